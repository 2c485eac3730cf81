"""Saving a training, and checking that the disk has room for it."""

import dataclasses
import logging
import shutil
import time
from typing import Any

from peerlearn.compute.guards import NonFiniteError, require_finite_weights
from peerlearn.compute.resumable import Resumable
from peerlearn.errors import UserError
from peerlearn.runs.checkpoint import drop_old_checkpoints, save_checkpoint, saved_steps
from peerlearn.runs.deadline import deadline
from peerlearn.runs.environment import environment
from peerlearn.runs.generators import generator_states

logger = logging.getLogger(__name__)


def save(training: Resumable, *, attempt: int) -> str | None:
    """Save everything that a later start needs to continue exactly. All ranks call it together.

    Args:
        training: training to save.
        attempt: number of this start of the run.

    Returns:
        The reason why the disk did not take the save, with the older saves unchanged; None if it did.

    Raises:
        NonFiniteError: a network holds NaN or Inf. Nothing is saved.
    """
    ranks, run, saves = training.ranks, training.run, training.saves
    _require_finite(training)
    tensors = training.whole_tensors()
    rng = {
        f"rank-{rank}.{name}": state
        for name, tensor in generator_states(ranks.device).items()
        for rank, state in enumerate(ranks.gather(tensor.to(ranks.device).unsqueeze(0)))
    }

    def write() -> str | None:
        start = time.monotonic()
        run.check_there()
        try:
            with deadline(
                saves.max_seconds, f"{run.checkpoints}: the save of step {training.step}"
            ):
                run.sync_metrics()
                save_checkpoint(
                    run.checkpoints,
                    training.step,
                    {**tensors, "rng": rng},
                    {**_state(training), "attempt": attempt},
                )
        except OSError as error:
            return error.strerror or str(error)
        run.event("saved", step=training.step, seconds=round(time.monotonic() - start, 3))
        drop_old_checkpoints(
            run.checkpoints,
            keep_last=saves.keep_last,
            keep_every_steps=saves.keep_every_steps,
        )
        return None

    return ranks.from_main(write)


def _require_finite(training: Resumable) -> None:
    """`require_finite_weights` on all ranks: each may hold other networks, and none may wait for one that stops."""
    found = None
    try:
        require_finite_weights(training.trained())
    except NonFiniteError as error:
        found = str(error)
    for reason in filter(None, training.ranks.collect(found)):
        raise NonFiniteError(reason)


def _state(training: Resumable) -> dict[str, Any]:
    epoch, step_in_epoch = divmod(training.step, training.steps_per_epoch)
    return {
        "step": training.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "config": dataclasses.asdict(training.config),
        "dataset": training.fingerprint,
        "world_size": training.ranks.world_size,
        "layout": training.layout,
        "environment": environment(),
        "guard": training.guard.state(),
        "metrics_rows": training.run.metrics_count,
        **training.state(),
    }


def check_room(training: Resumable) -> None:
    """Make sure that the disk has room for the next save, and at the start of a run for two saves.

    Raises:
        UserError: the disk has less room.
    """
    saves = 1 if saved_steps(training.run.checkpoints) else 2
    tensors = [t for group in training.tensors().values() for t in group.values()]
    size = sum(tensor.nbytes for tensor in tensors) + training.bytes_to_come()
    root = training.run.root.absolute()
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    if free < saves * size:
        raise UserError(
            f"{training.run.root}: no space: {saves} x {size / 2**20:,.1f} MiB are needed for saves, "
            f"{free / 2**20:,.1f} MiB are free; make room, or choose another folder by --run"
        )
