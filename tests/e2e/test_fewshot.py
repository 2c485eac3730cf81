"""`peerlearn fewshot` on exports of small runs of digits."""

import json
from pathlib import Path

import pytest
import torch

from fewshot.evaluate import evaluate_features
from peerlearn.cli import main
from peerlearn.data.datasets import load_dataset
from peerlearn.evaluation.feature_sets import with_ensemble
from peerlearn.export import load_export

CPU = ["--device", "cpu", "--cache", "false"]
SMALL = ["--ways", "3", "--queries", "6", "--episodes", "40"]


def fewshot(*words: str | Path) -> int:
    return main(["fewshot", *map(str, words), *CPU])


def results(folder: Path) -> dict[tuple[str, int], dict]:
    """By network and shots."""
    read = [json.loads(path.read_text()) for path in folder.glob("fewshot-*.json")]
    return {(each["network"], each["protocol"]["shots"]): each for each in read}


@pytest.fixture(scope="session")
def features(runs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of the test digits by the exports of the first run, by the network's own config."""
    test = load_dataset("digits", "test")
    encoded = {}
    for m in ("0", "1"):
        (folder,) = (runs[0] / "export").glob(f"step-*/net-{m}")
        backbone = load_export(folder)
        view = backbone.pretrained_cfg
        images = test.images.float() / 255
        images = torch.nn.functional.interpolate(
            images, size=view["input_size"][1:], mode="bilinear", antialias=True
        )
        mean, std = (torch.tensor(view[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            encoded[m] = backbone((images - mean) / std)
    return with_ensemble(encoded), test.labels


@pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
def test_every_network_and_their_ensemble_with_every_number_of_shots(
    runs, features, distance, tmp_path, capsys
):
    words = ["--checkpoint", runs[0], "--distance", distance, "--results", tmp_path]
    assert fewshot(*words, *SMALL) == 0
    printed = capsys.readouterr().out
    scores = results(tmp_path)
    assert set(scores) == {(name, s) for name in ("0", "1", "ensemble") for s in (1, 5)}
    for (name, shots), result in scores.items():
        expected = evaluate_features(
            features[0][name],
            features[1],
            ways=3,
            shots=shots,
            queries=6,
            episodes=40,
            distance=distance,
        )
        metrics = result["metrics"]
        # A query that rounding decides may fall either way.
        assert metrics["accuracies"] == pytest.approx(expected.accuracies.tolist(), abs=100 / 18)
        assert metrics["accuracy"] == pytest.approx(expected.mean, abs=0.3)
        assert metrics["accuracy"] == pytest.approx(sum(metrics["accuracies"]) / 40)
        assert metrics["n"] == 40
        assert result["protocol"]["distance"] == distance
        row = f"{metrics['accuracy']:.2f} +- {metrics['accuracy_ci95']:.2f}"
        assert row in printed
    assert "95 % interval over episodes" in " ".join(printed.split())


def test_several_runs_give_their_mean_over_runs(runs, tmp_path, capsys):
    words = ["--network", "0", "--shots", "1", "--results", tmp_path]
    assert fewshot("--checkpoint", *runs, *words, *SMALL) == 0
    assert "2 runs: mean +- ci95" in capsys.readouterr().out
    (mean,) = (
        each["metrics"]
        for each in (json.loads(path.read_text()) for path in tmp_path.glob("fewshot-*.json"))
        if "runs" in each["metrics"]
    )
    assert mean["accuracy"]["mean"] == pytest.approx(sum(mean["accuracy"]["values"]) / 2)


def test_the_list_of_episodes_is_kept_and_taken_again(runs, tmp_path, capsys):
    words = ["--checkpoint", runs[0], "--network", "0", "--shots", "1", *SMALL]
    file = tmp_path / "lists" / "episodes.json"
    for folder, seed in (("a", 0), ("b", 1)):
        asked = ["--results", tmp_path / folder, "--seed", str(seed), "--episodes_file", file]
        assert fewshot(*words, *asked) == 0
    first, second = (results(tmp_path / each)["0", 1]["metrics"] for each in "ab")
    assert first["accuracies"] == second["accuracies"]
    capsys.readouterr()
    assert fewshot(*words, "--data.split", "train", "--episodes_file", file) == 1
    assert "is of other images" in capsys.readouterr().err


def test_cl2n_is_centred_by_the_base_split(runs, features, tmp_path):
    words = ["--checkpoint", runs[0], "--network", "0", "--shots", "1", "--results", tmp_path]
    asked = ["--features", "cl2n", "--data.base_split", "test"]
    assert fewshot(*words, *asked, *SMALL) == 0
    rows = features[0]["0"].double()
    rows = rows - rows.mean(0)
    expected = evaluate_features(
        rows / rows.norm(dim=1, keepdim=True),
        features[1],
        ways=3,
        shots=1,
        queries=6,
        episodes=40,
    )
    metrics = results(tmp_path)["0", 1]["metrics"]
    assert metrics["accuracies"] == pytest.approx(expected.accuracies.tolist(), abs=100 / 18)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--ways", "11"], 1, "episodes of 11 ways need as many classes, and there are 10"),
        (["--ways", "3", "--shots", "30"], 1, "30 shots and 15 queries of a class, and class"),
        (["--features", "cl2n"], 2, "features cl2n and data.base_split go together"),
        (["--shots", "1", "1"], 2, "shots must be numbers of at least 1, each once"),
        (["--ways", "1"], 2, "ways must be at least 2"),
        (["--data.split", "novel"], 1, "digits has no split 'novel'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(runs, words, code, message, tmp_path, capsys):
    assert fewshot("--checkpoint", runs[0], "--results", tmp_path / "r", *words) == code
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "r").exists()
