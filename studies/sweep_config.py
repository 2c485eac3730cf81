"""The config of a sweep, which is grids of pretraining configs x seeds; and the reader of FILE.yaml.

A grid has axes, an axis has labels, and a label stands for words of `peerlearn pretrain`:

    grids:
      loss terms:                      # a grid: one table, one panel of the picture
        terms:                         # an axis, here by label: words
          all: ""
          without scl_hard: --terms scl_soft icl_hard icl_soft
      embedding size:
        cohort.embedding_dim: [32, 64, 128]    # an axis by the values of a config key
"""

import json
import shlex
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from peerlearn.config import config_keys, nearest, require
from peerlearn.errors import UsageError
from pretrain.config import PretrainConfig

# Keys that the sweep itself sets, or that are no part of a run's config.
_OWN_WORDS = ("--seed", "--run", "--config", "--auto_resume", "--dry_run", "--help", "-h")

# Name of the axis -> label -> words.
Axes = dict[str, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The config of a sweep: grids x seeds.

    Attributes:
        folder: folder of the sweep, for its runs, logs and tables.
        pretrain: words after `pretrain` that are common to all runs.
        seeds: seeds of each config.
        grids: axes of each grid, by its name; the product of the axes is run, and the last axis is compared along.
        baseline: label of each grid's last axis that the other labels are compared with.
    """

    folder: str
    pretrain: str = ""
    seeds: list[int]
    grids: dict[str, Axes]
    baseline: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must name the sweep's folder")
        require(bool(self.seeds), "seeds must hold at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds holds one twice: {self.seeds}")
        require(bool(self.grids), "grids must hold at least one")
        _check_words("pretrain", self.pretrain)
        for grid, axes in self.grids.items():
            require(bool(axes), f"grids: {grid}: it has no axis")
            for axis, labels in axes.items():
                require(bool(labels), f"grids: {grid}: {axis}: it has no label")
                for label, words in labels.items():
                    _check_words(f"grids: {grid}: {axis}: {label}", words)
            compared = list(axes.values())[-1]
            require(
                self.baseline[grid] in compared,
                f"baseline: {grid}: its last axis has no label {self.baseline[grid]!r}"
                f"{nearest(self.baseline[grid], compared)}",
            )


def read_sweep(
    path: Path,
    *,
    folder: str | None = None,
    seeds: Sequence[int] | None = None,
    pretrain: str | None = None,
) -> SweepConfig:
    """Read FILE.yaml.

    Args:
        path: path of the file.
        folder: folder of the sweep; None = the file's.
        seeds: seeds of each config; None = the file's.
        pretrain: words common to all runs; None = the file's.

    Raises:
        UsageError: the file cannot be read, a key is unknown, a value has the wrong type, or a label comes twice.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
        config = _build(content, folder=folder, seeds=seeds, pretrain=pretrain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    return config


class _Loader(yaml.SafeLoader):
    """Reads YAML with keys as they are written (a label may be 1e-3, or no). No key may come twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(written):
            if key in written[:number]:
                raise ValueError(f"{key!r} stands twice{node.start_mark}")
        self.flatten_mapping(node)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key must be a word{key.start_mark}")
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _build(
    content: Any, *, folder: str | None, seeds: Sequence[int] | None, pretrain: str | None
) -> SweepConfig:
    require(isinstance(content, Mapping), "a sweep's file holds `key: value` lines")
    known = [each.name for each in fields(SweepConfig)]
    for key in content:
        require(key in known, f"unknown key {key!r}{nearest(key, known)}")
    written = {key: value for key, value in content.items() if value is not None}
    overrides = {"folder": folder, "seeds": seeds, "pretrain": pretrain}
    written |= {key: value for key, value in overrides.items() if value is not None}
    for key, kind in (("folder", "a path"), ("pretrain", "a line of words")):
        require(isinstance(written.get(key, ""), str), f"{key} must be {kind}")
    numbers = written.get("seeds", [])
    require(
        isinstance(numbers, list) and all(type(seed) is int for seed in numbers),
        f"seeds must be a list of whole numbers, got {numbers!r}",
    )
    grids = _grids(written.get("grids", {}))
    return SweepConfig(
        folder=written.get("folder", ""),
        pretrain=written.get("pretrain", ""),
        seeds=numbers,
        grids=grids,
        baseline=_baselines(written.get("baseline", {}), grids),
    )


def _grids(content: Any) -> dict[str, Axes]:
    require(isinstance(content, Mapping), "grids must map names to axes")
    grids = {}
    for grid, axes in content.items():
        require(isinstance(axes, Mapping), f"grids: {grid}: it must map axes to their labels")
        grids[grid] = {axis: _labels(f"grids: {grid}: {axis}", axis, axes[axis]) for axis in axes}
    return grids


def _labels(where: str, axis: str, content: Any) -> dict[str, str]:
    if isinstance(content, list):
        return _values(where, axis, content)
    require(
        isinstance(content, Mapping),
        f"{where}: an axis maps labels to words, or is a config key with a list of its values",
    )
    for label, words in content.items():
        require(
            words is None or isinstance(words, str),
            f"{where}: {label}: words must be a line of text, got {words!r}",
        )
    return {label: words or "" for label, words in content.items()}


def _values(where: str, axis: str, values: list[Any]) -> dict[str, str]:
    keys = config_keys(PretrainConfig)
    require(
        axis in keys and not keys[axis],
        f"{where}: a list is of the values of a config key, and this is none{nearest(axis, keys)}",
    )
    words: dict[str, str] = {}
    for value in values:
        # A mapping cannot stand on a command line. All other values are YAML there too.
        require(not isinstance(value, Mapping), f"{where}: {value!r} is no value")
        text = value if isinstance(value, str) else json.dumps(value)
        label = ", ".join(map(str, value)) if isinstance(value, list) else text
        require(label not in words, f"{where}: {label!r} stands twice")
        words[label] = f"--{axis} {shlex.quote(text)}"
    return words


def _baselines(content: Any, grids: Mapping[str, Axes]) -> dict[str, str]:
    """The label of each grid's baseline; if the file names none, the first label of the last axis."""
    compared = {grid: list(axes.values())[-1] if axes else {} for grid, axes in grids.items()}
    baselines = {grid: next(iter(labels), "") for grid, labels in compared.items()}
    if isinstance(content, Mapping):
        for grid, label in content.items():
            require(grid in grids, f"baseline: unknown grid {grid!r}{nearest(grid, grids)}")
            require(not isinstance(label, list | Mapping), f"baseline: {grid}: name one label")
            baselines[grid] = label if isinstance(label, str) else json.dumps(label)
        return baselines
    label = content if isinstance(content, str) else json.dumps(content)
    having = [grid for grid, labels in compared.items() if label in labels]
    all_labels = {each for labels in compared.values() for each in labels}
    require(
        bool(having),
        f"baseline: no grid's last axis has a label {label!r}{nearest(label, all_labels)}",
    )
    return baselines | dict.fromkeys(having, label)


def _check_words(where: str, line: str) -> None:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{where}: {line!r} cannot be split into words: {error}") from error
    for word in words:
        name = word.split("=")[0]
        require(
            name not in _OWN_WORDS,
            f"{where}: {name} has no place here: a sweep sets seeds and runs itself",
        )
