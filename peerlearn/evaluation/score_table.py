"""Tables of scores on the terminal: one run with its interval, or several with their spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peerlearn.evaluation.results import read_result, write_mean_result
from peerlearn.evaluation.uncertainty import spread_over_runs


def report_scores(
    found: Sequence[Mapping[str, Path]], columns: Mapping[str, str], *, title: str, folder: Path
) -> None:
    """Print a row per network and, for several runs, write their means.

    One run's top-1 stands with its 95 % interval over test images, several runs as mean +- standard deviation with the
    95 % interval of the mean.

    Args:
        found: for every run, its result files by the name of the row.
        columns: the metric of each column, by its heading.
        folder: of the result files of means.
    """
    n = 0
    table = Table(title=title)
    table.add_column("network")
    for heading in columns:
        table.add_column(heading, justify="right")
        if heading == "top-1":
            table.add_column("95 % interval", justify="right")
    for row in found[0]:
        paths = [each[row] for each in found]
        metrics = [read_result(path)["metrics"] for path in paths]
        n = metrics[0]["n"]
        cells = []
        for heading, name in columns.items():
            spread = spread_over_runs([each[name] for each in metrics])
            if len(found) > 1:
                cells.append(f"{spread.mean:.2f} +- {spread.std:.2f}")
                interval = (spread.mean - spread.ci95, spread.mean + spread.ci95)
            else:
                cells.append(f"{spread.mean:.2f}")
                interval = metrics[0].get("top1_wilson95")
            if heading == "top-1":
                cells.append(f"{interval[0]:.2f} .. {interval[1]:.2f}")
        table.add_row(row, *cells)
        if len(found) > 1:
            write_mean_result(folder, paths)
    table.caption = f"n {n:,}" + (f", {len(found)} runs: mean +- std" if len(found) > 1 else "")
    Console().print(table)
