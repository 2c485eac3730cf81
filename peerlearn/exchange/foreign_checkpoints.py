"""Checkpoints of other programs, read without running anything in them.

Known by the names of their tensors: MoCo v1, v2 and v3 (ResNets), the MoCo and the supervised networks of the MCL
authors, and plain state dicts of torchvision's and timm's ResNets. The tensors' shapes tell which network it is.
"""

import contextlib
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

from peerlearn.backbones import create_backbone
from peerlearn.errors import UserError
from peerlearn.exchange.export_formats import RESNETS, ResNetShape
from peerlearn.export import state_misfits
from peerlearn.networks.cifar import CIFAR_NETWORKS
from peerlearn.runs.export_folders import KEY_PREFIX, network_order

# torch does not compress; half-precision zeros may have been, by hand.
_MOST_EXPANSION = 20
# More channels than any camera has would make networks of any size.
_MOST_CHANNELS = 1024


@dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """One network found in a file, whole.

    Attributes:
        name: as ``--network`` has it: "0", "1", "key-0", ...
        source: what the file calls it.
        architecture: for `create_backbone`.
        in_chans: likewise.
        small_images: likewise.
        backbone: with the file's weights.
        matched: how many tensors of the file it took, all that it has.
        counted: False where the file lacks batch norm's counters of batches, which are 0 then.
    """

    name: str
    source: str
    architecture: str
    in_chans: int
    small_images: bool
    backbone: nn.Module
    matched: int
    counted: bool


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """What was found in a file.

    Attributes:
        layout: whose.
        networks: the query networks and the momentum networks.
        left_out: how many tensors beside them, by the first part of their names; those of heads together.
        beside: what else lies beside the state dict: optimizer, epoch, ...
    """

    layout: str
    networks: tuple[ForeignNetwork, ...]
    left_out: dict[str, int]
    beside: tuple[str, ...]


def read_foreign(file: Path) -> ForeignCheckpoint:
    """Read a .pth, .pt, .tar or .safetensors file and find the networks in it.

    Raises:
        UserError: it cannot be read, holds more than plain data, none of the known layouts, a network that is not
            one of ours, one with tensors missing, too many or of other shapes, or NaN or Inf.
    """
    content = _load(file)
    tensors, beside = _unwrap(file, content)
    layout, parts, rest = _split(tensors)
    networks = tuple(_build(file, name, part) for name, part in parts.items())
    left_out = Counter(_printable(name.split(".")[0]) for name in rest)
    left_out["heads"] = sum(len(part.head) for part in parts.values())
    return ForeignCheckpoint(
        layout=layout,
        networks=networks,
        left_out={group: count for group, count in sorted(left_out.items()) if count},
        beside=beside,
    )


