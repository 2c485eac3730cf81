"""The training loop. Dimensions: M networks, B batch."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import NonFiniteError, all_finite, gradients
from peerlearn.compute.schedules import learning_rate
from peerlearn.data.loader import ViewBatch
from pretrain.cohort import statistics
from pretrain.faults import gradient_fault, term_fault, terms_are_finite
from pretrain.finite import deferred_checks, first_fault
from pretrain.initial_weights import INITIAL_WEIGHTS
from pretrain.method import networks_of
from pretrain.monitor import warn_of_collapse
from pretrain.rows import gradient_norms, loss_row, scores_text
from pretrain.state import Training, export, export_last_again
from pretrain.terms import Terms, objective

logger = logging.getLogger(__name__)


def train(attempt: Attempt[Training]) -> bool:
    """Train from ``training.step`` to the end, or until a signal asks any rank to stop.

    The order within a step matters:
        1. views      one global batch, random views of every image; dropout and the like are seeded by the step, so
                      that they too continue exactly
        2. momentum   the key networks move, before they encode anything
        3. terms      per micro-batch: queries, keys, the loss terms, backward; the queue stands still
        4. step       gradients are averaged over the ranks; the optimiser, at this step's learning rate
        5. enqueue    this step's keys become negatives of the next; the linear probe, if any, learns from the features
                      of 3
        6. log        losses, and at the end of an epoch what the monitor measures
        7. export     before the save, or a run killed between the two would never export this step
        8. save       everything that steps 1 to 5 have changed
    A step with NaN or Inf in its terms or gradients leaves 4 and 5 out, on all ranks.
    A signal that comes while the monitor measures interrupts 6. The next start then does 6 and 7 of that step first.

    Returns:
        True at the end of training, False if a signal asked to stop: the state is saved either way.

    Raises:
        StoppedError: a signal asked to stop between two steps; the state is to be saved.
        DivergedError: too many steps in a row had NaN or Inf.
        UserError: a rank is lost, images or the disk fail too often.
    """
    training = attempt.training
    training.cohort.train()
    if training.step == 0:
        if training.initial_weights and training.ranks.main:
            networks = [each.as_json() for each in training.initial_weights]
            training.run.event(INITIAL_WEIGHTS, networks=networks)
        _measure_untrained(attempt)
    if training.unwritten_row is not None:
        _write_row(attempt)
        _export_if_due(training)
    if training.step == training.total_steps:
        with training.whole():
            training.ranks.from_main(lambda: export_last_again(training))
    while training.step < training.total_steps:
        epoch, start_step = divmod(training.step, training.steps_per_epoch)
        training.unreadable.begin_epoch(epoch)
        for batch in attempt.batches(training.loader.epoch(epoch, start_step)):  # 1
            done = train_step(attempt, batch)  # 2 to 5
            training.step += 1
            _log(attempt, done)  # 6
            _export_if_due(training)  # 7
            if attempt.save_if_due():  # 8
                return False
    return True


class StepDone(NamedTuple):
    """What is to be told of a step.

    Attributes:
        lr: learning rate of the step.
        mutual: factor of the terms between networks.
        terms: terms of each micro-batch, (M,) vectors without gradient.
        skipped: whether the step was left out.
    """

    lr: float
    mutual: float
    terms: list[Terms]
    skipped: bool


def train_step(attempt: Attempt[Training], batch: ViewBatch) -> StepDone:
    """One optimiser step, 2 to 5 of `train`'s order, on this rank's part of a batch.

    The host waits for the device once, where the ranks agree whether the step can be trusted. (Beside that fp16 looks
    at its own flag, and the ensemble weights of supervised training are solved on the host.)

    Raises:
        DivergedError: too many steps in a row had NaN or Inf.
        UserError: a rank is lost, or too many images cannot be read.
    """
    training = attempt.training
    config, cohort, method = training.config, training.cohort, training.method
    ranks, precision, optimizer = training.ranks, training.precision, training.optimizer
    attempt.begin_step()
    lr, mutual = _set_learning_rate(training), training.mutual_weight
    method.begin_step(training.step)  # 2

    method.exchange.bytes_sent = 0
    optimizer.zero_grad(set_to_none=True)
    parts: list[Terms] = []
    refused = None
    with deferred_checks() as checks:
        try:
            for part in _micro_batches(batch, config.accumulation_steps):  # 3
                with precision.autocast():
                    terms = method.terms(*part)
                if len(parts) == config.accumulation_steps - 1:
                    training.gradient_average.begin()
                precision.backward(objective(terms, config, mutual) / config.accumulation_steps)
                parts.append(type(terms)(*(term.detach() for term in terms)))
        except NonFiniteError as error:
            # Of what every rank computes alike: none of them waits for another in backward.
            refused = str(error)
    training.gradient_average.finish()
    own = gradients(cohort.parameters())
    bad_terms = torch.ones((), dtype=torch.bool, device=ranks.device)
    if refused is None:
        bad_terms = ~terms_are_finite(checks, parts)
    bad_gradients = ~all_finite(own).to(ranks.device) & precision.overflow_is_a_fault()
    term_is_bad, gradient_is_bad, unreadable = attempt.agree(
        torch.stack([bad_terms, bad_gradients]), bool(batch.unreadable)
    )
    if unreadable:
        training.unreadable.note(batch.unreadable, ranks=ranks, run=training.run)

    if term_is_bad or gradient_is_bad:
        own_fault = first_fault(checks) or refused or term_fault(parts)
        fault = own_fault if term_is_bad else gradient_fault(cohort)
        method.drop_step()
        if method.probe is not None:
            method.probe.drop_step()
        attempt.skip(fault, images=batch.index.tolist())
        return StepDone(lr, mutual, parts, skipped=True)
    precision.unscale(optimizer)
    precision.step(optimizer)  # 4
    method.exchange.team.average_(
        [tensor for each in networks_of(method) for tensor in statistics(each)]
    )
    method.end_step()  # 5
    if method.probe is not None:
        method.probe.step()
    training.guard.passed()
    return StepDone(lr, mutual, parts, skipped=False)


def _log(attempt: Attempt[Training], done: StepDone) -> None:
    """The row of the step just done, where one is due."""
    training, log, report = attempt.training, attempt.log, attempt.report
    monitor = training.config.monitor
    epoch_ends = training.step % training.steps_per_epoch == 0
    if epoch_ends or training.step % monitor.log_every_steps == 0:
        row = step_row(training, done)
        if "loss" in row:
            pace = log.pace(training.step, training.config.images_per_step)
            row = {"loss": row.pop("loss"), **pace, **row}
        training.unwritten_row = row
        _write_row(attempt)
    report.advance(1, log.text)


def step_row(training: Training, done: StepDone) -> dict[str, float]:
    """What a row tells of the step just done, but for clocks and the monitor's figures. All ranks call it together."""
    row = {"lr": done.lr, "skipped_steps": training.guard.skipped} | training.method.metrics()
    if training.config.mutual_warmup_epochs:
        row["mutual_weight"] = done.mutual
    if not done.skipped:
        terms = mean_terms(done.terms, training.ranks)
        losses = loss_row(terms, training.config, done.mutual)
        own = gradient_norms(training.cohort)
        if training.method.probe is not None:
            own |= training.method.probe.metrics()
        row = losses | row | _of_all_networks(own, training) | training.precision.metrics()
    if training.dataset.has_files:
        row["unreadable_images"] = training.unreadable.in_epoch
    return row


