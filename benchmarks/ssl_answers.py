"""The comparisons that docs/study.md answers with, and their picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ssl_scores import NETWORKS, is_shown, is_validated
from peerlearn.evaluation.plots import COLORS, GREY, PAGE_INCHES, plain_style, save_figure
from studies.study_command import SHIPPED
from studies.study_file import read_study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Grids.
_PLAIN = "MoCo, with and without peers"
_SIMCLR = "SimCLR, with and without peers"
_COST = "at the same cost"
_UNLIKE = "unlike networks"
_POSITIVE = "same image of the peer as a positive"
_FRESH = "with fresh seeds"
_FOUR = "four networks with common low stages"
_SIMCLR_FRESH = "SimCLR with fresh seeds"
_MOCO_COST = "MoCo at the same cost"
_SIMCLR_COST = "SimCLR at the same cost"
# What answers the questions: study, grid, label, network.
ANSWERS = (
    ("ssl_fashion_mnist", _PLAIN, "MCL (x2)", "individual"),
    ("ssl_characters", _PLAIN, "MCL (x2)", "individual"),
    ("ssl_fashion_mnist", _SIMCLR, "SimCLR + MCL (x2)", "individual"),
    ("ssl_characters", _SIMCLR, "SimCLR + MCL (x2)", "individual"),
    ("ssl_fashion_mnist", _POSITIVE, "false", "individual"),
    ("ssl_characters", _POSITIVE, "false", "individual"),
    ("ssl_fashion_mnist", _COST, "MCL (x2)", "ensemble"),
    ("ssl_fashion_mnist", _COST, "MCL (x2), same_sample_positive false", "ensemble"),
    ("ssl_fashion_mnist", _COST, "MoCo for twice as long", "ensemble"),
    ("ssl_fashion_mnist", _COST, "MoCo of twice the width", "ensemble"),
    ("ssl_fashion_mnist", _COST, "own terms alone (DoGo)", "ensemble"),
    ("ssl_characters", _MOCO_COST, "MCL (x2)", "ensemble"),
    ("ssl_characters", _MOCO_COST, "MCL (x2), same_sample_positive false", "individual"),
    ("ssl_characters", _MOCO_COST, "MCL (x2), same_sample_positive false", "ensemble"),
    ("ssl_characters", _SIMCLR_COST, "SimCLR + MCL (x2)", "ensemble"),
    ("ssl_fashion_mnist", _UNLIKE, "Conv-4 and WRN-16-2, MCL", "ensemble"),
    ("ssl_settings", "which terms", "scl_hard alone", "ensemble"),
    ("ssl_settings", "weight of the interactive terms", "1.0", "individual"),
    ("ssl_best", _FRESH, "MCL (x2)", "ensemble"),
    ("ssl_best", _FRESH, "MCL (x2), best by validation", "individual"),
    ("ssl_best", _FRESH, "MCL (x2), best by validation", "ensemble"),
    ("ssl_best", _FRESH, "scl_hard alone, best by validation", "ensemble"),
    ("ssl_best", _FOUR, "MCL (x4), same_sample_positive false", "ensemble"),
    ("ssl_best", _SIMCLR_FRESH, "SimCLR + MCL (x2)", "ensemble"),
)
TASKS = {"knn": "kNN", "linear": "linear", "fewshot": "few-shot, characters"}
_MARKERS = {"individual": "o", "ensemble": "D"}
# Heights in the picture, in inches: of a comparison, and of title, axis and legend.
_ROW_INCHES, _MARGIN_INCHES = 0.3, 0.9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A comparison of two cells of a study.

    Attributes:
        study: name of the study.
        this: label that is compared, with its axis where the label does not tell it.
        against: label that it is compared with; "unmeasured" where nothing is kept.
        network: "individual" or "ensemble".
        scores: the kept score of each task that was measured.
    """

    study: str
    this: str
    against: str
    network: str
    scores: Mapping[str, Mapping[str, Any]]


def answers(kept: Mapping[str, Mapping[str, Any]]) -> Iterator[Answer]:
    """The comparisons in order, by the kept scores of each study."""
    for study, grid, label, network in ANSWERS:
        scores = [
            score
            for score in kept[study]["scores"]
            if (score["grid"], score["labels"], score["network"]) == (grid, [label], network)
            and not is_validated(score)
        ]
        (axis,) = read_study(SHIPPED / f"{study}.yaml").grids[grid]
        named = "" if axis == "method" else f"{axis} "
        yield Answer(
            study=study,
            this=named + label,
            against=named + scores[0]["baseline"] if scores else "unmeasured",
            network=network,
            scores={score["task"]: score for score in scores},
        )


@plain_style()
def plot_answers(comparisons: Sequence[Answer], file: Path) -> None:
    """Draw the differences that have a 95 % interval: a row for each comparison, a panel for each task."""
    from matplotlib.figure import Figure

    height = _ROW_INCHES * len(comparisons) + _MARGIN_INCHES
    figure = Figure(figsize=(PAGE_INCHES, height), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, (task, name) in zip(panels, TASKS.items(), strict=True):
        axes.axvline(0, color=GREY, lw=0.8)
        axes.grid(axis="x")
        axes.set(title=name, xlabel="difference, points")
        axes.tick_params(axis="y", length=0)
        for place, answer in enumerate(comparisons):
            if (score := answer.scores.get(task)) and score["difference_ci95"] is not None:
                _draw_difference(axes, place, answer.network, score)
    rows = [
        f"{answer.this}\nagainst {answer.against}, {_data(answer.study)}" for answer in comparisons
    ]
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    _add_legend(panels[1])
    save_figure(figure, file)


def _draw_difference(axes: "Axes", place: int, network: str, score: Mapping[str, Any]) -> None:
    mean, shown = score["difference_mean"], is_shown(score)
    color = (COLORS[0] if mean > 0 else COLORS[1]) if shown else GREY
    axes.errorbar(
        mean,
        place,
        xerr=score["difference_ci95"],
        fmt=_MARKERS[network],
        color=color,
        mfc=color if shown else "white",
    )


def _data(study: str) -> str:
    return "characters" if study == "ssl_characters" else "Fashion-MNIST"


def _add_legend(axes: "Axes") -> None:
    for name, color, fill in (
        ("better, shown", COLORS[0], COLORS[0]),
        ("worse, shown", COLORS[1], COLORS[1]),
        ("not shown", GREY, "white"),
    ):
        axes.plot([], [], "s", color=color, mfc=fill, label=name)
    for network, marker in _MARKERS.items():
        axes.plot([], [], marker, color=GREY, mfc="white", label=NETWORKS[network])
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
