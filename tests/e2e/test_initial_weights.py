"""Cohorts that start from weights: of runs, saves, exports, files and timm's cache."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch

from peerlearn.backbones import create_backbone
from peerlearn.cli import main
from peerlearn.export import load_export
from peerlearn.runs.checkpoint import load_checkpoint
from peerlearn.runs.files import file_sha256
from tests.e2e.runs import assert_same_run, events, newest_tensors, pretrain, write_noise

WORDS = [
    *("--data.limit", "64", "--epochs", "1", "--monitor.every_epochs", "0", "--queue.size", "48"),
    *("--checkpoint.every_steps", "1", "--checkpoint.keep_last", "9", "--base_lr", "1e-9"),
]
# A step of so small a learning rate moves no weight by more than its last bits.
NEAR = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    run = tmp_path_factory.mktemp("source") / "a"
    words = ["--base_lr", "0.5", "--seed", "7", "--checkpoint.export_key_networks", "true"]
    assert pretrain(run, *WORDS, *words) == 0
    return run


def start(run, *words: str) -> dict[str, torch.Tensor]:
    """The networks of a run after its first step."""
    assert pretrain(run, *WORDS, *words) == 0
    return load_checkpoint(run / "checkpoints/step-00000001")[0]["networks"]


def weights(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The parameters below a prefix; batch-norm statistics move with every batch."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.endswith(("weight", "bias"))
    }


def assert_near(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **NEAR, msg=name)


@pytest.mark.parametrize("word", ["", "checkpoints/step-00000002"])
def test_a_run_gives_each_network_its_own_with_its_head(word, source, tmp_path):
    theirs = newest_tensors(source)["networks"]
    ours = start(tmp_path / "b", "--cohort.init", str(source / word))
    for m in (0, 1):
        for part in ("backbones", "heads"):
            assert_near(weights(ours, f"{part}.{m}."), weights(theirs, f"{part}.{m}."))
    loaded = events(tmp_path / "b", "initial_weights")[0]["networks"]
    file = source / "checkpoints/step-00000002/networks.safetensors"
    assert [each["sha256"] for each in loaded] == [file_sha256(file)] * 2
    assert [(each["matched"], each["missing"], each["unused"]) for each in loaded] == [
        (30, [], [])
    ] * 2
    assert (
        json.loads((tmp_path / "b/env.json").read_text())["training"]["initial_weights"] == loaded
    )


def test_momentum_networks_follow_and_the_queue_starts_empty(source, tmp_path):
    words = ["--cohort.init", str(source), "--queue.momentum", "1", "--queue.size", "80"]
    start(tmp_path / "b", *words)
    tensors, _ = load_checkpoint(tmp_path / "b/checkpoints/step-00000001")
    theirs = newest_tensors(source)["networks"]
    for name, tensor in tensors["key_networks"].items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(tensor, theirs[name]), name
    assert int(tensors["queue"]["filled"]) == 32


def test_a_steps_exports_give_each_network_its_own_with_a_new_head(source, tmp_path):
    exports = source / "export/step-00000002"
    ours = start(tmp_path / "b", "--cohort.init", str(exports))
    fresh = start(tmp_path / "fresh")
    for m in (0, 1):
        given = load_export(exports / f"net-{m}").state_dict()
        assert_near(weights(ours, f"backbones.{m}."), weights(given, ""))
        assert_near(weights(ours, f"heads.{m}."), weights(fresh, f"heads.{m}."))


def test_one_network_serves_all_and_their_heads_differ(source, tmp_path, capfd):
    folder = source / "export/step-00000002/net-1"
    ours = start(tmp_path / "b", "--cohort.init", str(folder))
    given = load_export(folder).state_dict()
    for m in (0, 1):
        assert_near(weights(ours, f"backbones.{m}."), weights(given, ""))
    assert (ours["heads.0.weight"] - ours["heads.1.weight"]).abs().max() > 0.01
    assert "networks 0, 1 start alike but for heads of their own" in capfd.readouterr().out
    card = (tmp_path / "b/export/step-00000002/net-0/README.md").read_text()
    sha256 = events(tmp_path / "b", "initial_weights")[0]["networks"][0]["sha256"]
    assert f"weights of SHA-256 {sha256}, 28 tensors, 2 missing" in card
    assert str(source) not in card


def test_a_file_of_a_cohort_given_twice_to_one_network_keeps_no_head_in_common(source, tmp_path):
    """Two networks that start from one and the same network must not have the same head."""
    ours = start(
        tmp_path / "b",
        *("--cohort.networks", "3", "--cohort.share_stages", "0", "--cohort.init"),
        *(str(source / "export/step-00000002/net-0"), "random"),
        str(source / "export/step-00000002/net-0"),
    )
    assert_near(weights(ours, "backbones.0."), weights(ours, "backbones.2."))
    assert (ours["heads.0.weight"] - ours["heads.2.weight"]).abs().max() > 0.01
    assert (
        (ours["backbones.0.fc.weight"] - ours["backbones.1.fc.weight"]).abs().max() > 0.01
        if ("backbones.0.fc.weight" in ours)
        else True
    )


def test_a_frozen_network_teaches_with_the_weights_and_the_head_that_it_was_given(source, tmp_path):
    run = tmp_path / "b"
    words = ["--cohort.init", "random", str(source), "--cohort.frozen", "1", "--base_lr", "0.5"]
    assert pretrain(run, *WORDS, *words) == 0
    ours, theirs = newest_tensors(run)["networks"], newest_tensors(source)["networks"]
    for name, tensor in theirs.items():
        same = torch.equal(ours[name], tensor)
        assert same == (name.split(".")[1] == "1") or name.endswith("num_batches_tracked"), name
    exported = [folder / "export/step-00000002/net-1/model.safetensors" for folder in (run, source)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_a_classifier_comes_with_a_supervised_export(tmp_path):
    words = ["--method", "supervised"]
    first = tmp_path / "first"
    assert pretrain(first, *WORDS, *words, "--base_lr", "0.5") == 0
    ours = start(tmp_path / "b", *words, "--cohort.init", str(first / "export/step-00000002"))
    theirs = newest_tensors(first)["networks"]
    for m in (0, 1):
        assert_near(weights(ours, f"classifiers.{m}."), weights(theirs, f"classifiers.{m}."))
    loaded = events(tmp_path / "b", "initial_weights")[0]["networks"]
    assert [(each["matched"], each["missing"]) for each in loaded] == [
        (30, ["head.weight", "head.bias"])
    ] * 2


def test_a_killed_run_goes_on_when_what_it_started_from_is_gone(source, tmp_path):
    copied = tmp_path / "source"
    shutil.copytree(source, copied)
    words = ["--cohort.init", str(copied), "--base_lr", "0.1"]
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    assert pretrain(undisturbed, *WORDS, *words) == 0
    shutil.copytree(undisturbed, resumed)
    (resumed / "DONE").unlink()
    shutil.rmtree(resumed / "checkpoints/step-00000002")
    shutil.rmtree(resumed / "export")
    shutil.rmtree(copied)
    assert main(["resume", str(resumed)]) == 0
    assert_same_run(resumed, undisturbed)
    facts = [
        json.loads((run / "env.json").read_text())["training"] for run in (undisturbed, resumed)
    ]
    assert facts[0]["initial_weights"] == facts[1]["initial_weights"] != []


def test_a_run_killed_before_its_first_save_starts_from_the_weights_again(source, tmp_path):
    words = ["--cohort.init", str(source), "--base_lr", "0.1"]
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    assert pretrain(undisturbed, *WORDS, *words) == 0
    resumed.mkdir()
    shutil.copy(undisturbed / "config.yaml", resumed)
    shutil.copy(undisturbed / "env.json", resumed)
    assert main(["resume", str(resumed)]) == 0
    assert_same_run(resumed, undisturbed)


def test_a_run_that_starts_over_is_refused_where_its_weights_are_others_by_now(
    source, tmp_path, capfd
):
    copied, run = tmp_path / "source", tmp_path / "b"
    shutil.copytree(source, copied)
    assert pretrain(run, *WORDS, "--cohort.init", str(copied)) == 0
    shutil.rmtree(run / "checkpoints")
    (run / "DONE").unlink()
    (run / "metrics.jsonl").unlink()
    begun = [
        line for line in (run / "events.jsonl").read_text().splitlines() if '"saved"' not in line
    ]
    (run / "events.jsonl").write_text("\n".join(begun) + "\n")
    assert main(["resume", str(copied), "--epochs", "2"]) == 0
    capfd.readouterr()
    assert main(["resume", str(run)]) == 1
    told = capfd.readouterr().err
    assert f"holds other weights than those that {run} began from (SHA-256 " in told
    assert "restore them, or start a new run" in told

    theirs = tmp_path / "c"
    assert pretrain(theirs, *WORDS, "--cohort.init", str(source)) == 0
    assert main(["replay", str(theirs), "--step", "1"]) == 0
    before = (theirs / "replay/step-00000001/step.json").read_bytes()
    shutil.copy(run / "config.yaml", theirs / "config.yaml")
    for save in (theirs / "checkpoints").glob("step-*"):
        state = json.loads((save / "state.json").read_text())
        assert state["initial_weights"][0]["source"].startswith("network 0 of")
    capfd.readouterr()
    assert main(["replay", str(theirs), "--step", "1"]) == 1
    assert "holds other weights than those that" in capfd.readouterr().err
    assert (theirs / "replay/step-00000001/step.json").read_bytes() == before


def test_networks_of_unlike_architecture_are_never_mixed(tmp_path, capfd):
    """The first network's blocks that the second lacks are no part of it."""
    run = tmp_path / "unlike"
    words = [*WORDS, "--data.limit", "32", "--cohort.backbones", "resnet34", "resnet18"]
    assert pretrain(run, *words) == 0
    words = [*WORDS, "--cohort.init", str(run), "--dry_run", "--cohort.backbones"]
    for backbones, network in ((["resnet34"], 1), (["resnet18"], 0)):
        capfd.readouterr()
        assert pretrain(tmp_path / "b", *words, *backbones) == 1
        there = ["resnet34", "resnet18"][network]
        assert f"does not fit network {network}: it is {there}, not {backbones[0]}" in (
            capfd.readouterr().err
        )


