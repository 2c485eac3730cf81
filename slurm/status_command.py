"""`peerlearn status`: one table of runs and their jobs."""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UsageError
from peerlearn.runs.progress import time_text
from slurm.find_runs import find_runs
from slurm.jobs import JobWatch
from slurm.status import RunStatus, read_statuses

if TYPE_CHECKING:
    from rich.console import Console, Group

_STYLES = {"running": "cyan", "done": "green", "failed": "red", "dead": "red", "pending": "yellow"}
# Width of the table in a file or a pipe: one line for each run, however long.
_PLAIN_WIDTH = 10_000


class _Kind(NamedTuple):
    """A kind of accuracy.

    Attributes:
        name: what tables call it.
        fields: beginning of its fields of RunStatus.
        protocol: fields of its protocol, without that beginning.
        one: line that tells the protocol, with these fields.
        several: line that stands for several protocols.
    """

    name: str
    fields: str
    protocol: tuple[str, ...]
    one: str
    several: str

    def of(self, status: RunStatus, field: str) -> Any:
        """The run's field; None where it has no accuracy of this kind."""
        return getattr(status, f"{self.fields}_{field}")


_KINDS = (
    _Kind(
        "kNN",
        "knn",
        ("network", "k", "temperature"),
        "the monitor's top-1 in %, {network}, k {k}, temperature {temperature}",
        "the monitor's top-1 in %; --json names network, k and temperature",
    ),
    _Kind(
        "classifier",
        "classifier",
        ("network", "split"),
        "top-1 in % on the {split} images, {network}",
        "top-1 in %; --json names network and split",
    ),
    _Kind(
        "few-shot",
        "few_shot",
        ("network", "ways", "shots"),
        "accuracy in % over {ways}-way {shots}-shot validation episodes, {network}",
        "accuracy in % over validation episodes; --json names network, ways and shots",
    ),
)


