"""Tables of scores on the terminal: one run with its interval, or several with their spread."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from peerlearn.evaluation.results import Averaging, mean_over_runs, read_result, write_mean_result
from peerlearn.evaluation.uncertainty import (
    interval_over_runs,
    score_interval,
    spread_over_runs,
)
from peerlearn.runs.output import show
from peerlearn.runs.text import printable

# Width of what is printed below a table.
_WIDTH = 80
# The metrics of one network's score, run by run.
Runs = Sequence[Mapping[str, Any]]


class Column(NamedTuple):
    """A column of a table.

    heading: its heading.
    cell: function from the metrics of one run, or of several, to the text of a cell.
    over_runs: what a cell shows of several runs, for the caption.
    """

    heading: str
    cell: Callable[[Runs], str]
    over_runs: str = ""


def metric_column(heading: str, metric: str) -> Column:
    """A metric: ``62.31``; of several runs mean and standard deviation, ``62.31 +- 0.40``; nothing where it is None."""

    def cell(runs: Runs) -> str:
        values = [run[metric] for run in runs]
        if None in values:
            return ""
        mean, std, _, _ = spread_over_runs(values)
        return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} +- {std:.2f}"

    return Column(heading, cell, "mean +- std")


def interval_column(metric: str, interval: str) -> Column:
    """The 95 % interval of a metric, ``60.05 .. 64.50``: the one that its run tells, or that of the mean over runs.

    Args:
        metric: name of the metric.
        interval: name of the metric's interval, (low, high), in the metrics of one run.
    """

    def cell(runs: Runs) -> str:
        found = runs[0][interval]
        if len(runs) > 1:
            found = interval_over_runs([run[metric] for run in runs], metric)
        return "" if found is None else _interval_text(*found)

    return Column("95 % interval", cell)


def ci95_column(heading: str, metric: str, ci95: str) -> Column:
    """A mean and half the width of its 95 % interval, ``62.31 +- 0.84``: over episodes, say, or over several runs.

    An interval that would leave 0..100 is cut there: ``99.50 (98.66 .. 100.00)``.

    Args:
        heading: heading of the column.
        metric: name of the mean.
        ci95: name of the half width in the metrics of one run.
    """

    def cell(runs: Runs) -> str:
        mean, half_width = runs[0][metric], runs[0][ci95]
        interval: tuple[float, float] | None = score_interval(mean, half_width, metric)
        if len(runs) > 1:
            values = [run[metric] for run in runs]
            mean, _, half_width, _ = spread_over_runs(values)
            interval = interval_over_runs(values, metric)
        if interval is None:
            return f"{mean:.2f}"
        if interval[0] > mean - half_width or interval[1] < mean + half_width:
            return f"{mean:.2f} ({_interval_text(*interval)})"
        return f"{mean:.2f} +- {half_width:.2f}"

    return Column(heading, cell, "mean +- ci95 (none of two runs)")


def _interval_text(low: float, high: float) -> str:
    return f"{low:.2f} .. {high:.2f}"


# Of metrics that `accuracy_metrics` makes.
ACCURACY_COLUMNS = (metric_column("top-1", "top1"), interval_column("top1", "top1_wilson95"))


def report_scores(
    files: Sequence[Mapping[str, Path]],
    columns: Sequence[Column],
    *,
    title: str,
    folder: Path,
    average: Averaging = mean_over_runs,
) -> None:
    """Print a row per score, the protocol, what was chosen and the files; for several runs, write their means.

    Args:
        files: for every run, its result files by the name of the row.
        columns: columns of the table, after that of the rows' names.
        title: title of the table.
        folder: folder of the result files of means.
        average: function from the metrics of several runs to those of their mean.

    Raises:
        UserError: scores that have no mean, or a folder that cannot be written.
    """
    # Imported here: `--help` should not wait for it.
    from rich.table import Table
    from rich.text import Text

    n, dataset, several = 0, "", len(files) > 1
    protocols: list[Mapping[str, Any]] = []
    chosen: list[str] = []
    written: list[Path] = []
    # Text, as plain strings may hold rich's markup.
    table = Table(title=Text(title))
    table.add_column("network", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(Text(column.heading), justify="right", no_wrap=True)
    for row in files[0]:
        paths = [each[row] for each in files]
        results = list(map(read_result, paths))
        runs = [result["metrics"] for result in results]
        n, dataset = runs[0]["n"], results[0]["dataset"]
        table.add_row(Text(row), *(Text(column.cell(runs)) for column in columns))
        protocols += [result["protocol"] for result in results]
        chosen += [
            f"chosen for {row}: {_settings_text(metrics['chosen'])}"
            for metrics in runs
            if "chosen" in metrics
        ]
        written += [write_mean_result(folder, paths, average)] if several else paths
    shown = ", ".join(dict.fromkeys(column.over_runs for column in columns if column.over_runs))
    table.caption = Text(
        f"{dataset}\nn {n:,}" + (f", {len(files)} runs: {shown}" if several else "")
    )
    show(table)
    _print_origin(protocols, chosen, written)


def _print_origin(
    protocols: Sequence[Mapping[str, Any]], chosen: Sequence[str], files: Sequence[Path]
) -> None:
    """Print what a table stands for: the protocol, what validation chose, and the files that hold it all."""
    if common := common_protocol(protocols):
        chosen = [f"protocol: {common}", *dict.fromkeys(chosen)]
    for line in chosen:
        print(fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    for folder in dict.fromkeys(file.parent for file in files):
        print(f"results in {printable(str(folder))}:")
        for file in files:
            if file.parent == folder:
                print(f"  {printable(file.name)}")


def common_protocol(protocols: Sequence[Mapping[str, Any]]) -> str:
    """What protocols have in common, for reading: without what a hash tells of images."""
    first, *others = protocols
    return _settings_text(
        {
            key: value
            for key, value in first.items()
            if not key.endswith("_fingerprint") and all(each.get(key) == value for each in others)
        }
    )


def _settings_text(settings: Mapping[str, Any]) -> str:
    """``k 200, temperature 0.1``: without what is nothing, or no plain value."""
    return ", ".join(
        f"{key} {_value_text(value)}"
        for key, value in settings.items()
        if isinstance(value, str | int | float | list)
    )


def _value_text(value: str | float | list[Any]) -> str:
    if isinstance(value, list):
        return " ".join(map(_value_text, value))
    return f"{value:g}" if isinstance(value, float) else printable(str(value))
