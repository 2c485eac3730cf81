"""Which start of a run did which step, by its events. A later start does the steps after its save anew."""

from typing import Any, NamedTuple

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.heartbeat import read_step
from peerlearn.runs.step_folders import step_folders


class Stretch(NamedTuple):
    """Consecutive steps that one start of the run did, and no later start anew.

    Attributes:
        begins: number of steps done before them.
        attempt: number of the start.
        epochs: config's epochs at the time, by which the learning rate falls.
        processes: number of processes that trained.
        layout: which of them had which networks, where not all had all; else "".
    """

    begins: int
    attempt: int
    epochs: int
    processes: int
    layout: str = ""


def stretches(run: RunDirectory, *, epochs: int) -> list[Stretch]:
    """The stretches of a run, the newest first.

    Args:
        run: directory of the run.
        epochs: number of epochs in its config now. Later starts may have asked for more than earlier ones.

    Raises:
        UserError: the events tell of no start.
    """
    found: list[Stretch] = []
    for event in reversed(list(run.events("started", "config_changed"))):
        if event["event"] == "config_changed":
            # Written just before the start that changed it.
            epochs, _ = event["changes"].get("epochs", (epochs, None))
        elif not found or event["step"] < found[-1].begins:
            # Starts of earlier versions tell no layout.
            told = (event["attempt"], epochs, event["processes"], event.get("layout", ""))
            found.append(Stretch(event["step"], *told))
    if not found:
        raise UserError(f"{run.root}: no training has started there: {run.event_log} tells of none")
    return found


def stretch_of(found: list[Stretch], step: int) -> Stretch:
    """The stretch of a step, counted from 1."""
    return next((each for each in found if each.begins < step), found[-1])


def last_step_begun(run: RunDirectory) -> int:
    """The number of the furthest step that any start has begun, counted from 1; 0 before the first."""
    steps = [row["step"] for row in run.metric_rows()]
    steps += [step for step, _ in step_folders(run.checkpoints)]
    begun = [read_step(run.logs(attempt)) for attempt in run.attempt_numbers()]
    return max([*steps, *(step + 1 for step in begun if step is not None)], default=0)


def skips(run: RunDirectory, step: int) -> tuple[list[dict[str, Any]], bool]:
    """How often a step, counted from 1, was skipped.

    Returns:
        Its events `step_skipped`, and whether the run as it stands now skipped the step: it may have been done again
        since, by a later start or after the run went back to a save.
    """
    skipped: list[dict[str, Any]] = []
    stands = False
    for event in run.events("started", "rolled_back", "step_skipped"):
        if event["event"] == "step_skipped":
            if event["step"] == step - 1:
                skipped.append(event)
                stands = True
        elif event["step"] < step:
            # From here on the step is done anew.
            stands = False
    return skipped, stands