def _of_all_networks(own: dict[str, float], training: Training) -> dict[str, float]:
    """Figures of the networks of all processes, and what these have sent each other for a step."""
    exchange = training.method.exchange
    if not exchange.is_split:
        return own
    together = {name: value for each in training.ranks.collect(own) for name, value in each.items()}
    sent = {
        "exchange_bytes_per_rank": exchange.bytes_sent,
        "gradient_bytes_per_rank": training.gradient_average.bytes_sent,
    }
    return together | sent


def _write_row(attempt: Attempt[Training]) -> None:
    """Write the row of the newest step, with what the monitor measures where that is due."""
    training, log = attempt.training, attempt.log
    row = training.unwritten_row
    assert row is not None
    if _epoch_due(training, training.config.monitor.every_epochs):
        row = row | _measure(attempt, untrained=False)
    log.write(training.step, row)
    training.unwritten_row = None
    epoch, rest = divmod(training.step, training.steps_per_epoch)
    if rest == 0:
        attempt.report.say(f"{scores_text(row, epoch=epoch)}  {log.loss_text}")


def _export_if_due(training: Training) -> None:
    if _epoch_due(training, training.config.checkpoint.export_every_epochs):
        ended = training.step == training.total_steps
        with training.whole():
            training.ranks.from_main(lambda: export(training, must=ended))


def _measure_untrained(attempt: Attempt[Training]) -> None:
    """The row of step 0: what random networks and raw pixels score."""
    training = attempt.training
    if not training.config.monitor.every_epochs:
        return
    row = _measure(attempt, untrained=True)
    attempt.log.write(training.step, row)
    attempt.report.say(scores_text(row, epoch=0))


def _measure(attempt: Attempt[Training], *, untrained: bool) -> dict[str, float]:
    """What the monitor sees, measured by the main rank and told to all.

    Raises:
        StoppedError: a signal has interrupted it.
    """
    training = attempt.training

    def measure() -> dict[str, float]:
        assert training.watch is not None
        return training.watch(untrained)

    with attempt.report.pause():
        row = attempt.watch(measure)
    if not untrained:
        training.method.measured(training.step, row)
    if training.ranks.main:
        warn_of_collapse(training.run, training.step, row)
    return row


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


def mean_terms(parts: list[Terms], ranks: Ranks) -> Terms:
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
