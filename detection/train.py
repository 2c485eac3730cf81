"""Training of a detector on one exported network.

A step: a batch of images with boxes -> four losses -> gradients, their mean over the ranks -> SGD.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from detection.config import learning_rate
from detection.data import Data
from detection.measure import measure
from detection.saved import BEST, LAST
from detection.state import Batch, Best, Detection
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.guards import all_finite, gradients
from peerlearn.compute.program import Program
from peerlearn.evaluation.features import eval_mode
from peerlearn.runs.training_facts import TrainingFacts

_LOG_EVERY_STEPS = 20
_PROBED_IMAGES = 4


def detection_program(export: Path, network: str, data: Data) -> Program[Detection]:
    """The functions that train a detector on an exported network."""
    return Program(
        build=partial(Detection, export=export, network=network, data=data),
        train=_train,
        facts=_facts,
        finish=_finish,
    )


def _facts(training: Detection) -> TrainingFacts:
    config, train = training.config, training.data.train
    return TrainingFacts(
        dataset=train.name,
        data_root=config.data.root,
        images=len(train),
        seed=training.seed,
        lr=config.lr,
        processes=training.ranks.world_size,
        steps_per_epoch=training.steps_per_epoch,
    )


def _train(attempt: Attempt[Detection]) -> bool:
    """Train to the end (True), or to the first step after a signal has asked to stop (False)."""
    training = attempt.training
    if training.step == 0:
        attempt.report.say(_activations(training))
    _write_validated(attempt)
    steps = training.batches(training.step, training.total_steps)
    for batch in attempt.batches(steps):
        attempt.begin_step()
        lr, losses = _step(attempt, batch)
        training.step += 1
        ended = training.step == training.total_steps
        row: dict[str, float] = {}
        if training.step % _LOG_EVERY_STEPS == 0 or ended:
            row = {"lr": lr}
            if losses:
                each = {name: float(loss) for name, loss in losses.items()}
                pace = attempt.log.pace(training.step, training.config.batch_size)
                row = {"loss": sum(each.values()), **pace, **row, **each}
        if training.data.validation and (
            ended or training.step % training.config.validate_every == 0
        ):
            training.unwritten_row = row
        elif row:
            attempt.log.write(training.step, row)
        attempt.report.advance(1, attempt.log.text)
        if attempt.save_if_due():
            return False
        _write_validated(attempt)
    # Not saved: a training that goes on from its last save measures them again, and finds the same.
    training.measure_norms()
    return True


def _step(attempt: Attempt[Detection], batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """One step: its learning rate, and the mean losses over parts and ranks. One with NaN or Inf is skipped: {}."""
    training, ranks = attempt.training, attempt.training.ranks
    lr = learning_rate(training.step, training.config)
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    training.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(batch.parts):
        losses = training.losses(part, training.step, number)
        torch.stack(list(losses.values())).sum().div(len(batch.parts)).backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / len(batch.parts)
    own = gradients(training.detector.parameters())
    ranks.average_(own)
    # Of this rank's losses: their mean would not tell whose images were at fault.
    faults = torch.stack([~all_finite(list(sums.values())), ~all_finite(own)])
    loss_is_bad, gradient_is_bad, unreadable = attempt.agree(faults, bool(batch.unreadable))
    if unreadable:
        training.note_unreadable(batch.unreadable)
    if loss_is_bad or gradient_is_bad:
        bad = [name for name, loss in sums.items() if not bool(loss.isfinite())]
        if not loss_is_bad:
            bad = ["the gradients"]
        attempt.skip(f"not finite: {', '.join(bad)}" if bad else None, images=batch.images)
        return lr, {}
    ranks.average_(list(sums.values()))
    training.optimizer.step()
    if training.config.model.norm == "batch":
        ranks.average_([b for b in training.detector.buffers() if b.is_floating_point()])
    training.guard.passed()
    return lr, sums


def _finish(training: Detection) -> None:
    training.save_as(LAST, must=True)


def _write_validated(attempt: Attempt[Detection]) -> None:
    """Validate where a row waits for it, and write the row. It comes after the save, so that a stop costs no step."""
    training = attempt.training
    if training.unwritten_row is not None:
        row = training.unwritten_row | _validate(attempt)
        attempt.log.write(training.step, row)
        training.unwritten_row = None


def _validate(attempt: Attempt[Detection]) -> dict[str, float]:
    """Score the detector on the validation split, and keep it if it is the best so far. All ranks call it together."""
    training, ranks = attempt.training, attempt.training.ranks
    config, images = training.config, training.data.validation
    assert images is not None
    with attempt.report.pause():
        # Training goes on with the statistics of each batch, so that these need not be put back.
        training.measure_norms()
        measured = measure(
            config,
            training.detector,
            images,
            model=config.model,
            channels=training.body.image_channels,
            precision=training.precision,
            ranks=ranks,
        )
    result = measured.result
    row = {"ap": result.ap, "ap50": result.ap50, "ap75": result.ap75}
    if result.ap > training.best.ap and ranks.from_main(lambda: training.save_as(BEST, must=False)):
        training.best = Best(result.ap, training.step)
    attempt.report.say(
        f"step {training.step:,}: validation AP {result.ap:.2f}, AP50 {result.ap50:.2f}"
    )
    return row


@torch.no_grad()
def _activations(training: Detection) -> str:
    """How large the activations of the network are. Weights that did not come along show here first."""
    (batch,) = training.batches(0, 1)
    images = batch.parts[0][0][:_PROBED_IMAGES]
    padded, _ = training.detector.transform(images)
    with eval_mode([training.detector]):
        maps = training.detector.backbone.body(padded.tensors)
    scales = ", ".join(f"{float(each.square().mean().sqrt()):.3g}" for each in maps)
    return f"activations of the network, stage by stage (root mean square): {scales}"
