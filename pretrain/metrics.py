"""The rows of metrics.jsonl, the same in TensorBoard, and the line beside the progress bar."""

import time
from typing import Any

import torch

from peerlearn.run_dir import RunDirectory
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.losses import MCLTerms
from pretrain.methods import objective

# Fields that a run and its resumed twin may differ in carry one of these in their names, or are "attempt".
CLOCK_WORDS = ("seconds", "per_second", "memory")


class MetricsLog:
    """Writes rows; knows the clock and how far this attempt has come.

    Attributes:
        text: a short summary of the latest row.
    """

    def __init__(
        self, run: RunDirectory, *, attempt: int, step: int, steps_per_epoch: int, batch_size: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.text = ""
        self._run = run
        self._attempt = attempt
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._start = self._last = time.monotonic()
        self._last_step = step
        self._board = SummaryWriter(run.root / "tb", purge_step=step + 1 if step else 0)

    def losses(self, step: int, terms: MCLTerms, config: PretrainConfig) -> dict[str, float]:
        """The loss, every network's own terms and the rate since the last row, from four (M,) vectors."""
        total = objective(terms, config)
        values = torch.cat([total.view(1), *terms]).tolist()
        row = {"loss": values.pop(0), "images_per_second": self._rate(step)}
        networks = len(terms.scl_hard)
        for name in terms._fields:
            for m in range(networks):
                row[f"net/{m}/{name}"] = values.pop(0)
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add the step and the clock to a row, and write it."""
        epoch = step / self._steps_per_epoch
        header: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 3),
            "attempt": self._attempt,
        }
        self._run.append_metrics(header | row)
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        if "loss" in row:
            rate = row["images_per_second"]
            self.text = f"epoch {epoch:.2f}  loss {row['loss']:.3f}  {rate:,.0f} images/s"
        # What the monitor and the writing took is no training time.
        self._last, self._last_step = time.monotonic(), step

    def _rate(self, step: int) -> float:
        images = (step - self._last_step) * self._batch_size
        return round(images / (time.monotonic() - self._last), 1)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        self._board.close()


def gradient_norms(cohort: Cohort) -> dict[str, float]:
    """The norm of every network's gradient, backbone and head, shared stages counted in each.

    The terms are sums over networks and pairs, so their scale grows with M; this shows by how much.
    """
    norms = []
    for backbone, head in zip(cohort.backbones, cohort.heads, strict=True):
        gradients = [
            p.grad for p in (*backbone.parameters(), *head.parameters()) if p.grad is not None
        ]
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    return {f"net/{m}/gradient_norm": norm for m, norm in enumerate(torch.stack(norms).tolist())}
