"""The rows of metrics.jsonl, their copy in TensorBoard, and the line beside the progress bar."""

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The fields in which a run and its resumed twin may differ: "attempt", and those with one of these in their names.
CLOCK_WORDS = ("seconds", "per_second", "memory")

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes the rows of a run on the main rank, with the clock and the rate of this attempt.

    Attributes:
        text: short summary of the latest row with a loss.
    """

    def __init__(
        self, run: RunDirectory, *, attempt: int, step: int, steps_per_epoch: int, writes: bool
    ) -> None:
        self.text = ""
        self._run = run
        self._attempt = attempt
        self._writes = writes
        self._steps_per_epoch = steps_per_epoch
        self._start = self._last = time.monotonic()
        self._last_step = step
        self._board = _open_board(run, step) if writes else None

    def images_per_second(self, step: int, batch_size: int) -> float:
        """The images per second since the last row, at ``batch_size`` images per step."""
        images = (step - self._last_step) * batch_size
        return round(images / (time.monotonic() - self._last), 1)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add the step and the clock to a row, and write it."""
        epoch = step / self._steps_per_epoch
        header = {
            "step": step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 3),
            "attempt": self._attempt,
        }
        if self._writes:
            self._run.append_metrics(header | row)
            self._show(step, row)
        if "loss" in row:
            rate = (
                f"  {row['images_per_second']:,.0f} images/s" if "images_per_second" in row else ""
            )
            self.text = f"epoch {epoch:.2f}  loss {row['loss']:.3f}{rate}"
        # The time of the monitor and of the writing is no training time.
        self._last, self._last_step = time.monotonic(), step

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
        """Write the rows that TensorBoard still holds."""
        if self._board is not None:
            # Its thread passes on any error that a full disk caused.
            with contextlib.suppress(Exception):
                self._board.close()


def _open_board(run: RunDirectory, step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run.tensorboard, purge_step=step + 1 if step else 0)
    except Exception as error:  # It and what it imports raise what they like.
        logger.warning("TensorBoard is off: %s", printable(str(error)) or type(error).__name__)
        return None
