"""Where the networks of a foreign checkpoint are, by the names of its tensors.

A network is found by its first stage (layer1.0.conv1.weight, say), in any nesting: what stands before is a prefix.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peerlearn.exchange.foreign_files import printable
from peerlearn.runs.export_folders import KEY_PREFIX, network_order


@dataclass(kw_only=True)
class Part:
    """The tensors of one network in a file, by their names within it.

    Attributes:
        source: name of the network in the file.
        prefix: what stands before the names of its tensors.
        body: tensors of the backbone.
        beside: module beside the backbone and its heads -> number of its tensors.
        head: names of the tensors of its heads.
        first_stage: number of the first stage among its children, if they are numbered: 4 = stem, batch norm, ReLU and
            max-pool stand before it, 3 = no max-pool, 2 = no ReLU either; None = they have names.
    """

    source: str
    prefix: str = ""
    body: dict[str, Tensor] = field(default_factory=dict)
    beside: Counter[str] = field(default_factory=Counter)
    head: set[str] = field(default_factory=set)
    first_stage: int | None = None

    def add(self, name: str, tensor: Tensor, known: "KnownNetwork | None" = None) -> None:
        """Sort the tensor in: backbone, head, or another module."""
        module = name.split(".")[0]
        if known and name.startswith(known.classifiers):
            self.head.add(name)
        elif known and module in known.modules:
            self.body[name] = tensor
        elif re.fullmatch(_HEADS, module):
            self.head.add(name)
        elif re.fullmatch(_BACKBONE_MODULES, module):
            self.body[name] = tensor
        else:
            self.beside[module] += 1


@dataclass(frozen=True)
class KnownNetwork:
    """A network that is looked for by the names of its tensors.

    Attributes:
        names: the names of all its tensors.
        classifiers: what the names of its classifiers' tensors begin with.
    """

    names: tuple[str, ...]
    classifiers: tuple[str, ...]

    @property
    def modules(self) -> set[str]:
        """The modules of its tensors."""
        return {name.split(".")[0] for name in self.names}


@dataclass(frozen=True, kw_only=True)
class FoundNetworks:
    """The networks of a file.

    Attributes:
        layout: name of the program that wrote it, in words.
        parts: networks by name, query networks first; none if there are none that are known.
        left_out: module -> number of tensors that belong to no backbone; heads are counted together.
        not_read: names of the entries beside those that hold networks: optimizer, epoch, ...
        first: name of the file's first tensor; None if it has none.
    """

    layout: str
    parts: dict[str, Part]
    left_out: dict[str, int]
    not_read: tuple[str, ...]
    first: str | None


_HEADS = r"(fc|classifier|head|linear)(_\d+)?"
# Modules that a ResNet or wide ResNet may have, and those that would change what it computes: they are never left out.
_BACKBONE_MODULES = r"(layer|block|stage|stem|conv|bn|norm|downsample)\d*(_\d+)?|\w*pool\d*"
_FIRST_STAGES = r"(?P<prefix>(.+\.)?)(layer1\.0\.conv1|block1\.layer\.0\.conv1)\.weight"
# The children of a ResNet by number: stem, batch norm and perhaps ReLU and max-pool stand before the first stage.
_NUMBERED_STAGES = r"(?P<prefix>(.+\.)?)(?P<first>[234])\.0\.conv1\.weight"
# No part of a network's name: what wraps a module, and what holds a state dict.
_WRAPPERS = {"module", "_orig_mod"}
_CONTAINERS = {"state_dict", "model", "net", "network", "model_state_dict", "classy_state_dict"}
_NUMBER = r"(?P<number>0|[1-9][0-9]?)"
# The MCL authors' networks with shared low stages: layer3_1.0.conv1.weight belongs to branch 1.
_BRANCH = rf"(?P<module>(layer|block)[0-9]|bn|classifier)_{_NUMBER}\.(?P<name>.+)"
_MOMENTUM = (
    r"encoder_k(_\d+)?|key_encoder|encoder_key|moco_encoder|momentum\w*|\w+_momentum"
    r"|teacher\w*|target\w*|(\w+_)?ema"
)
_DEEPEST = 16


def find_networks(content: Any, known: KnownNetwork | None = None) -> FoundNetworks:
    """Find the networks in the content of a file.

    Args:
        content: content of the file, as `load_file` gives it.
        known: network to look for; None = any ResNet or wide ResNet.
    """
    tensors = dict(_tensors(content))
    prefixes = _prefixes(tensors, known.names[0] if known else None)
    holders = {_holder(content, prefix) for prefix in prefixes}
    entries = content if isinstance(content, Mapping) else {}
    not_read = sorted(
        str(key) for key in entries if holders and None not in holders and str(key) not in holders
    )
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if None in holders or name.split(".")[0] in holders
    }
    parts, rest = _split(content, tensors, prefixes, known)
    branches = _branches(parts)
    left_out: Counter[str] = Counter(rest)
    for part in parts.values():
        left_out.update({printable(name): count for name, count in part.beside.items()})
        left_out["heads"] += len(part.head)
    named = branches or _named(parts)
    return FoundNetworks(
        layout=_layout(entries, parts, left_out, branches=bool(branches)),
        parts={name: named[name] for name in sorted(named, key=network_order)},
        left_out={group: count for group, count in sorted(left_out.items()) if count},
        not_read=tuple(map(printable, not_read)),
        first=next(iter(dict(_tensors(content))), None),
    )


def _tensors(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors with names, however deep, with the path to them."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    for key, value in content.items():
        if isinstance(key, str):
            if isinstance(value, Tensor):
                yield prefix + key, value
            else:
                yield from _tensors(value, f"{prefix}{key}.", depth + 1)


def _prefixes(tensors: Mapping[str, Tensor], anchor: str | None) -> dict[str, int | None]:
    """The prefix of each network -> the number of its first stage among numbered children; None = it has a name."""
    if anchor is not None:
        found = (name.removesuffix(anchor) for name in tensors if name.endswith(anchor))
        return {prefix: None for prefix in found if prefix == "" or prefix.endswith(".")}
    prefixes: dict[str, int | None] = {}
    for name in tensors:
        if match := re.fullmatch(_FIRST_STAGES, name):
            prefixes[match["prefix"]] = None
        elif match := re.fullmatch(_NUMBERED_STAGES, name):
            stem = tensors.get(f"{match['prefix']}0.weight")
            if stem is not None and stem.dim() == 4 and f"{match['prefix']}1.weight" in tensors:
                prefixes.setdefault(match["prefix"], int(match["first"]))
    return prefixes


def _holder(content: Any, prefix: str) -> str | None:
    """The top entry that holds a network; None if the tensors themselves are the top entries."""
    top = prefix.split(".")[0]
    return top if isinstance(content, Mapping) and isinstance(content.get(top), Mapping) else None


def _split(
    content: Any,
    tensors: Mapping[str, Tensor],
    prefixes: Mapping[str, int | None],
    known: KnownNetwork | None,
) -> tuple[dict[str, Part], Counter[str]]:
    """The networks by prefix, and the modules outside of them with the number of their tensors."""
    parts = {
        prefix: Part(
            source=_source(content, prefix),
            prefix=prefix.removeprefix(_path(content, prefix)),
            first_stage=first,
        )
        for prefix, first in prefixes.items()
    }
    outside: Counter[str] = Counter()
    # A longer prefix first: a network may lie below the prefix of another.
    by_length = sorted(prefixes, key=len, reverse=True)
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in by_length if name.startswith(prefix)), None)
        if prefix is None:
            outside[printable(_module_outside(name, by_length))] += 1
        elif known:
            parts[prefix].add(name.removeprefix(prefix), tensor, known)
        else:
            parts[prefix].add(_by_name(name.removeprefix(prefix), prefixes[prefix]), tensor)
    return parts, outside


def _by_name(name: str, first_stage: int | None) -> str:
    """torchvision's name of a tensor: children may be numbered, shortcuts called so, and a stem too."""
    if first_stage is not None:
        child, _, rest = name.partition(".")
        if child.isdecimal():
            number = int(child)
            if number >= first_stage + 4:
                child = "fc"
            elif number >= first_stage:
                child = f"layer{number - first_stage + 1}"
            else:
                child = {0: "conv1", 1: "bn1"}.get(number, child)
        name = f"{child}.{rest}"
    name = re.sub(r"^stem\.([01])\.", lambda stem: ("conv1.", "bn1.")[int(stem[1])], name)
    return re.sub(r"^(layer\d\w*\.\d+)\.shortcut\.", r"\1.downsample.", name)


