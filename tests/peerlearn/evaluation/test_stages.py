"""The feature maps of an exported network, against what the network itself computes on its way."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peerlearn.backbones import create_backbone
from peerlearn.errors import UserError
from peerlearn.evaluation.networks import load_backbone, load_stages
from peerlearn.export import save_export


def exported(folder: Path, name: str, *, small: bool, classes: int = 0) -> nn.Module:
    """A network of random weights and batch-norm statistics, in eval mode; its export lies in the folder."""
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=1, small_images=small, image_size=32)
    for buffer in backbone.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_export(
        backbone,
        folder,
        architecture=name,
        in_chans=1,
        small_images=small,
        image_size=32,
        mean=[0.5],
        std=[0.25],
        provenance={},
        classifier=nn.Linear(backbone.num_features, classes) if classes else None,
    )
    return backbone.eval()


def activations(network: nn.Module, names: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What leaves the modules of these names while the network looks at the images."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        # Copied: a later layer may work in place.
        seen[name] = output.clone()

    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: keep(name, output)
        )
        for name in names
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


@pytest.mark.parametrize(
    ("name", "small", "classes", "reductions"),
    [
        ("resnet32", False, 0, [1, 2, 4]),
        ("resnet56", False, 10, [1, 2, 4]),
        ("wrn_16_2", False, 0, [1, 2, 4]),
        ("densenet_bc_40_12", False, 0, [1, 2, 4]),
        ("conv4", False, 0, [2, 4, 8, 16]),
        ("conv4_wide", False, 0, [2, 4, 8, 16]),
        ("resnet18", True, 10, [1, 1, 2, 4, 8]),
        ("resnet18", False, 0, [2, 4, 8, 16, 32]),
    ],
)
@torch.no_grad()
def test_stages_are_the_networks_own_activations(name, small, classes, reductions, tmp_path):
    # Not a path that would pass as a URL.
    folder = tmp_path / "a #1?"
    backbone = exported(folder, name, small=small, classes=classes)
    stages = load_stages(folder, 1, images="digits")
    assert not stages.training
    assert stages.feature_info.reduction() == reductions
    # Another size than the exported one: a detector's images have sizes of their own.
    images = torch.randn(2, 1, 32, 32 if name.startswith("conv4") else 64)
    maps = stages(images)
    expected = activations(backbone, stages.feature_info.module_name(), images)
    assert len(maps) == len(reductions)
    for found, own, reduction, channels in zip(
        maps, expected, reductions, stages.feature_info.channels(), strict=True
    ):
        assert torch.equal(found, own)
        assert found.shape == (2, channels, 32 // reduction, images.shape[3] // reduction)
    # The weights are the export's: the pooled features of the last map, say.
    if name == "resnet32":
        assert torch.equal(maps[-1].mean((2, 3)), backbone(images))


def test_other_channels_are_one_line(tmp_path):
    exported(tmp_path / "e", "resnet32", small=False)
    for load in (load_backbone, load_stages):
        with pytest.raises(UserError, match="takes 1 channels, voc has 3: choose another dataset"):
            load(tmp_path / "e", 3, images="voc")


def test_a_damaged_export_shows_no_stages(tmp_path):
    exported(tmp_path / "e", "resnet32", small=False)
    weights = tmp_path / "e" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="damaged, its SHA-256"):
        load_stages(tmp_path / "e", 1, images="digits")
