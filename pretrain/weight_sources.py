"""Where the weights lie that networks start from: exports, saves of runs, files, and what timm's cache holds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peerlearn.backbones import create_backbone, size_arguments
from peerlearn.errors import UserError
from peerlearn.export import export_hash, load_export
from peerlearn.runs.checkpoint import check_whole, read_state, saved_steps
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import WEIGHTS_FILE, exported_networks, is_export
from peerlearn.runs.export_log import last_steps
from peerlearn.runs.files import file_sha256, load_tensors
from peerlearn.runs.step_folders import step_folder
from pretrain.cohort_config import RANDOM, TIMM, for_each

_NETWORKS_FILE = "networks.safetensors"
# The modules of a cohort in such a file, by the part of a network that they are.
_GROUPS = {"backbone": "backbones", "head": "heads", "classifier": "classifiers"}
_KINDS = "RUN, RUN/export/step-N, one network's folder, FILE.safetensors, timm or random"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors that one network starts from.

    Attributes:
        title: words for people that name the place.
        sha256: SHA-256 of the file, or of the export, in hex.
        identity: text that two networks with the same weights have in common.
        tensors: tensors by part of the network and name: backbone.conv1.weight, head.weight, classifier.weight.
        architecture: timm's name of the network; None where the source does not tell.
    """

    title: str
    sha256: str
    identity: str
    tensors: Mapping[str, Tensor]
    architecture: str | None = None


def read_source(
    word: str, network: int, name: str, backbone: nn.Module, *, image_size: int
) -> Source | None:
    """What a word of ``cohort.init`` means for one network; None for random weights.

    Args:
        word: word of ``cohort.init``.
        network: number of the network.
        name: name of its architecture, as in ``cohort.backbones``.
        backbone: the network, whose tensors are only looked at.
        image_size: side of the images in pixels.

    Raises:
        UserError: nothing is there, it is damaged, or it holds no such network.
    """
    if word == RANDOM:
        return None
    if word == TIMM:
        return _of_timm(name, backbone, image_size=image_size)
    path = Path(word)
    try:
        if path.is_file():
            return _of_file(path, network, backbone, image_size)
        if is_export(path):
            return _of_export(path, backbone)
        if RunDirectory(path).begun:
            return _of_run(path, network, backbone, image_size)
        if (path / _NETWORKS_FILE).is_file():
            return _of_save(path, network, image_size)
        if exported := exported_networks(path):
            return _of_export(_chosen(exported, network, path), backbone)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cohort.init: {path} cannot be read ({error})") from error
    what = "holds no networks" if path.exists() else "is not there"
    raise UserError(f"cohort.init: {word} {what}; give {_KINDS}")


def _of_run(run: Path, network: int, backbone: nn.Module, image_size: int) -> Source:
    """The newest save that is whole, for it has heads; the last exports where there is none."""
    directory = RunDirectory(run)
    for save in saved_steps(directory.checkpoints):
        try:
            check_whole(save)
        except UserError as error:
            logger.warning("cohort.init: passed over a damaged save: %s", error)
            continue
        return _of_save(save, network, image_size)
    steps = last_steps(directory)
    folder = directory.exports / step_folder(steps[0]) if steps else directory.exports
    exported = exported_networks(folder)
    if not exported:
        raise UserError(f"cohort.init: {run} has neither saved nor exported networks yet")
    return _of_export(_chosen(exported, network, folder), backbone)


def _chosen(exported: Mapping[str, Path], network: int, folder: Path) -> Path:
    if str(network) not in exported:
        raise UserError(
            f"cohort.init: {folder} has networks {', '.join(exported)} and none for network {network}: name one "
            f"folder for each, such as {folder}/net-0"
        )
    return exported[str(network)]


def _of_export(folder: Path, backbone: nn.Module) -> Source:
    exported: Any = load_export(folder)
    sha256 = export_hash(folder)
    return Source(
        title=str(folder),
        sha256=sha256,
        identity=sha256,
        tensors=_by_part(load_tensors(folder / WEIGHTS_FILE), backbone),
        architecture=str(exported.pretrained_cfg["architecture"]),
    )


