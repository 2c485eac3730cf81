"""The sections of a page about a study: its tables and picture as `peerlearn table` wrote them, and its runs."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from peerlearn.report.failures import reason_text
from peerlearn.report.parts import Paragraph, Part, Picture, Section, Table
from peerlearn.report.result_pictures import data_url
from peerlearn.report.run_page import run_sections
from peerlearn.report.standing_parts import LONGEST_REASON
from peerlearn.report.study_tables import missing_table, score_tables
from peerlearn.runs.directory import STUDY_FILE, RunDirectory
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.registry import RegisteredRun, read_registry
from peerlearn.runs.text import listed, printable

# So many runs of a study are told of in full.
MOST_RUNS = 8
# Keys in which runs of one cell differ.
_OWN_KEYS = ("seed", "run")


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study."""
    return (folder / STUDY_FILE).is_file()


def study_sections(study: Path, *, images: bool = False) -> list[Section]:
    """All that is told of a study.

    Args:
        study: folder of the study.
        images: whether images of its runs are shown, which takes the data and the networks.

    Raises:
        UserError: the folder cannot be read.
    """
    runs = read_registry([study])
    chosen = _chosen(runs)
    return [
        Section(anchor="study", title="Study", parts=tuple(_study_parts(study, runs))),
        Section(
            anchor="study-runs", title="Runs of the study", parts=_run_parts(study, runs, chosen)
        ),
        *(
            run_sections([RunDirectory(Path(r.name)) for r in chosen], images=images)
            if chosen
            else []
        ),
    ]


def _study_parts(study: Path, runs: Sequence[RegisteredRun]) -> list[Part]:
    file = study / "table.json"
    renew = f"`peerlearn table {study}` writes it anew"
    try:
        content = read_json_object(file)
        parts = [*score_tables(content), *missing_table(content)]
    except FileNotFoundError:
        return [Paragraph(text=f"The study has no table yet: `peerlearn table {study}` writes it.")]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        return [Paragraph(text=f"{file.name} cannot be read ({reason}): {renew}.")]
    newer = _newer_results(file, runs)
    if newer:
        told = Paragraph(
            text=f"{newer} results are newer than {file.name}, and not in the tables: {renew}."
        )
        return [told, *parts, *_picture(study)]
    return [*parts, *_picture(study)]


def _newer_results(file: Path, runs: Sequence[RegisteredRun]) -> int:
    """The number of result files that were written after a file."""
    written = _written_ns(file)
    results = [
        result for run in runs for result in RunDirectory(Path(run.name)).results.glob("*.json")
    ]
    return sum(_written_ns(result) > written for result in results)


def _written_ns(file: Path) -> int:
    """When a file was written; 0 for one that has gone, or a link to nowhere."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _picture(study: Path) -> list[Part]:
    file = study / "table.png"
    try:
        url = data_url(file)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [Paragraph(text=f"{file.name} is not shown: {reason_text(error)}.")]
    return [
        Picture(
            image=Markup('<img alt="" src="{}">').format(url),
            caption="The tables as a picture: means with standard deviations over seeds; published figures are hollow.",
            alternative="Picture of the tables above, with the same numbers.",
        )
    ]


def _run_parts(
    study: Path, runs: Sequence[RegisteredRun], chosen: Sequence[RegisteredRun]
) -> tuple[Part, ...]:
    if not runs:
        return (Paragraph(text="No run has begun."),)
    names = {run.name: printable(str(Path(run.name).relative_to(study))) for run in runs}
    rows = tuple(
        (names[run.name], run.state, run.step, run.reason and printable(run.reason, LONGEST_REASON))
        for run in runs
    )
    table = Table(
        caption="How each run stands.",
        headings=("run", "state", "step", "reason"),
        rows=rows,
        is_folded=len(rows) > 2 * MOST_RUNS,
    )
    if len(chosen) == len(runs):
        return (table,)
    which = listed([names[run.name] for run in chosen])
    told = (
        f"What follows is of {len(chosen)} of {len(runs):,} runs: of each config one, up to {MOST_RUNS}, since more "
        f"curves could not be told apart. They are {which}. `peerlearn report RUN ...` shows others."
    )
    return Paragraph(text=told), table


def _chosen(runs: Sequence[RegisteredRun]) -> list[RegisteredRun]:
    """All runs where they are few; else the first run of each config, the first of these."""
    if len(runs) <= MOST_RUNS:
        return list(runs)
    first: dict[str, RegisteredRun] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in _OWN_KEYS}
        first.setdefault(repr(sorted(config.items(), key=repr)), run)
    return list(first.values())[:MOST_RUNS]