def test_what_timms_cache_holds_is_loaded_without_the_internet(monkeypatch, tmp_path, capfd):
    """A cache as huggingface_hub lays it out, with weights of our own making."""
    import huggingface_hub.constants

    published = timm.create_model("resnet10t")
    repository = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    for folder in ("refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    file = repository / "snapshots/abc/model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ["--cohort.backbones", "resnet10t", "--data.image_size", "32", "--cohort.init", "timm"]
    assert pretrain(tmp_path / "b", *WORDS, *words) == 1
    assert "it takes images of 3 channels, and these have 1" in capfd.readouterr().err
    assert not (tmp_path / "b").exists()

    write_noise(tmp_path / "images", {"train/a": 32, "train/b": 32, "val/a": 4, "val/b": 4})
    rgb = ["--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.workers", "0"]
    ours = start(tmp_path / "c", *words, *rgb)
    theirs = {n: t for n, t in published.state_dict().items() if not n.startswith("fc.")}
    for m in (0, 1):
        assert_near(weights(ours, f"backbones.{m}."), weights(theirs, ""))
    loaded = events(tmp_path / "c", "initial_weights")[0]["networks"][1]
    assert loaded["source"] == "timm's resnet10t.c3_in1k"
    assert loaded["sha256"] == file_sha256(file)
    assert loaded["unused"] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cohort.init", "nowhere"], "cohort.init: nowhere is not there; give RUN,"),
        (["--cohort.init", "FOLDER"], "FOLDER holds no networks; give RUN,"),
        (["--cohort.init", "timm"], "cohort.init: timm has no weights of conv4; give RUN,"),
        (
            ["--cohort.init", "timm", "--cohort.backbones", "resnet26"],
            "timm.create_model('resnet26', pretrained=True)",
        ),
        (["--cohort.init", "SOURCE", "--cohort.networks", "3"], "and none for network 2: name"),
        (
            ["--cohort.init", "SOURCE/export/step-00000002", "--cohort.networks", "3"],
            "for network 2",
        ),
        (
            ["--cohort.init", "SOURCE", "--cohort.backbones", "resnet32"],
            "it is conv4_cifar, not resnet32_cifar: name its architecture in cohort.backbones",
        ),
        (
            ["--cohort.init", "SOURCE/export/step-00000002", "--cohort.backbones", "resnet32"],
            "it is conv4_cifar, not resnet32_cifar: name its architecture in cohort.backbones",
        ),
        (["--cohort.init", "a", "b", "c"], "cohort.init must be one word or cohort.networks = 2"),
        (
            ["--cohort.init", "random", "SOURCE", "--cohort.share_stages", "all"],
            "networks that share stages start from weights together",
        ),
        (
            ["--cohort.init", "SOURCE", "--cohort.share_stages", "all"],
            "network 1 has other weights there than network 0: set cohort.share_stages to 0",
        ),
        (
            ["--cohort.init", "SOURCE", "--cohort.share_stages", "all", "--dry_run"],
            "network 1 has other weights there than network 0: set cohort.share_stages to 0",
        ),
        (["--cohort.init", "FILE.pth"], "is no safetensors file: `peerlearn import"),
        (["--cohort.init", "FILE.safetensors"], "FILE.safetensors cannot be read"),
        (["--pretrained", "SOURCE"], "here it is called 'cohort.init'"),
        (["--init", "SOURCE"], "here it is called 'cohort.init'"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line_and_leaves_nothing(
    words, message, source, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    for name in ("FILE.pth", "FILE.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
    words = [word.replace("SOURCE", str(source)) for word in words]
    assert pretrain(tmp_path / "b", *WORDS, *words) in (1, 2)
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("made", "words", "message"),
    [
        (
            {"in_chans": 3},
            [],
            "it takes images of 3 channels, and these have 1: name weights for 1 channels, or random",
        ),
        (
            {"in_chans": 1},
            ["--cohort.small_images", "true"],
            "its first layer is 7 x 7 pixels wide: set cohort.small_images to false",
        ),
        (
            {"in_chans": 1, "small_images": True},
            [],
            "its first layer is 3 x 3 pixels wide: set cohort.small_images to true",
        ),
    ],
)
def test_other_channels_and_other_stems_are_refused_with_the_fix(
    made, words, message, tmp_path, capfd
):
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create_backbone("resnet18", **made).state_dict(), file)
    words = ["--cohort.backbones", "resnet18", "--cohort.init", str(file), *words]
    assert pretrain(tmp_path / "b", *WORDS, *words) == 1
    assert message in capfd.readouterr().err


def test_a_dry_run_tells_what_would_be_loaded_and_refuses_what_the_start_would(
    source, tmp_path, capfd
):
    words = ["--dry_run", "--cohort.init", str(source)]
    assert pretrain(tmp_path / "b", *WORDS, *words) == 0
    told = capfd.readouterr().out
    assert (
        f"# network 1 starts from network 1 of {source}/checkpoints/step-00000002/networks.safetensors"
        in told
    )
    assert pretrain(tmp_path / "b", *WORDS, *words, "--cohort.networks", "3") == 1
    assert not (tmp_path / "b").exists()
