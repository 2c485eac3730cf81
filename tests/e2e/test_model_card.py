"""Model cards of whole runs: the Hub's library reads them, their code runs, and a resumed run has the same."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from huggingface_hub import ModelCard, ModelCardData, constants

from peerlearn.cli import main
from peerlearn.config import fixed_values, load_config
from peerlearn.export import load_export
from peerlearn.runs.export_folders import is_key_network, network_in
from peerlearn.runs.score_names import parse_score_name
from pretrain.config import PretrainConfig
from tests.e2e.runs import exported_files, pretrain, rows
from tests.e2e.test_prototypical import WORDS as PROTOTYPICAL

pytestmark = pytest.mark.slow(8)
MOCO = [
    *("--data.limit", "64", "--monitor.test_limit", "100"),
    *("--checkpoint.export_key_networks", "true", "--monitor.key_networks", "true"),
    *("--monitor.linear", "true", "--checkpoint.export_every_epochs", "1"),
]
SUPERVISED = ["--method", "supervised", "--temperature", "0.1"]
STEP = "step-00000004"
LAST = f"export/{STEP}"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def moco(once) -> Path:
    return once("card-moco", lambda run: pretrain(run, *MOCO))


@pytest.fixture(scope="session")
def supervised(once) -> Path:
    return once("card-supervised", lambda run: pretrain(run, *SUPERVISED))


@pytest.fixture(scope="session")
def prototypical(once) -> Path:
    return once("card-prototypical", lambda run: main([*PROTOTYPICAL, "--run", str(run)]))


def cards_of(run: Path) -> dict[Path, ModelCard]:
    """Every card below a folder, by its export; each survives the library's own writing."""
    cards = {}
    for file in sorted(run.rglob("README.md")):
        card = ModelCard.load(file)
        again = ModelCard(str(card))
        assert (
            again.data.to_dict()
            == card.data.to_dict()
            == ModelCardData(**card.data.to_dict()).to_dict()
        )
        assert card.data.license is None
        cards[file.parent] = card
    return cards


def code_of(folder: Path, language: str) -> list[str]:
    card = (folder / "README.md").read_text()
    found = re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)
    return [block.replace("FOLDER", str(folder)) for block in found]


@pytest.mark.parametrize("name", ["moco", "supervised", "prototypical"])
def test_the_figures_of_every_export_are_those_of_metrics_jsonl(name, request):
    run: Path = request.getfixturevalue(name)
    cards = cards_of(run / "export")
    assert len(cards) >= 2
    for folder, card in cards.items():
        step, network = int(folder.parent.name[5:]), network_in(folder.name)
        (row,) = (each for each in rows(run) if each["step"] == step)
        names = {key: parse_score_name(key) for key in row}
        expected = [
            value
            for key, value in row.items()
            if (own := names[key]) and own.network == network and re.search("_top[15]$", own.figure)
        ]
        assert [each.metric_value for each in card.data.eval_results] == expected
        counts = {"moco": 1 if is_key_network(network) else 2, "supervised": 2, "prototypical": 1}
        assert len(expected) == counts[name]
        first = card.data.eval_results[0]
        assert first.metric_type == "accuracy"
        protocol = {
            "moco": {"k": 5, "temperature": 0.1, "train_images": 300, "test_images": 100},
            "supervised": {"images": 360},
            "prototypical": {"ways": 3, "shots": 1, "queries": 5, "episodes": 20},
        }
        assert first.metric_args == protocol[name]
        assert (first.dataset_type, first.dataset_split) == {
            "moco": ("digits", "test"),
            "supervised": ("digits", "test"),
            "prototypical": ("fashion_mnist_classes", "validation"),
        }[name]
        assert card.data.library_name == "timm"
        assert {"timm", "peerlearn", name} <= {*card.data.tags}
        datasets = ["zalando-datasets/fashion_mnist"] if name == "prototypical" else None
        assert card.data.datasets == datasets
        assert ("MIT" if datasets else "CC BY 4.0") in card.text
        assert str(run) not in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["moco", "supervised", "prototypical"])
def test_the_cards_lines_load_it_and_its_recipe_is_the_runs(name, request, tmp_path):
    run: Path = request.getfixturevalue(name)
    folder = max(cards_of(run / "export"))
    x = torch.rand(2, 1, 16, 16)
    features, logits = load_export(folder)(x), []
    by_timm, by_us = code_of(folder, "python")
    assert len([line for line in by_timm.splitlines() if line]) == 3
    for code in (by_timm, by_us):
        scope: dict = {}
        exec(code, scope)
        logits.append(scope["backbone"](x))
    assert torch.equal(logits[1], features)
    if name == "supervised":
        assert logits[0].shape == (2, 10)
    else:
        assert torch.equal(logits[0], features)
    recipe = tmp_path / "recipe.yaml"
    (text,) = code_of(folder, "yaml")
    recipe.write_text(text)
    ours, saved = (load_config(PretrainConfig, file) for file in (recipe, run / "config.yaml"))
    assert fixed_values(ours) == fixed_values(saved)


