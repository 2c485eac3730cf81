"""The config of a study: grids x seeds of pretraining, evaluations of their exports, and what is compared.

A grid has axes, an axis has labels, and a label stands for words of `peerlearn pretrain`:

    grids:
      loss terms:                              # a grid: one table, one panel of the picture
        terms:                                 # an axis, here by label: words
          all: ""
          without scl_hard: --terms scl_soft icl_hard icl_soft
      embedding size:
        cohort.embedding_dim: [32, 64, 128]    # an axis by the values of a config key
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from peerlearn.config import config_keys, nearest, read_yaml, require
from peerlearn.errors import UsageError
from pretrain.config import PretrainConfig

# Words that the study itself sets, or that are no part of a command's config.
_OWN_WORDS = {
    "pretrain": ("--seed", "--run", "--config", "--auto_resume", "--dry_run", "--help", "-h"),
    "evaluate": ("--checkpoint", "--dry_run", "--help", "-h"),
}
# Keys of the sweeps and pipelines of earlier versions, and what to write instead.
_FORMER = {
    "baseline": "write it under compare: compare: {baseline: ...}",
    "every_epochs": "write exports: N",
    "watch_cluster": "leave it out: the watch has one process on evaluation_cluster",
}
# Keys that may be null, of any part of a file.
_NULL = ("evaluation_cluster", "throttle", "axis", "dataset", "variant")
KEEP = ("all", "last", "results")
WATCH = ("job", "here")

# Name of the axis -> label -> words.
Axes = dict[str, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What the tables of a study compare.

    Attributes:
        score: scores of the tables as TASK/METRIC, linear/top1 say; empty = the first metric of each task.
        axis: axis along which scores are compared; null = the last axis of each grid.
        baseline: label that the others are compared with, by grid.
    """

    score: list[str] = field(default_factory=list)
    axis: str | None = None
    baseline: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of one score that a paper has published for a grid.

    Attributes:
        grid: name of the grid.
        score: score of the figures as TASK/METRIC.
        network: network of the figures: individual (mean over the networks), ensemble, weighted-ensemble, 0, 1, ...
        dataset: data set of the figures; null = that of the grid's only results.
        variant: what tells the scores of one network apart, "5-way 1-shot" say; null = the network has one.
        rows: figures along the compared axis, by the labels of the other axes, joined by " / "; null = not published.
    """

    grid: str
    score: str
    network: str = "individual"
    dataset: str | None = None
    variant: str | None = None
    rows: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The config of a study.

    Attributes:
        folder: folder of the study, for its runs, logs and tables.
        pretrain: words after `pretrain` that are common to all runs.
        seeds: seeds of each config.
        grids: axes of each grid, by its name; the product of the axes is run.
        evaluate: command lines of the evaluations of each run, verb first, without --checkpoint.
        exports: exports that are evaluated: last, all, or the interval in epochs, whereby the last always is.
        compare: scores, axis and baseline of the tables.
        cluster: place of the pretraining: here (one run after another), local (the same in the background), debug, or
            the profile of a cluster.
        evaluation_cluster: profile of the evaluation jobs; null = that of the pretraining.
        watch: place of the process that submits evaluations: job, or here for clusters whose nodes may not submit.
        interval_seconds: seconds from one look at the runs to the next.
        throttle: largest number of pretrainings at once, and of evaluations; null = 1 here, no limit on a cluster.
        keep: what stays of a run once it is evaluated: all, the last export (without saves), or results alone.
        published: published figures, which tables show beside those measured.
    """

    folder: str
    pretrain: str = ""
    seeds: list[int]
    grids: dict[str, Axes]
    evaluate: list[str] = field(default_factory=list)
    exports: str | int = "last"
    compare: Compare = field(default_factory=Compare)
    cluster: str = "here"
    evaluation_cluster: str | None = None
    watch: str = "job"
    interval_seconds: float = 30.0
    throttle: int | None = None
    keep: str = "all"
    published: list[Published] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must name the study's folder")
        require(bool(self.seeds), "seeds must hold at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds holds one twice: {self.seeds}")
        require(bool(self.grids), "grids must hold at least one")
        check_words("pretrain", "pretrain", self.pretrain)
        for grid, axes in self.grids.items():
            require(bool(axes), f"grids: {grid}: it has no axis")
            for axis, labels in axes.items():
                require(bool(labels), f"grids: {grid}: {axis}: it has no label")
                for label, words in labels.items():
                    check_words("pretrain", f"grids: {grid}: {axis}: {label}", words)
        for line in self.evaluate:
            check_words("evaluate", f"evaluate: {line}", line)
            require(bool(line.split()), "evaluate holds an empty line")
        require(
            len(set(self.evaluate)) == len(self.evaluate),
            f"evaluate holds one twice: {self.evaluate}",
        )
        read_exports(self.exports)
        for key, choices in (("keep", KEEP), ("watch", WATCH)):
            value = getattr(self, key)
            require(value in choices, f"{key}: expected {' or '.join(choices)}, got {value!r}")
        require(
            self.throttle is None or self.throttle >= 1,
            f"throttle must be at least 1, got {self.throttle}",
        )
        require(
            0 < self.interval_seconds < float("inf"),
            f"interval_seconds must be positive and finite, got {self.interval_seconds}",
        )
        self._check_compared()

    @property
    def evaluated_on(self) -> str:
        """The place of the evaluations."""
        return self.evaluation_cluster or self.cluster

    def compared_axis(self, grid: str) -> str:
        """The axis of a grid along which scores are compared."""
        axes = list(self.grids[grid])
        return self.compare.axis if self.compare.axis in axes else axes[-1]

    def row_labels(self, grid: str) -> list[str]:
        """The rows of a grid: the labels on all axes but the compared one, joined by " / "."""
        axes = self.grids[grid]
        rows = [""]
        for axis, labels in axes.items():
            if axis != self.compared_axis(grid):
                rows = [f"{row} / {label}" if row else label for row in rows for label in labels]
        return rows

    def _check_compared(self) -> None:
        every_axis = {axis for axes in self.grids.values() for axis in axes}
        require(
            self.compare.axis is None or self.compare.axis in every_axis,
            f"compare: axis: no grid has an axis {self.compare.axis!r}"
            f"{nearest(self.compare.axis or '', every_axis)}",
        )
        scores = self.compare.score
        require(len(set(scores)) == len(scores), f"compare: score holds one twice: {scores}")
        for score in [*scores, *(each.score for each in self.published)]:
            require(
                len(score.split("/")) == 2 and all(score.split("/")),
                f"compare: score: expected TASK/METRIC, linear/top1 say, got {score!r}",
            )
        for grid in self.grids:
            rows = self.row_labels(grid)
            twice = next((row for row in rows if rows.count(row) > 1), None)
            require(twice is None, f"grids: {grid}: two of its rows are called {twice!r}")
            labels = self.grids[grid][self.compared_axis(grid)]
            label = self.compare.baseline.get(grid, "")
            require(
                label in labels,
                f"compare: baseline: {grid}: its axis {self.compared_axis(grid)} has no label {label!r}"
                f"{nearest(label, labels)}",
            )
        for each in self.published:
            require(
                each.grid in self.grids,
                f"published: unknown grid {each.grid!r}{nearest(each.grid, self.grids)}",
            )
            count = len(self.grids[each.grid][self.compared_axis(each.grid)])
            rows = self.row_labels(each.grid)
            for row, figures in each.rows.items():
                require(row in rows, f"published: {each.grid}: no row {row!r}{nearest(row, rows)}")
                require(
                    len(figures) == count,
                    f"published: {each.grid}: row {row!r}: {len(figures)} figures for {count} labels",
                )


