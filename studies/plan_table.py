"""What a study would do, told before it starts."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from peerlearn.runs.directory import RunDirectory
from studies.study import Study


def print_plan(study: Study, images: Mapping[str, int], *, verbose: bool) -> None:
    """Print a line for each grid, the runs, the evaluations and the images to process; every command if verbose.

    Args:
        study: the study.
        images: number of images that all steps of a run take, by its variant, for variants that are still to start.
        verbose: whether to print every command.
    """
    config = study.config
    print(f"study: {study.root} ({config.cluster})")
    for grid in study.grids:
        axes = config.grids[grid]
        sizes = " x ".join(f"{axis} ({len(labels)})" for axis, labels in axes.items())
        count = math.prod(map(len, axes.values()))
        print(
            f"grid: {grid}: {sizes} = {count}, compared along {config.compared_axis(grid)} with "
            f"{config.compare.baseline[grid]}"
        )
    states = Counter(_state(run.folder) for run in study.runs)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(
        f"runs: {len(study.runs)}, of {len(study.variants)} configs x {len(config.seeds)} seeds ({told})"
    )
    for line in config.evaluate:
        print(f"evaluation: {line}, of {_exports(config.exports)} of each run")
    left = sum(
        images.get(run.variant.name, 0) for run in study.runs if not RunDirectory(run.folder).begun
    )
    print(f"images to process: {left:,} in the trainings that have not begun")
    if not verbose:
        print("--verbose prints every command")
        return
    for run in study.runs:
        titles = [cell.title for cell in study.cells if cell.variant.name == run.variant.name]
        print(f"# {'; '.join(titles)}; seed {run.seed}: {_state(run.folder)}")
        print(f"peerlearn {shlex.join(['pretrain', *run.variant.words, *run.own_words])}")
        for line in config.evaluate:
            print(f"peerlearn {line} --checkpoint {shlex.quote(str(run.folder))}")


def _state(folder: Path) -> str:
    run = RunDirectory(folder)
    return "done" if run.done else "begun" if run.begun else "to start"


def _exports(exports: str | int) -> str:
    named = {"last": "the last export", "all": "every export"}
    return named.get(str(exports), f"the exports of every {exports} epochs and the last")