def _load(file: Path) -> Any:
    """The content of the file: tensors and plain values alone."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give the checkpoint file in it")
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if empty:
        raise UserError(f"{file} is empty: get it again")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        _check_archive(file)
        with warnings.catch_warnings():
            # Of unusual pickles; what cannot be read is an error in any case.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    # A file made to break the reader can raise anything.
    except Exception as error:
        _refuse(file, error)


def _check_archive(file: Path) -> None:
    """Refuse what torch would read without a word: records that are damaged, or that grow when they are unpacked."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(record.file_size for record in archive.infolist())
        if size > _MOST_EXPANSION * file.stat().st_size + 2**20:
            raise UserError(
                f"{file}: {file.stat().st_size:,} bytes unpack to {size:,}: refused; save it again uncompressed"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(
            f"{file} is damaged: the checksum of {_printable(damaged)} does not match; get it again"
        )


def _refuse(file: Path, error: Exception) -> NoReturn:
    called = sorted(_called_names(file))
    if called:
        names = ", ".join(map(_printable, called[:3]))
        names += f" and {len(called) - 3} more" if len(called) > 3 else ""
        harmless = all(re.fullmatch(_DATA_CLASSES, name) for name in called)
        does = (
            "holds more than tensors and plain values" if harmless else "would run code when loaded"
        )
        raise UserError(
            f"{file} {does} ({names}): refused; a file of torch.save(model.state_dict(), ...) alone can be imported"
        ) from error
    if tarfile.is_tarfile(file):
        raise UserError(
            f"{file} is of PyTorch's first format, a tar file, which could run code when loaded: refused; "
            "have it saved again by a newer PyTorch"
        ) from error
    raise UserError(
        f"{file} is no checkpoint that can be read safely: damaged, cut short, or of another format"
    ) from error


# What a pickle of tensors and plain values may name.
_TENSOR_CLASSES = (
    r"torch\.(\w*Storage|Size|device|Tensor|bool|[a-z]+\d+\w*)|torch\.storage\.\w+Storage|torch\._utils\._rebuild_\w+"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
)
# What scripts often put beside their tensors without any harm meant.
_DATA_CLASSES = (
    r"numpy\.(dtype|ndarray)|numpy\.(_core|core)\.\w+\.(scalar|_reconstruct|_frombuffer)|argparse\.Namespace"
    r"|pathlib\.\w+|datetime\.\w+|collections\.defaultdict|" + _TENSOR_CLASSES
)


def _called_names(file: Path) -> set[str]:
    """The functions and classes beyond tensors that the file's pickles name, found without loading them."""
    names: set[str] = set()
    # What cannot be parsed is refused in any case; only the message knows less.
    with contextlib.suppress(Exception):
        for stream in _pickles(file):
            _add_named(stream, names)
    return {name for name in names if not re.fullmatch(_TENSOR_CLASSES, name)}


def _pickles(file: Path) -> Iterator[IO[bytes]]:
    """The pickles in a torch file: of today (a zip file), of the first format (a tar file), or bare."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield archive.open(name)
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as tar:
            for member in tar.getmembers():
                stream = tar.extractfile(member) if member.name == "pickle" else None
                if stream:
                    yield stream
    else:
        with file.open("rb") as stream:
            yield stream


def _add_named(stream: IO[bytes], names: set[str]) -> None:
    """Add what the pickles of a stream name. Of a name in two strings, those pushed last are taken."""
    # PyTorch's second format is five pickles, one after the other, before the numbers.
    for _ in range(5):
        pushed: list[Any] = [None, None]
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.add(f"{pushed[-2]}.{pushed[-1]}")
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name.endswith("BINPUT"):
                memo[int(argument or 0)] = pushed[-1]
            elif opcode.name.endswith("BINGET"):
                pushed.append(memo.get(int(argument or 0)))
            else:
                pushed.append(argument)


def _printable(text: str) -> str:
    """A name of a foreign file, fit for a terminal."""
    return text if re.fullmatch(r"[\w.-]{1,80}", text) else ascii(text[:80])


def _unwrap(file: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict by its names, without DistributedDataParallel's prefix; and what lies beside it."""
    beside: tuple[str, ...] = ()
    for key in ("state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            beside = tuple(sorted(_printable(str(other)) for other in content if other != key))
            content = content[key]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        name: tensor
        for name, tensor in items
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise UserError(
            f"{file} holds no state dict: no tensors by name, bare or under state_dict, model or net"
        )
    if any(tensor.is_nested for tensor in tensors.values()):
        raise UserError(f"{file}: holds nested tensors, which no network here has")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors, beside


@dataclass(kw_only=True)
class _Part:
    """The tensors of one network in a file, by their names within it."""

    source: str
    body: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        is_head = name.split(".")[0] in ("fc", "classifier", "head")
        (self.head if is_head else self.body)[name] = tensor


_NUMBER = r"(?P<number>0|[1-9][0-9]?)"
# Whose layout -> the names of its networks' tensors.
_LAYOUTS = {
    "MoCo": r"(?P<source>encoder_(?P<role>[qk]))\.(?P<name>.+)",
    "MoCo of the MCL authors": rf"(?P<source>encoder_(?P<role>[qk])_{_NUMBER})\.(?P<name>.+)",
    "MoCo v3": r"(?P<source>(?P<role>base|momentum)_encoder)\.(?P<name>.+)",
    "supervised networks of the MCL authors": rf"(?P<source>module_list\.{_NUMBER})\.(?P<name>.+)",
}
# The MCL authors' networks with shared low stages: layer3_1.0.conv1.weight is of branch 1.
_BRANCH = rf"(?P<module>(layer|block)[0-9]|bn|classifier)_{_NUMBER}\.(?P<name>.+)"


def _split(tensors: dict[str, Tensor]) -> tuple[str, dict[str, _Part], list[str]]:
    """The layout, the networks by name, query networks first, and the names that belong to none."""
    for layout, pattern in _LAYOUTS.items():
        parts, rest = _split_by_prefix(tensors, pattern)
        if parts:
            return _moco_version(layout, parts), parts, rest
    parts = _split_branches(tensors)
    if parts:
        return "supervised networks of the MCL authors that share low stages", parts, []
    whole = _Part(source="the network")
    for name, tensor in tensors.items():
        whole.add(name, tensor)
    return "plain state dict", {"0": whole}, []


def _split_by_prefix(
    tensors: dict[str, Tensor], pattern: str
) -> tuple[dict[str, _Part], list[str]]:
    parts: dict[str, _Part] = {}
    rest = []
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            rest.append(name)
            continue
        found = match.groupdict()
        key = KEY_PREFIX if found.get("role") in ("k", "momentum") else ""
        network = f"{key}{found.get('number', 0)}"
        parts.setdefault(network, _Part(source=found["source"])).add(found["name"], tensor)
    order = sorted(parts, key=network_order)
    return {network: parts[network] for network in order}, rest


def _moco_version(layout: str, parts: dict[str, _Part]) -> str:
    """MoCo v1 and v2 differ in their heads: one linear layer, or two."""
    heads = {name for part in parts.values() for name in part.head}
    if layout != "MoCo" or not heads:
        return layout
    return "MoCo v2" if "fc.2.weight" in heads else "MoCo v1"


def _split_branches(tensors: dict[str, Tensor]) -> dict[str, _Part]:
    """Each branch on top of the shared stages is a whole network."""
    matches = {name: re.fullmatch(_BRANCH, name) for name in tensors}
    numbers = sorted({int(match["number"]) for match in matches.values() if match})
    parts = {str(number): _Part(source=f"branch {number}") for number in numbers}
    for name, tensor in tensors.items():
        match = matches[name]
        if match is None:
            for part in parts.values():
                part.add(name, tensor)
        else:
            # The last batch norm of a wide ResNet is bn_1 in a branch, bn1 in a network alone.
            module = match["module"].replace("bn", "bn1")
            parts[match["number"]].add(f"{module}.{match['name']}", tensor)
    return parts


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which of our networks takes the tensors, and how the file calls ours: (regular expression, its name for it)."""

    architecture: str
    in_chans: int
    small_images: bool = False
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


def _build(file: Path, name: str, part: _Part) -> ForeignNetwork:
    where = f"{file}: {part.source}"
    plan = _identify(where, part.body)
    backbone = create_backbone(
        plan.architecture, in_chans=plan.in_chans, small_images=plan.small_images
    )
    state = backbone.state_dict()
    expected = {plan.foreign_name(own): tensor for own, tensor in state.items()}
    found = dict(part.body)
    counted = any(_is_counter(key) for key in found)
    if not counted:
        found |= {key: tensor for key, tensor in expected.items() if _is_counter(key)}
    _check_fit(where, plan.architecture, expected, found)
    backbone.load_state_dict({own: found[plan.foreign_name(own)] for own in state})
    # As they are now: float64 can hold what float32 cannot.
    for own, tensor in backbone.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {plan.foreign_name(own)!r} holds NaN or Inf: refused")
    return ForeignNetwork(
        name=name,
        source=part.source,
        architecture=plan.architecture,
        in_chans=plan.in_chans,
        small_images=plan.small_images,
        backbone=backbone,
        matched=len(part.body),
        counted=counted,
    )


def _is_counter(name: str) -> bool:
    """Whether this is one that batch norm has had since PyTorch 0.4.1, and that no feature depends on."""
    return name.endswith(".num_batches_tracked")


def _check_fit(
    where: str, architecture: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    misfits = state_misfits(expected, found)
    misfits += [
        f"{name!r} is {found[name].dtype}, {found[name].layout}, not numbers of one plain tensor"
        for name, tensor in expected.items()
        if name in found and not _alike(tensor, found[name])
    ]
    if misfits:
        matched = sum(
            name in found and found[name].shape == tensor.shape for name, tensor in expected.items()
        )
        raise UserError(
            f"{where} does not fit {architecture}: {misfits[0]}"
            + (f", and {len(misfits) - 1} more" if len(misfits) > 1 else "")
            + f"; {matched} of {len(expected)} tensors match"
        )


def _alike(expected: Tensor, found: Tensor) -> bool:
    plain = found.layout is torch.strided and found.device.type == "cpu" and not found.is_quantized
    return plain and (found.is_floating_point() or not expected.is_floating_point())


def _identify(where: str, body: Mapping[str, Tensor]) -> _Plan:
    """Tell the network by its tensors' names and shapes.

    Raises:
        UserError: it is none of those known.
    """
    if "block1.layer.0.conv1.weight" in body:
        return _identify_wide_resnet(where, body)
    if "conv1.weight" in body and "layer1.0.conv1.weight" in body:
        return _identify_resnet(where, body)
    first = next(iter(body), "none at all")
    raise UserError(
        f"{where} is none of the networks that can be imported, torchvision's and the MCL authors' ResNets and wide "
        f"ResNets: its first tensor is {_printable(first)}"
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
        if known == shape and kernel in (3, 7):
            return _Plan(architecture=name, in_chans=in_chans, small_images=kernel == 3)
    cifar_name = f"resnet{2 + 2 * sum(blocks)}"
    if len(blocks) == 3 and not bottleneck and cifar_name in CIFAR_NETWORKS:
        return _Plan(architecture=cifar_name, in_chans=in_chans, renames=_CIFAR_RESNET_NAMES)
    raise UserError(
        f"{where} is a ResNet of {', '.join(map(str, blocks))} {'bottleneck' if bottleneck else 'basic'} blocks on a "
        f"{kernel}x{kernel} stem of {width} channels, which is none of those that can be imported: "
        f"{', '.join(RESNETS)}, and with basic blocks on 16 channels resnet32, resnet56, resnet110"
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
    """How many blocks each stage has, low to high."""
    found = {match.groups() for name in body if (match := re.match(pattern, name))}
    counts = Counter(stage for stage, _ in found)
    return tuple(counts[stage] for stage in sorted(counts))


def _conv_shape(where: str, body: Mapping[str, Tensor], name: str) -> tuple[int, int, int]:
    """Output channels, input channels of a group, and size of a square convolution."""
    shape = tuple(body[name].shape) if name in body else None
    if shape is None or len(shape) != 4 or 0 in shape:
        raise UserError(
            f"{where}: {name} is {shape or 'missing'}, not the weights of a convolution"
        )
    if shape[1] > _MOST_CHANNELS:
        raise UserError(f"{where}: {name} is of {shape[1]} channels, more than {_MOST_CHANNELS}")
    return shape[0], shape[1], shape[2]
