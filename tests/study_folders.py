"""Study folders as trainings and evaluations leave them, without any training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from peerlearn.config import config_to_yaml
from peerlearn.evaluation.results import write_result
from peerlearn.runs.directory import RunDirectory
from studies.evaluations import Outcome, write_outcome
from studies.study import Study, StudyRun, plan_study
from studies.study_file import read_study

LAST_STEP = 12
SMALL = "--method supervised --data.name digits --cohort.backbones conv4"
METHODS = {"vanilla": "--alpha 0 --beta 0", "MCL (x2)": ""}


def make_study(home: Path, **keys: object) -> Study:
    """A study of supervised runs of two networks in ``home``/s, with one grid of two methods."""
    content = {
        "folder": str(home / "s"),
        "pretrain": SMALL,
        "seeds": [0, 1, 2],
        "grids": {"g": {"method": METHODS}},
        **keys,
    }
    home.mkdir(parents=True, exist_ok=True)
    file = home / "file.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return plan_study(read_study(file))


def begin(run: StudyRun, *, done: bool = True, last: int = LAST_STEP) -> RunDirectory:
    """A run directory as training leaves it."""
    directory = RunDirectory(run.folder)
    directory.create_folder()
    config = replace(run.variant.config, seed=run.seed, run=str(run.folder))
    directory.write_config(config_to_yaml(config))
    if done:
        directory.event("done", attempt=1, step=last)
        directory.mark_done()
    return directory


def write_scores(
    run: StudyRun, scores: Mapping[str, float], step: int = LAST_STEP, **changes: Any
) -> list[Path]:
    """A result file for each network, with top1 as given."""
    files = []
    for network, top1 in scores.items():
        facts: dict[str, Any] = {
            "task": "classification",
            "dataset": "digits",
            "metrics": {"top1": top1, "top5": top1 / 2 + 50, "n": 360},
            "protocol": {"split": "test", "epoch": 100},
            "export_hash": "x",
            "seed": run.seed,
            "seconds": 1.0,
        }
        folder = run.folder / "results"
        files.append(write_result(folder, step=step, network=network, **(facts | changes)))
    return files


def evaluate(
    run: StudyRun,
    line: str,
    scores: Mapping[str, float],
    step: int = LAST_STEP,
    *,
    key: str = "",
    **changes: Any,
) -> list[Path]:
    """The end of an evaluation, and its result files."""
    verb = line.split()[0]
    protocol = {"line": line, "test_images": 360}
    files = write_scores(run, scores, step, **{"task": verb, "protocol": protocol, **changes})
    folder = RunDirectory(run.folder).evaluations / f"{abs(hash((line, step)))}{key}"
    folder.mkdir(parents=True)
    results = [str(file.relative_to(run.folder)) for file in files]
    write_outcome(folder, Outcome(line=line, step=step, kind="done", results=results))
    return files


def finish(study: Study, values: Mapping[tuple[str, int], tuple[float, ...]]) -> None:
    """Finished trainings: top1 of network 0, network 1 and the ensemble by compared label and seed."""
    for cell in study.cells:
        for seed in study.config.seeds:
            if (scores := values.get((study.compared_label(cell), seed))) is not None:
                run = study.run_of(cell.variant, seed)
                begin(run)
                write_scores(run, dict(zip(("0", "1", "ensemble"), scores, strict=False)))
