"""YAML files: their keys with the lines they stand in. No key may stand twice."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peerlearn.config.names import nearest_key
from peerlearn.config.values import Scalar, Written
from peerlearn.errors import UsageError

_NULL, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
)


class Entry(NamedTuple):
    """A key of a file.

    Attributes:
        value: value as it is written.
        place: what a message about it begins with: ``c.yaml, line 3: ``.
    """

    value: Written
    place: str


def read_file(path: Path, groups: Mapping[str, bool]) -> dict[str, Entry]:
    """The values of a config file by dotted keys.

    Args:
        path: path of the file.
        groups: every known key, and whether it is a group of further keys.

    Raises:
        UsageError: the file cannot be read, a key is unknown or stands twice, or a group has no keys.
    """
    root = read_yaml(path)
    entries: dict[str, Entry] = {}
    lines: dict[str, list[int]] = defaultdict(list)
    settable = [key for key in groups if not groups[key]]
    for key, key_node, node in _flat(root, "", groups):
        place = f"{path}, line {_line(key_node)}: "
        if key not in groups:
            raise UsageError(f"{place}unknown key {key!r}{nearest_key(key, settable)}")
        lines[key].append(_line(key_node))
        if not groups[key]:
            entries[key] = Entry(written(node), place)
        elif not isinstance(node, yaml.MappingNode):
            got = "null" if node.tag == _NULL else "a value"
            raise UsageError(f"{place}{key}: expected a group of keys, got {got}")
    _refuse_repeated(path, lines)
    return entries


def read_yaml(path: Path) -> yaml.MappingNode:
    """The top of a YAML file, a mapping in which no key stands twice, at any level.

    Raises:
        UsageError: the file cannot be read or holds no mapping; or a key stands twice, or is no word.
    """
    try:
        # A byte-order mark is what some editors begin a file with.
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{path}{line}: not a readable YAML file: {reason}") from error
    if root is None or root.tag == _NULL:
        raise UsageError(f"{path}: holds no keys")
    for prefix, node in _mappings(root, "", path, set()):
        lines: dict[str, list[int]] = defaultdict(list)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{path}, line {_line(key)}: a key must be a word")
            lines[f"{prefix}{key.value}"].append(_line(key))
        _refuse_repeated(path, lines)
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}: a config file holds `key: value` lines")
    return root


def written(node: yaml.Node) -> Written:
    """A value of a YAML file."""
    if isinstance(node, yaml.SequenceNode):
        # A list in a list is no value of any key.
        return [[] if isinstance(item, yaml.SequenceNode) else written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {}
    if node.tag == _NULL:
        return Scalar(None)
    # A plain word has no style: neither quotes nor the bar of a block.
    return Scalar(node.value, quoted=getattr(node, "style", None) is not None)


def written_text(text: str) -> Written:
    """A value of the command line: null, a list in square brackets, or a single value."""
    if text == "null":
        return Scalar(None)
    if text.startswith("["):
        try:
            node = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:
            return Scalar(text)
        return written(node) if isinstance(node, yaml.SequenceNode) else Scalar(text)
    return Scalar(text)


def _flat(
    node: yaml.MappingNode, prefix: str, groups: Mapping[str, bool]
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Every key by its dotted name; only known groups are looked into."""
    for key_node, value in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node, value
        if groups.get(key) and isinstance(value, yaml.MappingNode):
            yield from _flat(value, f"{key}.", groups)


def _mappings(
    node: Any, prefix: str, path: Path, seen: set[int]
) -> Iterator[tuple[str, yaml.MappingNode]]:
    """Every mapping, with its dotted name. An alias may make a mapping hold itself."""
    if node.tag not in _PLAIN_TAGS:
        raise UsageError(f"{path}: not a readable YAML file: {node.tag} in line {_line(node)}")
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item, prefix, path, seen)
        return
    yield prefix, node
    for key, value in node.value:
        yield from _mappings(value, f"{prefix}{key.value}.", path, seen)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _refuse_repeated(path: Path, lines: Mapping[str, list[int]]) -> None:
    for key, places in lines.items():
        if len(places) > 1:
            times = "twice" if len(places) == 2 else f"{len(places)} times"
            *first, last = map(str, places)
            raise UsageError(f"{path}: {key} stands {times} (lines {', '.join(first)} and {last})")
