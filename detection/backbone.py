"""The network that a detector stands on: an export's stages, with every weight where it belongs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.resnet import ResNet
from torch import Tensor, nn

from peerlearn.backbones import create_backbone
from peerlearn.errors import UserError
from peerlearn.evaluation.networks import load_stages, new_stages
from peerlearn.export import load_export
from peerlearn.runs.export_folders import WEIGHTS_FILE

_MOST_LEVELS = 4
_CHANNELS = (1, 3)
_PROBE_SIDE = 64
# The stem and the first three stages of a ResNet, as timm counts them.
_C4_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Body:
    """A network without its classifier, and how it sees images.

    Attributes:
        network: module from images (B, channels, H, W) to feature maps, of which the last ones are used.
        channels: channels of the maps that are used, finest first.
        strides: strides of these maps in pixels, each twice the one before.
        image_channels: number of channels of its images.
        mean: mean of the images that it was trained on, in [0, 1].
        std: standard deviation of these images.
        architecture: name of the network.
        image_size: side of these images in pixels.
        res5: last stage of a ResNet, where ``network`` ends before it; None where it does not.
        res5_channels: channels of that stage's map; 0 without.
    """

    network: nn.Module
    channels: list[int]
    strides: list[int]
    image_channels: int
    mean: Sequence[float]
    std: Sequence[float]
    architecture: str
    image_size: int
    res5: nn.Module | None = None
    res5_channels: int = 0


def load_body(export: Path, *, images: str, c4: bool, trained: bool) -> Body:
    """The network of an export for a detector.

    Args:
        export: folder of the export.
        images: name of the images' dataset.
        c4: whether it ends before its last stage, which becomes the detector's head.
        trained: whether it has the exported weights, or new ones from torch's global generator.

    Raises:
        UserError: the export cannot be read, its network has no stages that a detector can use, it takes other images
            than colour or grey ones, or a weight did not come where it belongs.
    """
    whole: Any = load_export(export)
    config = whole.pretrained_cfg
    channels, image_size, _ = config["input_size"]
    if channels not in _CHANNELS:
        raise UserError(
            f"{export} takes images of {channels} channels, a detector here takes 3 (colour) or 1 (grey): "
            "choose another network"
        )
    if not trained:
        return new_body(
            config["architecture"],
            channels=channels,
            image_size=image_size,
            mean=config["mean"],
            std=config["std"],
            c4=c4,
        )
    network = load_stages(export, channels, images=images, stages=_C4_STAGES if c4 else None)
    body = _body(network, whole, c4=c4)
    _check_loaded(export, [network, *([nn.ModuleDict({"layer4": body.res5})] if body.res5 else [])])
    return body


def new_body(
    architecture: str,
    *,
    channels: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    c4: bool,
) -> Body:
    """The same as `load_body`, with new weights from torch's global generator.

    Args:
        architecture: name of the network.
        channels: channels of its images.
        image_size: side of the images that it was made for, in pixels.
        mean: mean of these images, in [0, 1].
        std: standard deviation of these images.
        c4: as for `load_body`.

    Raises:
        UserError: no detector can stand on the network.
    """
    whole: Any = create_backbone(architecture, in_chans=channels, image_size=image_size)
    whole.pretrained_cfg = {
        **whole.pretrained_cfg,
        "architecture": architecture,
        "input_size": (channels, image_size, image_size),
        "mean": mean,
        "std": std,
    }
    network = new_stages(whole.pretrained_cfg, stages=_C4_STAGES if c4 else None)
    return _body(network, whole, c4=c4)


def _body(network: Any, whole: Any, *, c4: bool) -> Body:
    """What a detector needs of a network that shows its stages, and of the same network as a whole."""
    config = whole.pretrained_cfg
    architecture, (channels, image_size, _) = config["architecture"], config["input_size"]
    if c4 and not isinstance(whole, ResNet):
        raise UserError(
            f"network {architecture} is no ResNet of timm, which model.detector d2_c4 needs: choose d2_fpn"
        )
    widths, strides = network.feature_info.channels(), network.feature_info.reduction()
    used = 1 if c4 else _levels(strides)
    if problem := _problem(network, channels, widths[-used:], strides[-used:], used):
        raise UserError(
            f"no detector can stand on network {architecture}: {problem}: choose a ResNet, say"
        )
    return Body(
        network=network,
        channels=widths[-used:],
        strides=strides[-used:],
        image_channels=channels,
        mean=config["mean"],
        std=config["std"],
        architecture=architecture,
        image_size=image_size,
        res5=whole.layer4 if c4 else None,
        res5_channels=whole.num_features if c4 else 0,
    )


def _levels(strides: Sequence[int]) -> int:
    """How many of the last maps, at most four, have strides that double; 0 where none do."""
    doubled = [2 * low == high for low, high in pairwise(strides)]
    levels = next((n for n, each in enumerate(reversed(doubled)) if not each), len(doubled)) + 1
    return min(levels, _MOST_LEVELS) if levels > 1 else 0


@torch.no_grad()
def _problem(
    network: nn.Module, channels: int, widths: Sequence[int], strides: Sequence[int], used: int
) -> str:
    """Why the last maps of a network are not (B, channels, H / stride, W / stride) for images of any size; "" if so."""
    if not used:
        return "its stages do not halve their maps"
    side = max(_PROBE_SIDE, strides[-1])
    training = network.training
    try:
        maps = network.eval()(torch.zeros(1, channels, side, 2 * side))[-used:]
    except (AssertionError, RuntimeError, ValueError):
        return "it takes images of one size alone"
    finally:
        network.train(training)
    shapes = [tuple(each.shape[1:]) for each in maps]
    expected = [
        (width, side // stride, 2 * side // stride)
        for width, stride in zip(widths, strides, strict=True)
    ]
    return "" if shapes == expected else f"its maps are {shapes}, not {expected}"


def _check_loaded(export: Path, parts: Sequence[nn.Module]) -> None:
    """Make sure that every tensor of the parts is that of the file: what did not load would cost half the AP unseen."""
    # timm's feature extractor joins some levels of the names.
    stored = {_flat(name): tensor for name, tensor in load_file(export / WEIGHTS_FILE).items()}
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= part.state_dict()
    wrong = [
        name
        for name, tensor in tensors.items()
        if _flat(name) not in stored or not torch.equal(stored[_flat(name)], tensor)
    ]
    if wrong:
        raise UserError(
            f"{export / WEIGHTS_FILE}: {len(wrong)} of {len(tensors)} tensors did not come into the detector's "
            f"network, the first is {wrong[0]}: export the run again"
        )


def _flat(name: str) -> str:
    return name.replace(".", "_")
