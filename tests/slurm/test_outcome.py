"""What is made of the end of a start."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.outcome import Outcome, decide, read_outcomes, whole_outcome, write_outcome


def outcome(kind: str, *, code: int = 1, step: int | None = None, reason: str = "why") -> Outcome:
    return Outcome(kind=kind, code=code, reason=reason, step=step)


def line(kind: str, step: int | None = None, cause: str = "why", nodes: str = "n2") -> dict:
    return {"kind": kind, "step": step, "cause": cause, "nodes": nodes}


@pytest.mark.parametrize(
    ("ranks", "code", "kind", "reason"),
    [
        # The step ended well, whatever files an earlier start of another number left.
        ({0: outcome("done", code=0)}, 0, "done", "done"),
        # Both saved; srun then counts the one that was cut off.
        ({0: outcome("saved", code=75), 1: outcome("saved", code=75)}, 137, "saved", "rank 0: why"),
        # One saved with all others before the other died.
        ({0: outcome("saved", code=75), 1: outcome("crashed", code=-9)}, 137, "saved", "rank 0: why"),
        # Who died by itself is named, not who lost it.
        (
            {0: outcome("crashed", reason="rank 1 died"), 1: outcome("crashed", code=-9, reason="SIGKILL")},
            1,
            "crashed",
            "rank 1: SIGKILL",
        ),
        # A crash anywhere outweighs the user errors that it may have caused elsewhere.
        ({0: outcome("failed"), 1: outcome("crashed", code=-11, reason="SIGSEGV")}, 1, "crashed", "rank 1: SIGSEGV"),
        ({0: outcome("failed", reason="no such key")}, 1, "failed", "rank 0: no such key"),
        # Nobody could say why: killed with all its processes.
        ({}, 137, "crashed", "srun ended with 137 and no process could say why"),
    ],
)  # fmt: skip
def test_of_all_processes(ranks: dict[int, Outcome], code: int, kind: str, reason: str) -> None:
    found = whole_outcome(ranks, code=code, processes=2)
    assert (found.kind, found.reason) == (kind, reason)


@pytest.mark.parametrize(
    ("now", "earlier", "decision", "reason"),
    [
        (outcome("done", code=0, reason="done"), [], "done", "done"),
        (outcome("failed"), [], "failed", "why"),
        (outcome("saved", step=9), [], "requeue", "why"),
        (outcome("crashed", step=9), [], "requeue", "why"),
        (outcome("crashed", step=9), [line("crashed", 5)], "requeue", "why"),
        (outcome("crashed", step=9), [line("crashed", 9)], "failed", "crashed twice in step 9: why"),
        # Saves in between do not make it another crash.
        (outcome("crashed", step=9), [line("crashed", 9), line("saved", 8)], "failed", "crashed twice in step 9: why"),
        # Start-up: alike on other nodes, it is the command's own fault; on the same, or by another cause, perhaps not.
        (outcome("crashed"), [line("crashed")], "failed", "crashed twice in start-up: why"),
        (outcome("crashed"), [line("crashed", nodes="n1")], "requeue", "why"),
        (outcome("crashed"), [line("crashed", cause="another")], "requeue", "why"),
        (
            outcome("crashed", reason="died (process 12 on n1)"),
            [line("crashed", cause="died (process 7 on n2)")],
            "failed",
            "crashed twice in start-up: died (process 12 on n1)",
        ),
        (outcome("crashed"), [line("crashed", nodes="n1")] * 2, "failed", "crashed 3 times, max_crashes is 2: why"),
        (
            outcome("crashed", step=9),
            [line("crashed", 1), line("saved", 4), line("crashed", 5)],
            "failed",
            "crashed 3 times, max_crashes is 2: why",
        ),
        # Told to stop again and again before it could do a step.
        (outcome("saved", step=3), [line("saved", 3)] * 2, "requeue", "why"),
        (
            outcome("saved", step=3),
            [line("saved", 3)] * 3,
            "failed",
            "4 starts in a row came no further than step 3: why",
        ),
        (outcome("saved", step=4), [line("saved", 3)] * 3, "requeue", "why"),
    ],
)  # fmt: skip
def test_decision(now: Outcome, earlier: list[dict], decision: str, reason: str) -> None:
    assert decide(now, earlier, max_crashes=2, nodes="n1") == (decision, reason)


def test_a_command_without_steps_is_told_to_stop_as_often_as_it_likes() -> None:
    now, earlier = outcome("saved"), [line("saved")] * 99
    assert decide(now, earlier, max_crashes=2, makes_steps=False)[0] == "requeue"
    assert decide(now, earlier, max_crashes=2)[0] == "failed"


@given(steps=st.lists(st.integers(0, 50), max_size=200), max_crashes=st.integers(0, 5))
def test_a_job_that_always_crashes_ends(steps: list[int], max_crashes: int) -> None:
    earlier: list[dict] = []
    for step in steps:
        decision, _ = decide(outcome("crashed", step=step), earlier, max_crashes=max_crashes)
        if decision == "failed":
            return
        earlier.append(line("crashed", step))
    assert len(steps) <= max_crashes


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=50))
def test_a_job_that_is_told_to_stop_and_comes_further_goes_on_for_ever(steps: list[int]) -> None:
    earlier: list[dict] = []
    for step in sorted(steps):
        assert decide(outcome("saved", step=step), earlier, max_crashes=0)[0] == "requeue"
        earlier.append(line("saved", step))


def test_a_damaged_outcome_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "outcomes").mkdir()
    whole = outcome("crashed", step=4)
    write_outcome(tmp_path, task=0, restart=1, rank=2, outcome=whole)
    folder = tmp_path / "outcomes"
    for rank, text in enumerate(["[" * 10_000, '{"kind": 5}'], start=3):
        (folder / f"0-1-{rank}.json").write_text(text)
    (folder / "0-1-5.json").write_text('{"kind": "odd", "code": 1, "reason": "", "step": 0}')
    (folder / "0-1-6.json").mkdir()
    assert read_outcomes(tmp_path, task=0, restart=1) == {2: whole}
