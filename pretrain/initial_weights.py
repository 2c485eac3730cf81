"""Weights that a cohort starts from: exports, saves of runs, files, and what timm's cache holds.

Dimension: M networks.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peerlearn.backbones import size_arguments
from peerlearn.compute.dist import Ranks
from peerlearn.errors import UserError
from peerlearn.export import export_hash, load_export
from peerlearn.runs.checkpoint import check_whole, saved_steps
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import WEIGHTS_FILE, exported_networks, is_export
from peerlearn.runs.export_log import last_steps
from peerlearn.runs.files import file_sha256, load_tensors
from peerlearn.runs.step_folders import step_folder
from pretrain.cohort import Cohort
from pretrain.config import RANDOM, TIMM, CohortConfig

_NETWORKS_FILE = "networks.safetensors"
# The modules of a cohort in such a file, by the part of a network that they are.
_GROUPS = {"backbone": "backbones", "head": "heads", "classifier": "classifiers"}
_NUMBERED = re.compile(rf"(?:{'|'.join(_GROUPS.values())})\.(\d+)\.")
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


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What one network has started from, for env.json and the model card.

    Attributes:
        network: number of the network.
        source: place that the weights lay in.
        sha256: SHA-256 of the file, or of the export, in hex.
        matched: number of tensors that were loaded.
        missing: names of tensors that keep their random values, because the source lacks them.
        unused: names of tensors of the source that the network has no place for.
    """

    network: int
    source: str
    sha256: str
    matched: int
    missing: list[str]
    unused: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def on_card(self) -> str:
        """What the card of an export tells: no path."""
        return (
            f"weights of SHA-256 {self.sha256}, {self.matched} tensors, {len(self.missing)} missing"
        )

    def lacks(self, part: str) -> bool:
        """Whether a part of the network, such as its head, keeps random values."""
        return any(name.startswith(f"{part}.") for name in self.missing)

    def in_words(self) -> str:
        """One line for people."""
        new = [part for part in ("head", "classifier") if self.lacks(part)]
        statistics = sum(name.startswith("backbone.") for name in self.missing)
        told = [f"{self.matched} tensors"]
        told += [f"new {' and '.join(new)}"] if new else []
        told += [f"{statistics} statistics are missing there"] if statistics else []
        told += [f"{len(self.unused)} not used, first {self.unused[0]!r}"] if self.unused else []
        return f"network {self.network} starts from {self.source} (SHA-256 {self.sha256[:12]}, {', '.join(told)})"


def load_initial_weights(
    cohort: Cohort, config: CohortConfig, *, in_chans: int, image_size: int
) -> list[InitialWeights]:
    """Give the networks of a cohort the weights that ``config.init`` names, in place.

    Every parameter of a backbone must be in its source. Statistics of batch norms may be missing. A projection head and
    a classifier are loaded where the source holds them in the right shape, unless two networks start from the same
    weights: their heads must differ, or they would stay alike for ever.

    Args:
        cohort: networks of `pretrain.cohort.build_cohort`; on the device "meta" the sources are checked alone.
        config: config that the networks were built by.
        in_chans: number of channels of the images.
        image_size: side of the images in pixels.

    Returns:
        What was loaded, of each network that has a source.

    Raises:
        UserError: a source is not there, damaged, or does not fit the network. The message names the fix.
    """
    sources = [
        _read(word, m, config.architectures()[m], backbone, image_size=image_size)
        for m, (word, backbone) in enumerate(zip(config.initial(), cohort.backbones, strict=True))
    ]
    given = [source for source in sources if source]
    if cohort.shared_stages and 0 < len(given) < len(sources):
        raise UserError(
            f"cohort.init: networks that share stages start from weights together, and some of {config.init} are "
            f"{RANDOM}: set cohort.share_stages to 0, or name weights for all"
        )
    times = Counter(source.identity for source in given)
    loaded = [
        _load(cohort, m, source, in_chans=in_chans, with_parts=times[source.identity] == 1)
        for m, source in enumerate(sources)
        if source
    ]
    if cohort.shared_stages:
        for m, source in enumerate(sources):
            if source and not _holds(cohort.backbones[m], source):
                raise UserError(
                    f"cohort.init: the networks share stages, and network {m} has other weights there than the last "
                    "one: set cohort.share_stages to 0, or name the same weights for all"
                )
    return loaded


