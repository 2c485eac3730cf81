"""The exports that a run has written or missed, by its events: folders alone tell nothing of one that is gone."""

import contextlib
from pathlib import Path

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.standing import integer
from peerlearn.runs.step_folders import BEST_FILE, best_step, latest_step, step_folders

EXPORTED = "exported"
MISSED = "export_missed"


def trained_networks(run: Path) -> int:
    """The number of networks that a run trains, by its config; 0 if it has not begun, or does not tell."""
    import yaml

    try:
        text = RunDirectory(run).config.read_text(encoding="utf-8")
        return int(yaml.safe_load(text)["cohort"]["networks"])
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        yaml.YAMLError,
    ):
        return 0


def export_log(run: RunDirectory) -> dict[int, str]:
    """The steps whose exports were written, with "", or missed, with the reason. Earlier versions noted the latter."""
    found = {}
    with contextlib.suppress(OSError):
        for event in run.events(EXPORTED, MISSED):
            step = integer(event.get("step"))
            if step is not None:
                missed = event["event"] == MISSED
                found[step] = str(event.get("reason") or "it does not say why") if missed else ""
    return found


def last_steps(run: RunDirectory) -> list[int]:
    """The steps of the last exports of a run, and of the best where validation chooses, whether or not they are there.

    `latest` names the last. Where it is missing or spoilt, the last step of a run that is done stands for it, else the
    newest folder.

    Raises:
        UserError: `best` is spoilt.
    """
    newest = latest_step(run.exports)
    if newest is None and run.done:
        newest = _newest(run, "done")
    if newest is None:
        newest = next((step for step, _ in step_folders(run.exports)), None)
    return [step for step in (newest, chosen_step(run)) if step is not None]


def chosen_step(run: RunDirectory) -> int | None:
    """The step that validation has chosen: what `best` names, or the events where it is missing; None without any.

    Raises:
        UserError: `best` is spoilt, and no event tells what it named.
    """
    step = best_step(run.exports)
    if step is None:
        step = _newest(run, EXPORTED, best=True)
    file = run.exports / BEST_FILE
    if step is None and file.exists():
        raise UserError(f"{file} names no step: restore it")
    return step


def _newest(run: RunDirectory, name: str, **facts: object) -> int | None:
    """The step of the newest event of that name with these facts."""
    events = []
    with contextlib.suppress(OSError):
        events = [each for each in run.events(name) if facts.items() <= each.items()]
    return integer(events[-1].get("step")) if events else None
