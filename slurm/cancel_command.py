"""`peerlearn cancel`: end the jobs of runs."""

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from peerlearn.arguments import ArgumentParser
from peerlearn.errors import UserError
from peerlearn.run_dir import now_text
from slurm.client import JobState, call
from slurm.running import states_of
from slurm.status import CANCELLED_FILE, Record, find_runs, living_owner, records_of


def main(argv: Sequence[str]) -> int:
    """`peerlearn cancel RUN ...`. Returns the exit code."""
    parser = ArgumentParser(
        prog="peerlearn cancel",
        description="End all jobs of runs, those that train and those that evaluate, waiting or running. What runs is "
        "told to save first; `peerlearn resume` continues it. Example: peerlearn cancel runs/a",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run, or a folder that holds some: a sweep, a pipeline",
    )
    runs = find_runs(parser.parse_args(argv).runs)
    records = {run: records_of(run) for run in runs}
    # First those that need no Slurm.
    local = {run: [r for r in each if r["executor"] == "local"] for run, each in records.items()}
    found = {run: _cancel_local(run, each) for run, each in local.items()}
    slurm = [(run, r) for run, each in records.items() for r in each if r["executor"] == "slurm"]
    states = states_of([record for _, record in slurm])
    alive = [(run, r, s) for run, r in slurm if (s := states.get(r["job"])) is not None and s.live]
    if alive:
        call("scancel", *(record["job"] for _, record, _ in alive))
    for run, record, state in alive:
        found[run] = True
        _note(run, record, state)
    for run in runs:
        if not found[run]:
            print(f"{run}: nothing to cancel: {_why_nothing(run)}")
    return 0


def _cancel_local(run: Path, records: Sequence[Record]) -> bool:
    """Tell the live jobs on this machine to save and end; whether there are any."""
    found = False
    for record in records:
        if not states_of([record]):
            continue
        try:
            os.kill(int(record["job"]), signal.SIGTERM)
        except ProcessLookupError:
            continue
        except PermissionError as error:
            raise UserError(
                f"{run}: job {record['job']} is another user's, who alone can end it"
            ) from error
        _note(run, record, JobState(state="RUNNING"))
        found = True
    return found


def _why_nothing(run: Path) -> str:
    owner = living_owner(run)
    if owner is None:
        return "none of its jobs waits or runs"
    return (
        f"no job of this machine or of Slurm: stop process {owner['pid']} on {owner['host']} itself"
    )


def _note(run: Path, record: Record, state: JobState) -> None:
    """Say it, and leave it for `peerlearn status`."""
    was = state.state.lower()
    print(f"{run}: job {record['job']} ({record['verb']}, {was}) is told to end", flush=True)
    # A full disk keeps no job alive.
    with contextlib.suppress(OSError), (run / CANCELLED_FILE).open("a") as file:
        file.write(json.dumps({"job": record["job"], "time": now_text()}) + "\n")
