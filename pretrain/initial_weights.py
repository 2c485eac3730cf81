"""Weights that a cohort starts from: loaded into its networks, checked, and told."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from pretrain.cohort import Cohort, named_state
from pretrain.cohort_config import RANDOM, CohortConfig
from pretrain.weight_sources import Source, read_source

# The name of the event that tells what the networks of a run have started from.
INITIAL_WEIGHTS = "initial_weights"


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
        read_source(word, m, config.architectures()[m], backbone, image_size=image_size)
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
    if cohort.shared_stages and given:
        _check_shared(cohort, given)
    return loaded


def _check_shared(cohort: Cohort, sources: Sequence[Source]) -> None:
    """Make sure that the networks start from the same weights where they share them.

    Raises:
        UserError: they do not.
    """
    first = named_state(cohort.backbones[0])
    for m, (backbone, source) in enumerate(zip(cohort.backbones, sources, strict=True)):
        for name, tensor in named_state(backbone).items():
            values = [each.tensors.get(f"backbone.{name}") for each in (sources[0], source)]
            if tensor is first[name] and not _equal(*values):
                raise UserError(
                    f"cohort.init: the networks share stages, and network {m} has other weights there than network 0: "
                    "set cohort.share_stages to 0, or name the same weights for all"
                )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


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


def check_unchanged(loaded: Sequence[InitialWeights], run: RunDirectory) -> None:
    """Make sure that a run that starts over begins from the weights that it began from before.

    Raises:
        UserError: a source holds others by now.
    """
    before = next(iter(run.events(INITIAL_WEIGHTS)), None)
    if before is None:
        return
    hashes = {each["network"]: each["sha256"] for each in before["networks"]}
    for each in loaded:
        if hashes.get(each.network, each.sha256) != each.sha256:
            raise UserError(
                f"cohort.init: {each.source} holds other weights than those that {run.root} began from (SHA-256 "
                f"{hashes[each.network][:12]}): restore them, or start a new run"
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
        for name, tensor in own.items():
            if _fits(source, name, tensor):
                tensor.copy_(source.tensors[name])
                loaded.append(name)
            else:
                missing.append(name)
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
