"""`peerlearn mirror`: forward a run to an experiment tracker."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, positive_number
from peerlearn.errors import DONE
from peerlearn.exchange.mirror import Destination, Tracker, destination_of, mirror
from peerlearn.exchange.run_news import Subject
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.trackers import KINDS, check_installed


def main(argv: Sequence[str]) -> int:
    """`peerlearn mirror RUN --to TRACKER [--project P] [--uri U] [--follow]`.

    Returns:
        The exit code.

    Raises:
        UserError: the folder is no run, or the tracker cannot be used.
    """
    words = _parser().parse_args(argv)
    run = RunDirectory(words.run)
    run.check_exists()
    check_installed(words.to)
    mirror(
        run,
        destination_of(run, words.to, words.project, words.uri),
        _connection_to(words.to),
        follow=words.follow,
        interval_seconds=words.interval_seconds,
    )
    return DONE


def _connection_to(tracker: str) -> Callable[[Subject, Destination], Tracker]:
    """The function that opens a connection to a tracker."""
    module = importlib.import_module(f"peerlearn.exchange.{KINDS[tracker].module}")
    connect: Callable[[Subject, Destination], Tracker] = module.connect
    return connect


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="peerlearn mirror",
        description="Send the metrics, events and results of a run to an experiment tracker, each step once. It "
        "goes on where it was, also after a kill or a requeue.",
        epilog="examples:\n"
        "  peerlearn mirror runs/a --to wandb --follow\n"
        "  peerlearn mirror runs/a --to mlflow --uri http://localhost:5000 --project contrastive\n"
        "  WANDB_MODE=offline peerlearn mirror runs/a --to wandb; wandb sync runs/a/mirror/wandb/offline-run-*",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--to", required=True, choices=list(KINDS), help="the tracker")
    parser.add_argument(
        "--project",
        help="project or experiment there (default: the tracker's own variable, or peerlearn)",
    )
    parser.add_argument(
        "--uri",
        help="server or folder (default: the tracker's own settings; of tensorboard RUN/mirror/tensorboard)",
    )
    parser.add_argument(
        "--follow", action="store_true", help="go on until the run is DONE or FAILED, or Ctrl-C"
    )
    parser.add_argument(
        "--interval_seconds",
        type=positive_number,
        default=10.0,
        help="seconds from one look at the run to the next (default: 10)",
    )
    return parser
