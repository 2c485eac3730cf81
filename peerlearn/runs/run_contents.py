"""What the files of a run tell of it, read again only as far as they have changed.

What was read is kept as plain JSON, the memory of a run:

    {"config": {"stamp", "values", "problem"},
     "metrics": {"stamp", "offset", "before", "step", "damaged", "cut",
                 "scores": {NAME: [best, step, last, last step, by]}},
     "results": {FILE: {"stamp", "scores": {NAME: value}, "step", "problem"}}}

A file whose modification time, size and inode are those of its stamp is not opened. Rows of metrics.jsonl are appended
or the file is replaced, so that a longer file is read from where it ended.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import open_regular
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.score_names import (
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TOP1,
    PIXELS,
    TOP1,
    parse_score_name,
    score_name,
)
from peerlearn.runs.standing import integer, number

Memory = dict[str, Any]

# The figures of result files that tell how good networks are: of these, more is better.
_RESULT_FIGURES = ("top1", "accuracy", "ap", "ap50")
# The protocol of a row's figures, by the figure.
_PROTOCOLS = {
    KNN_TOP1: {"k": KNN_K, "temperature": KNN_TEMPERATURE},
    EPISODE_TOP1: {"ways": EPISODE_WAYS, "shots": EPISODE_SHOTS},
}
# A config has about 130 keys in a few kilobytes; what is far larger is none, and could take for ever to read.
_LARGEST_CONFIG_BYTES = 2**20
_MOST_KEYS, _DEEPEST = 2_000, 8
# So many bytes before the end of what was read tell whether a longer file is the same one.
_COMPARED_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class RunScore:
    """A score of a run over time, in percent.

    Attributes:
        best: largest value.
        best_step: step of the largest value.
        last: newest value.
        last_step: step of the newest value.
        by: protocol of the largest value in words, or the result file that tells it.
    """

    best: float
    best_step: int
    last: float
    last_step: int
    by: str


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """What the files of a run tell.

    Attributes:
        config: config of the run by dotted keys; empty where it cannot be read.
        step: step of the newest row of metrics.jsonl; None without one.
        scores: scores by their names: as in metrics.jsonl, or TASK-DATASET/ before such a name.
        problems: what cannot be read, in words.
        is_cut: whether the last row of metrics.jsonl lacks its end: it is being written, or a crash cut it short.
    """

    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    scores: dict[str, RunScore] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    is_cut: bool = False


def read_contents(run: RunDirectory, memory: Memory) -> tuple[RunContents, Memory]:
    """What the files of a run tell.

    Args:
        run: the run.
        memory: what an earlier call has returned; what makes no sense in it is read anew.

    Returns:
        The contents, and what to remember of them.
    """
    try:
        return _read(run, memory)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return _read(run, {})


def _read(run: RunDirectory, memory: Memory) -> tuple[RunContents, Memory]:
    config = _read_config(run.config, memory.get("config"))
    metrics = _read_metrics(run.metrics, memory.get("metrics"))
    results = _read_results(run.results, memory.get("results", {}))
    problems = [f"{run.config.name} {config['problem']}"] if config.get("problem") else []
    if metrics.get("problem"):
        problems.append(f"{run.metrics.name} {metrics['problem']}")
    if metrics.get("damaged"):
        problems.append(f"{run.metrics.name} has {_lines(metrics['damaged'])}")
    problems += [
        f"{run.results.name}/{name} {result['problem']}"
        for name, result in results.items()
        if result.get("problem")
    ]
    contents = RunContents(
        config=_checked_config(config.get("values", {})),
        step=integer(metrics.get("step")),
        scores={
            **{name: _score(*values) for name, values in metrics.get("scores", {}).items()},
            **_result_scores(results),
        },
        problems=tuple(problems),
        is_cut=metrics.get("cut") is True,
    )
    return contents, {"config": config, "metrics": metrics, "results": results}


def _lines(count: int) -> str:
    return "1 line that cannot be read" if count == 1 else f"{count:,} lines that cannot be read"


def _score(best: Any, best_step: Any, last: Any, last_step: Any, by: Any) -> RunScore:
    """A score of a memory.

    Raises:
        TypeError: the memory was written by something else.
    """
    values = (number(best), integer(best_step), number(last), integer(last_step))
    if None in values or not isinstance(by, str):
        raise TypeError("no score")
    return RunScore(best=best, best_step=best_step, last=last, last_step=last_step, by=by)


def _stamp(file: Path) -> list[int] | None:
    """What changes with a file's content; None if it is not there."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_size, found.st_ino]


def _read_config(file: Path, earlier: Memory | None) -> Memory:
    stamp = _stamp(file)
    if earlier is not None and stamp is not None and earlier["stamp"] == stamp:
        return earlier
    try:
        with open_regular(file) as opened:
            text = opened.read(_LARGEST_CONFIG_BYTES + 1)
        if len(text) > _LARGEST_CONFIG_BYTES:
            raise ValueError("it is too large")
        # In C, a config takes a twentieth of the time.
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(content, dict):
            raise ValueError("it holds no keys")
        values = dict(_flat(content))
    except OSError as error:
        return {"stamp": stamp, "problem": f"cannot be read ({error.strerror})"}
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}" if mark else " ".join(str(error).split())
        return {"stamp": stamp, "problem": f"is damaged ({reason})"}
    return {"stamp": stamp, "values": values}


