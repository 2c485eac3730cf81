"""What env.json tells of a training, and what is said where it does not."""

import json
import re
from pathlib import Path

import pytest

from peerlearn.errors import UserError
from peerlearn.runs.training_facts import TrainingFacts, training_verb, write_env

FACTS = TrainingFacts(dataset="digits", data_root="/data", images=1437, seed=3, lr=0.1, processes=2)


def test_what_is_written_is_read_back_whatever_stands_beside_it(tmp_path: Path):
    file = tmp_path / "env.json"
    assert training_verb(file) == "pretrain"
    write_env(file, "toy", FACTS)
    assert training_verb(file) == "toy"
    assert TrainingFacts.read(file) == FACTS
    content = json.loads(file.read_text())
    assert list(content)[-1] == "training"
    assert content["versions"]["torch"]
    content["training"]["unknown"] = 1
    file.write_text(json.dumps(content))
    assert TrainingFacts.read(file) == FACTS


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        (None, "dataset, data_root, images, seed, lr, processes"),
        ("{", "dataset, data_root, images, seed, lr, processes"),
        ("[]", "dataset, data_root, images, seed, lr, processes"),
        ('{"training": null}', "dataset, data_root, images, seed, lr, processes"),
        (
            '{"training": {"dataset": "digits", "seed": 0, "lr": 1, "processes": 1}}',
            "data_root, images",
        ),
    ],
)
def test_a_fact_that_is_missing_is_named(tmp_path: Path, content: str | None, missing: str):
    file = tmp_path / "env.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{file} does not tell the run's {missing}")):
        TrainingFacts.read(file)
