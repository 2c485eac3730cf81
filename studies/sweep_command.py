"""`peerlearn sweep`."""

import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, config_to_yaml, find_config
from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN, UsageError, UserError
from peerlearn.runs.stop import stop_signals
from studies.sweep import (
    CONFIG_FILE,
    Sweep,
    check_folder,
    is_whole,
    plan_sweep,
    write_sweep,
)
from studies.sweep_config import read_sweep

SHIPPED_SWEEPS = Path(__file__).parent / "sweeps"
# SIGUSR2 is SLURM's, near the time limit, where a job asks for it.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main(argv: Sequence[str]) -> int:
    """`peerlearn sweep FILE [--key value ...] [--dry_run | --commands | --table]`. Returns the exit code."""
    parser = ArgumentParser(
        prog="peerlearn sweep",
        description="Pretrain every config of a grid with several seeds, one after another, and compare them in one "
        "table. Run it again to go on: what is done is left alone. Example: peerlearn sweep my_sweep.yaml --seeds 0",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="a YAML file, a shipped sweep's name, or a sweep's folder")
    parser.add_argument("--folder", help="in place of the file's")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the file's")
    parser.add_argument("--pretrain", metavar="WORDS", help="in place of the file's common words")
    parser.add_argument("--only", nargs="+", default=[], metavar="GRID", help="only these grids")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry_run", action="store_true", help="print the config and the commands")
    instead.add_argument(
        "--commands", action="store_true", help="print the commands of what is not done, as JSON"
    )
    instead.add_argument("--table", action="store_true", help="only sum up what there is")
    words = parser.parse_args(argv)
    file = _find(words.file)
    # A sweep's own folder may have moved since its file was written.
    folder = words.folder or (words.file if Path(words.file).is_dir() else None)
    config = read_sweep(file, folder=folder, seeds=words.seeds, pretrain=words.pretrain)
    sweep = plan_sweep(config, words.only)
    check_folder(sweep)
    if words.dry_run:
        _print_plan(sweep)
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

    with stop_signals(_STOP_SIGNALS, "the run saves, then the sweep stops") as stop:
        write_sweep(sweep)
        whole = run_missing(sweep, stop)
    if not whole:
        again = shlex.join(["sweep", str(sweep.root), *(["--only", *only] if only else [])])
        print(f"saved; `peerlearn {again}` goes on", flush=True)
        return SAVED_RUN_AGAIN
    return FAILURE if report(sweep, whole=is_whole(sweep, only)).problems else DONE


def _commands(sweep: Sweep) -> list[list[str]]:
    """Of every run that is not done, the words of a command that makes it so."""
    return [
        ["resume", str(run.folder)]
        if run.state == "begun"
        else ["pretrain", *run.variant.words, *run.own_words]
        for run in sweep.runs
        if run.state != "done"
    ]


def _print_plan(sweep: Sweep) -> None:
    print(config_to_yaml(sweep.config), end="")
    for run in sweep.runs:
        titles = [cell.title for cell in sweep.cells if cell.variant.name == run.variant.name]
        print(f"# {'; '.join(titles)}; seed {run.seed}: {run.state}")
        print(f"# peerlearn {shlex.join(['pretrain', *run.variant.words, *run.own_words])}")
