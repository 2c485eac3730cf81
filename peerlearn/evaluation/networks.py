"""Exported networks, ready to see a dataset."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.evaluation.features import eval_mode
from peerlearn.export import load_export


def load_backbones(folders: Mapping[str, Path], dataset: ImageDataset) -> dict[str, nn.Module]:
    """The networks of the exports, in eval mode on the CPU.

    Raises:
        UserError: one cannot be loaded, or takes other channels than the dataset has.
    """
    backbones = {}
    for name, folder in folders.items():
        backbone: Any = load_export(folder)
        channels = backbone.pretrained_cfg["input_size"][0]
        if channels != dataset.channels:
            raise UserError(
                f"{folder} takes {channels} channels, {dataset.name} has {dataset.channels}: "
                "choose another dataset by --data.name"
            )
        backbones[name] = backbone
    return backbones


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