def initial_weights_of(state: Mapping[str, Any]) -> list[InitialWeights]:
    """What the networks of a save started from; saves of earlier versions do not tell it."""
    return [InitialWeights(**facts) for facts in state.get("initial_weights", ())]


def check_alike(loaded: Sequence[InitialWeights], ranks: Ranks) -> None:
    """Make sure that all ranks have loaded the same bytes.

    Raises:
        UserError: they have not, as with a cache of its own on every node.
    """
    hashes = ranks.collect([each.sha256 for each in loaded])
    if any(each != hashes[0] for each in hashes):
        raise UserError(
            "cohort.init: the processes have read unlike weights: name a file or a folder that all of them see"
        )


def remarks(cohort: Cohort, loaded: Sequence[InitialWeights]) -> Iterator[str]:
    """What users should know of how the networks start: a line each."""
    by_network = {each.network: each for each in loaded}
    yield from (each.in_words() for each in loaded)
    alike: dict[str, list[str]] = {}
    for each in loaded:
        alike.setdefault(each.source + each.sha256, []).append(str(each.network))
    for numbers in alike.values():
        if len(numbers) > 1:
            yield (
                f"networks {', '.join(numbers)} start alike but for heads of their own: peers teach each other more "
                "where they differ"
            )
    for m in sorted(cohort.frozen):
        if m not in by_network:
            yield (
                f"network {m} is frozen and random: it teaches what no training has taught it; give it weights by "
                "cohort.init"
            )
        elif by_network[m].lacks("head"):
            yield (
                f"network {m} is frozen with a new projection head: it teaches by a random projection of its features"
            )


def _read(
    word: str, network: int, name: str, backbone: nn.Module, *, image_size: int
) -> Source | None:
    """What a word of ``cohort.init`` means for the network of that number and architecture."""
    if word == RANDOM:
        return None
    if word == TIMM:
        return _of_timm(name, backbone, image_size=image_size)
    path = Path(word)
    try:
        if path.is_file():
            return _of_file(path, network, backbone)
        if is_export(path):
            return _of_export(path, backbone)
        if RunDirectory(path).begun:
            return _of_run(path, network, backbone)
        if (path / _NETWORKS_FILE).is_file():
            return _of_save(path, network, backbone)
        if exported := exported_networks(path):
            return _of_export(_chosen(exported, network, path), backbone)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cohort.init: {path} cannot be read ({error})") from error
    what = "holds no networks" if path.exists() else "is not there"
    raise UserError(f"cohort.init: {word} {what}; give {_KINDS}")


def _of_run(run: Path, network: int, backbone: nn.Module) -> Source:
    """The newest save that is whole, for it has heads; the last exports where there is none."""
    directory = RunDirectory(run)
    for save in saved_steps(directory.checkpoints):
        try:
            check_whole(save)
        except UserError as error:
            logger.warning("cohort.init: passed over a damaged save: %s", error)
            continue
        return _of_save(save, network, backbone)
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


def _of_save(folder: Path, network: int, backbone: nn.Module) -> Source:
    check_whole(folder)
    return _of_file(folder / _NETWORKS_FILE, network, backbone)


