"""The reader of a study's FILE.yaml."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from peerlearn.config import config_keys, nearest, read_yaml, require
from peerlearn.config.files import written
from peerlearn.config.values import Scalar, WrongTypeError, read_value
from peerlearn.errors import UsageError
from pretrain.config import PretrainConfig
from studies.config import Axes, Compare, Published, StudyConfig

# Keys of the sweeps and pipelines of earlier versions, and what to write instead.
_FORMER = {
    "baseline": "write it under compare: compare: {baseline: ...}",
    "every_epochs": "write exports: N",
    "watch_cluster": "leave it out: the watch has one process on evaluation_cluster",
}
# Keys with keys or lists of their own in them, by the class that they belong to.
_NESTED = {
    StudyConfig: ("grids", "compare", "published"),
    Compare: ("baseline",),
    Published: ("rows",),
}


def read_study(path: Path, *, score: list[str] | None = None, **instead: Any) -> StudyConfig:
    """Read FILE.yaml.

    Args:
        path: path of the file.
        score: scores of the tables in place of the file's; None = the file's.
        instead: values in place of the file's, by key; None = the file's.

    Raises:
        UsageError: the file cannot be read, a key is unknown, a value has the wrong type, or a label comes twice.
    """
    root = read_yaml(path)
    try:
        for key, node in root.value:
            require(key.value not in _FORMER, f"{key.value}: {_FORMER.get(key.value)}")
            require(
                key.value != "pretrain" or isinstance(node, yaml.ScalarNode),
                "pretrain: a pipeline's variants are labels of a grid: "
                "grids: {pretraining: {variant: {NAME: words}}}",
            )
        values = _values("", root, StudyConfig)
        grids = _grids(_as_written(values.pop("grids"))) if "grids" in values else {}
        compare = (
            _values("compare: ", values.pop("compare"), Compare) if "compare" in values else {}
        )
        if "baseline" in compare:
            compare["baseline"] = _as_written(compare["baseline"])
        if score or isinstance(compare.get("score"), str):
            compare["score"] = score or [compare["score"]]
        if "published" in values:
            listed = values["published"]
            require(
                isinstance(listed, yaml.SequenceNode),
                "published must be a list of figures, each with its grid",
            )
            values["published"] = list(map(_published, listed.value))
        values |= {key: value for key, value in instead.items() if value is not None}
        return make_study(grids, **compare, **values)
    except (yaml.YAMLError, ValueError) as error:
        message = " ".join(str(error).split())
        # A message begins with its key.
        lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
        line = next((f", line {lines[key]}" for key in lines if message.startswith(key)), "")
        raise UsageError(f"{path}{line}: {message}") from error


def make_study(
    grids: dict[str, Axes],
    *,
    baseline: Any = None,
    axis: str | None = None,
    score: list[str] | None = None,
    **values: Any,
) -> StudyConfig:
    """The config with these values; the baselines that are not named are the first labels.

    Raises:
        ValueError: a value is wrong; the message begins with the key.
    """
    require("seeds" in values, "seeds is missing: seeds: [0, 1, 2]")
    compare = Compare(score=score or [], axis=axis, baseline=_baselines(baseline, grids, axis))
    return StudyConfig(**{"folder": "", **values}, grids=grids, compare=compare)


def _values(where: str, node: yaml.Node, config_class: Any) -> dict[str, Any]:
    """The values of a mapping by the types of the class, and the nodes of its nested keys."""
    require(isinstance(node, yaml.MappingNode), f"{where}expected keys and values")
    hints = get_type_hints(config_class)
    if config_class is Compare:
        hints["score"] = str | list[str]
    values: dict[str, Any] = {}
    for key_node, value in node.value:
        key = key_node.value
        require(key in hints, f"{where}unknown key {key!r}{nearest(key, hints)}")
        if key in _NESTED[config_class]:
            require(not _is_null(value), f"{where}{key}: expected a value, got null")
            values[key] = value
        elif key == "pretrain" and value.value == "":
            values[key] = ""
        else:
            values[key] = _typed(f"{where}{key}", value, hints[key])
    return values


def _typed(where: str, node: yaml.Node, hint: Any) -> Any:
    try:
        return read_value(written(node), hint)
    except WrongTypeError as error:
        raise ValueError(f"{where}: {error}") from error


def read_exports(text: str) -> Any:
    """The value of --exports.

    Raises:
        UsageError: there is no such value.
    """
    try:
        found = read_value(Scalar(text), get_type_hints(StudyConfig)["exports"])
        require(isinstance(found, str) or found >= 1, f"expected at least 1 epoch, got {found}")
    except ValueError as error:
        raise UsageError(f"--exports: {error}") from error
    return found


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and _as_written(node) is None


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
    if content is None:
        return baselines
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


def _published(node: yaml.Node) -> Published:
    values = _values("published: ", node, Published)
    for key in ("grid", "score", "rows"):
        require(key in values, f"published: {key} is missing")
    rows = _as_written(values.pop("rows"))
    where = f"published: {values['grid']}"
    require(isinstance(rows, Mapping), f"{where}: rows must map rows to their figures")
    for row, figures in rows.items():
        require(
            isinstance(figures, list)
            and all(each is None or type(each) in (int, float) for each in figures),
            f"{where}: {row}: expected a list of figures, got {figures!r}",
        )
    return Published(**values, rows=rows)


def _label(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value)
