"""docs/study.md: whether MCL helps self-supervised pretraining, from what the studies ssl_* have measured.

python -m benchmarks.ssl_study --keep runs/ssl_fashion_mnist     # a study's scores -> benchmarks/results/
python -m benchmarks.ssl_study > docs/study.md
python -m benchmarks.ssl_study --pictures                        # -> docs/study_*.svg
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import same_sample
from benchmarks.performance import RESULTS, markdown_table, mean_and_spread
from benchmarks.ssl_answers import TASKS, answers, plot_answers
from benchmarks.ssl_scores import (
    LEVEL,
    NETWORKS,
    STUDIES,
    is_shown,
    is_validated,
    keep,
    learning_rates,
    read_kept,
)
from peerlearn.commands.configs_command import read_header
from peerlearn.errors import UserError
from peerlearn.runs.json_files import read_json_object
from studies.picture import plot_tables
from studies.statistics import p_text
from studies.study_command import SHIPPED
from studies.study_file import read_study

_DOCS = RESULTS.parents[1] / "docs"


def page(folder: Path = RESULTS) -> str:
    """The page, by the kept scores in ``folder``. What is not there is "unmeasured"."""
    kept = read_kept(folder)
    parts = [_INTRODUCTION.format(in_short=_in_short(kept)).strip()]
    for name in STUDIES:
        parts += _study(name, kept[name])
    if (file := folder / "same_sample.json").is_file():
        parts.append(same_sample.section(read_json_object(file)))
    return "\n\n".join(parts) + "\n"


def draw_pictures(folder: Path = RESULTS, docs: Path = _DOCS) -> list[Path]:
    """Draw the page's pictures, by the kept scores in ``folder``."""
    files = [docs / "study_answers.svg", docs / "study_learning_rates.svg"]
    plot_answers(list(answers(read_kept(folder))), files[0])
    plot_tables(learning_rates(folder), files[1])
    return files


