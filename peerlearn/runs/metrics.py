"""The rows of metrics.jsonl, their copy in TensorBoard, the standing, and the line beside the progress bar."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import read_json_lines
from peerlearn.runs.score_names import PIXELS, TOP1, parse_score_name
from peerlearn.runs.standing import StandingLog
from peerlearn.runs.text import printable
from peerlearn.runs.usage import usage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The fields in which a run and its resumed twin may differ: "attempt", and those with one of these in their names.
CLOCK_WORDS = ("seconds", "per_second", "memory", "data_wait")

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes the rows of a run on the main rank, with the clock and the rate of this attempt.

    Attributes:
        loss_text: epoch, losses and rate of the latest row that has a loss.
        text: the same and the newest accuracies, short.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        attempt: int,
        step: int,
        steps_per_epoch: int,
        total_steps: int,
        writes: bool,
    ) -> None:
        self.loss_text = ""
        self._accuracy_text = ""
        self._run = run
        self._attempt = attempt
        self._steps_per_epoch = steps_per_epoch
        self._start = self._last = time.monotonic()
        self._cpu_start = time.process_time()
        self._last_step = step
        self._waited_seconds = 0.0
        self._board = _open_board(run, step) if writes else None
        self._standing: StandingLog | None = None
        if writes:
            # A resumed run has cut the rows after its step.
            earlier = read_json_lines(run.metrics)
            self._standing = StandingLog(
                run.logs(attempt), earlier, step=step, total_steps=total_steps
            )

    def pace(self, step: int, batch_size: int) -> dict[str, float]:
        """The rate since the last row, for the next: at ``batch_size`` images per step the images per second, and the
        share of the time, in percent, in which the loop has waited for its batches.
        """
        seconds = time.monotonic() - self._last
        images = (step - self._last_step) * batch_size
        return {
            "images_per_second": round(images / seconds, 1),
            "data_wait_percent": round(100 * self._waited_seconds / seconds, 1),
        }

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, the loop waits for its next batch."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._waited_seconds += time.monotonic() - begun

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add the step and the clock to a row, and write it."""
        epoch = step / self._steps_per_epoch
        header = {
            "step": step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 3),
            "attempt": self._attempt,
            **usage(self._cpu_start),
        }
        if self._standing is not None:
            self._run.append_metrics(header | row)
            self._standing.add(header | row)
            self._show(step, row)
        if "loss" in row:
            self.loss_text = f"epoch {epoch:.2f}  loss {row['loss']:.3f}{_of_each(row)}{_pace(row)}"
        self._accuracy_text = _accuracies(row) or self._accuracy_text
        # The time of the monitor and of the writing is no training time.
        self._last, self._last_step, self._waited_seconds = time.monotonic(), step, 0.0

    @property
    def text(self) -> str:
        return "  ".join(filter(None, (self.loss_text, self._accuracy_text)))

    def _show(self, step: int, row: dict[str, Any]) -> None:
        """Pass the row to TensorBoard, whose failures (a full disk) must not end training."""
        if self._board is None:
            return
        try:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        except Exception as error:
            reason = printable(str(error)) or type(error).__name__
            logger.warning("TensorBoard is off from step %d on: %s", step, reason)
            self._board = None

    def close(self) -> None:
        """Write how the run stands, and the rows that TensorBoard still holds."""
        if self._standing is not None:
            self._standing.write()
        if self._board is not None:
            # Its thread passes on any error that a full disk caused.
            with contextlib.suppress(Exception):
                self._board.close()


def _of_each(row: Mapping[str, Any]) -> str:
    """The loss of each network, where there are several: `` (5.102, 5.217)``."""
    names = {key: parse_score_name(key) for key in row}
    losses = [row[key] for key, name in names.items() if name and name.figure == "loss"]
    return f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""


def _pace(row: Mapping[str, Any]) -> str:
    """How fast it goes: ``  512 images/s, 3 % waiting for data``; "" where the row does not tell."""
    if "images_per_second" not in row:
        return ""
    waits = (
        f", {row['data_wait_percent']:.0f} % waiting for data" if "data_wait_percent" in row else ""
    )
    return f"  {row['images_per_second']:,.0f} images/s{waits}"


def _accuracies(row: Mapping[str, Any]) -> str:
    """The first kind of accuracies in a row: ``kNN 70.1, 71.3, ensemble 72.0 %``; "" where it has none."""
    names = {key: parse_score_name(key) for key in row}
    top1 = {name: row[key] for key, name in names.items() if name and name.figure.endswith(TOP1)}
    top1 = {name: value for name, value in top1.items() if name.network != PIXELS}
    if not top1:
        return ""
    first = next(iter(top1)).figure
    kind = first.removesuffix(TOP1).replace("knn", "kNN")
    each = ", ".join(
        f"{'' if name.network.isdecimal() else name.network + ' '}{value:.1f}"
        for name, value in top1.items()
        if name.figure == first
    )
    return f"{kind} {each} %"


def _open_board(run: RunDirectory, step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run.tensorboard, purge_step=step + 1 if step else 0)
    except Exception as error:  # It and what it imports raise what they like.
        logger.warning("TensorBoard is off: %s", printable(str(error)) or type(error).__name__)
        return None
