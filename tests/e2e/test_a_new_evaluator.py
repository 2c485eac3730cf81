"""A fourth evaluator: one file and one line among the verbs, and everything else is there."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.spatial.distance import cdist

from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import load_dataset
from peerlearn.evaluation.feature_cache import Extraction, load_features
from peerlearn.export import export_hash
from peerlearn.knn import ensemble_features
from tests.e2e.runs import STEPS, command, environment, pretrain
from tests.trees import add_line, copied_tree

LINE = '    "toy": Verb("toy_eval", "main", "score by the nearest class mean", True),'
TOY = '''\
"""`peerlearn toy`: accuracy of the nearest class mean."""

from dataclasses import dataclass, field
from functools import partial

from peerlearn.evaluation.data import EvaluationDataConfig, load_splits
from peerlearn.evaluation.evaluator import Evaluator, EvaluatorConfig, run
from peerlearn.evaluation.confusion import plot_confusion
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.score_table import ACCURACY_COLUMNS

@dataclass(frozen=True, kw_only=True)
class ToyConfig(EvaluatorConfig):
    """Nearest class mean.

    Attributes:
        norms: powers of the distance; each gives a score of its own.
    """
    norms: list[float] = field(default_factory=lambda: [2.0])
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)

def score(config, selection, ranks):
    import torch
    from peerlearn.evaluation.classification import classification_scores
    from peerlearn.evaluation.feature_cache import Extraction
    from peerlearn.evaluation.feature_sets import load_feature_sets
    splits = load_splits(config.data, selection, ranks)
    how = Extraction(ranks=ranks, batch_size=256, workers=0, cached=False)
    known, asked = load_feature_sets(selection, (splits.train, splits.test), how)
    for name in filter(selection.wants, known.features):
        means = torch.stack([known.features[name][known.labels == label].mean(0) for label in range(splits.train.num_classes)])
        for norm in config.norms:
            found = classification_scores(-torch.cdist(asked.features[name], means, p=norm), asked.labels)
            picture = partial(plot_confusion, confusion=found.confusion, class_names=splits.test.class_names, title=name)
            yield Score(network=name, dataset=splits.title, metrics=found.metrics(), variant=f"norm {norm}", pictures={'': picture},
                        protocol={"norm": norm, **splits.protocol()})

TOY = Evaluator(verb="toy", config=ToyConfig, score=score, columns=ACCURACY_COLUMNS, title=lambda _: "nearest class mean (%)",
                description="Score by the nearest class mean.", example="peerlearn toy --checkpoint runs/a")
main = partial(run, TOY)
'''  # noqa: E501
LIMIT = 150


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project with a new evaluator."""
    tree = copied_tree(tmp_path_factory.mktemp("tree"))
    (tree / "toy_eval").mkdir()
    (tree / "toy_eval" / "__init__.py").write_text(TOY)
    add_line(tree / "peerlearn/commands/verbs.py", "VERBS = {", LINE)
    return tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of two networks, of different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        words = ["--seed", str(seed), "--monitor.every_epochs", "0", "--epochs", "2"]
        assert pretrain(folder / str(seed), *words) == 0
    return [folder / "0", folder / "1"]


