"""What a run would do, told before it starts: its images, steps, networks and memory. Nothing is trained or written.

Dimensions: M networks, B batch.
"""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peerlearn.compute.dist import Ranks
from peerlearn.compute.optimizers import build_optimizer, bytes_to_come
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.downloads import NotHereError, without_downloads
from peerlearn.data.published import PUBLISHED
from peerlearn.data.recipes import Augmentation
from peerlearn.errors import UserError
from peerlearn.export import check_classifier
from pretrain.cohort import Cohort, build_networks
from pretrain.config import PretrainConfig
from pretrain.initial_weights import load_initial_weights, remarks
from pretrain.method import Method, build_method, method_class
from pretrain.teams import check_not_shared, check_share
from pretrain.training_data import (
    IMAGE_FILE_SIZE,
    TrainingData,
    load_training_data,
    native_size,
    view_recipes,
)

_MIB, _GIB = 2**20, 2**30


class _Images(NamedTuple):
    """The images of a run, as far as the networks and the batches depend on them."""

    number: int
    channels: int
    size: int
    classes: int
    held_bytes: int
    said: str


class Preview(NamedTuple):
    """What a run would do.

    Attributes:
        lines: lines that `--dry_run` ends with.
        images: number of images that all steps take together.
    """

    lines: list[str]
    images: int


def preview(config: PretrainConfig) -> Preview:
    """What a run would do, after a look at its images and networks.

    Raises:
        UserError: data, networks or sizes that the start of the run would refuse.
    """
    check_share(config, _processes())
    kind = method_class(config.method)
    recipes = view_recipes(config, kind.views)
    images = _images(config, kind)
    size = config.data.image_size or images.size
    num_classes = images.classes if kind.labels == "classified" else 0
    # Each part that batch norm normalises apart needs two images.
    tried = 2 * config.cohort.batch_norm_splits
    with torch.device("meta"):
        cohort = build_networks(
            config, in_chans=images.channels, image_size=size, num_classes=num_classes
        )
        check_not_shared(cohort.shared_stages, config)
        for backbone in cohort.backbones if num_classes else ():
            check_classifier(backbone, num_classes, in_chans=images.channels, image_size=size)
        method = build_method(cohort, config, Ranks(torch.device("meta")))
    loaded = load_initial_weights(cohort, config.cohort, in_chans=images.channels, image_size=size)
    with torch.device("meta"):
        activations = _activation_bytes(
            cohort, torch.zeros(tried, images.channels, size, size), config
        )
    steps = config.steps_per_epoch(images.number)
    own = [sum(p.numel() for p in backbone.parameters()) for backbone in cohort.backbones]
    parameters = sum(p.numel() for p in cohort.parameters())
    frozen = sum(p.numel() for p in cohort.parameters() if not p.requires_grad)
    each = Counter(zip(config.cohort.architectures(), own, strict=True))
    lines = [
        f"images: {images.number:,} of {images.said}, views of {size} pixels",
        *views_in_words(recipes),
        f"steps: {steps:,} in each of {config.epochs:,} epochs, {steps * config.epochs:,} in all, of "
        f"{config.images_per_step:,} images",
        f"parameters: {parameters:,} in all{f', {frozen:,} of them frozen' if frozen else ''}; "
        + ", ".join(f"{times} x {name} of {count:,}" for (name, count), times in each.items()),
        *remarks(cohort, loaded),
        _memory(config, method, activations, images),
    ]
    return Preview(lines, steps * config.epochs * config.images_per_step)


def views_in_words(recipes: Sequence[Augmentation]) -> list[str]:
    """What is done to each view, a line for all views or one for each."""
    words = [recipe.in_words() for recipe in recipes]
    if len({*words}) == 1:
        return [f"each view: {words[0]}"]
    return [f"view {number}: {each}" for number, each in enumerate(words, start=1)]


