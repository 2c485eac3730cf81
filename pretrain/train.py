"""The training loop. Dimensions: M networks, B batch."""

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.compute.schedules import learning_rate
from peerlearn.counter_random import MODULE_NOISE, random_bits
from peerlearn.data.loader import ViewBatch
from peerlearn.runs.progress import Reporter
from peerlearn.runs.score_names import (
    KNN_TOP1,
    PIXELS,
    TOP1,
    measured_part,
    parse_score_name,
    score_name,
)
from peerlearn.runs.stop import Stop
from pretrain.accuracy import AccuracyMonitor
from pretrain.cohort import statistics
from pretrain.guards import checked_terms, gradient_fault
from pretrain.metrics import MetricsLog, gradient_norms
from pretrain.monitor import warn_of_collapse
from pretrain.state import Training, export, export_last_again, save
from pretrain.supervised import Supervised
from pretrain.terms import Terms, objective

logger = logging.getLogger(__name__)


def train(training: Training, log: MetricsLog, report: Reporter, stop: Stop) -> bool:
    """Train from ``training.step`` to the end, or to the first step after ``stop`` is requested on any rank.

    The order within a step matters:
        1. views      one global batch, two random views of every image; dropout and the like are
                      seeded by the step, so that they too continue exactly
        2. momentum   the key networks move, before they encode anything
        3. terms      per micro-batch: queries, keys, the loss terms, backward; the queue stands still
        4. step       gradients are averaged over the ranks; the optimiser, at this step's learning rate
        5. enqueue    this step's keys become negatives of the next
        6. log        losses, and at the end of an epoch what the monitor measures
        7. export     before the save, or a run killed between the two would never export this step
        8. save       everything that steps 1 to 5 have changed
    A step with NaN or Inf in its terms or gradients leaves 4 and 5 out, on all ranks.

    Returns:
        True at the end of training, False if a signal asked to stop: the state is saved either way.

    Raises:
        DivergedError: too many steps in a row had NaN or Inf.
        UserError: a rank is lost, images or the disk fail too often.
    """
    config, cohort, method = training.config, training.cohort, training.method
    ranks, guard, precision = training.ranks, training.guard, training.precision
    optimizer = training.optimizer
    cohort.train()
    if training.step == training.total_steps:
        ranks.from_main(lambda: export_last_again(training))
    while training.step < training.total_steps:
        epoch, start_step = divmod(training.step, training.steps_per_epoch)
        for batch in training.loader.epoch(epoch, start_step):  # 1
            ranks.at_step(training.step)
            if training.dataset.has_files:
                training.unreadable.note(
                    batch.unreadable, epoch=epoch, ranks=ranks, run=training.run
                )
            _seed_modules(training)
            lr = _set_learning_rate(training)
            guard.remember()
            method.begin_step(training.step)  # 2

            optimizer.zero_grad(set_to_none=True)
            parts: list[Terms] = []
            for part in _micro_batches(batch, config.accumulation_steps):  # 3
                with precision.autocast():
                    terms, fault = checked_terms(partial(method.terms, *part))
                fault = _agreed_fault(training, fault, batch)
                if fault or terms is None:
                    break
                precision.backward(objective(terms, config) / config.accumulation_steps)
                parts.append(type(terms)(*(term.detach() for term in terms)))
            else:
                ranks.average_([p.grad for p in cohort.parameters() if p.grad is not None])
                precision.unscale(optimizer)
                if not precision.overflow_is_normal:
                    fault = _agreed_fault(training, gradient_fault(cohort), batch)

            if fault:
                precision.leave_out_step()
                method.drop_step()
                guard.skip(training.step, fault)
            else:
                precision.step(optimizer)  # 4
                ranks.average_(_statistics(training))
                method.end_step()  # 5
                guard.passed()
            training.step += 1

            epoch_ends = training.step % training.steps_per_epoch == 0
            if epoch_ends or training.step % config.monitor.log_every_steps == 0:  # 6
                row = {"lr": lr, "skipped_steps": guard.skipped} | method.metrics()
                if not fault:
                    row = log.losses(training.step, _mean(parts, ranks), config) | row
                    row |= gradient_norms(cohort) | precision.metrics()
                if training.dataset.has_files:
                    row["unreadable_images"] = training.unreadable.in_epoch
                if _monitor_due(training):
                    row |= _measure(training)
                log.write(training.step, row)
                if epoch_ends:
                    report.say(f"{scores_text(row, epoch=epoch + 1)}  {log.text}")
            report.advance(1, log.text)

            ended = training.step == training.total_steps
            stopping = ranks.any(stop.requested)
            if _export_due(training):  # 7
                ranks.from_main(partial(export, training, must=ended))
            # Not among skipped steps: such saves would push out the last good one.
            if (_save_due(training) and not guard.in_a_row) or stopping or ended:  # 8
                save(training, attempt=log.attempt, must=stopping or ended)
            if stopping and not ended:
                return False
    return True


