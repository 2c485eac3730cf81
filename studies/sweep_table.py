"""The tables and files of a sweep's scores."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from peerlearn.evaluation.plots import draw
from peerlearn.runs.files import write_text
from peerlearn.runs.output import show
from peerlearn.runs.score_names import ENSEMBLE, WEIGHTED_ENSEMBLE
from peerlearn.runs.text import markdown_cell
from studies.sweep import Cell, Sweep, unwritable
from studies.sweep_plot import plot_sweep
from studies.sweep_scores import INDIVIDUAL, Findings, Score, score_sweep

if TYPE_CHECKING:
    import rich.table

_STATISTICS = (
    "top-1 in percent at the last step: mean +- standard deviation over seeds; vs: mean difference over the seeds that "
    "both have, its 95 % interval (Student's t) and the p of the two-sided paired t-test, not corrected for multiple "
    "comparisons"
)
_COLUMNS = (
    *("grid", "labels", "run", "network", "metric", "mean", "std", "seeds", "values"),
    *("baseline", "difference", "difference_ci95", "p", "common_seeds", "measured"),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The table of one grid, as text.

    Attributes:
        title: name of the grid.
        caption: protocol and images of the scores.
        headings: headings of the columns: the score, the axes, and the numbers.
        rows: rows, with one cell for each heading.
    """

    title: str
    caption: str
    headings: list[str]
    rows: list[list[str]]


def report(sweep: Sweep, *, whole: bool) -> Findings:
    """Print a table per grid and what is missing. For a whole sweep also write sweep.csv, .json, .md and .png.

    Raises:
        UserError: the folder cannot be written.
    """
    findings = score_sweep(sweep)
    tables = [grid_table(sweep, findings, grid) for grid in sweep.grids]
    _print(tables, findings)
    if not whole:
        print(f"a part of {sweep.root}: its sweep.csv, .json, .md and .png are left as they are")
        return findings
    try:
        sweep.root.mkdir(parents=True, exist_ok=True)
        write_text(sweep.root / "sweep.csv", _as_csv(findings.scores))
        write_text(sweep.root / "sweep.json", _as_json(sweep, findings))
        write_text(sweep.root / "sweep.md", _as_markdown(tables, findings))
        if findings.scores:
            draw(partial(plot_sweep, sweep, findings.scores), sweep.root / "sweep.png")
    except OSError as error:
        raise unwritable(sweep, error) from error
    print(f"table: {sweep.root / 'sweep.md'}", flush=True)
    return findings


def grid_table(sweep: Sweep, findings: Findings, grid: str) -> Table:
    """The table of a grid. Each score has a row per cell: labels, seeds, mean, and difference from the baseline."""
    cells = [cell for cell in sweep.cells if cell.grid == grid]
    found = [s for s in findings.scores if s.cell.grid == grid and s.metric == "top1"]
    by_cell = {(score.network, score.cell.labels): score for score in found}
    rows = []
    for network in _shown_networks(cells, found):
        for cell in cells:
            score = by_cell.get((network, cell.labels))
            seeds = f"{len(score.values) if score else 0} of {len(sweep.config.seeds)}"
            name = f"net {network}" if network.isdecimal() else network
            rows.append([name, *cell.labels, seeds, _mean_text(score), *_difference_texts(score)])
    measured = list(dict.fromkeys(score.measured for score in found))
    return Table(
        title=grid,
        caption="; ".join(measured)
        + (" (only what was measured alike is compared)" if len(measured) > 1 else "")
        or "nothing is measured yet",
        headings=[
            *("score", *sweep.config.grids[grid], "seeds", "top-1"),
            *(f"vs {sweep.config.baseline[grid]}", "95 % interval", "p"),
        ],
        rows=rows,
    )


def _shown_networks(cells: Sequence[Cell], scores: Sequence[Score]) -> list[str]:
    """The networks to show: individual and ensembles, and each network if they have different architectures."""
    found = {score.network for score in scores} | {INDIVIDUAL}
    differing = any(len(set(cell.variant.config.cohort.architectures())) > 1 for cell in cells)
    named = [network for network in (INDIVIDUAL, ENSEMBLE, WEIGHTED_ENSEMBLE) if network in found]
    return named + sorted((n for n in found if n.isdecimal() and differing), key=int)


