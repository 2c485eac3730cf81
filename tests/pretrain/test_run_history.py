"""Which start of a run did which step."""

import pytest

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from pretrain.run_history import Stretch, skips, stretch_of, stretches


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path)


def started(run: RunDirectory, attempt: int, step: int, processes: int = 1) -> None:
    run.event("started", attempt=attempt, step=step, total_steps=99, processes=processes)


def more_epochs(run: RunDirectory, before: int, after: int) -> None:
    run.event("config_changed", changes={"epochs": [before, after], "device": ["cpu", "auto"]})


def test_a_later_start_does_the_steps_after_its_save_anew(run):
    started(run, 1, 0)
    started(run, 2, 6, processes=2)
    started(run, 3, 9)
    # Killed before its first save: the fourth begins where the third did.
    started(run, 4, 9, processes=4)
    found = stretches(run, epochs=5)
    assert found == [Stretch(9, 4, 5, 4), Stretch(6, 2, 5, 2), Stretch(0, 1, 5, 1)]
    assert [stretch_of(found, step).attempt for step in (1, 6, 7, 9, 10)] == [1, 1, 2, 2, 4]
    # From the start: nothing of before counts.
    started(run, 5, 0)
    assert stretches(run, epochs=5) == [Stretch(0, 5, 5, 1)]


def test_each_stretch_has_the_epochs_of_its_time(run):
    started(run, 1, 0)
    more_epochs(run, 2, 4)
    started(run, 2, 12)
    # The same change once more, as the second start had not come to a save.
    more_epochs(run, 2, 4)
    started(run, 3, 12)
    more_epochs(run, 4, 6)
    started(run, 4, 20)
    assert stretches(run, epochs=6) == [
        Stretch(20, 4, 6, 1),
        Stretch(12, 3, 4, 1),
        Stretch(0, 1, 2, 1),
    ]


def test_a_run_that_never_started_is_told(run):
    with pytest.raises(UserError, match="no training has started there"):
        stretches(run, epochs=2)


def test_a_step_that_was_done_again_stands_as_it_was_done_last(run):
    started(run, 1, 0)
    for step in (7, 8):
        run.event("step_skipped", step=step, reason="once")
    assert [skips(run, step)[1] for step in (7, 8, 9)] == [False, True, True]
    run.event("rolled_back", step=8, before_step=8, reason="once")
    assert [skips(run, step)[1] for step in (8, 9)] == [True, False]
    run.event("step_skipped", step=8, reason="twice")
    events, stands = skips(run, 9)
    assert ([event["reason"] for event in events], stands) == (["once", "twice"], True)
