"""The scores of the studies ssl_*, taken from their tables into benchmarks/results/."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance import RESULTS
from peerlearn.data.titles import VALIDATION_ENDING
from peerlearn.errors import UserError
from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object
from studies.scores import Key, Score
from studies.study import plan_study
from studies.study_command import SHIPPED
from studies.study_file import read_study
from studies.table import Table, tables

STUDIES = (
    "ssl_learning_rates",
    "ssl_fashion_mnist",
    "ssl_characters",
    "ssl_settings",
    "ssl_best",
)
# Of each score: what the page says, and what finds it again.
_KEPT = (
    *(
        "grid",
        "labels",
        "run",
        "task",
        "metric",
        "dataset",
        "network",
        "line",
        "step",
        "n",
        "seeds",
    ),
    *("values", "mean", "std", "baseline", "core_minutes", "peak_memory_mb"),
    *("difference_mean", "difference_ci95", "difference_p", "difference_p_holm"),
)
# Below it a comparison counts as shown.
LEVEL = 0.05
NETWORKS = {"individual": "mean of the networks", "ensemble": "ensemble"}


def keep(study: Path, folder: Path = RESULTS) -> Path:
    """Write the shown scores of a study's tables, with the machines and versions of its runs, to FOLDER/NAME.json.

    What that file has of other cells stays, so that the grids of a study can be measured on several machines.

    Raises:
        UserError: the study is none of STUDIES or has no tables, or a cell from before would stay in a grid whose
            differences are tested together.
    """
    if study.name not in STUDIES:
        raise UserError(f"{study} is none of the studies that the page shows: {', '.join(STUDIES)}")
    table = study / "table.json"
    if not table.is_file():
        raise UserError(f"{table} is not there: `peerlearn table {study}` writes it")
    content = read_json_object(table)
    wanted = content["config"]["compare"]["score"]
    scores: list[Mapping[str, Any]] = [
        {key: score[key] for key in _KEPT}
        for score in content["scores"]
        if score["shown"] and f"{score['task']}/{score['metric']}" in wanted
    ]
    scores = [score for score in scores if score["network"] in NETWORKS]
    machines = sorted({_machine(path) for path in study.glob("*/results/*.json")})
    file = folder / f"{study.name}.json"
    if file.is_file():
        before = read_json_object(file)
        machines = sorted({*before["machines"], *machines})
        scores = _merged(before["scores"], scores, study)
    kept = {"machines": machines, "scores": scores}
    write_text(file, json.dumps(kept, indent=1) + "\n")
    return file


def _merged(
    before: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], study: Path
) -> list[Mapping[str, Any]]:
    """The scores of the shipped study's cells: those measured now in place of those from before.

    A grid whose differences were tested stays as it was until it can be tested again.
    """
    cells = {
        (grid, *cell)
        for grid, axes in read_study(SHIPPED / f"{study.name}.yaml").grids.items()
        for cell in itertools.product(*axes.values())
    }
    tested = _tested(before) - _tested(measured)
    new = [score for score in measured if score["grid"] not in tested]
    staying_cells = cells - {(score["grid"], *score["labels"]) for score in new}
    staying = [score for score in before if (score["grid"], *score["labels"]) in staying_cells]
    if mixed := sorted(_tested(new) & {score["grid"] for score in staying}):
        raise UserError(
            f"{study} has a part of the grid {mixed[0]!r} alone, and Holm's method corrects a whole grid: "
            f"measure it whole (peerlearn study {study.name} --only {mixed[0]!r})"
        )
    return [*staying, *new]


def _tested(scores: Iterable[Mapping[str, Any]]) -> set[str]:
    return {score["grid"] for score in scores if score["difference_p_holm"] is not None}


def _machine(result: Path) -> str:
    found = read_json_object(result)
    hardware, versions = found["hardware"], found["versions"]
    processor = re.search(r"x86_64|aarch64|arm64", hardware["platform"])
    told = [processor[0] if processor else hardware["platform"], f"{hardware['cpu_count']} cores"]
    told += hardware["cuda_devices"]
    versions = {"Python": hardware["python"]} | versions
    return ", ".join([*told, *(f"{name} {versions[name]}" for name in ("Python", "torch"))])


def read_kept(folder: Path = RESULTS) -> dict[str, Mapping[str, Any]]:
    """The kept scores of every study in ``folder``, and the machines that they come from."""
    files = {name: folder / f"{name}.json" for name in STUDIES}
    empty: dict[str, Any] = {"machines": [], "scores": []}
    return {name: read_json_object(f) if f.is_file() else empty for name, f in files.items()}


def is_validated(score: Mapping[str, Any]) -> bool:
    """Whether a score is of validation images, which rank settings and answer nothing."""
    return bool(score["dataset"].endswith(VALIDATION_ENDING))


def is_shown(score: Mapping[str, Any]) -> bool:
    """Whether a difference is shown, after Holm's correction."""
    return score["difference_p_holm"] is not None and score["difference_p_holm"] < LEVEL


def learning_rates(folder: Path = RESULTS) -> list[Table]:
    """The tables of ssl_learning_rates, of the kept scores in ``folder``."""
    name = "ssl_learning_rates"
    study = plan_study(read_study(SHIPPED / f"{name}.yaml"))
    cells = {(cell.grid, *cell.labels): cell for cell in study.cells}
    scores = [
        Score(
            cell=cell,
            key=Key(score["line"], score["task"], score["dataset"], "", score["network"]),
            values={int(seed): value for seed, value in score["values"].items()},
            **{key: score[key] for key in ("metric", "step", "mean", "std", "n")},
            chosen=False,
            shown=True,
            interval=None,
            protocol={},
            difference=None,
        )
        for score in read_json_object(folder / f"{name}.json")["scores"]
        if (cell := cells.get((score["grid"], *score["labels"])))
    ]
    return tables(study, scores)
