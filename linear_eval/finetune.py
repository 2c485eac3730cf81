"""Fine-tuning: the whole network learns the classes, from the exported weights on. It goes on after any stop."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_eval.classifiers import Classified
from linear_eval.config import LinearConfig
from linear_eval.streams import step_size, view_loader
from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import StepGuard, all_finite, gradients
from peerlearn.compute.optimizers import (
    bytes_to_come,
    load_optimizer_tensors,
    optimizer_tensors,
)
from peerlearn.compute.program import Program
from peerlearn.compute.resumable import Resumable
from peerlearn.compute.schedules import learning_rate
from peerlearn.counter_random import INITIAL_WEIGHTS, random_bits
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewBatch
from peerlearn.errors import UserError
from peerlearn.evaluation.features import extract_features
from peerlearn.evaluation.networks import by_input, seen_by
from peerlearn.evaluation.training_run import TrainingRun, trained
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.save_config import SaveConfig
from peerlearn.runs.score_names import score_name

_MAX_SKIPPED_STEPS = 3
_LOG_EVERY_STEPS = 10


def finetune(
    config: LinearConfig,
    place: TrainingRun,
    backbones: Mapping[str, nn.Module],
    train: ImageDataset,
    test: ImageDataset,
    ranks: Ranks,
) -> dict[str, Classified]:
    """Train every network with a linear classifier on top, all on the same batches, and classify the test images.

    Batch norm trains too, over each process's own part of a batch. All ranks call it together and get the same.

    Args:
        config: config of these networks.
        place: directory in which the training saves; if it is there already, the training in it is continued.
        backbones: exported networks by name.
        train: training images.
        test: test images.
        ranks: processes that train together.

    Raises:
        SavedError: a signal asked to stop; the training is saved.
        UserError: a network has diverged.
    """
    program = Program(build=partial(FineTuning, backbones=backbones, train=train), train=_train)
    with trained(place, program, config, ranks, keeps_saves=False) as training:
        return {
            name: _classify(config, name, model, backbones[name], test, ranks)
            for name, model in training.models.items()
        }


class FineTuning(Resumable):
    """Several networks that are fine-tuned side by side."""

    def __init__(
        self,
        config: LinearConfig,
        run: RunDirectory,
        ranks: Ranks,
        *,
        backbones: Mapping[str, nn.Module],
        train: ImageDataset,
    ) -> None:
        self.config = config
        self.run = run
        self.ranks = ranks
        self.step = 0
        self.models = {
            name: _with_classifier(backbone, train.num_classes, config.seed).to(ranks.device)
            for name, backbone in backbones.items()
        }
        self.optimizers = {
            name: torch.optim.SGD(
                model.parameters(),
                lr=config.base_lrs[0],
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
            )
            for name, model in self.models.items()
        }
        self.guard = StepGuard(list(self.models.values()), max_skipped_in_a_row=_MAX_SKIPPED_STEPS)
        self.batch_size = step_size(config, len(train), ranks)
        self.lr = config.base_lrs[0] * self.batch_size / config.base_lr_batch_size
        self.loaders = [
            (
                view_loader(config, view, image_size=size, batch_size=self.batch_size, ranks=ranks),
                names,
            )
            for view, size, names in by_input(backbones, train)
        ]
        self._train = train

    @property
    def saves(self) -> SaveConfig:
        return SaveConfig()

    @property
    def steps_per_epoch(self) -> int:
        return self.loaders[0][0].steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return self._train.fingerprint()

    @property
    def dataset_name(self) -> str:
        return self._train.name

    def headline(self) -> str:
        networks = ", ".join(self.models)
        return (
            f"fine-tuning network {networks} on {len(self._train):,} images of {self._train.title}"
        )

    def trained(self) -> nn.Module:
        return nn.ModuleDict(self.models)

    def bytes_to_come(self) -> int:
        return sum(map(bytes_to_come, self.optimizers.values()))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        networks = {f"weights-{name}": dict(m.state_dict()) for name, m in self.models.items()}
        optimizers = {f"optimizer-{n}": optimizer_tensors(o) for n, o in self.optimizers.items()}
        return networks | optimizers

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, object]) -> None:
        for name, model in self.models.items():
            try:
                model.load_state_dict(tensors[f"weights-{name}"])
            except RuntimeError as error:
                raise ValueError(f"network {name} does not fit: {error}") from error
            load_optimizer_tensors(self.optimizers[name], tensors[f"optimizer-{name}"])


def _train(attempt: Attempt[FineTuning]) -> bool:
    """Train to the end (True), or to the first step after a signal has asked to stop (False)."""
    training = attempt.training
    while training.step < training.total_steps:
        epoch, start_step = divmod(training.step, training.steps_per_epoch)
        epochs = (loader.epoch(epoch, start_step) for loader, _ in training.loaders)
        for batches in attempt.batches(zip(*epochs, strict=True)):
            attempt.begin_step()
            lr, losses = _step(attempt, batches)
            training.step += 1
            if (
                training.step % _LOG_EVERY_STEPS == 0
                or training.step % training.steps_per_epoch == 0
            ):
                row = {score_name(name, "loss"): float(loss) for name, loss in losses.items()}
                pace = attempt.log.pace(training.step, training.batch_size)
                loss = sum(row.values()) / len(row)
                attempt.log.write(training.step, {"loss": loss, **pace, "lr": lr, **row})
            attempt.report.advance(1, attempt.log.text)
            if attempt.save_if_due():
                return False
    return True


def _step(
    attempt: Attempt[FineTuning], batches: Sequence[ViewBatch]
) -> tuple[float, dict[str, Tensor]]:
    """One step of every network; its learning rate, and the losses. A step with NaN or Inf is left out."""
    training, ranks = attempt.training, attempt.training.ranks
    lr = learning_rate(
        training.step,
        lr=training.lr,
        schedule=training.config.schedule,
        steps_per_epoch=training.steps_per_epoch,
        total_steps=training.total_steps,
    )
    losses: dict[str, Tensor] = {}
    for batch, (_, names) in zip(batches, training.loaders, strict=True):
        assert batch.labels is not None
        for name in names:
            for group in training.optimizers[name].param_groups:
                group["lr"] = lr
            training.optimizers[name].zero_grad(set_to_none=True)
            images = batch.views[0].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(training.models[name](images), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[name] = loss.detach()
    own = {name: gradients(model.parameters()) for name, model in training.models.items()}
    for each in own.values():
        ranks.average_(each)
    computed = [*losses.values(), *(gradient for each in own.values() for gradient in each)]
    (fault,) = attempt.agree(~all_finite(computed).view(1))
    if fault:
        bad = [name for name in own if not all_finite([losses[name], *own[name]])]
        attempt.skip(f"the loss or the gradient of network {', '.join(bad)} is not finite")
        return lr, losses
    for name, model in training.models.items():
        training.optimizers[name].step()
        ranks.average_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
    training.guard.passed()
    return lr, losses


def _with_classifier(backbone: nn.Module, classes: int, seed: int) -> nn.Sequential:
    width: int = backbone.num_features  # type: ignore[assignment]
    classifier = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, width)))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(backbone, classifier).train()


def _classify(
    config: LinearConfig,
    name: str,
    model: nn.Sequential,
    backbone: nn.Module,
    test: ImageDataset,
    ranks: Ranks,
) -> Classified:
    view, size = seen_by(backbone, test)
    (logits,) = extract_features(
        [model],
        view,
        image_size=size,
        batch_size=config.encoding_batch_size,
        device=ranks.device,
        workers=config.data.workers,
        ranks=ranks,
    )
    if not logits.isfinite().all():
        raise ranks.told_once(
            UserError(f"network {name} has diverged: lower base_lr ({config.base_lr})")
        )
    return Classified(logits=logits, choice={})
