"""Checkpoints of other programs, as networks of ours.

The shapes of the tensors tell the network, as far as they can (`ForeignNetwork.untold`);
`peerlearn.exchange.foreign_layouts` tells where in the file it is.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from peerlearn.backbones import TIMM_NETWORKS, create_backbone, size_arguments
from peerlearn.errors import UserError
from peerlearn.exchange.export_formats import RESNETS, ResNetShape
from peerlearn.exchange.foreign_files import load_file, printable
from peerlearn.exchange.foreign_layouts import FoundNetworks, KnownNetwork, Part, find_networks
from peerlearn.export import state_misfits
from peerlearn.networks.cifar import CIFAR_NETWORKS

# No camera has more channels. Without a limit, a file could ask for a network of any size.
_MOST_CHANNELS = 1024

_ANY_NETWORK = "--architecture NAME reads any network of timm by timm's names"


@dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """A whole network of a file.

    Attributes:
        name: name for ``--network``: "0", "1", "key-0", ...
        source: name of the network in the file.
        prefix: what was stripped from the names of its tensors.
        architecture: name of the network for `create_backbone`.
        in_chans: channels of the images.
        small_images: whether the network has a small-image stem.
        image_size: height and width of the images that it is built for; None = any.
        backbone: the network with the file's weights.
        matched: number of tensors that the network took from the file, which is all it has.
        counted: whether the file has batch norm's counters of batches; without them they are 0.
        untold: what the tensors do not tell, and how it was taken.
    """

    name: str
    source: str
    prefix: str
    architecture: str
    in_chans: int
    small_images: bool
    image_size: int | None
    backbone: nn.Module
    matched: int
    counted: bool
    untold: str


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """The content of a file.

    Attributes:
        layout: name of the program that wrote it, in words.
        networks: query networks and momentum networks.
        left_out: first part of a name -> number of tensors that belong to no backbone; heads are counted together.
        not_read: names of the other entries beside the networks: optimizer, epoch, ...
    """

    layout: str
    networks: tuple[ForeignNetwork, ...]
    left_out: dict[str, int]
    not_read: tuple[str, ...]


def read_foreign(
    file: Path, *, architecture: str | None = None, image_size: int | None = None
) -> ForeignCheckpoint:
    """Read a .pth, .pt, .tar, .ckpt or .safetensors file and find the networks in it.

    Args:
        file: file to read.
        architecture: name of the network for `create_backbone`; None = the tensors, and a name beside them, tell.
        image_size: height and width of the images for networks that are built for one size; None = their default.

    Raises:
        UserError: the file cannot be read, holds more than plain data or has an unknown layout; or a network is
            unknown, is not the one that is asked for or that the file names, has missing, superfluous or misshapen
            tensors, or holds NaN or Inf.
    """
    content = load_file(file)
    given = None if architecture is None else _Given(architecture, image_size)
    found = find_networks(content)
    if given and not found.parts:
        found = find_networks(content, given.known)
    if not found.parts:
        raise _none_found(file, found)
    beside = _named_architecture(content)
    networks = tuple(
        _build(file, name, part, given=given, beside=beside) for name, part in found.parts.items()
    )
    return ForeignCheckpoint(
        layout=found.layout,
        networks=networks,
        left_out=found.left_out,
        not_read=found.not_read,
    )


def _none_found(file: Path, found: FoundNetworks) -> UserError:
    if found.first is None:
        return UserError(f"{file} holds no state dict: no tensors by name, however deep")
    return UserError(
        f"{file} is none of the networks that can be imported, ResNets and wide ResNets by the names of torchvision, "
        f"timm and the MCL authors: its first tensor is {printable(found.first)}; {_ANY_NETWORK}"
    )


class _Given:
    """The network of --architecture.

    Attributes:
        name: its name for `create_backbone`.
        state: its tensors by our names, without numbers in them.
        known: what it is looked for by.
        image_size: height and width of the images that it is built for; None = any.
    """

    def __init__(self, name: str, image_size: int | None) -> None:
        with torch.device("meta"):
            network: Any = create_backbone(name, image_size=image_size)
        config = network.pretrained_cfg
        self.name = name
        self.state: dict[str, Tensor] = network.state_dict()
        classifiers = config.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
        self.known = KnownNetwork(
            tuple(self.state), tuple(f"{classifier}." for classifier in classifiers)
        )
        default = image_size or config["input_size"][1]
        fixed = bool(size_arguments(config["architecture"], default))
        self.image_size = default if fixed else None


def _named_architecture(content: Any) -> str | None:
    """The name of a network beside the weights: arch, args.arch, hyper_parameters.backbone or the like."""
    holders = (_entry(content, key) for key in ("args", "opt", "config", "hyper_parameters"))
    for holder in (content, *holders):
        for key in ("arch", "architecture", "backbone", "encoder", "model_name", "model"):
            value = _entry(holder, key)
            name = value if isinstance(value, str) else _entry(value, "name")
            if isinstance(name, str):
                return name
    return None


def _entry(holder: Any, key: str) -> Any:
    """An item or attribute of what the file holds; None if it has none."""
    if not isinstance(holder, Mapping):
        return None
    return holder.get(key, getattr(holder, "__dict__", {}).get(key))


def _build(
    file: Path, name: str, part: Part, *, given: _Given | None, beside: str | None
) -> ForeignNetwork:
    where = f"{file}: {part.source}"
    plan = _given_plan(where, given, part.body) if given else _identify(where, part.body)
    if given is None:
        plan = _count_layers(where, plan, part.first_stage)
    if given is None and beside is not None:
        plan = _compare(where, plan, beside, part.body)
    backbone = create_backbone(
        plan.architecture,
        in_chans=plan.in_chans,
        small_images=plan.small_images,
        image_size=plan.image_size,
    )
    state = backbone.state_dict()
    expected = {plan.foreign_name(own): tensor for own, tensor in state.items()}
    tensors = dict(part.body)
    counted = any(_is_counter(key) for key in tensors)
    if not counted:
        tensors |= {key: tensor for key, tensor in expected.items() if _is_counter(key)}
    _check_fit(where, plan.architecture, expected, tensors, hint="" if given else _ANY_NETWORK)
    backbone.load_state_dict({own: tensors[plan.foreign_name(own)] for own in state})
    # Checked after loading: float64 can hold values that become Inf in float32.
    for own, tensor in backbone.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {plan.foreign_name(own)!r} holds NaN or Inf: refused")
    return ForeignNetwork(
        name=name,
        source=part.source,
        prefix=printable(part.prefix) if part.prefix else "",
        architecture=plan.architecture,
        in_chans=plan.in_chans,
        small_images=plan.small_images,
        image_size=plan.image_size,
        backbone=backbone,
        matched=len(part.body),
        counted=counted or not any(map(_is_counter, state)),
        untold="" if given else _untold(file, plan, beside),
    )


def _count_layers(where: str, plan: "_Plan", first_stage: int | None) -> "_Plan":
    """The network with the layers before its first stage that numbered children leave room for.

    Raises:
        UserError: no such network can be imported.
    """
    if first_stage is None or first_stage == 4:
        return plan
    if first_stage == 3 and plan.small_images:
        return plan
    without_relu = f"{plan.architecture}_small_no_relu"
    if first_stage == 2 and plan.small_images and without_relu in TIMM_NETWORKS:
        return replace(plan, architecture=without_relu, small_images=False)
    raise UserError(
        f"{where} is {plan.architecture} without {'ReLU and ' if first_stage == 2 else ''}max-pool between its stem "
        "and its first stage, which cannot be imported"
    )


def _given_plan(where: str, given: _Given, body: Mapping[str, Tensor]) -> "_Plan":
    """The network of --architecture, with the channels and the stem that the tensors tell."""
    choices = [
        _Plan(architecture=given.name, in_chans=3, renames=renames)
        for renames in ((), _CIFAR_RESNET_NAMES, _WIDE_RESNET_NAMES)
    ]
    plan = max(choices, key=lambda each: sum(each.foreign_name(own) in body for own in given.state))
    stem, tensor = next((item for item in given.state.items() if item[1].dim() == 4), ("", None))
    in_chans, small = 3, False
    if tensor is not None and plan.foreign_name(stem) in body:
        _, in_chans, kernel = _conv_shape(where, body, plan.foreign_name(stem))
        in_stem = f"{given.name}_small" in TIMM_NETWORKS and tensor.shape[-1] != kernel == 3
        small = in_stem and stem == "conv1.weight"
    return replace(plan, in_chans=in_chans, small_images=small, image_size=given.image_size)


def _compare(where: str, plan: "_Plan", beside: str, body: Mapping[str, Tensor]) -> "_Plan":
    """Compare the network that the tensors tell with the name beside them.

    Returns:
        The network of that name where the tensors are its own too, as of networks with blur; else the given one.

    Raises:
        UserError: the name is that of a network with other tensors.
    """
    # The MCL authors and OKDDip call the bottleneck network so.
    known = plan.architecture.removesuffix("_bottleneck")
    if beside in (plan.architecture, known) or not (
        beside in CIFAR_NETWORKS or timm.is_model(beside)
    ):
        return plan
    named = _given_plan(where, _Given(beside.split(".")[0], None), body)
    network = _meta(named)
    expected = {named.foreign_name(own): tensor for own, tensor in network.state_dict().items()}
    tensors = {name: tensor for name, tensor in body.items() if not _is_counter(name)}
    if state_misfits({k: t for k, t in expected.items() if not _is_counter(k)}, tensors):
        raise UserError(
            f"{where} is {plan.architecture} by its tensors, but the file calls it {printable(beside)}: "
            f"--architecture {plan.architecture} imports it all the same"
        )
    return named


def _meta(plan: "_Plan") -> nn.Module:
    with torch.device("meta"):
        return create_backbone(
            plan.architecture,
            in_chans=plan.in_chans,
            small_images=plan.small_images,
            image_size=plan.image_size,
        )


def _untold(file: Path, plan: "_Plan", beside: str | None) -> str:
    """What the tensors of the network do not tell, and how it was taken."""
    name = plan.architecture.partition("_small")[0]
    if name in CIFAR_NETWORKS:
        return "strides, padding, activation and batch norm's epsilon, taken as in the MCL authors' code"
    things = "blur (anti-aliasing), padding, strides, activation and batch norm's epsilon"
    if beside is not None and beside == name:
        words = f"{things}, taken as in {name}, which the file says it is"
    else:
        words = (
            f"{things}, taken as in torchvision's {name}; another network of the same tensors is to be named by "
            "--architecture"
        )
        example = name.replace("resnet", "resnetblur")
        if file.stem != name and timm.is_model(file.stem):
            words += f": the file is called {file.stem}"
        elif timm.is_model(example):
            words += f", for example {example}"
    if plan.small_images:
        words += (
            "; the 3x3 stem's stride 1, padding 1 and no max-pool (solo-learn pads by 2: --architecture "
            f"{name}_small_padding2; where a max-pool was left: {name}_small_pooled)"
        )
    return words


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The network of ours that takes the tensors, and the file's names for ours: (regular expression, replacement)."""

    architecture: str
    in_chans: int
    small_images: bool = False
    image_size: int | None = None
    renames: tuple[tuple[str, str], ...] = ()

    def foreign_name(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


_CIFAR_RESNET_NAMES = (
    (r"^stem\.0\.", "conv1."),
    (r"^stem\.1\.", "bn1."),
    (r"\.shortcut\.", ".downsample."),
)
_WIDE_RESNET_NAMES = (
    (r"^stem\.", "conv1."),
    (r"^layer(\d)\.", r"block\1.layer."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^final\.0\.", "bn1."),
)


def _is_counter(name: str) -> bool:
    """Whether this is batch norm's counter of batches, which PyTorch has since 0.4.1 and which no feature needs."""
    return name.endswith(".num_batches_tracked")


def _check_fit(
    where: str,
    architecture: str,
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    hint: str,
) -> None:
    """Make sure that the tensors are the network's, all of them and no others.

    Raises:
        UserError: they are not; where all are there and others too, which another network may have, it gives the hint.
    """
    misfits = state_misfits(expected, given)
    misfits += [
        f"{name!r} is {given[name].dtype}, {given[name].layout}, not numbers of one plain tensor"
        for name, tensor in expected.items()
        if name in given and not _alike(tensor, given[name])
    ]
    if misfits:
        matched = sum(
            name in given and given[name].shape == tensor.shape for name, tensor in expected.items()
        )
        raise UserError(
            f"{where} does not fit {architecture}: {misfits[0]}"
            + (f", and {len(misfits) - 1} more" if len(misfits) > 1 else "")
            + f"; {matched} of {len(expected)} tensors match"
            + (f"; {hint}" if hint and matched == len(expected) else "")
        )


def _alike(expected: Tensor, given: Tensor) -> bool:
    plain = given.layout is torch.strided and given.device.type == "cpu" and not given.is_quantized
    return plain and (given.is_floating_point() or not expected.is_floating_point())


def _identify(where: str, body: Mapping[str, Tensor]) -> _Plan:
    """Identify the network by the names and shapes of its tensors.

    Raises:
        UserError: it is none of the known networks.
    """
    if "block1.layer.0.conv1.weight" in body:
        return _identify_wide_resnet(where, body)
    if "conv1.weight" in body and "layer1.0.conv1.weight" in body:
        return _identify_resnet(where, body)
    first = next(iter(body), "none at all")
    raise UserError(
        f"{where} is none of the networks that can be imported, torchvision's and the MCL authors' ResNets and wide "
        f"ResNets: its first tensor is {printable(first)}; {_ANY_NETWORK}"
    )


def _identify_resnet(where: str, body: Mapping[str, Tensor]) -> _Plan:
    width, in_chans, kernel = _conv_shape(where, body, "conv1.weight")
    blocks = _blocks(body, r"layer(\d)\.(\d+)\.")
    bottleneck = "layer1.0.conv3.weight" in body
    groups, width_per_group = 1, 64
    if bottleneck:
        channels, width_per_group, _ = _conv_shape(where, body, "layer1.0.conv2.weight")
        groups = channels // max(width_per_group, 1)
    shape = ResNetShape(
        blocks=blocks, bottleneck=bottleneck, groups=groups, width_per_group=width_per_group
    )
    for name, known in RESNETS.items():
        if known == shape and width == 64 and kernel in (3, 7):
            return _Plan(architecture=name, in_chans=in_chans, small_images=kernel == 3)
    cifar_name = f"resnet{2 + (3 if bottleneck else 2) * sum(blocks)}{'_bottleneck' * bottleneck}"
    if len(blocks) == 3 and width == 16 and cifar_name in CIFAR_NETWORKS:
        return _Plan(architecture=cifar_name, in_chans=in_chans, renames=_CIFAR_RESNET_NAMES)
    raise UserError(
        f"{where} is a ResNet of {', '.join(map(str, blocks))} {'bottleneck' if bottleneck else 'basic'} blocks on a "
        f"{kernel}x{kernel} stem of {width} channels, which is none of those that can be imported: "
        f"{', '.join(RESNETS)}, and on 16 channels {', '.join(n for n in CIFAR_NETWORKS if n.startswith('resnet'))}; "
        f"{_ANY_NETWORK}"
    )


def _identify_wide_resnet(where: str, body: Mapping[str, Tensor]) -> _Plan:
    _, in_chans, _ = _conv_shape(where, body, "conv1.weight")
    width, _, _ = _conv_shape(where, body, "block1.layer.0.conv1.weight")
    depth = 4 + 2 * sum(_blocks(body, r"block(\d)\.layer\.(\d+)\."))
    name = f"wrn_{depth}_{width // 16}"
    if name not in CIFAR_NETWORKS:
        known = ", ".join(network for network in CIFAR_NETWORKS if network.startswith("wrn"))
        raise UserError(
            f"{where} is a wide ResNet of depth {depth} and {width} channels in its first stage, which is none of "
            f"those that can be imported: {known}"
        )
    return _Plan(architecture=name, in_chans=in_chans, renames=_WIDE_RESNET_NAMES)


def _blocks(body: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """The number of blocks in each stage, low to high."""
    blocks = {match.groups() for name in body if (match := re.match(pattern, name))}
    counts = Counter(stage for stage, _ in blocks)
    return tuple(counts[stage] for stage in sorted(counts))


def _conv_shape(where: str, body: Mapping[str, Tensor], name: str) -> tuple[int, int, int]:
    """The output channels, the input channels of a group, and the kernel size of a square convolution."""
    shape = tuple(body[name].shape) if name in body else None
    if shape is None or len(shape) != 4 or 0 in shape:
        raise UserError(
            f"{where}: {name} is {shape or 'missing'}, not the weights of a convolution"
        )
    if shape[1] > _MOST_CHANNELS:
        raise UserError(f"{where}: {name} is of {shape[1]} channels, more than {_MOST_CHANNELS}")
    return shape[0], shape[1], shape[2]
