"""The table at the end of a run."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.score_names import (
    ENSEMBLE,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    PIXELS,
    parse_score_name,
    score_name,
)


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
    rows = [row for row in run.metric_rows() if score_name(ENSEMBLE, KNN_TOP1) in row]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    table = Table(
        title=f"kNN top-1 (%) on {dataset}",
        caption=f"k {last[KNN_K]}, temperature {last[KNN_TEMPERATURE]}, "
        f"n {last[KNN_TEST_IMAGES]:,}",
    )
    table.add_column("features of")
    table.add_column("untrained", justify="right")
    table.add_column(f"epoch {last['epoch']:.0f}", justify="right")
    if (pixels := score_name(PIXELS, KNN_TOP1)) in first:
        table.add_row("raw pixels", f"{first[pixels]:.2f}", "")
    names = {key: name for key in last if (name := parse_score_name(key))}
    for key, (network, figure) in names.items():
        if figure == KNN_TOP1:
            label = network if network in (ENSEMBLE, PIXELS) else f"network {network}"
            table.add_row(label, f"{first[key]:.2f}", f"{last[key]:.2f}")
    return table