def main(argv: Sequence[str]) -> int:
    """`peerlearn status [RUN ...] [--follow] [--interval_seconds S] [--json]`.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    words: list[Path] = arguments.runs or [Path("runs")]
    show = _show_json if arguments.json else _show_table
    if not arguments.follow:
        show(read_statuses(find_runs(words), JobWatch()))
        return DONE
    with contextlib.suppress(KeyboardInterrupt):
        snapshots = _snapshots(words, arguments.interval_seconds)
        if not arguments.json and _console().is_terminal:
            _follow_live(snapshots)
            return DONE
        for number, statuses in enumerate(snapshots):
            if number and not arguments.json:
                print()
            show(statuses)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn status",
        description="Show the state of runs: jobs, steps, speed, scores and heartbeats. If there is no Slurm, or it "
        "does not answer, the run directories alone tell the state. "
        "Example: peerlearn status runs --follow",
        epilog="--json prints a list with an object for each run; null means unknown. Its keys: run, state, reason, "
        "live (whether it goes on by itself), job, restarts, step, total_steps, images_per_second, seconds_left, "
        "knn_top1 (percent), knn_network, knn_epoch, knn_k, knn_temperature, "
        "linear_top1 (percent, of monitor.linear), linear_network, linear_epoch, "
        "classifier_top1 (percent, of a supervised run), classifier_network, classifier_epoch, classifier_split, "
        "few_shot_top1 (percent, over validation episodes), few_shot_network, few_shot_epoch, few_shot_ways, "
        "few_shot_shots, "
        "heartbeat_age_seconds, evaluations_pending, evaluations_running.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a run, or a folder that holds runs: a study (default: runs)",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="show the table again and again, until nothing runs or waits",
    )
    parser.add_argument(
        "--interval_seconds",
        type=float,
        default=5.0,
        help="seconds from one table to the next (default: 5)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON for programs; with --follow one line for each table",
    )
    arguments = parser.parse_args(argv)
    if not arguments.interval_seconds > 0:
        raise UsageError(
            f"--interval_seconds must be more than 0, got {arguments.interval_seconds:g}"
        )
    return arguments


def _snapshots(words: Sequence[Path], interval_seconds: float) -> Iterator[list[RunStatus]]:
    """The statuses, again and again, until nothing runs or waits. New runs are found too."""
    watch = JobWatch()
    while True:
        statuses = read_statuses(find_runs(words), watch)
        yield statuses
        if not any(_goes_on(status) for status in statuses):
            return
        time.sleep(interval_seconds)


def _goes_on(status: RunStatus) -> bool:
    return status.live or status.evaluations_pending + status.evaluations_running > 0


def _follow_live(snapshots: Iterator[list[RunStatus]]) -> None:
    from rich.live import Live

    with Live(console=_console(), auto_refresh=False, vertical_overflow="visible") as live:
        for statuses in snapshots:
            live.update(_table(statuses), refresh=True)


def _show_json(statuses: Sequence[RunStatus]) -> None:
    print(json.dumps([{"run": each.run, **asdict(each)} for each in statuses]), flush=True)


def _show_table(statuses: Sequence[RunStatus]) -> None:
    _console().print(_table(statuses))


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def _table(statuses: Sequence[RunStatus]) -> "Group":
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    evaluated = any(s.evaluations_pending + s.evaluations_running for s in statuses)
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    table.add_column("state", min_width=10)
    for heading in ("step", "images/s", "time left", _score_heading(statuses), "heartbeat"):
        table.add_column(heading, justify="right", no_wrap=True)
    if evaluated:
        table.add_column("evaluations", no_wrap=True)
    for status in statuses:
        cells = [
            Text(status.run),
            Text(status.text, style=_STYLES.get(status.state, "")),
            *map(Text, _numbers(status)),
        ]
        if evaluated:
            cells.append(Text(_evaluations(status)))
        table.add_row(*cells)
    return Group(table, *(Text(line) for kind in _KINDS for line in _protocol(kind, statuses)))


def _protocol(kind: _Kind, statuses: Sequence[RunStatus]) -> list[str]:
    """The protocol of the accuracies of a kind in one line; no line if there are none."""
    protocols = {
        tuple(kind.of(status, field) for field in kind.protocol)
        for status in statuses
        if kind.of(status, "top1") is not None
    }
    if not protocols:
        return []
    one = kind.one.format(**dict(zip(kind.protocol, next(iter(protocols)), strict=True)))
    return [f"{kind.name}: {one if len(protocols) == 1 else kind.several}"]


def _score_heading(statuses: Sequence[RunStatus]) -> str:
    shown = [
        kind.name
        for kind in _KINDS
        if any(kind.of(status, "top1") is not None for status in statuses)
    ]
    return f"{'/'.join(shown) or 'top-1'} (epoch)"


def _numbers(status: RunStatus) -> list[str]:
    """The cells of one run: step, images/s, time left, accuracy, heartbeat. A dash means unknown."""
    step = "-" if status.step is None else f"{status.step:,}"
    total = "" if status.total_steps is None else f"/{status.total_steps:,}"
    rate, left = status.images_per_second, status.seconds_left
    return [
        f"{step}{total}",
        "-" if rate is None else f"{rate:,.0f}",
        "-" if left is None else time_text(left),
        _accuracy(status),
        _heartbeat(status),
    ]


def _heartbeat(status: RunStatus) -> str:
    if status.heartbeat_age_seconds is not None:
        return f"{status.heartbeat_age_seconds:.0f} s ago"
    return "unknown" if status.state == "running" and status.reason is None else "-"


def _accuracy(status: RunStatus) -> str:
    for kind in _KINDS:
        score, epoch = kind.of(status, "top1"), kind.of(status, "epoch")
        if score is not None:
            return f"{score:.2f}" + ("" if epoch is None else f" ({epoch:g})")
    return "-"


def _evaluations(status: RunStatus) -> str:
    counts = {"running": status.evaluations_running, "pending": status.evaluations_pending}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
