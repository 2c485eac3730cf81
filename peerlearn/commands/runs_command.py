"""`peerlearn runs`: one table of all runs, which ones and in which order."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peerlearn.commands.runs_table import csv_text, json_text, print_table, value_text
from peerlearn.config import ArgumentParser, nearest_key
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.files import write_text
from peerlearn.runs.registry import RegisteredRun, read_registry
from peerlearn.runs.score_names import ENSEMBLE, KNN_TOP1, score_name

_CONDITION = re.compile(r"(.+?)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_EXAMPLE_SCORE = score_name(ENSEMBLE, KNN_TOP1)


def main(argv: Sequence[str]) -> int:
    """`peerlearn runs [FOLDER ...] [--where KEY=VALUE ...] [--sort KEY] [--csv FILE|-] [--json]`.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    folders: list[Path] = arguments.folders or [Path("runs")]
    runs = read_registry(folders)
    if not runs:
        raise UserError(f"no run in {', '.join(map(str, folders))}: name folders that hold runs")
    keys = {key for run in runs for key in _values(run)}
    conditions = [_read_condition(text, keys) for text in arguments.where]
    runs = [run for run in runs if all(condition.holds(_values(run)) for condition in conditions)]
    if arguments.sort is not None:
        _require_key(arguments.sort, keys, "--sort")
        runs = _sorted(runs, arguments.sort)
    if arguments.json:
        print(json_text(runs), flush=True)
    elif arguments.csv is not None:
        _write_csv(runs, arguments.csv)
    elif not runs:
        print("no run fulfils the conditions")
    else:
        print_table(runs, sort=arguments.sort)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn runs",
        description="Show all runs in one table: how each stands, what differs in their configs, their best scores, "
        "their tags and notes. Example: peerlearn runs runs --where method=moco "
        f"--sort {_EXAMPLE_SCORE}",
        epilog="KEY is a key of the configs, the name of a score (its best value counts), run, state, step, tag or "
        "note; --json prints them all. FOLDER/.peerlearn-index.json keeps what was read, and may be removed.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="a run, or a folder that holds runs, however deep (default: runs)",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="show the runs alone that fulfil each condition: KEY=VALUE, KEY!=VALUE; in quotes 'KEY<VALUE', "
        "'KEY>=VALUE' and so on",
    )
    parser.add_argument(
        "--sort",
        metavar="KEY",
        help="order of the runs: scores from the best, other keys from the smallest; runs without the key come last",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--csv",
        metavar="FILE",
        help="write the table as CSV with every score and every key that differs; - = print it",
    )
    form.add_argument("--json", action="store_true", help="print JSON for programs, with all keys")
    return parser.parse_args(argv)


def _values(run: RegisteredRun) -> dict[str, list[Any]]:
    """What conditions and orders may ask of a run: the values of every key, of which tags and notes have several."""
    return {
        **{key: [value] for key, value in run.config.items()},
        **{name: [score.best] for name, score in run.scores.items()},
        "run": [run.name],
        "state": [run.state],
        "step": [] if run.step is None else [run.step],
        "tag": [*run.notes.tags],
        "note": [*run.notes.texts],
    }


class _Condition(NamedTuple):
    """A condition: the key, and whether a value of it fulfils the condition."""

    key: str
    fulfils: Callable[[Any], bool]
    negated: bool

    def holds(self, values: dict[str, list[Any]]) -> bool:
        found = any(self.fulfils(value) for value in values.get(self.key, ()))
        return found is not self.negated


def _read_condition(text: str, keys: Iterable[str]) -> _Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UsageError(f"--where: expected KEY=VALUE, KEY!=VALUE or the like, got {text!r}")
    key, operator, value = match.groups()
    _require_key(key, keys, "--where")
    if operator in ("=", "!="):
        return _Condition(key, partial(_equals, value), operator == "!=")
    limit = _number(value)
    if limit is None:
        raise UsageError(f"--where: {key}{operator} needs a number, got {value!r}")
    return _Condition(key, partial(_compares, operator, limit), False)


def _require_key(key: str, keys: Iterable[str], word: str) -> None:
    if key not in keys:
        raise UsageError(
            f"{word}: no run has a key {key!r}{nearest_key(key, [*keys])} (`peerlearn runs --json` shows all keys)"
        )


def _equals(asked: str, value: Any) -> bool:
    numbers = _number(asked), _number(value)
    return value_text(value) == asked or (None not in numbers and numbers[0] == numbers[1])


def _compares(operator: str, limit: float, value: Any) -> bool:
    number = _number(value)
    if number is None:
        return False
    return {
        "<": number < limit,
        "<=": number <= limit,
        ">": number > limit,
        ">=": number >= limit,
    }[operator]


def _number(value: Any) -> float | None:
    if isinstance(value, bool | list) or value is None:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _sorted(runs: list[RegisteredRun], key: str) -> list[RegisteredRun]:
    """The runs by a key; those without it last, in the order in which they were."""
    of = {run.name: _values(run).get(key, []) for run in runs}
    has = {name for name, values in of.items() if values and values[0] is not None}
    having = [run for run in runs if run.name in has]
    lacking = [run for run in runs if run.name not in has]
    if any(key in run.scores for run in runs):
        return [*sorted(having, key=lambda run: -of[run.name][0]), *lacking]
    return [*sorted(having, key=lambda run: _rank(of[run.name][0])), *lacking]


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers come before text."""
    number = _number(value)
    return number is None, number or 0.0, value_text(value)


def _write_csv(runs: Sequence[RegisteredRun], file: str) -> None:
    text = csv_text(runs)
    if file == "-":
        print(text, end="", flush=True)
        return
    try:
        write_text(Path(file), text)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}): choose another --csv"
        ) from error
