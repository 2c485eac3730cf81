"""`peerlearn sweep`: pretrain a grid of configs with several seeds, and compare them."""

import json
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, config_to_yaml, find_config
from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN, UsageError, UserError
from peerlearn.runs.stop import stop_signals
from studies.sweep import (
    CONFIG_FILE,
    Sweep,
    check_folder,
    check_variants,
    is_whole,
    plan_sweep,
    write_sweep,
)
from studies.sweep_config import read_sweep

SHIPPED_SWEEPS = Path(__file__).parent / "sweeps"
# SLURM sends SIGUSR2 near the time limit if a job asks for it.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main(argv: Sequence[str]) -> int:
    """`peerlearn sweep FILE [--key value ...] [--dry_run | --commands | --table]`.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn sweep",
        description="Pretrain every config of a grid with several seeds, one after another, and compare them in one "
        "table. The same command again continues the sweep: finished runs are left alone. "
        "Example: peerlearn sweep my_sweep.yaml --seeds 0",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="a YAML file, a shipped sweep's name, or a sweep's folder")
    parser.add_argument("--folder", help="folder of the sweep (default: the file's)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds of the runs (default: the file's)"
    )
    parser.add_argument(
        "--pretrain", metavar="WORDS", help="words common to all runs (default: the file's)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GRID", help="grids to run (default: all)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry_run", action="store_true", help="print the config and the commands")
    instead.add_argument(
        "--commands", action="store_true", help="print the commands of unfinished runs as JSON"
    )
    instead.add_argument(
        "--table", action="store_true", help="only print and write the tables of the runs so far"
    )
    words = parser.parse_args(argv)
    file = _find(words.file)
    # A sweep's folder may have been moved after its file was written.
    folder = words.folder or (words.file if Path(words.file).is_dir() else None)
    config = read_sweep(file, folder=folder, seeds=words.seeds, pretrain=words.pretrain)
    sweep = plan_sweep(config, words.only)
    check_folder(sweep)
    if words.dry_run:
        _print_plan(sweep, check_variants(sweep))
        return DONE
    if words.commands:
        print(json.dumps({"folder": str(sweep.root), "commands": _commands(sweep)}))
        return DONE
    if not words.table:
        return _run(sweep, words.only)
    if not sweep.root.is_dir():
        raise UserError(f"{sweep.root} is not there: nothing of this sweep has been run yet")
    from studies.sweep_table import report

    write_sweep(sweep)
    report(sweep, whole=is_whole(sweep, words.only))
    return DONE


def _find(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise UsageError(f"{name} is a folder, but no sweep's: it has no {CONFIG_FILE}")
        return folder / CONFIG_FILE
    return find_config(name, SHIPPED_SWEEPS)


def _run(sweep: Sweep, only: Sequence[str]) -> int:
    from studies.sweep_run import run_missing
    from studies.sweep_table import report

    check_variants(sweep)
    with stop_signals(_STOP_SIGNALS, "the run saves, then the sweep stops") as stop:
        write_sweep(sweep)
        whole = run_missing(sweep, stop)
    if not whole:
        again = shlex.join(["sweep", str(sweep.root), *(["--only", *only] if only else [])])
        print(f"saved; `peerlearn {again}` goes on", flush=True)
        return SAVED_RUN_AGAIN
    return FAILURE if report(sweep, whole=is_whole(sweep, only)).problems else DONE


def _commands(sweep: Sweep) -> list[list[str]]:
    """The words of a command for every run that is not done, which starts or continues it."""
    return [
        ["resume", str(run.folder)]
        if run.state == "begun"
        else ["pretrain", *run.variant.words, *run.own_words]
        for run in sweep.runs
        if run.state != "done"
    ]


def _print_plan(sweep: Sweep, needs: Mapping[str, Sequence[str]]) -> None:
    print(config_to_yaml(sweep.config), end="")
    for run in sweep.runs:
        titles = [cell.title for cell in sweep.cells if cell.variant.name == run.variant.name]
        print(f"# {'; '.join(titles)}; seed {run.seed}: {run.state}")
        print(f"# peerlearn {shlex.join(['pretrain', *run.variant.words, *run.own_words])}")
    for name, lines in needs.items():
        print(f"# {name}: {'; '.join(lines)}")