def read_exports(written: str | int) -> str | int:
    """The exports to evaluate: last, all, or an interval in epochs, also where it is written as text.

    Raises:
        ValueError: it is none of these.
    """
    number = int(written) if str(written).isdecimal() else 0
    require(
        written in ("last", "all") or number >= 1,
        f"exports: expected last, all or a number of epochs of at least 1, got {written!r}",
    )
    return number or written


def read_study(path: Path, **instead: Any) -> StudyConfig:
    """Read FILE.yaml.

    Args:
        path: path of the file.
        instead: values in place of the file's, by key; None = the file's.

    Raises:
        UsageError: the file cannot be read, a key is unknown, a value has the wrong type, or a label comes twice.
    """
    root = read_yaml(path)
    try:
        return build_study(_as_written(root), **instead)
    except (yaml.YAMLError, ValueError) as error:
        message = " ".join(str(error).split())
        # A message begins with its key.
        lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
        line = next((f", line {lines[key]}" for key in lines if message.startswith(key)), "")
        raise UsageError(f"{path}{line}: {message}") from error


def build_study(content: Mapping[str, Any], **instead: Any) -> StudyConfig:
    """The config with these values.

    Raises:
        ValueError: a key is unknown, or a value is wrong; the message begins with the key.
    """
    for key, hint in _FORMER.items():
        require(key not in content, f"{key}: {hint}")
    require(
        not isinstance(content.get("pretrain"), list),
        "pretrain: a pipeline's variants are labels of a grid: grids: {pretraining: {variant: {NAME: words}}}",
    )
    _check_keys("", content, StudyConfig)
    written = dict(content) | {key: value for key, value in instead.items() if value is not None}
    for key in ("folder", "pretrain", "cluster", "evaluation_cluster", "keep", "watch"):
        value = written.get(key)
        require(value is None or isinstance(value, str), f"{key}: expected text, got {value!r}")
    require("seeds" in written, "seeds is missing: seeds: [0, 1, 2]")
    for key, kind, name in (("seeds", int, "whole numbers"), ("evaluate", str, "command lines")):
        values = written.get(key, [])
        require(
            isinstance(values, list) and all(type(value) is kind for value in values),
            f"{key} must be a list of {name}, got {values!r}",
        )
    for key, kinds in (("throttle", (int,)), ("interval_seconds", (int, float))):
        value = written.get(key)
        require(value is None or type(value) in kinds, f"{key}: expected a number, got {value!r}")
    written["grids"] = _grids(written.get("grids", {}))
    compare = written.get("compare", {})
    _check_keys("compare: ", compare, Compare)
    score = compare.get("score", [])
    require(
        isinstance(score, str | list),
        f"compare: score: expected TASK/METRIC, or a list, got {score!r}",
    )
    axis = compare.get("axis")
    require(
        axis is None or isinstance(axis, str), f"compare: axis: expected one axis, got {axis!r}"
    )
    written["compare"] = Compare(
        score=[score] if isinstance(score, str) else list(map(str, score)),
        axis=axis,
        baseline=_baselines(compare.get("baseline", {}), written["grids"], axis),
    )
    published = written.get("published", [])
    require(isinstance(published, list), "published must be a list of figures, each with its grid")
    written["published"] = [_published(each) for each in published]
    written["exports"] = read_exports(written.get("exports", "last"))
    return StudyConfig(**{"folder": "", **written})


