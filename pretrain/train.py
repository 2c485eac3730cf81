"""The training loop. Dimensions: M networks, B batch."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peerlearn.counter_random import MODULE_NOISE, random_bits
from peerlearn.progress import Reporter
from pretrain.losses import MCLTerms
from pretrain.methods import objective
from pretrain.metrics import MetricsLog, gradient_norms
from pretrain.schedules import learning_rate
from pretrain.state import Training, export, save

logger = logging.getLogger(__name__)


@dataclass
class Stop:
    """Whether a signal has asked the run to stop."""

    requested: bool = False


def train(training: Training, log: MetricsLog, report: Reporter, stop: Stop) -> bool:
    """Train from ``training.step`` to the end, or to the first step after ``stop`` is requested.

    The order within a step matters:
        1. views      one global batch, two random views of every image; dropout and the like are
                      seeded by the step, so that they too continue exactly
        2. momentum   the key networks move, before they encode anything
        3. terms      per micro-batch: queries, keys, the loss terms, backward; the queue stands still
        4. step       the optimiser, at this step's learning rate
        5. enqueue    this step's keys become negatives of the next
        6. log        losses, and at the end of an epoch what the monitor measures
        7. export     before the save, or a run killed between the two would never export this step
        8. save       everything that steps 1 to 5 have changed

    Returns:
        True at the end of training, False if a signal asked to stop: the state is saved either way.
    """
    config, cohort, method = training.config, training.cohort, training.method
    cohort.train()
    while training.step < training.total_steps:
        epoch, start_step = divmod(training.step, training.steps_per_epoch)
        for batch in training.loader.epoch(epoch, start_step):  # 1
            _seed_modules(training)
            lr = _set_learning_rate(training)
            method.begin_step(training.step)  # 2

            training.optimizer.zero_grad(set_to_none=True)
            parts: list[MCLTerms] = []
            for views in _micro_batches(batch.views, config.accumulation_steps):  # 3
                terms = method.terms(views)
                (objective(terms, config) / config.accumulation_steps).backward()
                parts.append(MCLTerms(*(term.detach() for term in terms)))

            training.optimizer.step()  # 4
            method.end_step()  # 5
            training.step += 1

            epoch_ends = training.step % training.steps_per_epoch == 0
            if epoch_ends or training.step % config.monitor.log_every_steps == 0:  # 6
                row = log.losses(training.step, _mean(parts), config) | gradient_norms(cohort)
                row |= {"lr": lr} | method.metrics()
                if training.monitor and _monitor_due(training):
                    row |= training.monitor.measure(cohort, method.peers)
                log.write(training.step, row)
                if epoch_ends:
                    report.say(f"{scores_text(row, epoch=epoch + 1)}  {log.text}")
            report.advance(1, log.text)

            ended = training.step == training.total_steps
            if _export_due(training):  # 7
                export(training)
            if _save_due(training) or stop.requested or ended:  # 8
                save(training)
            if stop.requested and not ended:
                return False
    return True


def measure_untrained(training: Training, log: MetricsLog, report: Reporter) -> None:
    """The row of step 0: what random networks and raw pixels score."""
    if training.monitor is None:
        return
    row = training.monitor.measure(training.cohort, training.method.peers)
    pixels = training.monitor.pixels_top1()
    if pixels is not None:
        row["pixels/knn_top1"] = pixels
    log.write(training.step, row)
    report.say(scores_text(row, epoch=0))


def scores_text(row: dict[str, float], *, epoch: int) -> str:
    """One line of an epoch's kNN scores."""
    scores = "  ".join(
        f"{key.removesuffix('/knn_top1')} {value:.2f}"
        for key, value in row.items()
        if key.endswith("/knn_top1")
    )
    return f"epoch {epoch}  kNN top-1 %: {scores}" if scores else f"epoch {epoch}"


def _seed_modules(training: Training) -> None:
    """Seed torch's own generators, which dropout and stochastic depth draw from, by the step."""
    torch.manual_seed(int(random_bits(MODULE_NOISE, training.config.seed, training.step)))


def _set_learning_rate(training: Training) -> float:
    lr = learning_rate(
        training.step,
        lr=training.config.lr,
        schedule=training.config.schedule,
        steps_per_epoch=training.steps_per_epoch,
        total_steps=training.total_steps,
    )
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _micro_batches(views: tuple[Tensor, ...], parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the two views of a batch alike."""
    for first, second in zip(*(view.chunk(parts) for view in views), strict=True):
        yield (
            first.contiguous(memory_format=torch.channels_last),
            second.contiguous(memory_format=torch.channels_last),
        )


def _mean(parts: list[MCLTerms]) -> MCLTerms:
    return MCLTerms(*(torch.stack(term).mean(0) for term in zip(*parts, strict=True)))


def _epoch_due(training: Training, every_epochs: int) -> bool:
    """After every so many epochs, and at the end."""
    epochs, rest = divmod(training.step, training.steps_per_epoch)
    return rest == 0 and (epochs % every_epochs == 0 or epochs == training.config.epochs)


def _monitor_due(training: Training) -> bool:
    return _epoch_due(training, training.config.monitor.every_epochs)


def _export_due(training: Training) -> bool:
    return _epoch_due(training, training.config.checkpoint.export_every_epochs)


def _save_due(training: Training) -> bool:
    every_steps = training.config.checkpoint.every_steps or training.steps_per_epoch
    return training.step % every_steps == 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop answers between two steps; a second SIGINT interrupts."""
    stop = Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        logger.warning("%s: saving after this step", signal.Signals(number).name)
        stop.requested = True

    earlier = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
