"""The tables of a study: a grid's scores beside the published figures, with every comparison of a table corrected."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from types import MappingProxyType

from peerlearn.data.titles import VALIDATION_ENDING
from peerlearn.evaluation.results import CLASSIFICATION
from peerlearn.evaluation.score_table import common_protocol
from peerlearn.evaluation.uncertainty import is_percentage
from peerlearn.runs.directory import STUDY_FILE
from peerlearn.runs.score_names import ENSEMBLE
from studies.config import Published
from studies.cost import Cost, RunCost, mean_cost
from studies.evaluations import Problem
from studies.scores import INDIVIDUAL, Key, Score, network_rank
from studies.statistics import Difference, holm
from studies.study import Cell, Study

_LONGEST_PROTOCOL = 160
_NO_COSTS: Mapping[str, Mapping[int, RunCost]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell's score of one network.

    Attributes:
        cell: cell of the row.
        key: what was measured, and of which network.
        group: labels on the axes that are not compared, joined by " / ".
        label: label on the compared axis.
        score: score; None = unmeasured.
        published: published figure; None = there is none.
        gain: published figure less that of the group's baseline; None for the baseline, and for want of one of them.
        cost: mean cost of the trainings behind the score; None where one of them does not tell.
    """

    cell: Cell
    key: Key
    group: str
    label: str
    score: Score | None
    published: float | None
    gain: float | None
    cost: Cost | None = None

    @property
    def network(self) -> str:
        return self.key.network

    @property
    def difference(self) -> Difference | None:
        return self.score.difference if self.score else None


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of a grid by one metric of one evaluation.

    Attributes:
        study: study of the grid.
        grid: name of the grid.
        key: what was measured, for all networks.
        metric: name of the metric.
        rows: rows, network by network.
    """

    study: Study
    grid: str
    key: Key
    metric: str
    rows: list[Row]

    @property
    def baseline(self) -> str:
        return self.study.config.compare.baseline[self.grid]

    @property
    def compared(self) -> str:
        """The name of the compared axis."""
        return self.study.config.compared_axis(self.grid)

    @property
    def scores(self) -> list[Score]:
        return [row.score for row in self.rows if row.score]

    @property
    def metric_text(self) -> str:
        return f"{self.metric} (%)" if is_percentage(self.metric) else self.metric

    @property
    def title(self) -> str:
        dataset = f" on {self.key.dataset}" if self.key.dataset else ""
        variant = f", {self.key.variant}" if self.key.variant else ""
        return f"{self.grid}: {self.key.task}/{self.metric}{dataset}{variant}"

    @property
    def caption(self) -> str:
        """What was measured, when and how, and what the numbers are."""
        return ". ".join([*_measured(self), *_statistics(self)]) + "."


def _measured(table: Table) -> Iterator[str]:
    if table.key.line:
        yield f"Evaluation: {table.key.line}"
    if not table.scores:
        yield "Nothing is measured yet"
        return
    tests = {f"n {score.n:,}" for score in table.scores if score.n is not None}
    yield ", ".join([table.key.dataset, *sorted(tests)])
    steps = sorted({score.step for score in table.scores})
    when = "step that validation chose" if table.scores[0].chosen else "last step"
    yield f"Measured at the {when}: {' to '.join(map(str, sorted({steps[0], steps[-1]})))}"
    if told := common_protocol([score.protocol for score in table.scores]):
        yield f"Protocol: {shorten(told, _LONGEST_PROTOCOL, placeholder=' ...')}"


def _statistics(table: Table) -> Iterator[str]:
    if any(score.std is not None for score in table.scores):
        yield f"{table.metric}: mean +- standard deviation over seeds"
    differences = [row.difference for row in table.rows if row.difference]
    if differences:
        yield f"vs {table.baseline}: mean difference over the seeds that both have"
    if tests := sum(difference.p is not None for difference in differences):
        yield "95 %: interval of the mean difference by Student's t; p: of the two-sided paired t-test"
        yield f"p (Holm): corrected for all comparisons of this table ({tests})"
    if any(row.cost is not None for row in table.rows):
        yield "core-min, MB: processor time and most memory of a run's training, mean over seeds"
    if any(row.published is not None for row in table.rows):
        yield f"published: figures of the paper; gain: theirs over {table.baseline}"


def tables(
    study: Study, scores: Sequence[Score], costs: Mapping[str, Mapping[int, RunCost]] = _NO_COSTS
) -> list[Table]:
    """A table for each grid, score and evaluation that has results or published figures.

    Args:
        study: study whose grids are shown.
        scores: scores of its cells.
        costs: costs of its trainings by variant and seed.
    """
    found = []
    for grid in study.grids:
        for name in _names(study, grid, scores):
            own = [s for s in scores if (s.cell.grid, s.name, s.shown) == (grid, name, True)]
            figures = [p for p in study.config.published if (p.grid, p.score) == (grid, name)]
            rows_of = {}
            for key in _keys(study, name, own, figures):
                here = [score for score in own if score.key._replace(network="") == key]
                there = [each for each in figures if _fits(each, key)]
                rows = _rows(study, grid, key, here, there)
                rows_of[key] = _corrected([_with_cost(row, costs) for row in rows])
            for key in rows_of:
                if rows := _without_other_datasets(rows_of, key):
                    metric = name.partition("/")[2]
                    found.append(Table(study=study, grid=grid, key=key, metric=metric, rows=rows))
    return found


def _with_cost(row: Row, costs: Mapping[str, Mapping[int, RunCost]]) -> Row:
    """The row with the mean cost of the runs of its score, if all of them tell it."""
    known = costs.get(row.cell.variant.name, {})
    seeds = row.score.values if row.score else {}
    if not seeds or any(seed not in known for seed in seeds):
        return row
    return replace(row, cost=mean_cost([known[seed] for seed in seeds]))


def _without_other_datasets(rows_of: Mapping[Key, Sequence[Row]], key: Key) -> list[Row]:
    """The rows of a key without the groups that have scores or published figures on another data set alone."""

    def filled(each: Key) -> set[str]:
        return {row.group for row in rows_of[each] if row.score or row.published is not None}

    others = [each for each in rows_of if each._replace(dataset=key.dataset) == key != each]
    elsewhere = set().union(*map(filled, others)) - filled(key)
    return [row for row in rows_of[key] if row.group not in elsewhere]


def unknown_scores(study: Study, scores: Sequence[Score]) -> list[Problem]:
    """The scores that the config asks for and that are not among the results, unless they may still come."""
    known = list(dict.fromkeys(score.name for score in scores))
    verbs = {CLASSIFICATION, *(line.split()[0] for line in study.config.evaluate)}
    coming = verbs - {score.key.task for score in scores}
    there = f"there are {', '.join(known)}" if known else "nothing is measured yet"
    return [
        Problem(run=STUDY_FILE, what="compare: score", why=f"no result has {name}: {there}")
        for name in study.config.compare.score
        if name not in known and name.partition("/")[0] not in coming
    ]


def _names(study: Study, grid: str, scores: Sequence[Score]) -> list[str]:
    """The scores of a grid's tables: those of the config, else the first of each task and those published."""
    if study.config.compare.score:
        return study.config.compare.score
    first: dict[str, str] = {}
    for score in scores:
        first.setdefault(score.key.task, score.name)
    published = [each.score for each in study.config.published if each.grid == grid]
    return list(dict.fromkeys([*first.values(), *published]))


