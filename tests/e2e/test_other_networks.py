"""Networks without batch norm, or with buffers that are no statistics: trained, saved, resumed and exported as others."""

import shutil

import pytest
import timm
import torch

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