def test_the_cards_command_trains_the_same_network(moco, tmp_path, monkeypatch):
    folder = moco / LAST / "net-1"
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(code_of(folder, "yaml")[0])
    (command,) = code_of(folder, "bash")
    program, *words = command.split()
    assert program == "peerlearn"
    assert main([*words, "--run", "again", "--device", "cpu"]) == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (Path("again") / LAST / "net-1" / name).read_bytes() == (folder / name).read_bytes()


def test_a_resumed_run_and_the_export_command_write_the_same_cards(moco, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(moco, run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / STEP)
    shutil.rmtree(run / LAST)
    # What may change on the way is not told.
    changed = ["--data.workers", "0", "--checkpoint.keep_last", "5", "--rank_timeout_seconds", "9"]
    assert main(["resume", str(run), *changed]) == 0
    assert exported_files(run) == exported_files(moco)
    for network in ("0", "key-1"):
        words = ["--network", network, "--output", str(tmp_path / "out")]
        assert main(["export", str(run), *words]) == 0
    for folder in (tmp_path / "out").iterdir():
        assert (folder / "README.md").read_bytes() == (
            moco / LAST / folder.name / "README.md"
        ).read_bytes()


def test_results_of_evaluators_are_told_of_the_weights_they_were_measured_with(
    moco, tmp_path, capsys
):
    results = tmp_path / "results"
    words = [
        "--checkpoint",
        str(moco),
        "--network",
        "1",
        "--device",
        "cpu",
        "--results",
        str(results),
    ]
    assert main(["knn", *words, "--k", "3"]) == 0
    (results / "half.json").write_text("{")
    export = ["export", str(moco), "--network", "1", "--output", str(tmp_path / "out")]
    assert main(export) == 0
    before = (tmp_path / "out/net-1/model.safetensors").read_bytes()
    assert main([*export, "--results", str(results)]) == 0
    (card,) = cards_of(tmp_path / "out").values()
    own = ModelCard.load(moco / LAST / "net-1/README.md").data.eval_results
    assert card.data.eval_results[: len(own)] == own
    (added,) = card.data.eval_results[len(own) :]
    (file,) = results.glob("knn*.json")
    told = json.loads(file.read_text())
    assert added.metric_value == told["metrics"]["top1"]
    assert added.metric_args["k"] == told["protocol"]["k"] == 3
    assert added.metric_args["n"] == told["metrics"]["n"]
    assert added.metric_args["top1_standard_error"] == told["metrics"]["top1_standard_error"]
    assert (tmp_path / "out/net-1/model.safetensors").read_bytes() == before
    # Those of another network are not its.
    assert main([*export[:2], "--network", "0", *export[4:], "--results", str(results)]) == 0
    assert "holds no result of net-0" in capsys.readouterr().err
    assert (tmp_path / "out/net-0/README.md").read_bytes() == (
        moco / LAST / "net-0/README.md"
    ).read_bytes()
    assert main([*export[:4], "--results", str(results)]) == 2
    assert "--results needs --output" in capsys.readouterr().err
    assert main([*export, "--results", str(tmp_path / "none")]) == 2


def test_cards_for_other_libraries_and_of_imports_tell_what_is_known(tmp_path):
    file = tmp_path / "it's `a`: |b|.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    assert main(["import", str(file), "--output", str(tmp_path / "in")]) == 0
    (imported,) = cards_of(tmp_path / "in").values()
    assert imported.data.eval_results is None
    assert imported.data.tags == ["timm", "peerlearn", "image-feature-extraction", "imported"]
    assert "unmeasured" in imported.text
    assert "unknown: ask who trained the network" in imported.text
    for target in ("torchvision", "detectron2"):
        words = ["--format", target, "--output", str(tmp_path / target)]
        assert main(["export", str(tmp_path / "in"), *words]) == 0
        (card,) = cards_of(tmp_path / target).values()
        assert card.data.library_name == target
        assert {target, "peerlearn", "imported"} <= {*card.data.tags}
        assert "timm" not in card.data.tags
        assert "## Limits" in card.text
        assert "## Licence" in card.text
