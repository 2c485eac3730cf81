"""The tables of a study as text, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peerlearn.evaluation.uncertainty import is_percentage
from peerlearn.runs.text import markdown_cell, printable
from studies.evaluations import Problem
from studies.scores import Key, Score
from studies.statistics import p_text
from studies.study import Cell, Study
from studies.table import Row, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_LONGEST_BASELINE = 16
_INTERVAL, _P, _P_HOLM, _GAIN = "95 % interval", "p", "p (Holm)", "published gain"
_CORE_MINUTES, _MEMORY = "core-min", "MB"
_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}


def _columns(table: Table) -> dict[str, list[str]]:
    """The columns of numbers by heading, a cell for each row; without those that are empty."""
    rows = [_cells(table, row) for row in table.rows]
    columns = {heading: [row[heading] for row in rows] for heading in rows[0]}
    return {heading: cells for heading, cells in columns.items() if {*cells} - {"", "baseline"}}


def _cells(table: Table, row: Row) -> dict[str, str]:
    score, compared = row.score, row.difference
    mean = _number(table, score.mean) if score else "unmeasured"
    if score and score.std is not None:
        mean += f" +- {_number(table, score.std)}"
    versus, interval = "baseline" if score and row.label == table.baseline else "", ""
    if compared:
        versus = _number(table, compared.mean, "+")
    if compared and compared.ci95 is not None:
        low, high = compared.mean - compared.ci95, compared.mean + compared.ci95
        interval = f"{_number(table, low)} .. {_number(table, high)}"
    seeds = f"{len(score.values) if score else 0} of {len(table.study.config.seeds)}"
    return {
        "seeds": seeds if table.scores else "",
        table.metric_text: mean,
        _versus(table): versus,
        _INTERVAL: interval,
        _P: p_text(compared.p if compared else None),
        _P_HOLM: p_text(compared.p_holm if compared else None),
        "published": _number(table, row.published),
        _GAIN: _number(table, row.gain, "+"),
        _CORE_MINUTES: f"{row.cost.core_minutes:.2f}" if row.cost else "",
        _MEMORY: f"{row.cost.peak_memory_mb:.0f}" if row.cost and row.cost.peak_memory_mb else "",
    }


def _number(table: Table, value: float | None, sign: str = "") -> str:
    form = f"{sign}z.2f" if is_percentage(table.metric) else f"{sign}.4g"
    return "" if value is None else format(value, form)


def _versus(table: Table) -> str:
    return f"vs {printable(table.baseline, _LONGEST_BASELINE)}"


def _network(network: str) -> str:
    return f"net {network}" if network.isdecimal() else network


def as_text(table: Table) -> "RichTable":
    """The table for 80 columns: networks and groups stand above their rows, and only labels are wrapped.

    A comparison is one column: the difference +- half its 95 % interval, and below it both p values. Memory stands
    below the processor time.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = _columns(table)
    tested = [columns.pop(heading, None) for heading in (_INTERVAL, _P, _P_HOLM)]
    memory = columns.pop(_MEMORY, None)
    headings = {_GAIN: "gain"}
    if memory:
        headings[_CORE_MINUTES] = f"{_CORE_MINUTES}\n{_MEMORY}"
    if tested[0]:
        headings[_versus(table)] = f"{_versus(table)}\n+- 95 %; p, Holm"
    # Titles and labels come from the user, so brackets in them are no markup.
    title = Text(printable(table.title))
    shown = RichTable(
        title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True
    )
    shown.add_column(Text(printable(table.compared)), overflow="fold")
    for heading in columns:
        shown.add_column(Text(headings.get(heading, heading)), justify="right", no_wrap=True)
    network = group = ""
    for number, row in enumerate(table.rows):
        if row.network != network:
            shown.add_section()
            shown.add_row(Text(_network(row.network), style="bold"))
            network, group = row.network, ""
        if row.group != group:
            group = row.group
            shown.add_row(Text(printable(group), style="italic"))
        cells = {heading: column[number] for heading, column in columns.items()}
        if row.difference and row.difference.ci95 is not None:
            found = row.difference
            p_values = f"{p_text(found.p)}, {p_text(found.p_holm)}"
            cells[_versus(table)] += f" +- {_number(table, found.ci95)}\n{p_values}"
        if memory:
            cells[_CORE_MINUTES] += f"\n{memory[number]}"
        shown.add_row(Text(printable(row.label)), *map(Text, cells.values()))
    return shown


def _flat(table: Table) -> tuple[list[str], list[list[str]], int]:
    """The headings, the rows, each with all its labels, and how many columns are labels."""
    columns = _columns(table)
    axes = list(table.study.config.grids[table.grid])
    rows = [
        [_network(row.network), *row.cell.labels, *(cells[number] for cells in columns.values())]
        for number, row in enumerate(table.rows)
    ]
    return ["score", *axes, *columns], rows, 1 + len(axes)