def _in_short(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The differences that answer the questions, a row for each comparison."""
    rows = []
    for answer in answers(kept):
        found = [_difference(answer.scores.get(task)) or "unmeasured" for task in TASKS]
        study = f"[{answer.study}](#{answer.study})"
        rows.append([study, answer.this, answer.against, NETWORKS[answer.network], *found])
    return markdown_table(["study", "this", "against", "of", *TASKS.values()], rows)


def _study(name: str, kept: Mapping[str, Any]) -> Iterator[str]:
    path = SHIPPED / f"{name}.yaml"
    config, header = read_study(path), read_header(path)
    yield f"## {name}"
    machines = "; ".join(kept["machines"]) or "unmeasured"
    about = header["source"].partition("; ")[2]
    tested: list[Mapping[str, Any]] = []
    validated: list[Mapping[str, Any]] = []
    for score in kept["scores"]:
        (validated if is_validated(score) else tested).append(score)
    yield f"`peerlearn study {name}` ({machines}). {about[:1].upper()}{about[1:]}."
    for grid, axes in config.grids.items():
        scores = [score for score in tested or validated if score["grid"] == grid]
        yield f"### {grid}"
        # Another grid's run may be the baseline here.
        if all(score["labels"] == [score["baseline"]] for score in scores):
            told = " x ".join(f"{axis} ({'; '.join(labels)})" for axis, labels in axes.items())
            yield f"Unmeasured: {told}."
            continue
        if len(axes) == 2:
            yield _curves(scores, axes)
        else:
            yield _grid(scores, axes)
            yield _verdict(scores)
    # Where test images are scored too, validation images rank the settings, and do nothing else.
    if tested and validated:
        yield "### Settings, by validation images"
        yield _ranking(validated)


def _ranking(scores: Sequence[Mapping[str, Any]]) -> str:
    """The settings of all grids from the best to the worst, by the mean of the networks; each run once."""
    by_runs: dict[str, Mapping[str, Any]] = {}
    for score in scores:
        if score["network"] == "individual":
            by_runs.setdefault(score["run"], score)
    ranked = sorted(by_runs.values(), key=lambda score: -score["mean"])
    rows = [[score["grid"], ", ".join(score["labels"]), _mean(score)] for score in ranked]
    return markdown_table(["grid", "setting", _score_name(ranked[0])], rows)


def _curves(scores: Sequence[Mapping[str, Any]], axes: Mapping[str, Iterable[str]]) -> str:
    """A row for each label of the first axis, a column for each of the second: means of the networks, the best bold."""
    own = {tuple(each["labels"]): each for each in scores if each["network"] == "individual"}
    (name,) = {_score_name(each) for each in scores}
    (first, firsts), (second, seconds) = axes.items()
    rows = []
    for label in firsts:
        found = [own.get((label, other)) for other in seconds]
        best = max((each["mean"] for each in found if each), default=None)
        cells = [
            f"**{_mean(each)}**" if each and each["mean"] == best else _mean(each) for each in found
        ]
        costs = [c for each in found if each and (c := each["core_minutes"]) is not None]
        rows.append([label, *cells, f"{fmean(costs):.1f}" if costs else ""])
    columns = [f"{second} {label}" for label in seconds]
    return f"{name}:\n\n" + markdown_table([first, *columns, "core-min"], rows)


def _grid(scores: Sequence[Mapping[str, Any]], axes: Mapping[str, Iterable[str]]) -> str:
    """A row for each cell, of the networks and of their ensemble; two columns for each evaluation, and the cost."""
    named = {_score_name(each): each for each in scores}
    heading = ["", *axes]
    for name in named:
        heading += [name, f"vs {scores[0]['baseline']}"]
    rows = []
    for network, *cell in itertools.product(NETWORKS, *axes.values()):
        own = {
            _score_name(each): each
            for each in scores
            if each["network"] == network and each["labels"] == cell
        }
        if not own and network == "ensemble":
            continue
        row = [NETWORKS[network], *cell]
        for name in named:
            row += [_mean(own.get(name)), _difference(own.get(name))]
        rows.append([*row, *_cost(own.values())])
    return markdown_table([*heading, "core-min", "MB"], rows)


def _score_name(score: Mapping[str, Any]) -> str:
    return f"{score['task']} {score['metric']} on {score['dataset']}, n {score['n']:,}"


def _mean(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "unmeasured"
    return mean_and_spread(score["mean"], score["std"], score["seeds"])


def _difference(score: Mapping[str, Any] | None) -> str:
    if score is None or score["difference_mean"] is None:
        return ""
    mean, half, p = (score[f"difference_{key}"] for key in ("mean", "ci95", "p_holm"))
    if half is None:
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} ({mean - half:.2f} .. {mean + half:.2f}), p {p_text(p)}"
    return f"**{text}**" if is_shown(score) else text


def _cost(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    first: Mapping[str, Any] = next(iter(scores), {})
    figures = (first.get("core_minutes"), first.get("peak_memory_mb"))
    return [
        "" if each is None else f"{each:.{digits}f}"
        for each, digits in zip(figures, (1, 0), strict=True)
    ]


def _verdict(scores: Sequence[Mapping[str, Any]]) -> str:
    """How many comparisons of a grid are shown at the level of 5 %: those in bold."""
    tested = [score for score in scores if score["difference_p_holm"] is not None]
    if not tested:
        return "Nothing is tested: a difference needs two seeds."
    shown = sum(map(is_shown, tested))
    return f"Shown at p (Holm) < {LEVEL}, in bold: {shown} of {len(tested)} comparisons."


_INTRODUCTION = """
# Does MCL help self-supervised pretraining?

`python -m benchmarks.ssl_study > docs/study.md` prints this page from the files in `benchmarks/results/`, which
`python -m benchmarks.ssl_study --keep runs/NAME` has taken from the tables of the study NAME.

## In short

Not on these images. No network that MCL has taught is shown to be better than those of MoCo and SimCLR. Several are
shown to be worse:

- On the characters, networks of MoCo lose 2.6 points of kNN accuracy. One positive of the paper's loss, which [betrays
  itself](#with-moco-the-peers-query-betrays-itself), is a part of the reason.
- Networks of SimCLR lose 0.7 points in linear probes of Fashion-MNIST.
- Cohorts of four lose more than cohorts of two: on Fashion-MNIST 2.7 points of kNN accuracy, on the characters 12.8.
- Two unlike networks lose 1.9 points in linear probes of their ensemble.

Ensembles are often better than one network, taught or not. On Fashion-MNIST, two networks of MoCo or of SimCLR that
never meet had higher ensembles than MCL in all three evaluations. One of these differences is shown: that of MoCo in
few-shot episodes, with fresh seeds. On the characters, two networks of MoCo that never meet are shown to be better than
MCL in all three evaluations, by the mean of the networks and as an ensemble. Without the same-sample positive MCL is
nearer, but the mean of its networks is still shown to be worse in all three, and their ensemble by kNN. Two networks of
SimCLR that never meet are shown to be better by kNN, also as an ensemble; in few-shot episodes no difference is shown
(65.61 and 65.88).

No part of MCL is shown to help MoCo ([ssl_settings](#ssl_settings)). These changes are not shown to change a score: a
term less of the four, another temperature of the soft terms, a larger alpha, three times the beta, a later begin of the
terms between networks, both views as queries, another size of the queue, a slower momentum. Ten times the beta costs
about a point of kNN accuracy, and a momentum of 0.9, which is a setting of MoCo, 2.5 points.
`scl_hard` alone makes two networks that never meet, and their ensemble is shown to be better by linear probe, +0.50.

Validation images rank `scl_hard` alone first. But for weight decay, it is the same as two MoCo networks apart. Among
the settings with terms between networks, the one without `icl_hard` is first. With fresh seeds
([ssl_best](#ssl_best)) neither is shown to differ from two MoCo networks apart: in kNN and linear accuracy no interval
reaches one point.

Four networks with common low stages cost as much as two. On Fashion-MNIST their ensembles score highest by linear
probe, with terms between the networks (84.64) or without (84.67), where two networks apart have 83.37. By kNN and in
few-shot episodes those without such terms are shown to be better.

![The differences with their 95 % intervals](study_answers.svg)

{in_short}

Differences in points, [as explained below](#how-it-was-measured).

## How it was measured

Two data sets that need no download: the first 8,000 training images of Fashion-MNIST (10 classes), and 60 characters
drawn in fonts, of which the test images have others than the training images. Few-shot episodes are of characters in
fonts, too, 5 ways and 5 shots. Images have 16 pixels and the network is Conv-4, so that a run takes minutes on one core
and every comparison has several seeds. A run is 744 steps (12 epochs), and twice that for "twice as long". On
Fashion-MNIST 744 steps bring the loss of MoCo to 3.9 ([last table](#with-moco-the-peers-query-betrays-itself)), where
chance among 2,049 candidates is 7.6. What holds here need not hold for ResNet-50 on ImageNet.

Each rival has the base learning rate that is best for it on validation images:
[ssl_learning_rates](#ssl_learning_rates) has tried the same rates for all of them on a data set, with a seed that the
comparisons do not use. Best is the highest mean of the networks in one run, by kNN on 2,000 images: the choice is as
coarse as that. On the characters, the weights of the authors' code got 0.002, the lowest that was tried; on
Fashion-MNIST several rivals got 0.03, the highest. No search was made for cohorts of four, which have the rate of
cohorts of two, for networks apart, which have the rate of one, and for the settings of MCL that a grid compares by
themselves, which have that of MCL (x2).

Test images choose no setting. That ssl_settings leaves the same-sample positive out is right by validation images too
(81.67 against 80.95). One question came from test images: ensembles of four had scored highest by linear probe in
ssl_settings, so the second grid of ssl_best asks with fresh seeds whether that is due to MCL. The networks of a cohort
of four share their low stages, as in the paper, so that it costs hardly more than one of two.

![Validation kNN of each rival by base learning rate](study_learning_rates.svg)

(`python -m benchmarks.ssl_study --pictures`; dashed: ensembles.)

- A score is mean ± standard deviation over seeds, and in brackets how many seeds.
- A difference is paired by seed: its mean, its 95 % interval by Student's t, and p of the paired t-test, corrected by
  Holm's method for all comparisons of its grid and score.
- The mean of the networks tells what one exported network is worth. The ensemble joins the features of all networks; a
  lone network stands for its own. An ensemble beside a lone network shows what two networks are worth, taught or not:
  what MCL adds to them, the grids "at the same cost" tell.
- A setting that stands in two grids may have been run on two machines of one description, whose processors round
  otherwise. MCL (x2) on the characters has been: single seeds differ by up to 0.8 points, means of five by up to 0.2
  (kNN 47.68 and 47.53). Where the two runs of a pair come from two machines, that is a part of the spread of their
  difference.
- core-min is the processor time of a training, MB the most memory that it held. The grids come from several machines of
  one description, so core-min compare within a grid. In [ssl_settings](#ssl_settings) they do not: its grids have the
  run of the default setting in common, and the others come from faster and slower machines. In
  [ssl_learning_rates](#ssl_learning_rates), the row of Conv-4 and WRN-16-2 with MCL comes from a faster machine than
  the rows above it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Keep a study's scores, draw the page's picture, or print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--keep", type=Path, metavar="STUDY", help="folder of a study to keep")
    actions.add_argument(
        "--pictures", action="store_true", help="draw the page's pictures: answers, learning rates"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.keep:
            print(keep(arguments.keep))
        elif arguments.pictures:
            print(*draw_pictures(), sep="\n")
        else:
            print(page(), end="")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
