"""`peerlearn mirror RUN --follow` beside a training, which it cannot hurt: it is a process of its own."""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from peerlearn.exchange.run_news import FOLDER
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import open_no_link
from peerlearn.runs.launcher import module_words

# How long the rest may take to be sent once the training has ended; less where the machine is about to be taken.
REST_SECONDS, HURRY_SECONDS = 60.0, 10.0


class MirrorProcess:
    """The mirror of a run that is about to start, or to start again."""

    def __init__(
        self,
        run: RunDirectory,
        tracker: str,
        home: Path,
        in_child: Callable[[], None] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            run: the run.
            tracker: name of the tracker.
            home: folder of the program to run.
            in_child: function that is called in the new process before the program; None = none.
        """
        self._run = run
        self._tracker = tracker
        self._home = home
        self._in_child = in_child
        self._attempt = run.newest_attempt()
        self._process: subprocess.Popen[bytes] | None = None
        self._complaint = ""

    @property
    def _log(self) -> Path:
        return self._run.root / FOLDER / f"{self._tracker}.log"

    def look(self) -> None:
        """Start the mirror once the training has begun: before, a mark of the start before may tell of an end."""
        if self._process is not None or self._complaint:
            return
        try:
            if self._run.newest_attempt() > self._attempt:
                self._process = self._start()
        except OSError as error:
            self._complaint = error.strerror or type(error).__name__

    def _start(self) -> "subprocess.Popen[bytes]":
        words = ["mirror", str(self._run.root), "--to", self._tracker, "--follow"]
        self._log.parent.mkdir(exist_ok=True)
        with open(self._log, "ab", opener=open_no_link) as log:
            return subprocess.Popen(
                [*module_words(self._home, "peerlearn"), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._in_child,
            )

    def end(self, seconds: float) -> str:
        """Have the rest sent, and end the mirror.

        Args:
            seconds: longest time that it may take.

        Returns:
            A line that tells what failed; "" if all was sent.
        """
        self.look()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._complaint = f"it did not end within {seconds:.0f} s"
                process.kill()
                process.wait()
            else:
                self._complaint = _last_line(self._log) if process.returncode else ""
        if not self._complaint:
            return ""
        return (
            f"mirror to {self._tracker}: {self._complaint}; the run is not concerned: "
            f"`peerlearn mirror {self._run.root} --to {self._tracker}` sends the rest"
        )


def send_now(run: Path, tracker: str, home: Path, seconds: float) -> str:
    """Send what a run's mirror lacks. Returns a line that tells what failed; "" if all was sent."""
    words = [*module_words(home, "peerlearn"), "mirror", str(run), "--to", tracker]
    try:
        subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=seconds
        )
    except subprocess.CalledProcessError as error:
        return f"{run}: {error.stderr.decode(errors='replace').strip().rpartition(chr(10))[2]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{run}: {error}"
    return ""


def _last_line(log: Path) -> str:
    lines = [""]
    with suppress(OSError):
        lines += log.read_text(errors="replace").splitlines()
    return lines[-1].removeprefix("peerlearn: ")
