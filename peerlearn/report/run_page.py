"""The sections of a page about runs."""

from collections.abc import Sequence

from peerlearn.report.config_parts import config_section
from peerlearn.report.curves import curve_sections
from peerlearn.report.environment_parts import environment_section
from peerlearn.report.event_parts import event_section
from peerlearn.report.parts import Section
from peerlearn.report.result_pictures import picture_section
from peerlearn.report.run_facts import RunFacts, read_facts
from peerlearn.report.score_parts import score_section
from peerlearn.report.standing_parts import problem_section, standing_section
from peerlearn.runs.directory import RunDirectory


def run_sections(runs: Sequence[RunDirectory], *, images: bool = False) -> list[Section]:
    """All that is told of the runs.

    Args:
        runs: run directories, at least one.
        images: whether images are shown, which takes the data and the networks of the runs.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    return sections_of(read_facts(runs))


def sections_of(facts: Sequence[RunFacts]) -> list[Section]:
    """The sections about runs whose facts were read. Some may be empty."""
    return [
        standing_section(facts),
        problem_section(facts),
        score_section(facts),
        *curve_sections(facts),
        picture_section(facts),
        config_section(facts),
        event_section(facts),
        environment_section(facts),
    ]
