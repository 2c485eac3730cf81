"""Progress of long work: a bar on a terminal, elsewhere a plain line every ten seconds. Both name the work."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peerlearn.runs import terminal

_PLAIN_INTERVAL_SECONDS = 10.0
# A short piece of work shows no bar.
_BAR_AFTER_SECONDS = 1.0
_BAR_WIDTH = 20

logger = logging.getLogger(__name__)


class TimeLeft:
    """How long work still takes, from how long its units and the pauses between them took.

    The first unit is not counted: it warms up.
    """

    def __init__(self, done: int, now: float) -> None:
        self._at_start, self._done = done, done
        self._begun, self._paused, self._pauses = now, 0.0, 0
        self._warm: tuple[int, float] | None = None

    def advance(self, done: int, now: float) -> None:
        """So many units are done."""
        if self._warm is None:
            self._warm = (done, now - self._paused)
        self._done = done

    def pause(self, seconds: float) -> None:
        """A pause between two units took so long."""
        self._paused += seconds
        self._pauses += 1

    def seconds(self, units: int, pauses: int, now: float) -> float | None:
        """The seconds that so many further units and pauses take; None while nothing is known."""
        if self._warm is None:
            return None
        done, since = self._warm
        if self._done > done:
            each = (now - self._paused - since) / (self._done - done)
        elif self._done > self._at_start:
            each = (now - self._paused - self._begun) / (self._done - self._at_start)
        else:
            return None
        pause = self._paused / self._pauses if self._pauses else 0.0
        return units * each + pauses * pause


class Reporter:
    """Counts the work that is done; `progress` makes it.

    Attributes:
        pauses_left: gives the number of pauses to come at a number of units done.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        name: str,
        done: int,
        console: Console | None,
        quiet: bool,
        pauses_left: Callable[[int], int],
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._name, self._unit, self._text = name, unit, ""
        self._total, self._done = total, done
        self._phase: tuple[str, int, int] | None = None
        self._pauses_left = pauses_left
        self._start = self._last_line = time.monotonic()
        self._left = TimeLeft(done, self._start)
        self._live: Live | None = None

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Count ``amount`` more units as done and show ``text`` beside the count."""
        self._done += amount
        self._text = text
        self._left.advance(self._done, time.monotonic())
        self._show()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A pause between two units, whose time is no unit's."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._left.pause(time.monotonic() - begun)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show that a part of the work is done now: ``measuring 3,000 of 15,000 images``."""
        outer = self._phase

        def advance(images: int) -> None:
            assert self._phase is not None
            self._phase = (name, self._phase[1] + images, total)
            self._show()

        self._phase = (name, 0, total)
        self._show()
        try:
            yield advance
        finally:
            self._phase = outer

    def say(self, line: str) -> None:
        """Print a line that stays on the screen, and log it."""
        if self._quiet:
            return
        logger.info("%s", line)
        if self._console:
            self._console.print(line, highlight=False, markup=False)
            return
        print(line, flush=True)

    def close(self) -> None:
        """Leave the bar on the screen as it is now."""
        if self._live:
            self._live.stop()
            terminal.bar_lines = 0

    def _show(self) -> None:
        now = time.monotonic()
        if self._console:
            if self._live is None and now - self._start >= _BAR_AFTER_SECONDS:
                self._live = Live(get_renderable=self._bar, console=self._console)
                self._live.start()
            return
        if now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            self.say("  ".join(filter(None, (self._head(), self._text, self._times()))))

    def _head(self) -> str:
        name, done, total = self._phase or (self._name, self._done, self._total)
        unit = "images" if self._phase else self._unit
        return f"{name} {done:,} of {total:,} {unit}"

    def _times(self) -> str:
        now = time.monotonic()
        pauses = self._pauses_left(self._done)
        left = self._left.seconds(self._total - self._done, pauses, now)
        return f"{time_text(now - self._start)}, {'?' if left is None else time_text(left)} left"

    def _bar(self) -> RenderableType:
        _, done, total = self._phase or ("", self._done, self._total)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=max(total, 1), completed=done, width=_BAR_WIDTH),
            Text(f"{self._head()}  {self._times()}"),
        )
        whole = Group(head, Text(self._text)) if self._text else Group(head)
        assert self._console is not None
        # For lines that a signal's handler writes.
        terminal.bar_lines = len(self._console.render_lines(whole, pad=False))
        return whole


# Of the pieces of work that go on now, the innermost last.
_reporters: list[Reporter] = []


@contextmanager
def progress(
    total: int,
    unit: str,
    *,
    name: str,
    done: int = 0,
    quiet: bool = False,
    pauses_left: Callable[[int], int] = lambda done: 0,
) -> Iterator[Reporter]:
    """Report the progress of long work.

    Args:
        total: number of units of work.
        unit: name of the units.
        name: name of the work, such as training.
        done: number of units that are done already.
        quiet: whether to print nothing.
        pauses_left: function from the number of units done to the number of `Reporter.pause` to come.
    """
    console = Console()
    reporter = Reporter(
        total,
        unit,
        name=name,
        done=done,
        console=None if quiet or not console.is_terminal else console,
        quiet=quiet,
        pauses_left=pauses_left,
    )
    _reporters.append(reporter)
    try:
        yield reporter
    finally:
        _reporters.remove(reporter)
        reporter.close()


@contextmanager
def phase(name: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A part of whatever work is reported now, or else work of its own, on so many images.

    Args:
        name: name of the part, such as measuring.
        total: number of images.
        quiet: whether to print nothing where no other work is reported.

    Yields:
        A function that is told the number of further images done.
    """
    if _reporters:
        with _reporters[-1].phase(name, total) as advance:
            yield advance
    else:
        with progress(total, "images", name=name, quiet=quiet) as reporter:
            yield reporter.advance


def time_text(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