def _mean_text(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.mean:.2f}" + ("" if score.std is None else f" +- {score.std:.2f}")


def _difference_texts(score: Score | None) -> tuple[str, str, str]:
    """The difference, its interval and its p value, each empty if unknown."""
    if score is None or score.difference is None:
        is_baseline = score is not None and score.cell.labels[-1] == score.baseline
        return "baseline" if is_baseline else "", "", ""
    found = score.difference
    interval = p = ""
    if found.ci95 is not None:
        interval = f"{found.mean - found.ci95:.2f} .. {found.mean + found.ci95:.2f}"
    if found.p is not None:
        p = "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
    return f"{found.mean:+.2f}", interval, p


def _print(tables: Sequence[Table], findings: Findings) -> None:
    from rich.text import Text

    show(*map(_for_terminal, tables), Text(_STATISTICS))
    for problem in findings.problems:
        print(f"missing: {problem.run}: {problem.why}")


def _for_terminal(table: Table) -> "rich.table.Table":
    """A table for 80 columns, if the labels allow it: the score stands above its rows, and only labels are wrapped."""
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    # Titles and labels come from the user, so brackets in them are no markup.
    shown = rich_table.Table(
        title=Text(table.title),
        caption=Text(table.caption),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    labels = table.headings.index("seeds")
    for number, heading in enumerate(table.headings[1:], start=1):
        is_label = number < labels
        shown.add_column(
            Text(heading),
            justify="left" if is_label else "right",
            overflow="fold",
            no_wrap=not is_label,
        )
    for score, rows in itertools.groupby(table.rows, key=lambda row: row[0]):
        shown.add_row(Text(score, style="bold"))
        for row in rows:
            shown.add_row(*map(Text, row[1:]))
        shown.add_section()
    return shown


def _as_markdown(tables: Sequence[Table], findings: Findings) -> str:
    lines = []
    for table in tables:
        lines += [f"## {markdown_cell(table.title)}", "", _markdown_row(table.headings)]
        labels = table.headings.index("seeds")
        lines.append(_markdown_row(["---"] * labels + ["--:"] * (len(table.headings) - labels)))
        lines += [*map(_markdown_row, table.rows), "", table.caption, ""]
    lines += [_STATISTICS.replace("+-", "±"), ""]
    if findings.problems:
        lines += ["Missing:", ""]
        lines += [
            f"- {markdown_cell(problem.run)}: {markdown_cell(problem.why)}"
            for problem in findings.problems
        ]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    texts = [markdown_cell(cell.replace("+-", "±")) for cell in cells]
    return f"| {' | '.join(texts)} |"


def _as_csv(scores: Sequence[Score]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for score in scores:
        row = _plain(score)
        row["labels"] = " / ".join(score.cell.labels)
        row["seeds"] = len(score.values)
        row["values"] = " ".join(f"{seed}:{value!r}" for seed, value in score.values.items())
        difference = row.pop("difference")
        if difference is not None:
            row["difference"], row["difference_ci95"] = difference["mean"], difference["ci95"]
            row["p"], row["common_seeds"] = difference["p"], len(difference["seeds"])
        writer.writerow(row)
    return text.getvalue()


def _as_json(sweep: Sweep, findings: Findings) -> str:
    content = {
        "config": asdict(sweep.config),
        "scores": [_plain(score) for score in findings.scores],
        "problems": [asdict(problem) for problem in findings.problems],
        "statistics": _STATISTICS,
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(score: Score) -> dict[str, Any]:
    return {
        "grid": score.cell.grid,
        "labels": list(score.cell.labels),
        "run": score.cell.variant.name,
        "network": score.network,
        "metric": score.metric,
        "mean": score.mean,
        "std": score.std,
        "values": score.values,
        "baseline": score.baseline,
        "difference": None if score.difference is None else asdict(score.difference),
        "measured": score.measured,
    }