def as_markdown(tables: Iterable[Table], problems: Sequence[Problem]) -> str:
    """The tables, and what is missing."""
    lines = []
    for table in tables:
        headings, rows, labels = _flat(table)
        lines += [f"## {markdown_cell(table.title)}", "", _markdown_row(headings)]
        lines.append(f"|{' --- |' * labels}{' --: |' * (len(headings) - labels)}")
        lines += [*map(_markdown_row, rows), "", markdown_cell(_plus_minus(table.caption)), ""]
    if problems:
        missing = [f"- {markdown_cell(problem_text(problem))}" for problem in problems]
        lines += ["Missing:", "", *missing, ""]
    return "\n".join(lines)


def problem_text(problem: Problem) -> str:
    """A problem in one line: RUN: WHAT: WHY."""
    return printable(f"{problem.run}: {problem.what}: {problem.why}")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_cell(_plus_minus(cell)) for cell in cells)} |"


def _plus_minus(text: str) -> str:
    return text.replace("+-", "±")


def as_latex(tables: Iterable[Table]) -> str:
    """The tables for a paper."""
    lines = [r"% \usepackage{booktabs}"]
    for table in tables:
        headings, rows, labels = _flat(table)
        lines += ["", r"\begin{table}", r"\centering", r"\small"]
        lines.append(f"\\caption{{{latex(f'{table.title}. {table.caption}')}}}")
        lines.append(f"\\begin{{tabular}}{{{'l' * labels}{'r' * (len(headings) - labels)}}}")
        lines += [r"\toprule", _latex_row(headings)]
        for _, block in itertools.groupby(rows, key=lambda row: row[0]):
            lines += [r"\midrule", *map(_latex_row, block)]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


def latex(text: str) -> str:
    """Text in which nothing is a command of LaTeX. A sign before a number is one of mathematics."""
    escaped = "".join(_LATEX.get(sign, sign) for sign in printable(_plus_minus(text)))
    # Two hyphens, of an option say, would make a dash.
    escaped = re.sub(r"-(?=-)", "-{}", escaped)
    return re.sub(r"(^|(?<= ))([+-])(?=\d)", r"$\2$", escaped)


def as_csv(study: Study, tables: Sequence[Table], scores: Sequence[Score]) -> str:
    """A row for each score, all metrics and steps; and for each published figure of what is unmeasured."""
    text = io.StringIO()
    rows = _facts(study, tables, scores)
    writer = csv.DictWriter(text, rows[0] if rows else ["grid"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return " / ".join(map(str, value)) if isinstance(value, list) else value


def as_json(
    study: Study, tables: Sequence[Table], scores: Sequence[Score], problems: Iterable[Problem]
) -> str:
    """The same with the config, the captions of the tables, and what is missing."""
    content = {
        "config": asdict(study.config),
        "scores": _facts(study, tables, scores),
        "tables": [{"title": table.title, "caption": table.caption} for table in tables],
        "problems": [asdict(problem) for problem in problems],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _facts(study: Study, tables: Sequence[Table], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """All that is known of each score, and of each published figure that no score of ours stands beside."""
    places = [(row, table.metric) for table in tables for row in table.rows]
    rows = {_identity(row.score): row for row, _ in places if row.score}
    found: list[tuple[Cell, Key, str, Score | None, Row | None]] = [
        (score.cell, score.key, score.metric, score, rows.get(_identity(score))) for score in scores
    ]
    found += [
        (row.cell, row.key, metric, None, row)
        for row, metric in places
        if row.score is None and row.published is not None
    ]
    return [_fact(study, *each) for each in found]


def _fact(
    study: Study, cell: Cell, key: Key, metric: str, score: Score | None, row: Row | None
) -> dict[str, Any]:
    # A table's score knows its corrected p.
    difference = (row.difference if row else None) or (score.difference if score else None)
    low, high = score.interval if score and score.interval else (None, None)
    own = ("step", "chosen", "shown", "mean", "std", "values", "n", "protocol")
    names = ("mean", "ci95", "p", "p_holm", "seeds")
    return {
        "grid": cell.grid,
        "labels": list(cell.labels),
        "run": cell.variant.name,
        **key._asdict(),
        "metric": metric,
        **{name: getattr(score, name, None) for name in own},
        "seeds": len(score.values) if score else 0,
        "low": low,
        "high": high,
        "baseline": study.config.compare.baseline[cell.grid],
        **{f"difference_{name}": getattr(difference, name, None) for name in names},
        "published": row and row.published,
        "published_gain": row and row.gain,
        "core_minutes": row.cost.core_minutes if row and row.cost else None,
        "peak_memory_mb": row.cost.peak_memory_mb if row and row.cost else None,
    }


def _identity(score: Score) -> tuple[Any, ...]:
    return score.cell.grid, score.cell.labels, score.key, score.metric, score.step, score.chosen
