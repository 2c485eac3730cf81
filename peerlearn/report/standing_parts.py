"""How runs stand: state, steps, speed, heartbeat, notes; and what cannot be read of them."""

from collections.abc import Sequence

from peerlearn.report.parts import Cell, Paragraph, Part, Section
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.signs_of_life import state_text
from peerlearn.report.tables import filled_table
from peerlearn.runs.file_ages import FileAges
from peerlearn.runs.heartbeat import beat_file, read_beats
from peerlearn.runs.progress import time_text
from peerlearn.runs.standing import Standing, read_standing
from peerlearn.runs.text import printable

# Letters of why a run has failed.
LONGEST_REASON = 500


def standing_section(facts: Sequence[RunFacts]) -> Section:
    """How each run stands now, and what people have noted of it."""
    ages = FileAges()
    headings = (
        "run",
        "state",
        "step",
        "of steps",
        "epoch",
        "starts",
        "images/s",
        "time left",
        "heartbeat",
    )
    rows = tuple(_standing_row(each, ages) for each in facts)
    table = filled_table(
        caption="How each run stands. Images/s: over all processes, median of the last logged steps.",
        headings=headings,
        rows=rows,
    )
    parts: list[Part] = [table]
    for each in facts:
        if each.registered.reason is not None:
            parts.append(
                Paragraph(
                    text=f"{each.label} has failed: {printable(each.registered.reason, LONGEST_REASON)}"
                )
            )
    notes = _notes(facts)
    return Section(anchor="standing", title="Standing", parts=(*parts, *notes))


def _standing_row(facts: RunFacts, ages: FileAges) -> tuple[Cell, ...]:
    run, attempt = facts.run, facts.run.newest_attempt()
    standing = (attempt and read_standing(run.logs(attempt))) or Standing()
    is_running = facts.registered.state == "running"
    left = standing.seconds_left if is_running else None
    return (
        facts.label,
        state_text(run, facts.registered.state, attempt),
        facts.series.last_step if standing.step is None else standing.step,
        standing.total_steps,
        facts.series.last_epoch,
        attempt,
        standing.images_per_second,
        None if left is None else time_text(left),
        _heartbeat_text(facts, attempt, ages) if is_running else None,
    )


def _heartbeat_text(facts: RunFacts, attempt: int, ages: FileAges) -> str | None:
    """How long ago the rank that has been silent for longest gave a sign."""
    folder = facts.run.logs(attempt)
    found = [ages.age_seconds(beat_file(folder, beat.rank)) for beat in read_beats(folder)]
    known = [age for age in found if age is not None]
    return f"{max(known):.0f} s ago" if known else "unknown"


def _notes(facts: Sequence[RunFacts]) -> list[Part]:
    noted = [each for each in facts if each.registered.notes.texts or each.registered.notes.tags]
    if not noted:
        return []
    rows = tuple(
        (each.label, " ".join(f"#{tag}" for tag in notes.tags) or None, "\n".join(notes.texts))
        for each in noted
        for notes in [each.registered.notes]
    )
    return [
        filled_table(
            caption="Tags and notes that people gave.", headings=("run", "tags", "notes"), rows=rows
        )
    ]


def problem_section(facts: Sequence[RunFacts]) -> Section:
    """What cannot be read of the runs. It is empty where all is well."""
    rows = tuple((each.label, printable(problem)) for each in facts for problem in each.problems)
    table = filled_table(
        caption="What could not be read. The page shows the rest.",
        headings=("run", "problem"),
        rows=rows,
    )
    return Section(anchor="problems", title="Problems", parts=(table,) if rows else ())