def measure_untrained(training: Training, log: MetricsLog, report: Reporter) -> None:
    """The row of step 0: what random networks and raw pixels score."""
    if not training.config.monitor.every_epochs:
        return
    row = _measure(training, pixels=True)
    log.write(training.step, row)
    report.say(scores_text(row, epoch=0))


def _measure(training: Training, *, pixels: bool = False) -> dict[str, float]:
    """What the monitor sees, measured by the main rank and told to all."""

    def measure() -> dict[str, float]:
        monitor, method = training.monitor, training.method
        if isinstance(monitor, AccuracyMonitor):
            assert isinstance(method, Supervised)
            return monitor.measure(training.cohort, method.ensemble_weights)
        assert monitor is not None
        row = monitor.measure(training.cohort, method.peers)
        if pixels and (top1 := monitor.pixels_top1()) is not None:
            row[score_name(PIXELS, KNN_TOP1)] = top1
        return row

    row = training.ranks.from_main(measure)
    if training.ranks.main:
        warn_of_collapse(training.run, training.step, row)
    return row


def _agreed_fault(training: Training, fault: str | None, batch: ViewBatch) -> str | None:
    """What is wrong on any rank, or None; the event names the images of those ranks."""
    ranks = training.ranks
    if not ranks.any(fault is not None):
        return None
    found = ranks.collect(fault and {"reason": fault, "images": batch.index.tolist()})
    faults = {rank: item for rank, item in enumerate(found) if item}
    reason = "; ".join(f"rank {rank}: {item['reason']}" for rank, item in faults.items())
    if ranks.main:
        logger.warning("step %d is skipped: %s", training.step, reason)
        training.run.event(
            "step_skipped",
            step=training.step,
            epoch=training.step // training.steps_per_epoch,
            batch=training.step % training.steps_per_epoch,
            reason=reason,
            images=[index for item in faults.values() for index in item["images"]],
        )
    return reason


def _statistics(training: Training) -> list[Tensor]:
    """Every batch-norm statistic of the query and the key networks, which each rank has moved by its own batch."""
    peers = training.method.peers
    return statistics(training.cohort) + (statistics(peers) if peers else [])


def scores_text(row: dict[str, float], *, epoch: int) -> str:
    """One line of an epoch's scores, which are of one kind: knn_top1, test_top1 or validation_top1."""
    named = {name: value for key, value in row.items() if (name := parse_score_name(key))}
    found = {name: value for name, value in named.items() if name.figure.endswith(TOP1)}
    if not found:
        return f"epoch {epoch}"
    kind = next(iter(found)).figure.removesuffix(TOP1).replace("knn", "kNN")
    scores = "  ".join(
        f"{measured_part(name.network)} {value:.2f}" for name, value in found.items()
    )
    return f"epoch {epoch}  {kind} top-1 %: {scores}"


def _seed_modules(training: Training) -> None:
    """Seed torch's own generators, which dropout and stochastic depth draw from, by the step."""
    rank = training.ranks.rank
    torch.manual_seed(int(random_bits(MODULE_NOISE, training.config.seed, training.step, rank)))


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


def _micro_batches(
    batch: ViewBatch, parts: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Split the views of a batch, and its labels, alike."""
    labels = [None] * parts if batch.labels is None else batch.labels.chunk(parts)
    for views, own in zip(
        zip(*(v.chunk(parts) for v in batch.views), strict=True), labels, strict=True
    ):
        yield tuple(v.contiguous(memory_format=torch.channels_last) for v in views), own


def _mean(parts: list[Terms], ranks: Ranks) -> Terms:
    """Over micro-batches and ranks."""
    terms = [torch.stack(micro).mean(0) for micro in zip(*parts, strict=True)]
    ranks.average_(terms)
    return type(parts[0])(*terms)


def _epoch_due(training: Training, every_epochs: int) -> bool:
    """After every so many epochs, and at the end; 0 = never."""
    if not every_epochs:
        return False
    epochs, rest = divmod(training.step, training.steps_per_epoch)
    return rest == 0 and (epochs % every_epochs == 0 or epochs == training.config.epochs)


def _monitor_due(training: Training) -> bool:
    return _epoch_due(training, training.config.monitor.every_epochs)


def _export_due(training: Training) -> bool:
    return _epoch_due(training, training.config.checkpoint.export_every_epochs)


def _save_due(training: Training) -> bool:
    every_steps = training.config.checkpoint.every_steps or training.steps_per_epoch
    return training.step % every_steps == 0