def _check_keys(where: str, content: Any, config_class: Any) -> None:
    require(isinstance(content, Mapping), f"{where or 'the file'}: expected keys and values")
    known = [each.name for each in fields(config_class)]
    for key, value in content.items():
        require(key in known, f"{where}unknown key {key!r}{nearest(key, known)}")
        require(value is not None or key in _NULL, f"{where}{key}: expected a value, got null")


def _as_written(node: Any) -> Any:
    """The content of a YAML file with its keys as they are written: a label may be 1e-3, or no."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _as_written(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(item) for item in node.value]
    return yaml.SafeLoader("").construct_object(node)


def _grids(content: Any) -> dict[str, Axes]:
    require(isinstance(content, Mapping), "grids must map names to axes")
    grids = {}
    for grid, axes in content.items():
        require(isinstance(axes, Mapping), f"grids: {grid}: it must map axes to their labels")
        grids[grid] = {axis: _labels(f"grids: {grid}: {axis}", axis, axes[axis]) for axis in axes}
    return grids


def _labels(where: str, axis: str, content: Any) -> dict[str, str]:
    if isinstance(content, list):
        return axis_of_values(where, axis, content)
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


def axis_of_values(where: str, axis: str, values: Iterable[Any]) -> dict[str, str]:
    """The labels and words of an axis that is a config key with its values.

    Raises:
        ValueError: there is no such key, or a value stands twice; the message begins with ``where``.
    """
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


def _baselines(content: Any, grids: Mapping[str, Axes], axis: str | None) -> dict[str, str]:
    """The label of each grid's baseline; if the file names none, the first label of the compared axis."""
    compared = {
        grid: axes.get(axis or "", list(axes.values())[-1]) if axes else {}
        for grid, axes in grids.items()
    }
    baselines = {grid: next(iter(labels), "") for grid, labels in compared.items()}
    if isinstance(content, Mapping):
        for grid, label in content.items():
            require(
                grid in grids, f"compare: baseline: unknown grid {grid!r}{nearest(grid, grids)}"
            )
            require(
                label is not None and not isinstance(label, list | Mapping),
                f"compare: baseline: {grid}: name one label",
            )
            baselines[grid] = _label(label)
        return baselines
    having = [grid for grid, labels in compared.items() if _label(content) in labels]
    all_labels = {each for labels in compared.values() for each in labels}
    require(
        bool(having),
        f"compare: baseline: no grid has a label {_label(content)!r}{nearest(_label(content), all_labels)}",
    )
    return baselines | dict.fromkeys(having, _label(content))


def _published(content: Any) -> Published:
    _check_keys("published: ", content, Published)
    for key in ("grid", "score", "rows"):
        require(key in content, f"published: {key} is missing")
    rows = content["rows"]
    where = f"published: {content['grid']}"
    require(isinstance(rows, Mapping), f"{where}: rows must map rows to their figures")
    for row, figures in rows.items():
        require(
            isinstance(figures, list)
            and all(each is None or type(each) in (int, float) for each in figures),
            f"{where}: {row}: expected a list of figures, got {figures!r}",
        )
    texts = {key: _label(value) for key, value in content.items() if key != "rows"}
    return Published(**texts, rows=dict(rows))


def _label(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def check_words(kind: str, where: str, line: str) -> list[str]:
    """Split a line of a study into words.

    Args:
        kind: key of the line: pretrain or evaluate.
        where: place of the line, for the message.
        line: words of a command.

    Raises:
        ValueError: it cannot be split, or has a word that the study sets itself; the message begins with ``where``.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{where}: {line!r} cannot be split into words: {error}") from error
    for word in words:
        name = word.split("=")[0]
        require(
            name not in _OWN_WORDS[kind],
            f"{where}: {name} has no place here: the study sets it itself",
        )
    return words
