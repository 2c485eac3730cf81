"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.runs.directory import RunDirectory


def print_summary(
    run: RunDirectory, dataset: str, accuracies: Mapping[str, ClassificationScores]
) -> None:
    """Print what the networks have learned, and where everything lies.

    Args:
        run: its metrics give kNN top-1 of raw pixels, of the untrained and of the trained networks.
        dataset: its name.
        accuracies: of a supervised run's last epoch on the test split, by network; empty for other methods.
    """
    console = Console()
    table = _accuracies(dataset, accuracies) if accuracies else _knn(run, dataset)
    if table is not None:
        console.print(table)
    console.print(f"run directory: {run.root}", highlight=False)


def _accuracies(dataset: str, accuracies: Mapping[str, ClassificationScores]) -> Table:
    n = next(iter(accuracies.values())).n
    table = Table(title=f"test accuracy (%) on {dataset}, last epoch", caption=f"n {n:,}")
    table.add_column("network")
    table.add_column("top-1", justify="right")
    table.add_column("top-5", justify="right")
    for network, scores in accuracies.items():
        top5 = "" if scores.top5 is None else f"{scores.top5:.2f}"
        table.add_row(network, f"{scores.top1:.2f}", top5)
    return table


def _knn(run: RunDirectory, dataset: str) -> Table | None:
    rows = [row for row in run.metric_rows() if "ensemble/knn_top1" in row]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    table = Table(
        title=f"kNN top-1 (%) on {dataset}",
        caption=f"k {last['knn/k']}, temperature {last['knn/temperature']}, "
        f"n {last['knn/test_images']:,}",
    )
    table.add_column("features of")
    table.add_column("untrained", justify="right")
    table.add_column(f"epoch {last['epoch']:.0f}", justify="right")
    if "pixels/knn_top1" in first:
        table.add_row("raw pixels", f"{first['pixels/knn_top1']:.2f}", "")
    for key in (key for key in last if key.endswith("/knn_top1")):
        name = key.removesuffix("/knn_top1").replace("net/", "network ")
        table.add_row(name, f"{first[key]:.2f}", f"{last[key]:.2f}")
    return table
