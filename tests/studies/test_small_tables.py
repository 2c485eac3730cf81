"""The miniatures of the paper's tables, run as they are but for one seed, two cells and one epoch."""

import json
from pathlib import Path

import pytest
import yaml

from studies.study import plan_study
from studies.study_command import SHIPPED
from studies.study_file import read_study
from tests.studies.small_studies import peerlearn

LABELS = "--epochs 1 --data.shots 6 --batch_size 12"
SMALLER = {
    "table_1_digits": LABELS,
    "table_2_digits": LABELS,
    "table_3_fashion_mnist": LABELS,
    "table_4_digits": LABELS,
    "table_5_digits": LABELS,
    "table_6_digits": LABELS,
    "table_7_characters": "--epochs 1 --prototypical.steps_per_epoch 3 "
    "--prototypical.validation_episodes 4",
    "table_8_digits": "--epochs 1 --data.limit 200 --queue.size 80 --batch_size 40",
    "figure_3_digits": LABELS,
}
LINES = {
    "linear": "--data.train_limit 100 --data.test_limit 100 --penalties_c 1",
    "knn": "--data.train_limit 100 --data.test_limit 100",
    "fewshot": "--episodes 4",
    "detect": "--iterations 2 --milestones 1 --warmup_iterations 1 --precise_bn_iterations 1 --data.limit 8",
}


@pytest.mark.slow(40)
@pytest.mark.parametrize(("name", "words"), SMALLER.items())
def test_a_miniature_comes_to_its_tables(name: str, words: str, tmp_path: Path) -> None:
    shipped = read_study(SHIPPED / f"{name}.yaml")
    grid = next(iter(shipped.grids))
    axes = {
        axis: {
            label: words
            for label, words in labels.items()
            if label == next(iter(labels))
            or (axis == shipped.compared_axis(grid) and label == list(labels)[-1])
        }
        for axis, labels in shipped.grids[grid].items()
    }
    content = {
        "folder": str(tmp_path / "s"),
        "pretrain": shipped.pretrain,
        "seeds": [0],
        "grids": {grid: axes},
        "evaluate": [f"{line} {LINES[line.split()[0]]}" for line in shipped.evaluate],
        "compare": {"score": shipped.compare.score},
    }
    # The words of a label come last, so what makes the runs smaller stands there.
    last = axes[list(axes)[-1]]
    last |= {label: f"{line} {words}".strip() for label, line in last.items()}
    file = tmp_path / "smaller.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    printed = peerlearn("study", str(file), OMP_NUM_THREADS="1")
    assert "missing: " not in printed
    study = plan_study(read_study(file))
    tables = json.loads((tmp_path / "s" / "table.json").read_text())
    measured = {
        (score["task"], tuple(score["labels"]))
        for score in tables["scores"]
        if score["network"] == "individual" or name == "table_3_fashion_mnist"
    }
    tasks = {line.split()[0] for line in shipped.evaluate} or {"classification"}
    assert measured >= {(task, cell.labels) for task in tasks for cell in study.cells}
    assert (tmp_path / "s" / "table.tex").read_text().count("\\toprule") >= 1
