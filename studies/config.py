"""The config of a study: grids x seeds of pretraining, evaluations of their exports, and what is compared.

A grid has axes, an axis has labels, and a label stands for words of `peerlearn pretrain`:

    grids:
      loss terms:                              # a grid: one table, one panel of the picture
        terms:                                 # an axis, here by label: words
          all: ""
          without scl_hard: --terms scl_soft icl_hard icl_soft
      embedding size:
        cohort.embedding_dim: [32, 64, 128]    # an axis by the values of a config key
"""

import shlex
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import added, nearest, require
from peerlearn.evaluation.plots import PictureFormat
from peerlearn.runs.trackers import TrackerName

# Words that the study itself sets, or that are no part of a command's config.
_OWN_WORDS = {
    "pretrain": ("--seed", "--run", "--config", "--auto_resume", "--dry_run", "--help", "-h"),
    "evaluate": ("--checkpoint", "--dry_run", "--help", "-h"),
}
# Name of the axis -> label -> words.
Axes = dict[str, dict[str, str]]
# Which exports of a run: the last, all, or an interval in epochs.
Exports = Literal["last", "all"] | int


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What the tables of a study compare.

    Attributes:
        score: scores of the tables as TASK/METRIC, linear/top1 say; empty = the first metric of each task.
        axis: axis along which scores are compared; null = the last axis of each grid.
        baseline: label that the others are compared with, by grid.
    """

    score: list[str] = field(default_factory=list)
    axis: str | None = None
    baseline: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of one score that a paper has published for a grid.

    Attributes:
        grid: name of the grid.
        score: score of the figures as TASK/METRIC.
        network: network of the figures: individual (mean over the networks), ensemble, weighted-ensemble, 0, 1, ...
        dataset: data set of the figures; null = that of the grid's only results.
        variant: what tells the scores of one network apart, "5-way 1-shot" say; null = the network has one.
        rows: figures along the compared axis, by the labels of the other axes, joined by " / "; null = not published.
    """

    grid: str
    score: str
    network: str = "individual"
    dataset: str | None = None
    variant: str | None = None
    rows: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The config of a study.

    Attributes:
        folder: folder of the study, for its runs, logs and tables.
        pretrain: words after `pretrain` that are common to all runs.
        seeds: seeds of each config.
        grids: axes of each grid, by its name; the product of the axes is run.
        evaluate: command lines of the evaluations of each run, verb first, without --checkpoint.
        exports: exports that are evaluated: last, all, or the interval in epochs, whereby the last always is.
        compare: scores, axis and baseline of the tables.
        cluster: place of the pretraining: here (one run after another), local (the same in the background), debug, or
            the profile of a cluster.
        evaluation_cluster: profile of the evaluation jobs; null = that of the pretraining.
        watch: place of the process that submits evaluations: job, or here for clusters whose nodes may not submit.
        interval_seconds: seconds from one look at the runs to the next.
        throttle: largest number of pretrainings at once, and of evaluations; null = 1 here, no limit on a cluster.
        keep: what stays of a run once it is evaluated: all, the last export (without saves), or results alone.
        published: published figures, which tables show beside those measured.
        mirror: tracker that each run is mirrored to, as by `peerlearn mirror`; null = none.
        pictures: format of the picture of the tables: png, svg or pdf.
    """

    folder: str
    pretrain: str = ""
    seeds: list[int]
    grids: dict[str, Axes]
    evaluate: list[str] = field(default_factory=list)
    exports: Exports = "last"
    compare: Compare = field(default_factory=Compare)
    cluster: str = "here"
    evaluation_cluster: str | None = None
    watch: Literal["job", "here"] = "job"
    interval_seconds: float = 30.0
    throttle: int | None = None
    keep: Literal["all", "last", "results"] = "all"
    published: list[Published] = field(default_factory=list)
    mirror: TrackerName | None = added(None)
    pictures: PictureFormat = added("png")

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must name the study's folder")
        require(bool(self.seeds), "seeds must hold at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds holds one twice: {self.seeds}")
        require(bool(self.grids), "grids must hold at least one")
        check_words("pretrain", "pretrain", self.pretrain)
        for grid, axes in self.grids.items():
            require(bool(axes), f"grids: {grid}: it has no axis")
            for axis, labels in axes.items():
                require(bool(labels), f"grids: {grid}: {axis}: it has no label")
                for label, words in labels.items():
                    check_words("pretrain", f"grids: {grid}: {axis}: {label}", words)
        for line in self.evaluate:
            check_words("evaluate", f"evaluate: {line}", line)
            require(bool(line.split()), "evaluate holds an empty line")
        require(
            len(set(self.evaluate)) == len(self.evaluate),
            f"evaluate holds one twice: {self.evaluate}",
        )
        require(
            isinstance(self.exports, str) or self.exports >= 1,
            f"exports: expected a number of epochs of at least 1, got {self.exports}",
        )
        require(
            self.throttle is None or self.throttle >= 1,
            f"throttle must be at least 1, got {self.throttle}",
        )
        require(
            0 < self.interval_seconds < float("inf"),
            f"interval_seconds must be positive and finite, got {self.interval_seconds}",
        )
        self._check_compared()

    @property
    def evaluated_on(self) -> str:
        """The place of the evaluations."""
        return self.evaluation_cluster or self.cluster

    def compared_axis(self, grid: str) -> str:
        """The axis of a grid along which scores are compared."""
        axes = list(self.grids[grid])
        return self.compare.axis if self.compare.axis in axes else axes[-1]

    def row_labels(self, grid: str) -> list[str]:
        """The rows of a grid: the labels on all axes but the compared one, joined by " / "."""
        axes = self.grids[grid]
        rows = [""]
        for axis, labels in axes.items():
            if axis != self.compared_axis(grid):
                rows = [f"{row} / {label}" if row else label for row in rows for label in labels]
        return rows

    def _check_compared(self) -> None:
        every_axis = {axis for axes in self.grids.values() for axis in axes}
        require(
            self.compare.axis is None or self.compare.axis in every_axis,
            f"compare: axis: no grid has an axis {self.compare.axis!r}"
            f"{nearest(self.compare.axis or '', every_axis)}",
        )
        scores = self.compare.score
        require(len(set(scores)) == len(scores), f"compare: score holds one twice: {scores}")
        for score in [*scores, *(each.score for each in self.published)]:
            require(
                len(score.split("/")) == 2 and all(score.split("/")),
                f"compare: score: expected TASK/METRIC, linear/top1 say, got {score!r}",
            )
        for grid in self.grids:
            rows = self.row_labels(grid)
            twice = next((row for row in rows if rows.count(row) > 1), None)
            require(twice is None, f"grids: {grid}: two of its rows are called {twice!r}")
            labels = self.grids[grid][self.compared_axis(grid)]
            label = self.compare.baseline.get(grid, "")
            require(
                label in labels,
                f"compare: baseline: {grid}: its axis {self.compared_axis(grid)} has no label {label!r}"
                f"{nearest(label, labels)}",
            )
        for each in self.published:
            require(
                each.grid in self.grids,
                f"published: unknown grid {each.grid!r}{nearest(each.grid, self.grids)}",
            )
            count = len(self.grids[each.grid][self.compared_axis(each.grid)])
            rows = self.row_labels(each.grid)
            for row, figures in each.rows.items():
                require(row in rows, f"published: {each.grid}: no row {row!r}{nearest(row, rows)}")
                require(
                    len(figures) == count,
                    f"published: {each.grid}: row {row!r}: {len(figures)} figures for {count} labels",
                )


def check_words(kind: str, where: str, line: str) -> list[str]:
    """Split a line of a study into words.

    Args:
        kind: key of the line: pretrain or evaluate.
        where: place of the line, for the message.
        line: words of a command.

    Raises:
        ValueError: it cannot be split, or has a word that the study sets itself; the message begins with ``where``.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{where}: {line!r} cannot be split into words: {error}") from error
    for word in words:
        name = word.split("=")[0]
        require(
            name not in _OWN_WORDS[kind],
            f"{where}: {name} has no place here: the study sets it itself",
        )
    return words
