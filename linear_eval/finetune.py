"""Fine-tuning: the whole network learns the classes, from the exported weights on."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_eval.classifiers import Classified
from linear_eval.config import LinearConfig
from linear_eval.streams import step_size, view_loader
from peerlearn.compute.dist import Ranks
from peerlearn.compute.schedules import learning_rate
from peerlearn.counter_random import INITIAL_WEIGHTS, MODULE_NOISE, random_bits
from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.evaluation.features import extract_features
from peerlearn.evaluation.networks import by_input, seen_by
from peerlearn.runs.progress import progress


def finetune(
    config: LinearConfig,
    backbones: Mapping[str, nn.Module],
    train: ImageDataset,
    test: ImageDataset,
    ranks: Ranks,
) -> dict[str, Classified]:
    """Train every network with a linear classifier on top, all on the same batches, and classify the test images.

    Batch norm trains too, over each process's own part of a batch. All ranks call it together and get the same.

    Raises:
        UserError: a network has diverged.
    """
    models = {
        name: _with_classifier(backbone, train.num_classes, config.seed).to(ranks.device)
        for name, backbone in backbones.items()
    }
    optimizers = {
        name: torch.optim.SGD(
            model.parameters(),
            lr=config.base_lrs[0],
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        for name, model in models.items()
    }
    batch_size = step_size(config, len(train), ranks)
    lr = config.base_lrs[0] * batch_size / config.base_lr_batch_size
    loaders = [
        (view_loader(config, view, image_size=size, batch_size=batch_size, ranks=ranks), names)
        for view, size, names in by_input(backbones, train)
    ]
    steps_per_epoch = loaders[0][0].steps_per_epoch
    total_steps = config.epochs * steps_per_epoch
    step = 0
    with progress(total_steps, "step", quiet=not ranks.main) as report:
        for epoch in range(config.epochs):
            for batches in zip(*(loader.epoch(epoch) for loader, _ in loaders), strict=True):
                rate = learning_rate(
                    step,
                    lr=lr,
                    schedule=config.schedule,
                    steps_per_epoch=steps_per_epoch,
                    total_steps=total_steps,
                )
                torch.manual_seed(int(random_bits(MODULE_NOISE, config.seed, step, ranks.rank)))
                loss = torch.zeros((), device=ranks.device)
                for batch, (_, names) in zip(batches, loaders, strict=True):
                    assert batch.labels is not None
                    for name in names:
                        loss += _step(
                            models[name],
                            optimizers[name],
                            batch.views[0],
                            batch.labels,
                            rate,
                            ranks,
                        )
                step += 1
                report.advance(1, f"epoch {epoch}  loss {float(loss) / len(models):.3f}")
    return {
        name: _classify(config, name, models[name], backbones[name], test, ranks) for name in models
    }


def _with_classifier(backbone: nn.Module, classes: int, seed: int) -> nn.Sequential:
    width: int = backbone.num_features  # type: ignore[assignment]
    classifier = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(int(random_bits(INITIAL_WEIGHTS, seed, width)))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(backbone, classifier).train()


def _step(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    lr: float,
    ranks: Ranks,
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    ranks.average_([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    ranks.average_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
    return loss.detach()


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
