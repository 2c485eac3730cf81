"""`peerlearn summary`: a pipeline's scores over its seeds, as a table, as files and as a picture."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UserError
from peerlearn.evaluation.plots import draw, plain_text
from peerlearn.runs.files import write_text
from peerlearn.runs.output import show
from studies.pipeline import Pipeline, is_pipeline, load_pipeline, name_of
from studies.summary import Score, Summary, sum_up

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = (
    *("pretrain", "evaluation", "task", "dataset", "network", "variant", "step", "chosen"),
    "metric",
    *("mean", "std", "ci95", "seeds", "values", "n", "protocol"),
)


def main(argv: Sequence[str]) -> int:
    """`peerlearn summary PIPELINE`.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn summary",
        description="Sum up what a pipeline has measured so far: mean, standard deviation and 95 % interval of the "
        "mean over seeds. All steps and metrics go into PIPELINE/summary.csv and summary.json, what is missing into "
        "the latter. Example: peerlearn summary runs/fashion_mnist",
    )
    parser.add_argument("pipeline", type=Path)
    root: Path = parser.parse_args(argv).pipeline
    if not is_pipeline(root):
        raise UserError(f"{root} is no pipeline: it has no pipeline.yaml")
    summarise(load_pipeline(root))
    return DONE


def summarise(pipeline: Pipeline) -> None:
    """Print the scores of each pretraining's last step and what is missing; write summary.csv, .json and .png.

    Raises:
        UserError: the folder cannot be written.
    """
    summary = sum_up(pipeline)
    try:
        write_text(pipeline.root / "summary.csv", _as_csv(summary.scores))
        write_text(pipeline.root / "summary.json", _as_json(summary))
        if summary.scores:
            by_step = [score for score in summary.main() if not score.chosen]
            draw(partial(_plot, by_step), pipeline.root / "summary.png")
    except OSError as error:
        raise UserError(f"{pipeline.root}: cannot be written ({error.strerror})") from error
    _print(pipeline, summary)


def _as_csv(scores: Sequence[Score]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for score in scores:
        row = {name: value for name, value in asdict(score).items() if name in _COLUMNS}
        values = " ".join(f"{seed}:{value!r}" for seed, value in score.values.items())
        protocol = json.dumps(score.protocol, sort_keys=True)
        writer.writerow(row | {"seeds": len(score.values), "values": values, "protocol": protocol})
    return text.getvalue()


def _as_json(summary: Summary) -> str:
    content = {
        "scores": [asdict(score) for score in summary.scores],
        "problems": [asdict(problem) for problem in summary.problems],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _print(pipeline: Pipeline, summary: Summary) -> None:
    latest = summary.latest()
    for panel in _panels(latest):
        chosen = [score for score in latest if _panel(score) == panel]
        show(_table(chosen, seeds=len(pipeline.config.seeds)))
    if not latest:
        print(f"{pipeline.root}: nothing is measured yet")
    for problem in summary.problems:
        print(f"missing: {problem.run}: {problem.what}: {problem.why}")
    print(f"summary: {pipeline.root / 'summary.csv'}", flush=True)


def _table(scores: Sequence[Score], *, seeds: int) -> "Table":
    """The table of one evaluation of every pretraining's last or chosen step. A single seed has no spread."""
    from rich.table import Table
    from rich.text import Text

    first = scores[0]
    n = "" if first.n is None else f"n {first.n:,}; "
    table = Table(
        title=Text(_title(first)),
        caption=f"{n}mean +- std over seeds, 95 % interval of the mean"
        + ("; best: the step that validation chose" if first.chosen else ""),
    )
    for heading in ("pretraining", "step", "network"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", "95 % interval", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        spread = interval = ""
        if score.std is not None and score.ci95 is not None:
            spread = f" +- {score.std:.2f}"
            interval = f"{score.mean - score.ci95:.2f} .. {score.mean + score.ci95:.2f}"
        table.add_row(
            *map(Text, (name_of(score.pretrain), _shown_step(score), score.network)),
            *(f"{score.mean:.2f}{spread}", interval, f"{len(score.values)} of {seeds}"),
        )
    return table


def _panels(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(map(_panel, scores)))


def _panel(score: Score) -> tuple[str, ...]:
    """The key of a panel of the picture. Scores with the same key are compared."""
    return score.evaluation, score.dataset, score.metric, score.variant


def _shown_step(score: Score) -> str:
    return "best" if score.chosen else str(score.step)


def _title(score: Score) -> str:
    variant = f", {score.variant}" if score.variant else ""
    return f"{score.evaluation} on {score.dataset}: {score.metric}{variant}"


@plain_text()
def _plot(scores: Sequence[Score], file: Path) -> None:
    """Draw a panel for each evaluation: its main metric over steps, with a line for each pretraining and network."""
    from matplotlib.figure import Figure

    panels = _panels(scores)
    # A Figure, and not pyplot: pyplot keeps global state and looks for a display.
    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        chosen = [score for score in scores if _panel(score) == panel]
        for pretrain, network in dict.fromkeys((s.pretrain, s.network) for s in chosen):
            line = [s for s in chosen if (s.pretrain, s.network) == (pretrain, network)]
            axes.errorbar(
                [s.step for s in line],
                [s.mean for s in line],
                yerr=[s.ci95 or 0.0 for s in line],
                marker="o",
                capsize=3,
                label=f"{name_of(pretrain)}, {network}",
            )
        axes.set(title=_title(chosen[0]), xlabel="step", ylabel=panel[2])
        axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=100)
