"""Whole runs of the command, small ones, on scikit-learn's digits."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import peerlearn  # noqa: F401  timm learns our networks' names from it
from peerlearn.cli import main
from peerlearn.export import load_export
from peerlearn.runs.checkpoint import load_checkpoint, saved_steps
from peerlearn.runs.directory import RunDirectory
from tests.e2e.runs import SMALL, pretrain, rows, without_clocks


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    assert pretrain(run, "--checkpoint.export_key_networks", "true") == 0
    return run


def test_the_run_directory_holds_what_the_contract_names(finished):
    last = "step-00000012"
    for name in ("config.yaml", "env.json", "metrics.jsonl", "events.jsonl", "DONE"):
        assert (finished / name).is_file(), name
    assert (finished / "logs/attempt-1/rank-0.log").is_file()
    assert list((finished / "tb").iterdir())
    assert (finished / "checkpoints/latest").read_text().strip() == last
    assert (finished / "export/latest").read_text().strip() == last
    assert sorted(p.name for p in (finished / "checkpoints" / last).iterdir()) == [
        "key_networks.safetensors",
        "manifest.json",
        "networks.safetensors",
        "optimizer.safetensors",
        "queue.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    assert sorted(p.name for p in (finished / "export" / last).iterdir()) == [
        "net-0",
        "net-0-key",
        "net-1",
        "net-1-key",
    ]
    assert not list(finished.rglob("*.pt")) + list(finished.rglob("*.pkl"))


def test_metrics_have_a_row_per_logged_step_with_every_figure(finished):
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(13))
    assert all(row["attempt"] == 1 for row in found)
    last = found[-1]
    assert last["epoch"] == 2.0
    for m in (0, 1):
        for name in ("scl_hard", "scl_soft", "icl_hard", "icl_soft", "gradient_norm"):
            assert last[f"net/{m}/{name}"] > 0
        assert 10 < last[f"net/{m}/knn_top1"] <= 100
        assert 1 <= last[f"net/{m}/rankme"] <= 64
        assert 1 <= last[f"net/{m}/lidar"] <= 16
        for name in ("feature_std", "alignment", "uniformity"):
            assert f"net/{m}/{name}" in last
    assert last["knn/k"] == 5
    assert last["knn/temperature"] == 0.1
    assert last["knn/test_images"] == 360
    assert 0 <= last["cohort/agreement"] <= 100
    # 12 steps of 32 keys have long filled 80 rows; the first step had none.
    assert found[1]["queue/filled_percent"] == 40.0
    assert last["queue/filled_percent"] == 100.0
    assert found[1]["net/0/scl_hard"] == 0.0
    loss = 0.5 * sum(last[f"net/{m}/scl_{kind}"] for m in (0, 1) for kind in ("hard", "soft"))
    loss += 0.1 * sum(last[f"net/{m}/icl_{kind}"] for m in (0, 1) for kind in ("hard", "soft"))
    assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert {"pixels/knn_top1", "net/0/knn_top1"} <= set(found[0])


def test_the_learning_rate_is_the_scaled_cosine(finished):
    import math

    for row in rows(finished)[1:]:
        step = row["step"] - 1
        assert row["lr"] == pytest.approx(
            0.1 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * step / 12))
        )


@pytest.mark.parametrize("name", ["net-0", "net-1", "net-0-key", "net-1-key"])
def test_every_export_loads_bit_equal_through_timm_and_holds_the_checkpoints_weights(
    finished, name
):
    folder = finished / "export/step-00000012" / name
    ours = load_export(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    tensors, _ = load_checkpoint(saved_steps(finished / "checkpoints")[0])
    group = tensors["key_networks" if name.endswith("key") else "networks"]
    number = name.removeprefix("net-").removesuffix("-key")
    prefix = f"backbones.{number}."
    saved = {k.removeprefix(prefix): v for k, v in group.items() if k.startswith(prefix)}
    exported = load_file(folder / "model.safetensors")
    assert saved.keys() == exported.keys()
    for key, tensor in exported.items():
        assert torch.equal(tensor, saved[key]), key


def test_knn_of_the_exports_equals_what_training_logged(finished, capsys):
    arguments = ["knn", "--checkpoint", str(finished), "--k", "5", "--device", "cpu"]
    arguments += ["--data.train_limit", "300"]
    assert main(arguments) == 0
    results = {
        path.name.split("-")[3]: json.loads(path.read_text())
        for path in (finished / "results").glob("knn-digits-00000012-*.json")
    }
    last = rows(finished)[-1]
    assert set(results) == {"0", "1", "ensemble"}
    for name, key in (("0", "net/0"), ("1", "net/1"), ("ensemble", "ensemble")):
        assert results[name]["metrics"]["top1"] == pytest.approx(last[f"{key}/knn_top1"], abs=1e-6)
        assert results[name]["protocol"]["k"] == 5
        assert results[name]["metrics"]["n"] == 360
    assert f"{results['0']['metrics']['top1']:.2f}" in capsys.readouterr().out


def test_the_same_run_twice_is_the_same_to_the_bit(finished, tmp_path):
    assert pretrain(tmp_path / "b", "--checkpoint.export_key_networks", "true") == 0
    assert [without_clocks(row) for row in rows(tmp_path / "b")] == [
        without_clocks(row) for row in rows(finished)
    ]
    for file in (finished / "export").rglob("*"):
        if file.is_file():
            twin = tmp_path / "b" / "export" / file.relative_to(finished / "export")
            assert twin.read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "simclr"),
        ("--cohort.networks", "1", "--alpha", "1", "--beta", "0"),
        ("--symmetric", "true", "--accumulation_steps", "2"),
        ("--cohort.networks", "3", "--cohort.backbones", "resnet32", "--data.limit", "64"),
        ("--cohort.backbones", "[conv4, resnet32]", "--data.limit", "64"),
        ("--cohort.batch_norm_splits", "4", "--optimizer.name", "lars"),
        ("--data.backend", "folder", "--data.workers", "1", "--optimizer.name", "adamw"),
    ],
)
def test_every_way_to_train_reaches_the_end_with_finite_losses(tmp_path, more):
    assert pretrain(tmp_path / "r", "--epochs", "1", *more) == 0
    found = rows(tmp_path / "r")
    assert all(abs(row["loss"]) < 1e4 for row in found[1:])
    networks = len(list((tmp_path / "r/export").glob("step-*/net-*")))
    assert networks == len([key for key in found[-1] if key.endswith("/scl_hard")])


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["pretrian"], 2, "did you mean 'pretrain'?"),
        (["pretrain", "--epocs", "3"], 2, "did you mean 'epochs'?"),
        (["pretrain", "--data.name", "cifra10"], 2, "did you mean 'cifar10'?"),
        (["pretrain", "--data.name", "cifar10", "--data.root", "/nowhere"], 1, "/nowhere"),
        (["pretrain", *SMALL, "--cohort.backbones", "resnet33"], 1, "resnet32"),
        (["pretrain", *SMALL, "--batch_size", "256"], 1, "batch_size"),
        (["pretrain", *SMALL, "--device", "cuda:9"], 1, "device 'cuda:9' is not available"),
        (["pretrain", *SMALL, "--device", "gpu"], 2, "device must be auto, cpu, mps, cuda or"),
        (["pretrain", *SMALL, "--epochs", "two"], 2, "epochs: expected a whole number, got 'two'"),
        (["pretrain", *SMALL, "--batch_size", "1"], 2, "batch_size must be at least 2"),
        (["pretrain", *SMALL, "--data.limit", "8"], 1, "lower batch_size (32) or raise data.limit"),
        (["pretrain", *SMALL, "--data.image_size", "4"], 1, "image_size 4 is below 16"),
        (
            ["pretrain", *SMALL, "--cohort.embedding_dim", "[8, 16]"],
            2,
            "cohort.embedding_dim: expected a whole number",
        ),
        (
            ["pretrain", *SMALL, "--cohort.backbones", "[conv4]", "--cohort.networks", "0"],
            2,
            "cohort.networks",
        ),
        (
            [
                *("pretrain", *SMALL, "--cohort.backbones", "[conv4, resnet32]"),
                "--cohort.share_stages",
                "1",
            ],
            *(1, "set cohort.share_stages to 0"),
        ),
        (["pretrain", *SMALL, "--run", "/dev/null/run"], 1, "cannot be written (Not a directory)"),
        (["pretrain", *SMALL, "--data.name", "folder"], 1, "folder needs data.root"),
        (["pretrain", "nothing.yaml"], 2, "nothing.yaml: no such config file"),
        (["resume", "nowhere"], 1, "nowhere is not a run directory"),
        (["knn", "--checkpoint", "nowhere"], 1, "no exported networks"),
        (["knn"], 2, "checkpoint"),
        (["knn", "--checkpoint", "x", "--temperature", "0.001", "0.1"], 2, "is too low for k"),
        (
            ["knn", "--checkpoint", "x", "--data.subset_seed", str(2**63)],
            2,
            "data.subset_seed: expected a whole number that fits 64 bits",
        ),
        (["pretrain", "--seed", str(2**63)], 2, "seed: expected a whole number that fits 64 bits"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    argv, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_empty_data_folder_and_one_without_labels_say_what_they_lack(finished, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    words = ["--data.name", "folder", "--data.root", str(tmp_path / "data")]
    assert pretrain(tmp_path / "run", *words) == 1
    assert f"below {tmp_path / 'data'}: mend data.root" in capsys.readouterr().err
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / split / "0.png")
    assert main(["knn", "--checkpoint", str(finished), *words]) == 1
    assert "folder has no labels: evaluation needs them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "warned"), [(199, False), (200, True)])
def test_a_queue_of_more_keys_than_other_images_is_warned_of(size, warned, tmp_path, capsys):
    words = ["--queue.size", str(size), "--epochs", "1", "--monitor.every_epochs", "0"]
    assert pretrain(tmp_path / "run", *words) == 0
    assert ("lower queue.size" in capsys.readouterr().err) == warned


def test_an_existing_run_is_never_overwritten(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert pretrain(finished) == 1
    assert f"`peerlearn resume {finished}` continues it" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert main(["resume", str(finished)]) == 0
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(finished, tmp_path, poison):
    from peerlearn.compute.dist import Ranks
    from peerlearn.compute.guards import NonFiniteError
    from peerlearn.compute.saves import save
    from peerlearn.config import load_config
    from pretrain.config import PretrainConfig
    from pretrain.state import build, export

    run = RunDirectory(tmp_path / "n")
    config = load_config(PretrainConfig, finished / "config.yaml")
    training = build(config, run, Ranks(torch.device("cpu")))
    with torch.no_grad():
        training.cohort.heads[1].weight[0, 0] = poison
    for write in (partial(save, attempt=1), partial(export, must=True)):
        with pytest.raises(NonFiniteError, match=r"heads\.1\.weight holds NaN or Inf"):
            write(training)
    assert not run.root.exists()


def test_dropout_is_seeded_by_the_step(tmp_path):
    from peerlearn.compute.attempt import seed_modules

    def draw(seed: int, step: int) -> torch.Tensor:
        seed_modules(seed, step, rank=0)
        return torch.nn.functional.dropout(torch.ones(64))

    assert torch.equal(draw(0, 3), draw(0, 3))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))


def test_one_export_of_a_run_knows_its_name_and_step(finished, capsys):
    export = finished / "export/step-00000012/net-1-key"
    assert main(["knn", "--checkpoint", str(export), "--k", "9", "--device", "cpu"]) == 0
    (path,) = (finished / "results").glob("knn-digits-00000012-key-1-*.json")
    assert json.loads(path.read_text())["protocol"]["k"] == 9
    assert main(["knn", "--checkpoint", str(export), "--network", "0"]) == 2
    assert "is network key-1 alone" in capsys.readouterr().err


def test_unknown_network_names_those_there_are(finished, capsys):
    assert main(["knn", "--checkpoint", str(finished), "--network", "7"]) == 2
    assert "choose from 0, 1, key-0, key-1, all, ensemble" in capsys.readouterr().err


def test_dry_run_prints_a_config_that_reads_back_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *SMALL, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    (tmp_path / "c.yaml").write_text(printed)
    assert main(["pretrain", "c.yaml", "--dry_run"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"../.."])
def test_a_spoilt_pointer_to_the_latest_exports_is_not_needed(finished, tmp_path, content, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    latest = run / "export/latest"
    latest.unlink() if content is None else latest.write_bytes(content)
    assert main(["knn", "--checkpoint", str(run), "--k", "9", "--network", "0"]) == 0
    assert list((run / "results").glob("knn-digits-00000012-0-*.json"))


@pytest.mark.parametrize("pointer", ["latest", None])
def test_no_older_export_is_scored_for_the_last_that_is_gone(finished, tmp_path, pointer, capsys):
    """By any verb. Where `latest` is gone too, the event tells which step was the last."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    last = run / "export/step-00000012"
    last.rename(run / "export/step-00000006")
    if pointer is None:
        (run / "export/latest").unlink()
    for verb in ("knn", "linear", "fewshot", "detect"):
        capsys.readouterr()
        code = main([verb, "--checkpoint", str(run)])
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (1, 1), error
        assert error.startswith(f"peerlearn: {last} is gone, the last exports of the run: restore")
        assert f"or `peerlearn resume {run}` writes it again, or name others by " in error
        assert f"--checkpoint {run}/export/step-N\n" in error
    assert main(["knn", "--checkpoint", str(run / "export/step-00000006"), "--k", "9"]) == 0


def test_several_k_and_temperatures_are_scored_as_each_alone(finished, tmp_path, capsys):
    words = ["knn", "--checkpoint", str(finished), "--device", "cpu"]
    swept = ["--k", "3", "9", "--temperature", "0.05", "0.5", "--results", str(tmp_path / "all")]
    assert main([*words, *swept]) == 0
    table = capsys.readouterr().out
    assert "ensemble, k 9, temperature 0.5" in table
    files = sorted((tmp_path / "all").glob("*.json"))
    assert len(files) == 12
    for k in ("3", "9"):
        alone = ["--k", k, "--temperature", "0.5", "--results", str(tmp_path / k)]
        assert main([*words, *alone]) == 0
        for file in (tmp_path / k).glob("*.json"):
            ours, theirs = (
                json.loads(path.read_text()) for path in (tmp_path / "all" / file.name, file)
            )
            assert ours["metrics"] == theirs["metrics"]
            assert ours["protocol"] == theirs["protocol"]
