"""What the trainings of a study have cost, beside their scores."""

import csv
import io
import json
from typing import Any

import pytest

from studies.cost import Cost, RunCost, mean_cost, run_cost, study_costs
from studies.formats import as_csv, as_markdown
from studies.scores import score_study
from studies.table import tables
from tests.study_folders import begin, make_study, write_scores


def rows(*pairs: tuple[int, float | None, float | None]) -> list[dict[str, Any]]:
    """Rows of a log from attempt, processor seconds and memory; a figure of None is not logged."""
    named = ("attempt", "cpu_seconds", "peak_memory_mb")
    return [
        {"step": step} | {k: v for k, v in zip(named, pair, strict=True) if v is not None}
        for step, pair in enumerate(pairs, start=1)
    ]


@pytest.mark.parametrize(
    ("log", "cost"),
    [
        # The clock begins again at each start; the memory may have been more in an earlier one.
        ([(1, 3.0, 90.0), (1, 8.0, 95.0), (2, 5.0, 70.0)], RunCost(cpu_seconds=13.0, peak_memory_mb=95.0)),
        ([(1, 8.0, None)], RunCost(cpu_seconds=8.0, peak_memory_mb=None)),
        # The first start was one of an earlier version.
        ([(1, None, None), (2, 5.0, 70.0)], None),
        ([(1, float("nan"), 9.0)], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_cost_of_a_run_is_that_of_all_its_starts(tmp_path, log, cost) -> None:
    study = make_study(tmp_path)
    folder = begin(study.runs[0])
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows(*log)))
    assert run_cost(folder.root) == cost


def test_a_run_that_goes_on_or_is_damaged_has_no_cost(tmp_path) -> None:
    study = make_study(tmp_path)
    line = json.dumps(rows((1, 3.0, 9.0))[0]) + "\n"
    going = begin(study.runs[0], done=False)
    going.metrics.write_text(line)
    damaged = begin(study.runs[1])
    damaged.metrics.write_text(f"x\n{line}")
    assert study_costs(study) == {}


def test_a_mean_has_memory_only_if_every_run_tells_it() -> None:
    one, other = (
        RunCost(cpu_seconds=s, peak_memory_mb=m) for s, m in ((60.0, 10.0), (180.0, 30.0))
    )
    assert mean_cost([one, other]) == Cost(core_minutes=2.0, peak_memory_mb=20.0)
    silent = RunCost(cpu_seconds=60.0, peak_memory_mb=None)
    assert mean_cost([one, silent]) == Cost(core_minutes=1.0, peak_memory_mb=None)
    assert mean_cost([]) is None


def test_the_cost_stands_beside_the_score(tmp_path) -> None:
    study = make_study(tmp_path, seeds=[0, 1])
    for number, run in enumerate(study.runs):
        directory = begin(run)
        write_scores(run, {"0": 50.0 + number, "1": 52.0, "ensemble": 55.0})
        # The last run comes from an earlier version.
        if number < 3:
            row = rows((1, 60.0 * (number + 1), 100.0 + number))[0]
            directory.metrics.write_text(json.dumps(row) + "\n")
    scores, _ = score_study(study)
    shown = tables(study, scores, study_costs(study))
    text = as_markdown(shown, [])
    lines = [line for line in text.splitlines() if line.startswith("| individual")]
    # Seed by seed: the first method has runs 0 and 2, of 1 and 3 minutes.
    assert [line.split(" | ")[-2:] for line in lines] == [["2.00", "101 |"], ["", " |"]]
    assert "core-min, MB: processor time and most memory of a run's training" in text
    found = list(csv.DictReader(io.StringIO(as_csv(study, shown, scores))))
    assert {(row["labels"], row["core_minutes"], row["peak_memory_mb"]) for row in found} >= {
        ("vanilla", "2.0", "101.0"),
        ("MCL (x2)", "", ""),
    }
