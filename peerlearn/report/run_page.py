"""The sections of a page about runs."""

from collections.abc import Sequence

from peerlearn.report.config_parts import config_section
from peerlearn.report.curves import curve_sections
from peerlearn.report.environment_parts import environment_section
from peerlearn.report.event_parts import event_section
from peerlearn.report.parts import Paragraph, Section
from peerlearn.report.result_pictures import picture_section
from peerlearn.report.run_facts import RunFacts, read_facts
from peerlearn.report.score_parts import score_section
from peerlearn.report.standing_parts import problem_section, standing_section
from peerlearn.runs.directory import RunDirectory

# Images of more runs would make a page too large for a mail.
_MOST_IMAGE_RUNS = 10


def run_sections(runs: Sequence[RunDirectory], *, images: bool = False) -> list[Section]:
    """All that is told of the runs.

    Args:
        runs: run directories, at least one.
        images: whether images are shown, which takes the data and the networks of the runs.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    facts = read_facts(runs)
    return sections_of(facts) + (_image_sections(facts) if images else [])


def _image_sections(facts: Sequence[RunFacts]) -> list[Section]:
    # Imported here: a page without images should not wait for torch.
    from peerlearn.report.images import image_section

    sections = [
        image_section(each.run, label=each.label, anchor=f"images-{number}")
        for number, each in enumerate(facts[:_MOST_IMAGE_RUNS], start=1)
    ]
    if len(facts) > _MOST_IMAGE_RUNS:
        text = f"Images are shown of the first {_MOST_IMAGE_RUNS} of {len(facts)} runs."
        sections.append(
            Section(anchor="images-more", title="More images", parts=(Paragraph(text=text),))
        )
    return sections


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
