"""A study on this machine: runs and evaluations as processes, one after another or some side by side."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerlearn import HOME
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, UserError
from peerlearn.exchange.mirror_process import HURRY_SECONDS, REST_SECONDS, MirrorProcess
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import open_no_link
from peerlearn.runs.launcher import module_words
from peerlearn.runs.lock import living_owner
from peerlearn.runs.progress import Reporter, progress, time_text
from peerlearn.runs.standing import read_standing
from peerlearn.runs.stop import Stop
from studies.due import Jobs, Look, Ordered, Work, drop_bulk, failure_of, look, to_train
from studies.evaluations import read_outcome, write_failure, write_order
from studies.study import StudyRun, unwritable

_POLL_SECONDS = 0.2
THREADS = "OMP_NUM_THREADS"


@dataclass
class _Child:
    """A process that trains or measures.

    Attributes:
        title: what it does, in words.
        process: the process.
        begun: when it began, by this machine's monotonic clock.
        run: folder of the run.
        log: file with its output.
        ordered: the evaluation; None if it trains.
        told: whether it was told to stop.
        mirror: mirror of the run that it trains; None without one.
    """

    title: str
    process: subprocess.Popen[bytes]
    begun: float
    run: Path
    log: Path
    ordered: Ordered | None = None
    told: bool = False
    mirror: MirrorProcess | None = None


class Here:
    """Does the work of a study by processes of this machine.

    Attributes:
        whole: whether nothing was left to do at the end; False if a signal stopped the work.
    """

    def __init__(
        self,
        work: Work,
        runs: Sequence[StudyRun],
        config_of: Callable[[StudyRun], Path],
        *,
        at_once: int,
        again: bool,
        interval_seconds: float,
        mirror: str | None = None,
    ) -> None:
        self._mirror = mirror
        self._work = work
        self._runs = {run.folder: run for run in runs}
        self._config_of = config_of
        self._at_once = at_once
        self._again = again
        self._interval_seconds = interval_seconds
        self._children: list[_Child] = []
        # What this process has tried already is left as it is, however it ended.
        self._tried: set[Path] = set()
        self.whole = True

    def run(self, stop: Stop) -> Look:
        """Start and continue what is not done. A failure is printed and stops nothing else.

        Returns:
            What is found at the end.

        Raises:
            UserError: the folder cannot be written.
        """
        found = self._look()
        done = sum(map(found.is_over, self._work.runs))
        name = "study" if self._runs else "watch"
        with progress(len(self._work.runs), "runs", name=name, done=done) as reporter:
            try:
                while not self._over(found, stop):
                    self._start_due(found, stop)
                    self._wait(reporter, stop)
                    found = self._look()
                    over = sum(map(found.is_over, self._work.runs))
                    reporter.advance(over - done, self._now())
                    done = over
            finally:
                self._kill()
        return found

    def _look(self) -> Look:
        found = look(self._work, Jobs())
        drop_bulk(self._work, found)
        return found

    def _over(self, found: Look, stop: Stop) -> bool:
        if self._children:
            return False
        self.whole = next(self._due(found), None) is None and not found.goes_on
        return stop.requested or self.whole

    def _due(self, found: Look) -> Iterator[Ordered | StudyRun]:
        """What may be started: evaluations first, so that scores come early."""
        yield from (o for o in found.with_standing("due") if o.folder not in self._tried)
        for folder, run in self._runs.items():
            if folder not in self._tried and to_train(found.training[folder], again=self._again):
                yield run

    def _start_due(self, found: Look, stop: Stop) -> None:
        for each in self._due(found):
            if stop.requested or len(self._children) >= self._at_once:
                return
            self._start(each)

    def _start(self, each: Ordered | StudyRun) -> None:
        if isinstance(each, Ordered):
            folder = write_order(each.run, each.order)
            words, log, title = ["measure", str(folder)], folder / "log.txt", each.title
            run, place = each.run, folder
        else:
            # With its resolved config: later changes of a file that the study names do not change the run.
            words = ["pretrain", str(self._config_of(each)), *each.own_words, "--auto_resume"]
            log, title, run = each.log, f"{each.folder.name}: training", each.folder
            place = each.folder
        self._tried.add(place)
        mirror = None
        if self._mirror is not None and not isinstance(each, Ordered):
            mirror = MirrorProcess(RunDirectory(run), self._mirror, HOME)
        try:
            process = _spawn(words, log, variables_of_run(self._at_once))
        except OSError as error:
            raise unwritable(self._work.root, error) from error
        ordered = each if isinstance(each, Ordered) else None
        child = _Child(title, process, time.monotonic(), run, log, ordered, mirror=mirror)
        self._children.append(child)

    def _wait(self, reporter: Reporter, stop: Stop) -> None:
        """Wait until a process has ended, or until it is time for another look."""
        deadline = time.monotonic() + self._interval_seconds
        while time.monotonic() < deadline or stop.requested:
            for child in self._children if stop.requested else ():
                if not child.told:
                    child.process.terminate()
                    child.told = True
            for child in self._children:
                if child.mirror is not None:
                    child.mirror.look()
            ended = [child for child in self._children if child.process.poll() is not None]
            for child in ended:
                self._children.remove(child)
                reporter.say(self._end(child, stop))
                seconds = HURRY_SECONDS if stop.requested else REST_SECONDS
                if child.mirror is not None and (said := child.mirror.end(seconds)):
                    reporter.say(said)
            if ended or (stop.requested and not self._children):
                return
            if sys.stdout.isatty():
                reporter.advance(0, self._now())
            time.sleep(_POLL_SECONDS)

    def _end(self, child: _Child, stop: Stop) -> str:
        """The line that tells how a process ended."""
        code = child.process.returncode
        seconds = time_text(time.monotonic() - child.begun)
        if code == DONE:
            return f"{child.title}: done ({seconds})"
        place = child.ordered.folder if child.ordered else child.run
        if not stop.requested and living_owner(place):
            self._tried.discard(place)
            return f"{child.title}: another process does it"
        if code == SAVED_RUN_AGAIN or stop.requested:
            self._tried.discard(place)
            return f"{child.title}: stopped ({seconds})"
        reason = _last_complaint(child.log)
        if code < 0:
            reason = f"ended by {signal.Signals(-code).name}"
        if child.ordered is None:
            if RunDirectory(child.run).failed_mark.is_file():
                reason = failure_of(child.run)
        elif outcome := read_outcome(child.ordered.folder):
            reason = outcome.reason
        else:
            with contextlib.suppress(UserError):
                write_failure(child.ordered.folder, child.ordered.order, reason)
        return f"{child.title}: failed: {reason} ({seconds})"

    def _now(self) -> str:
        """What goes on now: ``base-seed-0: training, step 120``."""
        return "\n".join(
            child.title + ("" if child.ordered else _standing(child.run))
            for child in self._children
        )

    def _kill(self) -> None:
        for child in self._children:
            child.process.kill()
            child.process.wait()
            if child.mirror is not None:
                child.mirror.end(0)


def _standing(run: Path) -> str:
    """How a run stands: ``, step 120 of 400, 2:10 left``."""
    directory = RunDirectory(run)
    now = read_standing(directory.logs(directory.newest_attempt()))
    if now is None or now.step is None:
        return ""
    left = "" if now.seconds_left is None else f", {time_text(now.seconds_left)} left"
    return f", step {now.step:,} of {now.total_steps or 0:,}{left}"


def variables_of_run(at_once: int) -> dict[str, str]:
    """The environment of each of so many processes at once: its threads are its share of the cores, unless set."""
    return {THREADS: str(max(1, (os.cpu_count() or 1) // at_once)), **os.environ}


def _spawn(
    words: Sequence[str], log: Path, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own."""
    with open(log, "ab", opener=open_no_link) as output:
        return subprocess.Popen(
            [*module_words(HOME, "peerlearn"), *words],
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is this process's to hand on: once, and as what saves.
            start_new_session=True,
        )


def _last_complaint(log: Path) -> str:
    """The last error message in a log; the place of the log without one."""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = lines[-1] if lines else ""
        if said.startswith("peerlearn: "):
            return said.removeprefix("peerlearn: ")
    return f"see {log}"