def _fits(published: Published, key: Key) -> bool:
    # A figure that names no data set is of test images.
    any_dataset = published.dataset is None and not key.dataset.endswith(VALIDATION_ENDING)
    fits_dataset = any_dataset or published.dataset == key.dataset
    return fits_dataset and published.variant in (None, key.variant)


def _keys(
    study: Study, name: str, scores: Sequence[Score], published: Sequence[Published]
) -> list[Key]:
    """What the tables of a score are of: the results, by evaluation, then published figures without any result."""
    lines = study.config.evaluate
    measured = dict.fromkeys(score.key._replace(network="") for score in scores)
    keys = sorted(measured, key=lambda key: ["", *lines].index(key.line))
    task = name.partition("/")[0]
    own = [line for line in lines if line.split()[0] == task]
    for each in published:
        if not any(_fits(each, key) for key in keys):
            # Of several evaluations by one verb, nobody can tell which the figure is of.
            line = own[0] if len(own) == 1 else ""
            keys.append(Key(line, task, each.dataset or "", each.variant or "", network=""))
    return keys


def _rows(
    study: Study, grid: str, key: Key, scores: Sequence[Score], published: Sequence[Published]
) -> list[Row]:
    cells = [cell for cell in study.cells if cell.grid == grid]
    by_place = {(score.key.network, score.cell.labels): score for score in scores}
    baseline = study.config.compare.baseline[grid]
    rows = []
    for network in _shown_networks(cells, scores, published):
        own = [each for each in published if each.network == network]
        for cell in cells:
            label = study.compared_label(cell)
            score = by_place.get((network, cell.labels))
            figure, first = (_figure(study, own, cell, each) for each in (label, baseline))
            gain = None if figure is None or first is None else figure - first
            if score or figure is not None or _has(cell, network):
                row = Row(
                    cell=cell,
                    key=key._replace(network=network),
                    group=study.row_of(cell),
                    label=label,
                    score=score,
                    published=figure,
                    gain=None if label == baseline else gain,
                )
                rows.append(row)
    return rows


def _has(cell: Cell, network: str) -> bool:
    """Whether the runs of a cell have such a network; one alone stands for its own ensemble."""
    networks = cell.variant.config.cohort.networks
    if network.isdecimal():
        return int(network) < networks
    return network in (INDIVIDUAL, ENSEMBLE) or networks > 1


def _figure(study: Study, published: Sequence[Published], cell: Cell, label: str) -> float | None:
    """The published figure in the row of a cell, for a label of the compared axis."""
    place = list(study.config.grids[cell.grid][study.config.compared_axis(cell.grid)]).index(label)
    rows = [each.rows.get(study.row_of(cell)) for each in published]
    return next((row[place] for row in rows if row and row[place] is not None), None)


def _shown_networks(
    cells: Sequence[Cell], scores: Sequence[Score], published: Sequence[Published]
) -> list[str]:
    """Individual and ensembles; and each network if their architectures differ, or if nothing else stands for it."""
    differing = any(len(set(cell.variant.config.cohort.architectures())) > 1 for cell in cells)
    whole = {score.cell.labels for score in scores if score.key.network == INDIVIDUAL}
    shown = {each.network for each in published}
    for score in scores:
        network = score.key.network
        if not network.isdecimal() or differing or score.cell.labels not in whole:
            shown.add(network)
    return sorted(shown, key=network_rank)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with p values that are corrected for all their comparisons."""
    found = list(rows)
    tested = [
        (n, d.p) for n, d in enumerate(row.difference for row in rows) if d and d.p is not None
    ]
    for (number, _), p_holm in zip(tested, holm([p for _, p in tested]), strict=True):
        score = found[number].score
        assert score is not None
        assert score.difference is not None
        corrected = replace(score, difference=replace(score.difference, p_holm=p_holm))
        found[number] = replace(found[number], score=corrected)
    return found