def _processes() -> int:
    """How many processes a launcher has started, or `peerlearn submit` is about to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _images(config: PretrainConfig, kind: type[Method]) -> _Images:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), without_downloads():
            data = load_training_data(config, Ranks(torch.device("cpu")), kind.labels)
    except NotHereError as error:
        return _published(config, error)
    dataset = data.train
    kind.sampler(config, dataset)
    kind.check(config, data)
    note = f" ({' '.join(said.getvalue().split())})" if said.getvalue() else ""
    return _Images(
        number=len(dataset),
        channels=dataset.channels,
        size=data.image_size,
        classes=dataset.num_classes,
        held_bytes=_held_bytes(dataset, data),
        said=f"{dataset.title} {dataset.split}{note}",
    )


def _held_bytes(dataset: ImageDataset, data: TrainingData) -> int:
    if isinstance(dataset.images, Tensor):
        return dataset.images.nbytes
    if data.backend != "memory":
        return 0
    return dataset.channels * native_size(dataset) ** 2 * len(dataset)


def _published(config: PretrainConfig, error: NotHereError) -> _Images:
    """A data set that is not on this machine, as its publishers describe it."""
    data = config.data
    known = PUBLISHED[data.name]
    if known is None or data.split not in known.images:
        raise error
    count = min(known.images[data.split], data.limit or known.images[data.split])
    if not config.steps_per_epoch(count):
        raise UserError(
            f"{count} images are fewer than one batch: lower batch_size ({config.batch_size}) or raise data.limit"
        )
    instead = f", or trains on {data.fallback} where that fails" if data.fallback else ""
    return _Images(
        number=count,
        channels=known.channels,
        size=known.size or IMAGE_FILE_SIZE,
        classes=known.classes,
        held_bytes=0
        if data.backend == "folder"
        else count * known.channels * (known.size or 0) ** 2,
        said=f"{data.name} {data.split} (not on this machine: the run downloads it{instead})",
    )


def _activation_bytes(cohort: Cohort, images: Tensor, config: PretrainConfig) -> int:
    """Size of what the passes of one image keep for the backward pass, in the run's number format."""

    def passes() -> None:
        features = cohort.branches(cohort.trunk(images))
        if cohort.heads:
            cohort.embed(features)

    # Half as many bytes in a number of 16 bits.
    share = 1 if config.precision == "fp32" else 0.5
    return int(share * bytes_kept_for_backward(cohort, passes) / len(images))


def bytes_kept_for_backward(module: nn.Module, passes: Callable[[], object]) -> int:
    """Size of what autograd keeps of passes through a module, without its parameters; also on the device "meta"."""
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage()._cdata for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        passes()
    return sum(storage.nbytes() for storage in kept.values())


def _memory(config: PretrainConfig, method: Method, activations: int, images: _Images) -> str:
    parameters = list(method.cohort.parameters())
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    optimizer = bytes_to_come(build_optimizer(method.cohort, config.optimizer, lr=config.lr))
    own = sum(t.nbytes for group in method.state_tensors().values() for t in group.values())
    # Momentum networks encode a view without gradients, unless both views are queries in turn.
    with_gradient = method.views - (method.peers is not None and not config.symmetric)
    at_once = config.images_per_step // config.accumulation_steps
    parts = {
        "weights, gradients and optimiser": weights + gradients + optimizer,
        "activations": activations * with_gradient * at_once,
    }
    if own:
        parts[f"what {config.method} keeps"] = own
    if images.held_bytes:
        parts["images"] = images.held_bytes
    has = "all networks and the whole batch" if config.parallel.is_split else "the whole batch"
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"memory: about {_size(sum(parts.values()))} where one process has {has}, beside torch itself ({listed})"


def _size(size_bytes: int) -> str:
    if size_bytes < _GIB:
        return f"{size_bytes / _MIB:,.0f} MiB"
    return f"{size_bytes / _GIB:,.1f} GiB"
