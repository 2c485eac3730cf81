"""One process of a job on a node: it runs the command as a child and records how the child ended.

The child does not know SLURM. It sees RANK, WORLD_SIZE, MASTER_ADDR and similar variables. When it is told to stop, it
saves and exits with 75. The end of the batch script (`slurm.requeue`) then decides whether the job goes on.

`python -m slurm.job FOLDER` is one process of a job. Its task of the submission is that of the array.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peerlearn.errors import (
    DONE,
    FAILURE,
    SAVED_RUN_AGAIN,
    CrashError,
    UserError,
)
from peerlearn.exchange.mirror_process import HURRY_SECONDS, REST_SECONDS, MirrorProcess
from peerlearn.runs.files import write_text
from peerlearn.runs.heartbeat import read_step
from peerlearn.runs.launcher import FAULT_FILE, MACHINES, MEETING_SOCKET, USERS, module_words
from slurm.outcome import UNWRITTEN_CODES, Kind, Outcome, write_outcome
from slurm.submission import Submission, submission_to_run

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
# Nodes may start minutes apart.
_RENDEZVOUS_SECONDS = 600.0
# Below the ephemeral ports, which other programs' connections take at random.
_FIRST_PORT, _PORTS, _BACKLOG = 15000, 15000, 4096
_PR_SET_PDEATHSIG = 1
# The beginning of the line in which the command says why it ends.
_COMPLAINT = "peerlearn: "


@dataclass(frozen=True)
class Job:
    """One command of a submission. It holds only where to look.

    Attributes:
        folder: folder of the submission.
        task: number of the command in the submission.
    """

    folder: str
    task: int

    def __call__(self) -> int:
        """Run this process's part of the command.

        Returns:
            The command's exit code.

        Raises:
            UserError: another account could have changed what the job runs.
        """
        import submitit

        place = submitit.JobEnvironment()
        submission = submission_to_run(Path(self.folder))
        with _signals() as signals:
            return _Process(submission, self.task, place, signals).run().code


class _Signals:
    """Receives signals and passes them on to the child."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.child: subprocess.Popen[bytes] | None = None

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal: record it, and send it to the child, which may have had it from SLURM already."""
        self.received.add(number)
        if self.child is not None:
            self.child.send_signal(number)

    def watch(self, child: "subprocess.Popen[bytes]") -> None:
        """Pass signals on to this child: those to come, and those received before."""
        self.child = child
        for number in self.received:
            child.send_signal(number)


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Handle SIGTERM and SIGUSR2 here. submitit would ignore SIGTERM, and would requeue within the SIGUSR2 handler."""
    signals = _Signals()
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    earlier = {number: signal.signal(number, signals.receive) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class _Process:
    """One process of one start of a job."""

    def __init__(self, submission: Submission, task: int, place: Any, signals: _Signals) -> None:
        self.submission = submission
        self.task = task
        self.place = place
        self.signals = signals
        self.in_slurm = place.cluster == "slurm"
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.run_directory = submission.trained_run(task)
        self.complaint = self.last_line = ""
        self.mirror = self._mirror()
        name = f"fault-{task}-{self.restart}-{place.global_rank}"
        self.fault_file = submission.outcomes / name

    def run(self) -> Outcome:
        """Run the command and write its outcome. If SLURM is about to end the job, wait for that first."""
        attempt = self._newest_attempt()
        try:
            code = self._run_child()
        except CrashError as error:
            outcome = Outcome(kind="crashed", code=FAILURE, reason=str(error))
            print(outcome.reason, flush=True)
        else:
            if self.in_slurm and signal.SIGTERM in self.signals.received:
                self._end_mirror()
                self._hold()
            outcome = self._outcome(code, attempt_before=attempt)
        try:
            write_outcome(
                self.submission.folder,
                task=self.task,
                restart=self.restart,
                rank=self.place.global_rank,
                outcome=outcome,
            )
        except OSError:
            # The disk is full, which may be what ended the command. Only the exit code can tell the outcome.
            sys.exit(UNWRITTEN_CODES.get(outcome.kind, outcome.code))
        finally:
            self._end_mirror()
        return outcome

    def _mirror(self) -> MirrorProcess | None:
        """The mirror of a training, by its first process."""
        tracker = self.submission.config.mirror
        if tracker is None or self.run_directory is None or self.place.global_rank != 0:
            return None
        code = self.submission.code.resolve()
        return MirrorProcess(self.run_directory, tracker, code, in_child=_die_with_parent)

    def _end_mirror(self) -> None:
        if self.mirror is not None:
            seconds = HURRY_SECONDS if self.signals.received else REST_SECONDS
            if complaint := self.mirror.end(seconds):
                print(complaint, flush=True)
            self.mirror = None

    def _run_child(self) -> int:
        """Run the command, and return its exit code.

        Raises:
            CrashError: it cannot be started here and now.
        """
        words = self.submission.command(self.task)
        self.fault_file.unlink(missing_ok=True)
        with contextlib.ExitStack() as held:
            variables = self._variables(held)
            listening = int(variables.get(MEETING_SOCKET, "-1"))
            try:
                child = subprocess.Popen(
                    [*module_words(self.submission.code, "peerlearn"), *words],
                    cwd=self.submission.working_directory,
                    env=os.environ | variables,
                    stderr=subprocess.PIPE,
                    preexec_fn=_die_with_parent,
                    pass_fds=[listening] if listening >= 0 else [],
                )
            except OSError as error:
                raise CrashError(
                    f"{error.filename or sys.executable}: {error.strerror} on {socket.gethostname()}"
                ) from error
        self.signals.watch(child)
        assert child.stderr is not None
        reader = threading.Thread(target=self._pass_on, args=(child.stderr,), daemon=True)
        reader.start()
        code = self._wait(child)
        # A process that the command left behind may hold the pipe open.
        reader.join(timeout=5)
        return code

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait for the command, and start its mirror once it trains."""
        while self.mirror is not None:
            self.mirror.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_LOOK_SECONDS)
        return child.wait()

    def _pass_on(self, stderr: IO[bytes]) -> None:
        """Pass the command's stderr on, and remember its last line and its last error message."""
        for line in stderr:
            os.write(2, line)
            text = line.decode(errors="replace").strip()
            self.last_line = text or self.last_line
            if text.startswith(_COMPLAINT):
                self.complaint = text.removeprefix(_COMPLAINT)

    def _hold(self) -> None:
        """Wait for the end after SIGTERM.

        The job was preempted, cancelled or requeued by hand. Only SLURM knows which. An exit now would look like a
        failure, and a requeue would revive a job that the user has cancelled. SIGKILL ends the wait. SIGUSR2 ends it
        too, if the SIGTERM had no consequence and the time limit comes near.
        """
        print("SIGTERM: waiting for SLURM to end this job", flush=True)
        while signal.SIGUSR2 not in self.signals.received:
            time.sleep(_POLL_SECONDS)

    def _variables(self, held: contextlib.ExitStack) -> dict[str, str]:
        """The variables for torch.distributed and its libraries. ``held`` keeps what they name until the child has it.

        Raises:
            CrashError: rank 0 gives no address.
        """
        place = self.place
        variables = {
            "RANK": str(place.global_rank),
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(place.num_tasks),
            "LOCAL_WORLD_SIZE": str(place.num_tasks // place.num_nodes),
        }
        if place.num_tasks > 1:
            variables |= self._rendezvous(held)
        variables[FAULT_FILE] = str(self.fault_file)
        traces = self.submission.outcomes / f"nccl-{self.task}-{self.restart}-rank-"
        defaults = {
            "OMP_NUM_THREADS": str(self.submission.config.cpus_per_task),
            # NCCL's flight recorder: at a timeout the last collectives of every rank are written beside the outcomes.
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": str(traces),
        }
        return {k: v for k, v in defaults.items() if k not in os.environ} | variables

    def _rendezvous(self, held: contextlib.ExitStack) -> dict[str, str]:
        """The address at which the processes meet. Rank 0 listens there already, and tells the others by a file."""
        place = self.place
        name = f"rendezvous-{place.job_id}-{self.restart}.json"
        file = self.submission.outcomes / name
        if place.global_rank == 0:
            listening = held.enter_context(listen(place.job_id, self.restart))
            meeting = {
                "MASTER_ADDR": os.environ.get("MASTER_ADDR") or socket.gethostname(),
                "MASTER_PORT": str(listening.getsockname()[1]),
            }
            write_text(file, json.dumps(meeting) + "\n")
            return {**meeting, MEETING_SOCKET: str(listening.fileno())}
        deadline = time.monotonic() + _RENDEZVOUS_SECONDS
        while not file.exists():
            if time.monotonic() > deadline:
                raise CrashError(
                    f"rank {place.global_rank} on {socket.gethostname()}: rank 0 gave no address for "
                    f"{_RENDEZVOUS_SECONDS:.0f} s ({file})"
                )
            # A listing of the folder makes network file systems look again.
            os.listdir(file.parent)
            time.sleep(_POLL_SECONDS)
        return {**json.loads(file.read_text()), MEETING_SOCKET: "-1"}

    def _newest_attempt(self) -> int:
        return self.run_directory.newest_attempt() if self.run_directory else 0

    def _outcome(self, code: int, *, attempt_before: int) -> Outcome:
        step, events = None, []
        attempt = self._newest_attempt()
        if self.run_directory and attempt > attempt_before:
            step = read_step(self.run_directory.logs(attempt))
            events = [e for e in self.run_directory.events() if e.get("attempt") == attempt]
        if code == DONE:
            return Outcome(kind="done", code=code, reason="done", step=step)
        if code in (SAVED_RUN_AGAIN, -signal.SIGUSR2):
            # Killed by the signal before it could handle it: there was nothing to save yet.
            return Outcome(kind="saved", code=code, reason="told to stop in time", step=step)
        told = signal.SIGUSR2 in self.signals.received
        if told and code == FAILURE and self.run_directory is None:
            # What does not train saves nothing, and says so by 1: it starts again.
            return Outcome(kind="saved", code=code, reason="told to stop in time", step=None)
        if code < 0:
            name = signal.Signals(-code).name
            return Outcome(kind="crashed", code=code, reason=f"died of {name}", step=step)
        failures = [event for event in events if event["event"] == "failed"]
        kinds = {event.get("kind") for event in failures}
        reason = failures[-1]["reason"] if failures else self.complaint
        machines = "user" not in kinds if failures else self._fault() == MACHINES
        kind: Kind = "crashed" if machines else "failed"
        where = f"it exited with {code} on {socket.gethostname()}"
        reason = reason or (f"{where}: {self.last_line}" if self.last_line else where)
        return Outcome(kind=kind, code=code, reason=reason, step=step)

    def _fault(self) -> str:
        """Whose fault the failure of the command was. A command that could not say was ended by its machine."""
        with contextlib.suppress(OSError):
            return self.fault_file.read_text()
        return USERS if self.complaint else MACHINES


def listen(job: str, restart: int) -> socket.socket:
    """A socket that listens on a free TCP port of this machine.

    Every job and every start tries other ports first, so that a late process of an earlier start cannot join.

    Raises:
        CrashError: no port is free.
    """
    digits = int("".join(filter(str.isdigit, job)) or 0)
    first = digits * 13 + restart * 101
    for offset in range(_PORTS):
        port = _FIRST_PORT + (first + offset) % _PORTS
        try:
            return socket.create_server(("", port), backlog=_BACKLOG)
        except OSError:
            continue
    last = _FIRST_PORT + _PORTS - 1
    raise CrashError(f"no port from {_FIRST_PORT} to {last} is free on {socket.gethostname()}")


def _die_with_parent() -> None:
    """Have the kernel kill the command if this process is killed. Runs between fork and exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: str) -> int:
    """Run this process's part of a job.

    Returns:
        The exit code.
    """
    os.environ["SUBMITIT_FOLDER"] = folder
    try:
        code = Job(folder, int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")))()
    except UserError as error:
        print(f"{_COMPLAINT}{error}", file=sys.stderr, flush=True)
        return FAILURE
    return FAILURE if code else DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