@pytest.fixture
def runs(trained: list[Path], tmp_path: Path) -> list[Path]:
    """Copies to leave results in."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in trained]


def peerlearn(tree: Path, *words: str | Path, cwd: Path) -> str:
    """What that version prints, which is to end well."""
    found = subprocess.run(
        command(*map(str, words)),
        cwd=cwd,
        env=environment(PYTHONPATH=str(tree)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def results(folder: Path) -> dict[tuple[str, float], dict]:
    """By network and norm."""
    found = [json.loads(file.read_text()) for file in folder.glob("toy-digits-*.json")]
    return {(each["network"], each["protocol"]["norm"]): each for each in found}


def expected_top1(run: Path, norms: list[float]) -> dict[tuple[str, float], float]:
    """Worked out apart: by scipy, in double precision."""
    folders = {m: run / f"export/step-{STEPS:08d}/net-{m}" for m in ("0", "1")}
    how = Extraction(ranks=Ranks(torch.device("cpu")), batch_size=256, workers=0, cached=False)
    splits = [load_dataset("digits", split, limit=LIMIT) for split in ("train", "test")]
    sides = [load_features(folders, split, how) for split in splits]
    for side in sides:
        side["ensemble"] = ensemble_features([side["0"], side["1"]])
    labels = [split.labels.numpy() for split in splits]
    found = {}
    for name in sides[0]:
        train, test = (side[name].double().numpy() for side in sides)
        means = np.stack([train[labels[0] == c].mean(axis=0) for c in range(10)])
        for norm in norms:
            nearest = cdist(test, means, "minkowski", p=norm).argmin(axis=1)
            found[name, norm] = 100 * int((nearest == labels[1]).sum()) / LIMIT
    return found


def test_it_is_short_and_its_help_answers_without_torch(tree: Path, tmp_path: Path):
    assert len(TOY.splitlines()) <= 40
    assert len(LINE.splitlines()) == 1
    code = (
        "import sys; from peerlearn.cli import main; main(['--help']); main(['toy', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    found = subprocess.run(
        words, cwd=tmp_path, env=environment(PYTHONPATH=str(tree)), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "  toy        score by the nearest class mean" in found.stdout
    for key in ("--checkpoint", "--network", "--norms", "--data.limit", "--results", "--dry_run"):
        assert key in found.stdout
    assert "powers of the distance" in found.stdout
    # Written once, where every evaluator has it from.
    assert "folder of the result files" in found.stdout


def test_a_dry_run_prints_its_config_and_a_wrong_key_its_neighbour(
    tree: Path, runs: list[Path], tmp_path: Path
):
    checkpoints, before = list(map(str, runs)), sorted(tmp_path.rglob("*"))
    words = ["toy", "--checkpoint", *checkpoints, "--norms", "1", "2", "--dry_run"]
    printed = peerlearn(tree, *words, cwd=tmp_path)
    config = yaml.safe_load(printed)
    assert (config["checkpoint"], config["norms"]) == (checkpoints, [1, 2])
    assert config["network"] == "all"
    assert "# images of digits: " in printed
    assert sorted(tmp_path.rglob("*")) == before
    wrong = subprocess.run(
        command("toy", "--nroms", "1"),
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tree)),
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "unknown key --nroms; did you mean 'norms'" in wrong.stderr


def test_runs_of_two_networks_are_scored_drawn_printed_and_averaged(
    tree: Path, runs: list[Path], tmp_path: Path
):
    norms = [1.0, 2.0]
    words = ["toy", "--network", "all", "--norms", "1", "2", "--data.limit", str(LIMIT)]
    printed = peerlearn(tree, *words, "--checkpoint", *runs, "--device", "cpu", cwd=tmp_path)
    expected = [expected_top1(run, norms) for run in runs]
    assert len(expected[0]) == 6
    # A network of a minute, far above chance.
    assert min(expected[0].values()) > 30
    for seed, run in enumerate(runs):
        found = results(run / "results")
        assert {key: each["metrics"]["top1"] for key, each in found.items()} == expected[seed]
        for (network, norm), result in found.items():
            step = (result["task"], result["dataset"], result["step"], result["seed"])
            assert step == ("toy", "digits", STEPS, seed)
            assert result["metrics"]["n"] == LIMIT
            low, high = result["metrics"]["top1_wilson95"]
            assert low < expected[seed][network, norm] < high
            assert result["protocol"]["train_images"] == LIMIT
        folder = run / f"export/step-{STEPS:08d}"
        hashes = {m: export_hash(folder / f"net-{m}") for m in ("0", "1")}
        assert found["1", 2.0]["export_hash"] == hashes["1"]
        assert found["ensemble", 2.0]["export_hash"] == hashes
        pictures = sorted(run.glob("results/*.png"))
        assert [path.stem for path in pictures] == [
            p.stem for p in sorted(run.glob("results/*.json"))
        ]
        with Image.open(pictures[0]) as picture:
            assert min(picture.size) > 300
    means = results(tmp_path / "results")
    assert means.keys() == expected[0].keys()
    for key, mean in means.items():
        values = [each[key] for each in expected]
        top1 = mean["metrics"]["top1"]
        assert top1["values"] == values
        assert top1["mean"] == pytest.approx(sum(values) / 2)
        assert top1["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert (mean["seed"], mean["metrics"]["runs"]) == ([0, 1], 2)
        (row,) = [line for line in printed.splitlines() if f" {key[0]}, norm {key[1]} " in line]
        assert f"{top1['mean']:.2f} +- {top1['std']:.2f}" in row
    assert "nearest class mean (%)" in printed
    assert f"n {LIMIT}, 2 runs: mean +- std" in printed


def test_it_can_be_watched_and_submitted(tree: Path, runs: list[Path], tmp_path: Path):
    """By a process of its own, and by a job, which runs a copy of the program that has the new package."""
    watched, submitted = runs
    limit = f"--data.limit {LIMIT} --device cpu"
    words = ["watch", watched, "--cluster", "local", "--interval_seconds", "0.3"]
    printed = peerlearn(tree, *words, "--evaluate", f"toy --norms 1 {limit}", cwd=tmp_path)
    assert f"toy --norms 1 {limit}: done (" in printed
    words = ["submit", "--cluster", "local", "--wait", "true", "--", "toy", *limit.split()]
    printed = peerlearn(tree, *words, "--checkpoint", submitted, "--network", "1", cwd=tmp_path)
    assert ": done" in printed
    found = results(watched / "results")
    expected = expected_top1(watched, [1.0])
    assert {key: each["metrics"]["top1"] for key, each in found.items()} == expected
    (key,) = {each["job"] for each in found.values()}
    assert (watched / "evaluations" / key / "outcome.json").is_file()
    ((key, result),) = results(submitted / "results").items()
    assert key == ("1", 2.0)
    assert result["metrics"]["top1"] == expected_top1(submitted, [2.0])[key]
    assert (submitted / "slurm" / "toy-1" / "code" / "toy_eval" / "__init__.py").is_file()
