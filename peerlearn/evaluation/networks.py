"""Exported networks, ready to see a dataset."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

from peerlearn.backbones import size_arguments
from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.evaluation.features import eval_mode
from peerlearn.export import load_export
from peerlearn.runs.export_folders import WEIGHTS_FILE


def load_backbones(
    folders: Mapping[str, Path], channels: int, *, images: str
) -> dict[str, nn.Module]:
    """`load_backbone` of every export, by the networks' names."""
    return {
        name: load_backbone(folder, channels, images=images) for name, folder in folders.items()
    }


def load_backbone(folder: Path, channels: int, *, images: str) -> nn.Module:
    """The network of an export, in eval mode on the CPU.

    Args:
        folder: the export.
        channels: channels of the images that the network is to see.
        images: name of those images' dataset.

    Raises:
        UserError: it cannot be loaded, or takes other channels.
    """
    backbone: Any = load_export(folder)
    expected = backbone.pretrained_cfg["input_size"][0]
    if expected != channels:
        raise UserError(
            f"{folder} takes {expected} channels, {images} has {channels}: "
            "choose another dataset by --data.name"
        )
    return cast(nn.Module, backbone)


def load_stages(
    folder: Path,
    channels: int,
    *,
    images: str,
    stages: tuple[int, ...] | None = None,
) -> nn.Module:
    """The network of an export as one that shows its stages, for a feature pyramid; in eval mode on the CPU.

    Args:
        folder: the export.
        channels: channels of the images that the network is to see.
        images: name of those images' dataset.
        stages: numbers of the stages that it shows, as timm counts them; None = all.

    Returns:
        A module from images (B, channels, H, W) to a list of feature maps (B, C_i, H / R_i, W / R_i), finest first.
        Its `feature_info.channels()` are the C_i, its `feature_info.reduction()` the R_i. (Maps of a few timm networks,
        Swin among them, are (B, H / R_i, W / R_i, C_i).)

    Raises:
        UserError: as `load_backbone` does; or the network has no stages to show.
    """
    # First, because timm would load a damaged file in silence.
    backbone: Any = load_backbone(folder, channels, images=images)
    config = {**backbone.pretrained_cfg, "file": str(folder / WEIGHTS_FILE)}
    try:
        return _stages(config, stages, pretrained=True)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def new_stages(
    pretrained_cfg: Mapping[str, Any], *, stages: tuple[int, ...] | None = None
) -> nn.Module:
    """As `load_stages` of an export with this config, but with new weights from torch's global generator.

    Raises:
        UserError: the network has no stages to show.
    """
    return _stages(pretrained_cfg, stages, pretrained=False)


def _stages(
    config: Mapping[str, Any], stages: tuple[int, ...] | None, *, pretrained: bool
) -> nn.Module:
    architecture, (channels, image_size, _) = config["architecture"], config["input_size"]
    shown: Any = {} if stages is None else {"out_indices": stages}
    try:
        network = timm.create_model(
            architecture,
            pretrained=pretrained,
            pretrained_cfg=dict(config),
            features_only=True,
            in_chans=channels,
            **shown,
            **size_arguments(architecture, image_size),
        )
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"network {architecture} does not show its stages ({reason}): choose another network"
        ) from error
    return network.eval()


def seen_by(backbone: Any, dataset: ImageDataset) -> tuple[ImageDataset, int]:
    """The dataset normalised as the network's training images were, and the side it wants them to have, in pixels."""
    config = backbone.pretrained_cfg
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    return dataclasses.replace(dataset, mean=mean, std=std), int(config["input_size"][1])


def by_input(
    backbones: Mapping[str, nn.Module], dataset: ImageDataset
) -> list[tuple[ImageDataset, int, list[str]]]:
    """Networks that see the same views, which need be made only once: the dataset for them, its size, their names."""
    groups: dict[Any, tuple[ImageDataset, int, list[str]]] = {}
    for name, backbone in backbones.items():
        view, size = seen_by(backbone, dataset)
        groups.setdefault((view.mean, view.std, size), (view, size, []))[2].append(name)
    return list(groups.values())


@contextmanager
def frozen(backbones: Sequence[nn.Module]) -> Iterator[None]:
    """Run the networks in eval mode, and see to it that they are afterwards what they were before.

    Raises:
        RuntimeError: a parameter or a buffer, batch-norm statistics too, has changed: no score of it can stand.
    """
    before = weights_hash(backbones)
    with eval_mode(backbones):
        yield
    if weights_hash(backbones) != before:
        raise RuntimeError("the weights of a frozen network have changed")


def weights_hash(backbones: Sequence[nn.Module]) -> str:
    """SHA-256, in hex, of every parameter and buffer: whether frozen networks, batch-norm statistics too, stayed so."""
    digest = hashlib.sha256()
    for backbone in backbones:
        for name, tensor in backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
