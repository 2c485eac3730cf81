"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_log import chosen_step
from peerlearn.runs.output import show
from peerlearn.runs.score_names import (
    ENSEMBLE,
    EPISODE_COUNT,
    EPISODE_QUERIES,
    EPISODE_SHOTS,
    EPISODE_TOP1,
    EPISODE_WAYS,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    LINEAR_TOP1,
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
    """What was watched before and after training: accuracy or, without labels, what features tell alone."""
    episodes = [row for row in run.metric_rows() if score_name(0, EPISODE_TOP1) in row]
    if episodes:
        return _episodes(episodes, chosen_step(run), dataset)
    rows = [row for row in run.metric_rows() if score_name(0, "rankme") in row]
    if not rows:
        return None
    labelled = score_name(ENSEMBLE, KNN_TOP1) in rows[-1]
    return (_knn if labelled else _label_free)(rows[0], rows[-1], dataset)


def _label_free(first: dict[str, Any], last: dict[str, Any], dataset: str) -> Table:
    table = Table(title=Text(f"features on {dataset}, without labels"))
    table.add_column("figure")
    _add_moments(table, first, last)
    for figure, (shown, decimals) in LABEL_FREE.items():
        for key, name in ((key, parse_score_name(key)) for key in last):
            if name is not None and name.figure == figure:
                values = (_shown(row.get(key), decimals) for row in (first, last))
                table.add_row(f"{shown}, network {name.network}", *values)
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
    _add_moments(table, first, last)
    if (pixels := score_name(PIXELS, KNN_TOP1)) in first:
        table.add_row("raw pixels", f"{first[pixels]:.2f}", "")
    _add_scores(table, [first, last], KNN_TOP1)
    _add_scores(table, [first, last], LINEAR_TOP1, ", linear probe")
    return table


def _episodes(rows: Sequence[dict[str, Any]], best: int | None, dataset: str) -> Table:
    last = rows[-1]
    chosen = [row for row in rows if row["step"] == best]
    table = Table(
        title=Text(f"few-shot accuracy (%) on the validation classes of {dataset}"),
        caption=f"{last[EPISODE_WAYS]}-way {last[EPISODE_SHOTS]}-shot, {last[EPISODE_QUERIES]} queries, "
        f"{last[EPISODE_COUNT]:,} episodes",
    )
    table.add_column("network")
    _add_moments(table, rows[0], last)
    for row in chosen:
        table.add_column(f"export/best, epoch {row['epoch']:.0f}", justify="right")
    _add_scores(table, [rows[0], last, *chosen], EPISODE_TOP1)
    return table


def _add_moments(table: Table, first: dict[str, Any], last: dict[str, Any]) -> None:
    for title in (
        "untrained" if first["step"] == 0 else f"epoch {first['epoch']:.0f}",
        f"epoch {last['epoch']:.0f}",
    ):
        table.add_column(title, justify="right")


def _add_scores(
    table: Table, rows: Sequence[dict[str, Any]], figure: str, remark: str = ""
) -> None:
    """A row of every network that has the figure, with its value at each of these moments where there is one."""
    names = {key: name for key in rows[-1] if (name := parse_score_name(key))}
    for key, name in names.items():
        if name.figure == figure:
            label = (
                name.network if name.network in (ENSEMBLE, PIXELS) else f"network {name.network}"
            )
            table.add_row(label + remark, *(_shown(row.get(key), 2) for row in rows))


def _shown(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