def _of_file(file: Path, network: int, backbone: nn.Module, image_size: int) -> Source:
    """A file of one network, by timm's names, or that of a save."""
    if file.name == _NETWORKS_FILE:
        return _of_save(file.parent, network, image_size)
    if file.suffix != ".safetensors":
        raise UserError(
            f"cohort.init: {file} is no safetensors file: `peerlearn import {file}` makes networks of it that can be "
            "named here"
        )
    sha256 = file_sha256(file)
    return Source(
        title=str(file),
        sha256=sha256,
        identity=sha256,
        tensors=_by_part(load_tensors(file), backbone),
    )


def _of_save(folder: Path, network: int, image_size: int) -> Source:
    """One network of a save of this project."""
    check_whole(folder)
    file = folder / _NETWORKS_FILE
    try:
        cohort = read_state(folder)["config"]["cohort"]
        names = for_each(cohort["backbones"], cohort["networks"])
        small_images = bool(cohort["small_images"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"cohort.init: {folder} was written by another version of peerlearn: name its exports"
        ) from error
    if network >= len(names):
        numbers = ", ".join(map(str, range(len(names))))
        raise UserError(
            f"cohort.init: {file} has networks {numbers} and none for network {network}: name weights for each "
            f"network, or {RANDOM}"
        )
    with torch.device("meta"):
        saved: Any = create_backbone(
            names[network], small_images=small_images, image_size=image_size
        )
    tensors, sha256 = load_tensors(file), file_sha256(file)
    own = {part: _below(tensors, f"{group}.{network}.") for part, group in _GROUPS.items()}
    # What networks share is saved with the first of them, and networks that share are of one architecture.
    if len({*names}) == 1:
        own["backbone"] = _below(tensors, "backbones.0.") | own["backbone"]
    return Source(
        title=f"network {network} of {file}",
        sha256=sha256,
        identity=f"{sha256} {network}",
        tensors={f"{part}.{name}": t for part, given in own.items() for name, t in given.items()},
        architecture=str(saved.pretrained_cfg["architecture"]),
    )


def _by_part(tensors: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A state dict by timm's names, whose classifier is a part of its own."""
    registered: Any = backbone.pretrained_cfg
    prefix = f"{registered.get('classifier')}."
    return {
        f"classifier.{name.removeprefix(prefix)}"
        if name.startswith(prefix)
        else f"backbone.{name}": t
        for name, t in tensors.items()
    }


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _of_timm(name: str, backbone: nn.Module, *, image_size: int) -> Source:
    """Published weights that timm's cache holds. The internet is not asked for them."""
    file = _cached_file(name)
    try:
        published: Any = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file)},
            **size_arguments(name, image_size),
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"cohort.init: {file} cannot be loaded by timm ({error})") from error
    sha256 = file_sha256(file)
    return Source(
        title=f"timm's {name}.{published.pretrained_cfg['tag']}",
        sha256=sha256,
        identity=sha256,
        tensors=_by_part(published.state_dict(), backbone),
    )


def _cached_file(name: str) -> Path:
    """The file of a network's published weights in the cache of huggingface_hub, or in that of torch.hub."""
    from huggingface_hub import try_to_load_from_cache

    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if published is None or not published.has_weights:
        raise UserError(f"cohort.init: timm has no weights of {name}; give {_KINDS}")
    if published.hf_hub_id:
        repository, _, revision = published.hf_hub_id.partition("@")
        for kind in (WEIGHTS_FILE, "pytorch_model.bin"):
            found = try_to_load_from_cache(
                repository, published.hf_hub_filename or kind, revision=revision or None
            )
            if isinstance(found, str):
                return Path(found)
    if published.url:
        file = Path(f"{torch.hub.get_dir()}/checkpoints/{Path(str(published.url)).name}")
        if file.is_file():
            return file
    raise UserError(
        f"cohort.init: the weights of {name} are not in timm's cache on this machine; where there is a network, this "
        f"fetches them: python -c \"import timm; timm.create_model('{name}', pretrained=True)\""
    )
