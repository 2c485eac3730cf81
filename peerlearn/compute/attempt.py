"""What the steps of a training need to survive, within one start on its run directory."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from peerlearn.compute.resumable import Resumable
from peerlearn.compute.saves import save
from peerlearn.counter_random import MODULE_NOISE, random_bits
from peerlearn.errors import UserError
from peerlearn.runs.metrics import MetricsLog
from peerlearn.runs.progress import Reporter, progress
from peerlearn.runs.stop import Stop

T = TypeVar("T", bound=Resumable)
Batch = TypeVar("Batch")
Figures = TypeVar("Figures")

logger = logging.getLogger(__name__)


class Attempt(Generic[T]):
    """The part of the spine that a training loop calls, step by step.

    Attributes:
        training: the training.
        number: number of this start of the run, counted from 1.
        log: rows of metrics.jsonl.
        report: progress bar.
        stopping: whether a signal has asked any rank to stop, as of the last `agree`.
    """

    log: MetricsLog
    report: Reporter

    def __init__(self, training: T, number: int, stop: Stop) -> None:
        self.training = training
        self.number = number
        self.stopping = False
        self._stop = stop
        self._missed_saves = 0
        self._saved_step = training.step

    def batches(self, epoch: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch. Where this process trains alone, a signal interrupts the reading of the next.

        Several processes have to agree first, which they do in every step.

        Raises:
            StoppedError: a signal has asked to stop.
        """
        alone = self.training.ranks.world_size == 1
        while True:
            with self.log.waiting(), self._stop.at_once() if alone else contextlib.nullcontext():
                batch = next(epoch, None)
            if batch is None:
                return
            yield batch

    def watch(self, measure: Callable[[], Figures]) -> Figures:
        """`Ranks.from_main` of what changes nothing that is saved, so that a signal may interrupt it where it stands.

        Raises:
            StoppedError: a signal has interrupted it, on all ranks alike.
        """

        def interruptible() -> Figures:
            with self._stop.at_once():
                return measure()

        with self.training.whole():
            return self.training.ranks.from_main(interruptible)

    def begin_step(self) -> None:
        """Begin a step: give a sign of life, seed torch's own generators, copy the buffers.

        Dropout and stochastic depth draw from those generators. Seeded by the step, they continue exactly too.
        """
        training = self.training
        training.ranks.at_step(training.step)
        seed_modules(training.config.seed, training.step, training.ranks.rank)
        training.guard.remember()

    def agree(self, faults: Tensor, *flags: bool) -> list[bool]:
        """Whether any rank has each fault, and then whether any rank has each flag. All ranks get the same answer.

        The wish to stop travels along. This is the only place of a step where the host waits for the device.

        Args:
            faults: faults of this rank, bool (n,), on the device.
            flags: further conditions of this rank, on the host.
        """
        ranks = self.training.ranks
        own = torch.tensor([self._stop.requested, *flags], dtype=torch.float32)
        # The host does not wait for this copy: the device reads it when it comes to it.
        on_device = own.to(ranks.device, non_blocking=True)
        together = torch.cat([on_device, faults.to(torch.float32)])
        stop, *agreed = (value > 0 for value in ranks.add_up(together).tolist())
        self.stopping = stop
        return [*agreed[len(flags) :], *agreed[: len(flags)]]

    def skip(self, fault: str | None, **facts: Sequence[Any]) -> None:
        """Skip this step, which has a fault on some rank: undo its forward passes, and write an event.

        Args:
            fault: fault of this rank in words; None if it has none.
            facts: facts about the ranks with a fault for the event, such as the images of their batches.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        training, ranks = self.training, self.training.ranks
        found = ranks.collect(fault and {"reason": fault, **facts})
        faults = {rank: item for rank, item in enumerate(found) if item}
        reason = "; ".join(f"rank {rank}: {item['reason']}" for rank, item in faults.items())
        if ranks.main:
            together = {
                # Ranks that hold other networks may see the same images.
                name: list(dict.fromkeys(each for item in faults.values() for each in item[name]))
                for name in facts
            }
            self.tell_skipped(reason, **together)
        training.guard.skip(training.step, reason)

    def tell_skipped(self, reason: str, **facts: Sequence[Any]) -> None:
        """Tell, on the main rank, that this step is skipped: by a warning and an event.

        Args:
            reason: faults of all ranks in words.
            facts: facts about the ranks with a fault.
        """
        training = self.training
        epoch, batch = divmod(training.step, training.steps_per_epoch)
        hint = training.how_to_look(training.step)
        logger.warning(
            "step %d is skipped: %s%s", training.step, reason, f" ({hint})" if hint else ""
        )
        training.run.event(
            "step_skipped", step=training.step, epoch=epoch, batch=batch, reason=reason, **facts
        )

    def save_if_due(self) -> bool:
        """Save after a step if the config asks for it, at the end, and if a signal asks to stop.

        Nothing is saved after skipped steps: such saves would push out the last good one.

        Returns:
            Whether to stop now, before the end.

        Raises:
            NonFiniteError: a network holds NaN or Inf. Nothing is saved.
            UserError: too many saves in a row have failed, or the last save of the run has.
        """
        training = self.training
        if training.ranks.world_size == 1:
            self.stopping = self._stop.requested
        ended = training.step == training.total_steps
        every_steps = training.saves.every_steps or training.steps_per_epoch
        due = training.step % every_steps == 0 and not training.guard.in_a_row
        if due or self.stopping or ended:
            self.save(must=self.stopping or ended)
        return self.stopping and not ended

    def save_unless_saved(self) -> None:
        """Save what steps have changed since the newest save, between two steps. All ranks call it together.

        Raises:
            NonFiniteError, UserError: as `save` does.
        """
        if self.training.step != self._saved_step:
            self.save(must=True)

    def save(self, *, must: bool) -> None:
        """Save. If the disk does not take the save, only this save is lost, and a line and an event say so.

        Args:
            must: whether this is the last save.

        Raises:
            NonFiniteError: a network holds NaN or Inf. Nothing is saved.
            UserError: too many saves in a row have failed, or the last save of the run has.
        """
        training = self.training
        run, ranks = training.run, training.ranks
        reason = save(training, attempt=self.number)
        if reason is None:
            self._missed_saves, self._saved_step = 0, training.step
            return
        self._missed_saves += 1
        message = f"{run.checkpoints}: step {training.step} could not be saved ({reason})"
        if must or self._missed_saves >= training.saves.max_missed:
            raise ranks.told_once(
                UserError(
                    f"{message}, miss number {self._missed_saves} in a row: make room, then "
                    f"`peerlearn resume {run.root}` goes on from the save before it"
                )
            )
        if ranks.main:
            logger.warning("%s: training goes on, the older saves stand", message)
            run.event("save_missed", step=training.step, reason=reason)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Open the metrics log and the progress bar for as long as the block lasts."""
        training = self.training
        quiet = not training.ranks.main
        self.log = MetricsLog(
            training.run,
            attempt=self.number,
            step=training.step,
            steps_per_epoch=training.steps_per_epoch,
            total_steps=training.total_steps,
            writes=training.ranks.main,
        )
        try:
            with progress(
                training.total_steps,
                "steps",
                name="training",
                done=training.step,
                quiet=quiet,
                pauses_left=training.measurings_left,
            ) as self.report:
                yield
        finally:
            self.log.close()


def seed_modules(seed: int, step: int, rank: int) -> None:
    """Seed torch's own generators, which dropout and stochastic depth draw from, by the step."""
    torch.manual_seed(int(random_bits(MODULE_NOISE, seed, step, rank)))
