"""`peerlearn measure`: one evaluation that a study or a watch has ordered. Its jobs run this."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from peerlearn.cli import dispatch
from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, SavedError, UserError
from peerlearn.evaluation.results import JOB_VARIABLE, read_result
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from peerlearn.runs.lock import InUseError, run_lock
from studies.evaluations import (
    Order,
    Outcome,
    check_export,
    read_order,
    read_outcome,
    write_failure,
    write_outcome,
)

_CONFIG = "resolved.yaml"


def main(argv: Sequence[str]) -> int:
    """`peerlearn measure RUN/evaluations/KEY`.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn measure",
        description="Do one evaluation that a study or `peerlearn watch` has ordered, unless its results are there. "
        "The jobs of a study run this. Example: peerlearn measure runs/a/evaluations/0123456789abcdef01234567",
    )
    parser.add_argument("folder", type=Path, metavar="RUN/evaluations/KEY")
    folder: Path = parser.parse_args(argv).folder
    order = read_order(folder)
    if _measured(folder):
        return DONE
    if os.environ.get("RANK", "0") != "0":
        return dispatch(_command(folder, order))
    try:
        with run_lock(folder):
            # Another process may have measured it until the lock was free.
            return DONE if _measured(folder) else _measure(folder, order)
    except InUseError as error:
        print(f"{error}; its outcome is looked for again", flush=True)
        return SAVED_RUN_AGAIN


def _measured(folder: Path) -> bool:
    outcome = read_outcome(folder)
    if outcome is None or outcome.kind != "done":
        return False
    there = all(file.is_file() for file in outcome.files(_run_of(folder)))
    if there:
        print(f"{folder}: measured already", flush=True)
    return there


def _run_of(folder: Path) -> Path:
    return folder.parent.parent


def _command(folder: Path, order: Order) -> list[str]:
    return [order.verb, str(folder / _CONFIG)]


def _measure(folder: Path, order: Order) -> int:
    run = _run_of(folder)
    config = {**order.config, "checkpoint": str(run / order.export)}
    os.environ[JOB_VARIABLE] = folder.name
    try:
        check_export(run, order)
        write_text(folder / _CONFIG, yaml.safe_dump(config, sort_keys=False))
        code = dispatch(_command(folder, order))
    except SavedError:
        raise  # It goes on where it was told to stop.
    except Exception as error:
        reason = " ".join(str(error).split())
        known = isinstance(error, UserError)
        write_failure(folder, order, reason if known else f"{type(error).__name__}: {reason}")
        raise
    results = _results(run, order, folder.name) if code == DONE else []
    if not results:
        write_failure(folder, order, f"it exited with {code} and left no result")
        return code
    write_outcome(folder, Outcome(line=order.line, step=order.step, kind="done", results=results))
    return DONE


def _results(run: Path, order: Order, key: str) -> list[str]:
    """The result files that this evaluation wrote, relative to the run: they name it."""
    place = Path(order.config.get("results") or RunDirectory(run).results)
    found = []
    for path in sorted(place.glob(f"*-{order.step:08d}-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if read_result(path).get("job") == key:
                found.append(os.path.relpath(path, run))
    return found
