"""The network that a detector stands on: an export's stages, with every weight where it belongs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peerlearn.errors import UserError
from peerlearn.evaluation.networks import load_backbone, load_stages
from peerlearn.export import load_export
from peerlearn.networks.shared_stages import stage_names
from peerlearn.runs.export_folders import WEIGHTS_FILE

_MOST_LEVELS = 4
_CHANNELS = (1, 3)
_PROBE_SIDE = 64


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
    channels = config["input_size"][0]
    if channels not in _CHANNELS:
        raise UserError(
            f"{export} takes images of {channels} channels, a detector here takes 3 (colour) or 1 (grey): "
            "choose another network"
        )
    architecture = config["architecture"]
    if c4 and (stage_names(whole) or ())[-1:] != ("layer4",):
        raise UserError(
            f"{export}: network {architecture} is no ResNet of four stages, which model.detector d2_c4 needs: "
            "choose d2_fpn"
        )
    network: Any = load_stages(
        export, channels, images=images, stages=tuple(range(4)) if c4 else None, trained=trained
    )
    widths, strides = network.feature_info.channels(), network.feature_info.reduction()
    used = 1 if c4 else _levels(strides)
    _check_maps(export, architecture, network, channels, widths, strides, used)
    res5 = None
    if c4:
        res5 = (whole if trained else _new(load_backbone(export, channels, images=images))).layer4
    if trained:
        parts = [network] if res5 is None else [network, nn.ModuleDict({"layer4": res5})]
        _check_loaded(export, parts)
    return Body(
        network=network,
        channels=widths[-used:],
        strides=strides[-used:],
        image_channels=channels,
        mean=config["mean"],
        std=config["std"],
        architecture=architecture,
        res5=res5,
        res5_channels=whole.num_features if c4 else 0,
    )


def _new(network: Any) -> Any:
    """The same network with new weights, as timm draws them."""
    network.init_weights()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return network


def _levels(strides: Sequence[int]) -> int:
    """How many of the last maps, at most four, have strides that double; 0 where none do."""
    doubled = [2 * low == high for low, high in pairwise(strides)]
    levels = next((n for n, each in enumerate(reversed(doubled)) if not each), len(doubled)) + 1
    return min(levels, _MOST_LEVELS) if levels > 1 else 0


@torch.no_grad()
def _check_maps(
    export: Path,
    architecture: str,
    network: nn.Module,
    channels: int,
    widths: Sequence[int],
    strides: Sequence[int],
    used: int,
) -> None:
    """Refuse a network whose maps are not (B, channels, H / stride, W / stride) for images of any size."""
    side = max(_PROBE_SIDE, strides[-1])
    problem = "" if used else "its stages do not halve their maps"
    if used:
        try:
            maps = network(torch.zeros(1, channels, side, 2 * side))
        except (AssertionError, RuntimeError, ValueError):
            problem = "it takes images of one size alone"
        else:
            shapes = [tuple(each.shape[1:]) for each in maps[-used:]]
            expected = [
                (width, side // stride, 2 * side // stride)
                for width, stride in zip(widths[-used:], strides[-used:], strict=True)
            ]
            if shapes != expected:
                problem = f"its maps are {shapes}, not (channels, height, width) {expected}"
    if problem:
        raise UserError(
            f"{export}: no detector can stand on network {architecture}: {problem}: choose a ResNet, say"
        )


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
