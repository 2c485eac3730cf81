"""The table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.output import show
from peerlearn.runs.score_names import (
    ENSEMBLE,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    NEIGHBOUR_AGREEMENT,
    PIXELS,
    parse_score_name,
    score_name,
)
from pretrain.rows import LABEL_FREE


def print_summary(
    run: RunDirectory, dataset: str, accuracies: Mapping[str, ClassificationScores]
) -> None:
    """Print what the networks have learned, and where everything lies.

    Args:
        run: its metrics give kNN top-1 of raw pixels, of the untrained and of the trained networks.
        dataset: its name.
        accuracies: of a supervised run's last epoch on the test split, by network; empty for other methods.
    """
    table = _accuracies(dataset, accuracies) if accuracies else _monitored(run, dataset)
    if table is not None:
        show(table)
    print(f"run directory: {run.root}", flush=True)


def _accuracies(dataset: str, accuracies: Mapping[str, ClassificationScores]) -> Table:
    n = next(iter(accuracies.values())).n
    table = Table(title=Text(f"test accuracy (%) on {dataset}, last epoch"), caption=f"n {n:,}")
    table.add_column("network")
    table.add_column("top-1", justify="right")
    table.add_column("top-5", justify="right")
    for network, scores in accuracies.items():
        top5 = "" if scores.top5 is None else f"{scores.top5:.2f}"
        table.add_row(network, f"{scores.top1:.2f}", top5)
    return table


def _monitored(run: RunDirectory, dataset: str) -> Table | None:
    """What was watched before and after training: kNN accuracy or, without labels, what features tell alone."""
    rows = [row for row in run.metric_rows() if score_name(0, "rankme") in row]
    if not rows:
        return None
    labelled = score_name(ENSEMBLE, KNN_TOP1) in rows[-1]
    return (_knn if labelled else _label_free)(rows[0], rows[-1], dataset)


def _label_free(first: dict[str, Any], last: dict[str, Any], dataset: str) -> Table:
    table = Table(title=Text(f"features on {dataset}, without labels"))
    table.add_column("figure")
    table.add_column("untrained", justify="right")
    table.add_column(f"epoch {last['epoch']:.0f}", justify="right")
    for figure, (shown, decimals) in LABEL_FREE.items():
        for key, name in ((key, parse_score_name(key)) for key in last):
            if name is not None and name.figure == figure:
                before, after = (f"{row[key]:.{decimals}f}" for row in (first, last))
                table.add_row(f"{shown}, network {name.network}", before, after)
    if NEIGHBOUR_AGREEMENT in last:
        before, after = (f"{row[NEIGHBOUR_AGREEMENT]:.1f}" for row in (first, last))
        table.add_row("agreement (%)", before, after)
    return table


def _knn(first: dict[str, Any], last: dict[str, Any], dataset: str) -> Table:
    table = Table(
        title=Text(f"kNN top-1 (%) on {dataset}"),
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