def _flat(group: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The values by dotted keys, as JSON has them.

    Raises:
        ValueError: there are more than any config has.
    """
    for count, found in enumerate(_flat_group(group, "", _DEEPEST)):
        if count == _MOST_KEYS:
            raise ValueError("it has too many keys")
        yield found


def _flat_group(group: Mapping[Any, Any], prefix: str, levels: int) -> Iterator[tuple[str, Any]]:
    if not levels:
        raise ValueError("it is nested too deeply")
    for key, value in group.items():
        if isinstance(value, dict) and value:
            yield from _flat_group(value, f"{prefix}{key}.", levels - 1)
        elif isinstance(value, list):
            yield f"{prefix}{key}", [_plain(item) for item in value]
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict | list):
        return "..." if value else ""
    known = isinstance(value, str | int | None) or number(value) is not None
    return value if known else str(value)


def _checked_config(values: Any) -> dict[str, Any]:
    if any(isinstance(value, dict) for value in values.values()):
        raise TypeError("no config")
    return dict(values)


def _read_metrics(file: Path, earlier: Memory | None) -> Memory:
    stamp = _stamp(file)
    if stamp is None:
        return {}
    if earlier and earlier["stamp"] == stamp:
        return earlier
    try:
        with open_regular(file) as rows:
            memory: Memory = {"offset": 0, "step": None, "damaged": 0, "scores": {}}
            if earlier and _goes_on(rows, earlier, stamp):
                # A new one: what an error leaves of it is thrown away.
                memory = json.loads(json.dumps(earlier))
            rows.seek(memory["offset"])
            _take_rows(rows, memory)
            rows.seek(max(0, memory["offset"] - _COMPARED_BYTES))
            memory["before"] = rows.read(memory["offset"] - rows.tell()).hex()
    except OSError as error:
        return {"stamp": stamp, "problem": f"cannot be read ({error.strerror})"}
    # A stamp from before the reading: what was added since is read next time.
    return {**memory, "stamp": stamp}


def _goes_on(rows: Any, earlier: Memory, stamp: list[int]) -> bool:
    """Whether the file is the one that was read, with more lines."""
    _, earlier_size, earlier_inode = earlier["stamp"]
    _, size, inode = stamp
    before = bytes.fromhex(earlier.get("before", ""))
    if inode != earlier_inode or size <= earlier_size or not before:
        return False
    rows.seek(earlier["offset"] - len(before))
    return bool(rows.read(len(before)) == before)


def _take_rows(rows: Any, memory: Memory) -> None:
    """Take in the whole lines that follow. A last line without its end is being written."""
    last, named = b"", f'{TOP1}"'.encode()
    memory["cut"] = False
    for line in rows:
        if not line.endswith(b"\n"):
            memory["cut"] = True
            break
        memory["offset"] += len(line)
        # Most rows hold losses alone. They are not parsed, which would take ten times as long.
        if named in line:
            _take_row(line, memory)
        elif not (line.startswith(b"{") and line.endswith(b"}\n")):
            memory["damaged"] += 1
            continue
        last = line
    step = integer(_parsed(last).get("step"))
    memory["step"] = memory["step"] if step is None else step


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _take_row(line: bytes, memory: Memory) -> None:
    row = _parsed(line)
    step = integer(row.get("step"))
    if step is None:
        memory["damaged"] += 1
        return
    if step == 0:
        # Of networks that nothing has trained.
        return
    for name, value in row.items():
        score = number(value) if name.endswith(TOP1) else None
        parsed = None if score is None else parse_score_name(name)
        if score is None or parsed is None or parsed.network == PIXELS:
            continue
        best, best_step, _, _, by = memory["scores"].get(name, [-math.inf, step, 0, 0, ""])
        if score > best:
            best, best_step, by = score, step, _protocol(row, parsed.figure)
        memory["scores"][name] = [best, best_step, score, step, by]


def _protocol(row: Mapping[str, Any], figure: str) -> str:
    fields = {name: number(row.get(key)) for name, key in _PROTOCOLS.get(figure, {}).items()}
    return ", ".join(f"{name} {value:g}" for name, value in fields.items() if value is not None)


def _read_results(folder: Path, earlier: Mapping[str, Memory]) -> dict[str, Memory]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return {}
    found = {name: _read_result(folder / name, earlier.get(name)) for name in names}
    return {name: result for name, result in found.items() if result is not None}


def _read_result(file: Path, earlier: Memory | None) -> Memory | None:
    """None of a file that has gone."""
    stamp = _stamp(file)
    if stamp is None:
        return None
    if earlier is not None and earlier["stamp"] == stamp:
        return earlier
    try:
        result = read_json_object(file)
        task, dataset, network = (str(result[key]) for key in ("task", "dataset", "network"))
        step, metrics = integer(result["step"]), dict(result["metrics"])
    except OSError as error:
        return {"stamp": stamp, "problem": f"cannot be read ({error.strerror})"}
    except (ValueError, TypeError, LookupError):
        return {"stamp": stamp, "problem": "is damaged, or no result"}
    scores = {
        f"{task}-{dataset}/{score_name(network, figure)}": number(metrics.get(figure))
        for figure in _RESULT_FIGURES
    }
    known = {name: value for name, value in scores.items() if value is not None}
    return {"stamp": stamp, "step": step or 0, "scores": known}


def _result_scores(results: Mapping[str, Memory]) -> dict[str, RunScore]:
    """The best value of every score, and the best one of its newest step."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    for file, result in results.items():
        for name, value in result.get("scores", {}).items():
            found.setdefault(name, []).append((value, result["step"], file))
    scores = {}
    for name, values in found.items():
        best, best_step, file = max(values)
        last_step = max(step for _, step, _ in values)
        last = max(value for value, step, _ in values if step == last_step)
        scores[name] = _score(best, best_step, last, last_step, file)
    return scores