def _of_file(file: Path, network: int, backbone: nn.Module) -> Source:
    """A file of one network, by timm's names, or of the networks of a cohort."""
    if file.suffix != ".safetensors":
        raise UserError(
            f"cohort.init: {file} is no safetensors file: `peerlearn import {file}` makes networks of it that can be "
            "named here"
        )
    tensors, sha256 = load_tensors(file), file_sha256(file)
    if not any(name.startswith("backbones.") for name in tensors):
        return Source(
            title=str(file), sha256=sha256, identity=sha256, tensors=_by_part(tensors, backbone)
        )
    numbers = {match[1] for name in tensors if (match := _NUMBERED.match(name))}
    if str(network) not in numbers:
        raise UserError(
            f"cohort.init: {file} has networks {', '.join(sorted(numbers, key=int))} and none for network {network}: "
            f"name weights for each network, or {RANDOM}"
        )
    own = {part: _below(tensors, f"{group}.{network}.") for part, group in _GROUPS.items()}
    # What networks share is saved with the first of them.
    names = backbone.state_dict()
    shared = {n: t for n, t in _below(tensors, "backbones.0.").items() if n in names}
    own["backbone"] = shared | own["backbone"]
    return Source(
        title=f"network {network} of {file}",
        sha256=sha256,
        identity=f"{sha256} {network}",
        tensors={f"{part}.{name}": t for part, given in own.items() for name, t in given.items()},
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


@torch.no_grad()
def _load(
    cohort: Cohort, network: int, source: Source, *, in_chans: int, with_parts: bool
) -> InitialWeights:
    """Copy a source into one network: its backbone, and each further part if all of it fits."""
    loaded: list[str] = []
    missing: list[str] = []
    for kind, part in cohort.parts(network):
        own = {f"{kind}.{name}": tensor for name, tensor in part.state_dict().items()}
        if kind == "backbone":
            _check_fit(part, network, source, in_chans=in_chans)
        elif not (with_parts and all(_fits(source, name, tensor) for name, tensor in own.items())):
            missing += own
            continue
        missing += [name for name in own if name not in source.tensors]
        for name in own.keys() & source.tensors.keys():
            own[name].copy_(source.tensors[name])
            loaded.append(name)
    return InitialWeights(
        network=network,
        source=source.title,
        sha256=source.sha256,
        matched=len(loaded),
        missing=missing,
        unused=[name for name in source.tensors if name not in loaded],
    )


def _fits(source: Source, name: str, own: Tensor) -> bool:
    given = source.tensors.get(name)
    return given is not None and given.shape == own.shape


def _check_fit(backbone: nn.Module, network: int, source: Source, *, in_chans: int) -> None:
    """Make sure that the source holds every parameter of the backbone, in its shape.

    Raises:
        UserError: it does not. The message names the key to change.
    """
    where = f"cohort.init: {source.title} does not fit network {network}"
    own: Any = backbone.pretrained_cfg
    parameters = dict(backbone.named_parameters())
    first = next(name for name, tensor in parameters.items() if tensor.ndim > 1)
    given = source.tensors.get(f"backbone.{first}")
    if given is not None and given.ndim == parameters[first].ndim > 2:
        channels, kernel = given.shape[1], tuple(given.shape[2:])
        if channels != parameters[first].shape[1]:
            raise UserError(
                f"{where}: it takes images of {channels} channels, and these have {in_chans}: name weights for "
                f"{in_chans} channels, or {RANDOM}"
            )
        if kernel != tuple(parameters[first].shape[2:]):
            small = "true" if kernel[0] <= 3 else "false"
            raise UserError(
                f"{where}: its first layer is {' x '.join(map(str, kernel))} pixels wide: set cohort.small_images "
                f"to {small}"
            )
    if source.architecture is not None and source.architecture != own["architecture"]:
        raise UserError(
            f"{where}: it is {source.architecture}, not {own['architecture']}: name its architecture in "
            "cohort.backbones (and cohort.small_images)"
        )
    for name, tensor in parameters.items():
        if not _fits(source, f"backbone.{name}", tensor):
            there = source.tensors.get(f"backbone.{name}")
            shape = (
                "missing" if there is None else f"{tuple(there.shape)}, not {tuple(tensor.shape)}"
            )
            raise UserError(
                f"{where} ({own['architecture']}): {name!r} is {shape}: name its architecture in cohort.backbones, "
                "and its size in data.image_size"
            )


def _holds(backbone: nn.Module, source: Source) -> bool:
    """Whether the backbone has these weights; on the device "meta" nobody can tell."""
    return all(
        tensor.is_meta or torch.equal(tensor.cpu(), given.to(tensor.dtype))
        for name, tensor in backbone.state_dict().items()
        if (given := source.tensors.get(f"backbone.{name}")) is not None
    )