def _path(content: Any, prefix: str) -> str:
    """The part of a network's prefix that leads to its state dict."""
    path = ""
    for word in prefix.split("."):
        if not (isinstance(content, Mapping) and isinstance(content.get(word), Mapping)):
            break
        content, path = content[word], f"{path}{word}."
    return path


def _source(content: Any, prefix: str) -> str:
    """The network's name in the file: its prefix without wrappers and without what holds state dicts."""
    path = _path(content, prefix)
    words = [word for word in path.split(".") if word not in _CONTAINERS]
    words += [word for word in prefix.removeprefix(path).split(".") if word not in _WRAPPERS]
    return printable(".".join(filter(None, words)) or "the network")


def _module_outside(name: str, prefixes: Sequence[str]) -> str:
    """The module that a tensor outside of the networks belongs to: the first word that no prefix shares."""
    words = name.split(".")
    shared = 0
    for prefix in prefixes:
        theirs = prefix.split(".")
        count = 0
        while count < len(words) - 1 and count < len(theirs) and words[count] == theirs[count]:
            count += 1
        shared = max(shared, count)
    return words[shared]


def _named(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The networks by the names that ``--network`` knows: 0, 1, key-0, ..."""
    roles = [_role(prefix) for prefix in parts]
    if all(key for key, _ in roles):
        roles = [("", number) for _, number in roles]
    named: dict[str, Part] = {}
    for (key, number), part in zip(roles, parts.values(), strict=True):
        free = number or 0
        while f"{key}{free}" in named:
            free += 1
        named[f"{key}{free}"] = part
    return named


def _role(prefix: str) -> tuple[str, int | None]:
    """Whether a network is a momentum network, and its number, if the prefix tells one."""
    words = prefix.rstrip(".").split(".")
    momentum = any(re.fullmatch(_MOMENTUM, word) for word in words)
    found = re.search(rf"(^|\.)(encoder_[qk]_|module_list\.){_NUMBER}\.", prefix)
    return KEY_PREFIX if momentum else "", int(found["number"]) if found else None


def _branches(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The networks of a file with shared stages: each branch becomes a whole network; none if nothing is shared."""
    if len(parts) != 1:
        return {}
    (whole,) = parts.values()
    named = {name: re.fullmatch(_BRANCH, name) for name in whole.body}
    branched = {name: match for name, match in named.items() if match}
    numbers = sorted({int(match["number"]) for match in branched.values()})
    parts_by_number = {
        str(number): Part(source=f"branch {number}", prefix=whole.prefix) for number in numbers
    }
    for name, tensor in whole.body.items():
        match = named[name]
        if match is None:
            for part in parts_by_number.values():
                part.add(name, tensor)
        else:
            # The last batch norm of a wide ResNet is bn_1 in a branch, but bn1 in a single network.
            module = match["module"].replace("bn", "bn1")
            parts_by_number[match["number"]].add(f"{module}.{match['name']}", tensor)
    return parts_by_number


def _layout(
    entries: Mapping[Any, Any],
    parts: Mapping[str, Part],
    left_out: Mapping[str, int],
    *,
    branches: bool,
) -> str:
    """The program that wrote the file, by the names of its networks and of what is beside them."""
    words = {word for prefix in parts for word in prefix.split(".")}
    heads = {name for part in parts.values() for name in part.head}
    if branches:
        return "supervised networks of the MCL authors that share low stages"
    if "module_list" in words:
        return "supervised networks of the MCL authors"
    if any(re.fullmatch(r"encoder_[qk]_\d+", word) for word in words):
        return "MoCo of the MCL authors"
    if words & {"encoder_q", "encoder_k"}:
        if "net" in words:
            return "MoCo's CIFAR notebook"
        if not heads:
            return "MoCo"
        return "MoCo v2" if "fc.2.weight" in heads else "MoCo v1"
    if {"base_encoder"} & words:
        return "MoCo v3"
    if "classy_state_dict" in entries or "_feature_blocks" in words:
        return "VISSL"
    if "pytorch-lightning_version" in entries:
        return "a checkpoint of Lightning, as solo-learn and lightly save it"
    if "prototypes" in left_out:
        return "SwAV or DeepCluster v2"
    if {"student", "teacher"} & words:
        return "DINO"
    if "encoder" in words and "predictor" in left_out:
        return "SimSiam"
    if "backbone" in words and "projector" in left_out:
        return "Barlow Twins or VICReg"
    return "plain state dict"
