"""Networks without batch norm, or with other buffers than statistics: trained, saved, resumed, exported."""

import shutil

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image

from peerlearn.cli import main
from peerlearn.export import load_export
from peerlearn.runs.checkpoint import saved_steps
from tests.e2e.runs import assert_same_run, flip_last_byte, pretrain, rows

WORDS = [
    *("--data.limit", "32", "--batch_size", "16", "--epochs", "2", "--queue.size", "32"),
    *("--data.image_size", "32", "--monitor.every_epochs", "0", "--checkpoint.every_steps", "2"),
    *("--base_lr", "0.01"),
]


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("method", "network"),
    [
        ("moco", "convnext_atto"),
        ("simclr", "convnext_atto"),
        ("supervised", "convnext_atto"),
        ("moco", "vit_tiny_patch16_224"),
        ("simclr", "vit_tiny_patch16_224"),
        ("supervised", "vit_tiny_patch16_224"),
        ("simclr", "resnetblur18"),
    ],
)
def test_networks_with_other_norms_train_resume_and_load_through_timm(method, network, tmp_path):
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    words = ["--method", method, "--cohort.backbones", network, *WORDS]
    assert pretrain(undisturbed, *words) == 0
    losses = [row["loss"] for row in rows(undisturbed)]
    assert len(losses) == 4
    assert len(set(losses)) == 4

    shutil.copytree(undisturbed, resumed)
    (resumed / "DONE").unlink()
    newest, older = saved_steps(resumed / "checkpoints")[:2]
    assert older.name == "step-00000002"
    flip_last_byte(newest / "networks.safetensors")
    assert main(["resume", str(resumed)]) == 0
    assert_same_run(resumed, undisturbed)

    export = undisturbed / "export/step-00000004/net-1"
    own = load_export(export)
    theirs = timm.create_model(f"local-dir:{export}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        features = own(images)
        assert torch.equal(theirs(images), features)
    assert features.std() > 0
    assert own.pretrained_cfg["input_size"] == [1, 32, 32]


@pytest.mark.parametrize(
    ("words", "crop_pct", "crop_mode"),
    [
        (["--data.image_size", "64"], 1.0, "squash"),  # the images have 8 pixels
        (["--data.name", "folder", "--data.image_size", "16"], 1.0, "squash"),  # 16
        (["--data.name", "folder", "--data.image_size", "72"], 72 / 82, "center"),  # 80
        (["--data.name", "folder", "--data.image_size", "80"], 1.0, "squash"),  # 80
    ],
)
def test_an_export_tells_how_evaluators_see_the_images_of_its_training(
    words, crop_pct, crop_mode, tmp_path
):
    if "folder" in words:
        size = 16 if "16" in words else 80
        noise = np.random.default_rng(0)
        for split in ("train", "val"):
            (tmp_path / "data" / split / "a").mkdir(parents=True)
            for number in range(20):
                pixels = noise.integers(0, 255, (size, size, 3), dtype=np.uint8)
                file = tmp_path / "data" / split / "a" / f"{number}.png"
                Image.fromarray(pixels).save(file)
        words = [*words, "--data.root", str(tmp_path / "data"), "--data.backend", "folder"]
        words += ["--data.workers", "0"]
    run = tmp_path / "run"
    words += ["--data.limit", "16", "--batch_size", "16", "--epochs", "1", "--queue.size", "8"]
    words += ["--cohort.backbones", "resnet32", "--monitor.every_epochs", "0"]
    assert pretrain(run, *words) == 0
    export = run / "export/step-00000001/net-0"
    config = timm.data.resolve_model_data_config(
        timm.create_model(f"local-dir:{export}", pretrained=True)
    )
    assert config["crop_pct"] == pytest.approx(crop_pct, abs=1e-9)
    assert config["crop_mode"] == crop_mode
    # From a save too.
    assert main(["export", str(run), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/net-0/config.json").read_bytes() == (
        export / "config.json"
    ).read_bytes()
