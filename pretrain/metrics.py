"""The rows of metrics.jsonl, the same in TensorBoard, and the line beside the progress bar."""

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from peerlearn.runs.score_names import score_name
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.terms import Terms, objective

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from pretrain.state import Training

# Fields that a run and its resumed twin may differ in carry one of these in their names, or are "attempt".
CLOCK_WORDS = ("seconds", "per_second", "memory")

logger = logging.getLogger(__name__)


class MetricsLog:
    """Builds rows on every rank and writes them on the main one; knows the clock and how far this attempt has come.

    Attributes:
        attempt: which start of the run this is, counted from 1.
        text: a short summary of the latest row.
    """

    def __init__(self, training: "Training", *, attempt: int) -> None:
        self.attempt = attempt
        self.text = ""
        self._run = training.run
        self._writes = training.ranks.main
        self._steps_per_epoch = training.steps_per_epoch
        self._batch_size = training.config.batch_size
        self._start = self._last = time.monotonic()
        self._last_step = training.step
        self._board = _open_board(training) if self._writes else None

    def losses(self, step: int, terms: Terms, config: PretrainConfig) -> dict[str, float]:
        """The loss, every network's own terms and the rate since the last row, from (M,) vectors."""
        total = objective(terms, config)
        values = torch.cat([total.view(1), *terms]).tolist()
        row = {"loss": values.pop(0), "images_per_second": self._rate(step)}
        for name, term in zip(terms._fields, terms, strict=True):
            for m in range(len(term)):
                row[score_name(m, name)] = values.pop(0)
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add the step and the clock to a row, and write it."""
        epoch = step / self._steps_per_epoch
        header: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 3),
            "attempt": self.attempt,
        }
        if self._writes:
            self._run.append_metrics(header | row)
            self._show(step, row)
        if "loss" in row:
            rate = row["images_per_second"]
            self.text = f"epoch {epoch:.2f}  loss {row['loss']:.3f}  {rate:,.0f} images/s"
        # What the monitor and the writing took is no training time.
        self._last, self._last_step = time.monotonic(), step

    def _show(self, step: int, row: dict[str, float]) -> None:
        """Tell TensorBoard, whose failures (a full disk) must not end training."""
        if self._board is None:
            return
        try:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        except Exception as error:
            logger.warning("TensorBoard is off from step %d on: %s", step, error)
            self._board = None

    def _rate(self, step: int) -> float:
        images = (step - self._last_step) * self._batch_size
        return round(images / (time.monotonic() - self._last), 1)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            # Its thread hands on whatever a full disk made of it.
            with contextlib.suppress(Exception):
                self._board.close()


def _open_board(training: "Training") -> "SummaryWriter | None":
    from torch.utils.tensorboard import SummaryWriter

    purged = training.step + 1 if training.step else 0
    try:
        return SummaryWriter(training.run.tensorboard, purge_step=purged)
    except OSError as error:
        logger.warning("TensorBoard is off: %s", error)
        return None


def gradient_norms(cohort: Cohort) -> dict[str, float]:
    """The norm of every network's gradient, with its head and classifier, shared stages counted in each.

    The terms are sums over networks and pairs, so their scale grows with M; this shows by how much.
    """
    norms = []
    for m in range(len(cohort.backbones)):
        parameters = (p for _, part in cohort.parts(m) for p in part.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    return {
        score_name(m, "gradient_norm"): norm for m, norm in enumerate(torch.stack(norms).tolist())
    }
