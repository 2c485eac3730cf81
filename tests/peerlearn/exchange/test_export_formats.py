"""Exports for torchvision and Detectron2: the same features there, by their own names, in the same bytes."""

import io
import json
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

from peerlearn.backbones import create_backbone
from peerlearn.errors import UserError
from peerlearn.exchange.export_formats import RESNETS, convert_export, how_to_load, write_export
from peerlearn.export import export_hash, load_export, save_export

# Name, in_chans, small_images, image_size.
TORCHVISION = [
    ("resnet18", 3, False, 64),
    ("resnet18", 1, True, 28),
    ("resnet18", 4, False, 64),
    ("resnet34", 3, True, 32),
    ("resnet50", 1, False, 64),
    ("wide_resnet50_2", 3, False, 64),
    ("resnext50_32x4d", 3, True, 32),
]
DETECTRON2 = [
    ("resnet18", 3, False, 64),
    ("resnet34", 1, False, 64),
    ("resnet50", 3, False, 64),
    ("resnext50_32x4d", 3, False, 64),
]
MEAN, STD = (0.485, 0.456, 0.406, 0.4), (0.229, 0.224, 0.225, 0.3)


def save(folder: Path, network: tuple[str, int, bool, int], seed: int = 1) -> Path:
    """An export none of whose parameters and statistics is what a new network starts with."""
    name, in_chans, small_images, image_size = network
    torch.manual_seed(seed)
    backbone = create_backbone(
        name, in_chans=in_chans, small_images=small_images, image_size=image_size
    )
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(torch.rand(tensor.shape) + 0.5).add_(0.01)
        else:
            tensor.fill_(17)
    save_export(
        backbone,
        folder,
        architecture=name,
        in_chans=in_chans,
        small_images=small_images,
        image_size=image_size,
        mean=MEAN[:in_chans],
        std=STD[:in_chans],
        provenance={"method": "moco", "step": 1000},
    )
    return folder


def images(in_chans: int, size: int) -> torch.Tensor:
    return torch.randn(2, in_chans, size, size, generator=torch.Generator().manual_seed(0))


def features_of(export: Path, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = load_export(export)(x)
    assert features.isfinite().all()
    assert features.std() > 0
    return features


@pytest.mark.slow
@pytest.mark.parametrize("network", TORCHVISION, ids=str)
def test_the_lines_of_the_card_load_torchvisions_network_with_the_same_features(
    network: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    export = save(tmp_path / "net-0", network)
    folder = tmp_path / "elsewhere" / "net-0-torchvision"
    assert write_export(folder, convert_export(export, "torchvision"))
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "strict=True" in code
    assert "peerlearn" not in code
    scope: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), scope)
    assert type(scope["backbone"]) is torchvision.models.ResNet
    x = images(network[1], network[3])
    with torch.no_grad():
        assert torch.equal(scope["backbone"](x), features_of(export, x))

    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == network[0]
    assert config["small_images"] == network[2]
    assert config["input_size"] == [network[1], network[3], network[3]]
    assert tuple(config["mean"]) == MEAN[: network[1]]
    assert tuple(config["std"]) == STD[: network[1]]
    assert config["num_features"] == scope["backbone"](x).shape[1]


@pytest.mark.parametrize("name", RESNETS)
def test_the_table_of_resnets_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        ours = create_backbone(name)
    names = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: shape for key, shape in names.items() if not key.startswith("fc.")} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }
    shape = RESNETS[name]
    stages = [theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4]
    assert shape.blocks == tuple(len(stage) for stage in stages)
    first = theirs.layer1[0]
    assert shape.bottleneck == hasattr(first, "conv3")
    middle = first.conv2
    assert (shape.groups, shape.width_per_group) == (
        middle.groups,
        middle.out_channels // middle.groups,
    )
    assert shape.depth == int(re.findall(r"\d+", name)[0])


class Conv(nn.Conv2d):
    """Detectron2's convolution, which owns the batch norm that follows it."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = self.norm(super().forward(x))
        return normalised


class Block(nn.Module):
    """A residual block as Detectron2 documents it: with STRIDE_IN_1X1 False the 3x3 convolution has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, middle: int | None, groups: int):
        super().__init__()
        if inputs != outputs:
            self.shortcut: nn.Module | None = Conv(inputs, outputs, 1, stride)
        else:
            self.shortcut = None
        if middle is None:
            self.layers = [Conv(inputs, outputs, 3, stride), Conv(outputs, outputs, 3)]
        else:
            self.layers = [
                Conv(inputs, middle, 1),
                Conv(middle, middle, 3, stride, groups),
                Conv(middle, outputs, 1),
            ]
        for number, layer in enumerate(self.layers, start=1):
            self.add_module(f"conv{number}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for layer in self.layers[:-1]:
            out = F.relu(layer(out))
        out = self.layers[-1](out)
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Detectron2ResNet(nn.Module):
    """build_resnet_backbone of a config's MODEL.RESNETS, from its documentation."""

    def __init__(self, resnets: dict[str, Any], in_chans: int):
        super().__init__()
        depth = resnets["DEPTH"]
        basic = depth in (18, 34)
        assert basic == (resnets.get("RES2_OUT_CHANNELS", 256) == 64)
        assert resnets["STRIDE_IN_1X1"] is False
        groups = resnets.get("NUM_GROUPS", 1)
        middle = groups * resnets.get("WIDTH_PER_GROUP", 64)
        self.stem = nn.Module()
        self.stem.conv1 = Conv(in_chans, 64, 7, 2)
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
        inputs, outputs = 64, resnets.get("RES2_OUT_CHANNELS", 256)
        for stage, count in enumerate(blocks, start=2):
            modules = []
            for number in range(count):
                stride = 2 if stage > 2 and number == 0 else 1
                modules.append(Block(inputs, outputs, stride, None if basic else middle, groups))
                inputs = outputs
            self.add_module(f"res{stage}", nn.Sequential(*modules))
            outputs, middle = 2 * outputs, 2 * middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        for stage in range(2, 6):
            x = self.get_submodule(f"res{stage}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def card_config(card: str) -> dict[str, Any]:
    text, _ = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    config: dict[str, Any] = yaml.safe_load(text)
    return config


@pytest.mark.parametrize(
    ("name", "fits_c4"), [("resnet18", False), ("resnet34", False), ("resnet50", True)]
)
def test_the_card_says_what_detectron2_can_build_on_the_network(
    name: str, fits_c4: bool, tmp_path: Path
) -> None:
    """A C4 model builds res5 of bottlenecks at every depth (`Res5ROIHeads._build_res5_block`)."""
    files = convert_export(save(tmp_path / "net-0", (name, 3, False, 64)), "detectron2")
    card = files["README.md"].decode()
    assert "build_resnet_fpn_backbone" in card
    assert ("C4 models cannot use it" in card) == (not fits_c4)
    assert ("and C4 models, with Detectron2's names" in card) == fits_c4


def test_the_card_tells_mocos_recipe_whole(tmp_path: Path) -> None:
    """As detection/configs/Base-RCNN-C4-BN.yaml of facebookresearch/moco has it."""
    files = convert_export(save(tmp_path / "net-0", ("resnet50", 3, False, 64)), "detectron2")
    card = files["README.md"].decode()
    _, text = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert yaml.safe_load(text) == {
        "MODEL": {
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {"NORM": "naiveSyncBN"},
            "ROI_HEADS": {"NAME": "Res5ROIHeadsExtraNorm"},
        },
        "TEST": {"PRECISE_BN": {"ENABLED": True}},
    }
    assert "one more norm of the same kind after `res5`" in card


@pytest.mark.parametrize("network", DETECTRON2, ids=str)
def test_detectron2s_resnet_of_the_cards_config_gives_the_same_features(
    network: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    export = save(tmp_path / "net-0", network)
    files = convert_export(export, "detectron2")
    assert files.keys() == {"model.pkl", "README.md"}
    config = card_config(files["README.md"].decode())
    backbone = Detectron2ResNet(config["MODEL"]["RESNETS"], network[1]).eval()
    # As Detectron2 reads it.
    content = pickle.loads(files["model.pkl"], encoding="latin1")
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["__author__"] == "peerlearn"
    assert content["matching_heuristics"] is True
    weights = {name: torch.from_numpy(array) for name, array in content["model"].items()}
    own = backbone.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    assert weights.keys() == own.keys() - counters
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    backbone.load_state_dict({**own, **weights}, strict=True)
    x = images(network[1], network[3])
    with torch.no_grad():
        assert torch.equal(backbone(x), features_of(export, x))

    model = config["MODEL"]
    assert model["PIXEL_MEAN"] == pytest.approx([255 * value for value in MEAN[: network[1]]])
    assert model["PIXEL_STD"] == pytest.approx([255 * value for value in STD[: network[1]]])
    assert config["INPUT"]["FORMAT"] == ("RGB" if network[1] == 3 else "L")


def test_detectron2s_names_are_those_of_its_structure(tmp_path: Path) -> None:
    """ResNet-50's, written down from the stages of 3, 4, 6 and 3 blocks; values by hand from the export."""
    export = save(tmp_path / "net-0", ("resnet50", 3, False, 64))
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = ["stem.conv1.weight", *(f"stem.conv1.norm.{n}" for n in norm)]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            layers = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            for layer in layers:
                place = f"res{stage}.{block}.{layer}"
                expected += [f"{place}.weight", *(f"{place}.norm.{n}" for n in norm)]
    arrays = pickle.loads(convert_export(export, "detectron2")["model.pkl"])["model"]
    assert sorted(arrays) == sorted(expected)
    state = load_export(export).state_dict()
    for theirs, ours in (
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res2.0.shortcut.weight", "layer1.0.downsample.0.weight"),
        ("res2.0.shortcut.norm.bias", "layer1.0.downsample.1.bias"),
        ("res4.5.conv3.norm.weight", "layer3.5.bn3.weight"),
        ("res5.2.conv2.weight", "layer4.2.conv2.weight"),
    ):
        assert np.array_equal(arrays[theirs], state[ours].numpy()), theirs


class PlainUnpickler(pickle.Unpickler):
    """Knows arrays and nothing else that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        return {("numpy", "ndarray"): np.ndarray, ("builtins", "bytearray"): bytearray}[
            module, name
        ]


def test_detectron2s_pickle_holds_arrays_and_plain_values_alone(tmp_path: Path) -> None:
    export = save(tmp_path / "net-0", ("resnet18", 3, False, 64))
    content = convert_export(export, "detectron2")["model.pkl"]
    arrays = PlainUnpickler(io.BytesIO(content)).load()["model"]
    assert all(type(array) is np.ndarray for array in arrays.values())
    # PyTorch warns of arrays that cannot be written.
    assert all(array.flags.writeable for array in arrays.values())
    opcodes = [opcode.name for opcode, _, _ in pickletools.genops(content)]
    assert not {"GLOBAL", "INST", "NEWOBJ", "BUILD", "PERSID", "BINPERSID"} & set(opcodes)
    assert opcodes.count("REDUCE") == 2 * len(arrays)


@pytest.mark.parametrize("target", ["timm", "torchvision", "detectron2"])
def test_the_same_export_gives_the_same_bytes_wherever_it_lies(target: str, tmp_path: Path) -> None:
    network = ("resnet18", 3, False, 64)
    first = convert_export(save(tmp_path / "net-0", network), target)
    again = convert_export(save(tmp_path / "elsewhere" / "net-3-key", network), target)
    assert first == again
    assert convert_export(save(tmp_path / "net-1", network, seed=2), target) != first
    assert not [name for name, content in first.items() if str(tmp_path).encode() in content]


@pytest.mark.parametrize("target", ["timm", "torchvision", "detectron2"])
def test_the_card_tells_where_the_network_comes_from(target: str, tmp_path: Path) -> None:
    export = save(tmp_path / "net-0", ("resnet18", 3, False, 64))
    card = convert_export(export, target)["README.md"].decode()
    assert "| origin | |\n|---|---|\n| method | moco |\n| step | 1000 |\n" in card
    assert (export_hash(export) in card) == (target != "timm")
    (export / "README.md").unlink()
    if target != "timm":
        assert export_hash(export) in convert_export(export, target)["README.md"].decode()


@pytest.mark.parametrize("target", ["torchvision", "detectron2"])
@pytest.mark.parametrize(
    "network",
    [
        ("densenet_bc_40_12", 3, False, 32),
        ("conv4", 1, False, 28),
        ("resnet32", 3, False, 32),
        ("resnet10t", 3, False, 64),
    ],
    ids=str,
)
def test_other_networks_are_refused_with_those_that_can_be_converted(
    network: tuple[str, int, bool, int], target: str, tmp_path: Path
) -> None:
    export = save(tmp_path / "net-0", network)
    with pytest.raises(
        UserError, match=f"net-0: {network[0]}.* cannot be had for {target}"
    ) as found:
        convert_export(export, target)
    assert all(name in str(found.value) for name in RESNETS)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (("resnet18", 3, True, 32), "net-0: Detectron2's ResNets have a 7x7 stem"),
        (("resnet18", 4, False, 64), "net-0: Detectron2 reads images of 1 or 3 channels"),
    ],
)
def test_what_detectron2_cannot_load_is_refused(
    network: tuple[str, int, bool, int], message: str, tmp_path: Path
) -> None:
    export = save(tmp_path / "net-0", network)
    with pytest.raises(UserError, match=f"{message}.*; --format torchvision or timm takes it"):
        convert_export(export, "detectron2")


@pytest.mark.parametrize("target", ["timm", "torchvision", "detectron2"])
def test_a_damaged_export_is_not_converted(target: str, tmp_path: Path) -> None:
    export = save(tmp_path / "net-0", ("resnet18", 3, False, 64))
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        convert_export(export, target)


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "net-0-detectron2"
    files = {"model.pkl": b"weights", "README.md": b"card"}
    assert write_export(folder, files)
    before = folder.stat().st_ino, (folder / "model.pkl").stat().st_mtime_ns
    assert not write_export(folder, files)
    assert not write_export(folder, {**files, "README.md": b"worded otherwise"})
    assert (folder.stat().st_ino, (folder / "model.pkl").stat().st_mtime_ns) == before
    assert (folder / "README.md").read_bytes() == b"card"
    with pytest.raises(UserError, match=f"{folder} is there and holds something else"):
        write_export(folder, {**files, "model.pkl": b"others"})
    assert (folder / "model.pkl").read_bytes() == b"weights"
    (folder / "model.pkl").unlink()
    with pytest.raises(UserError, match="holds something else"):
        write_export(folder, files)


def test_how_to_load_names_the_file_to_load(tmp_path: Path) -> None:
    assert f"local-dir:{tmp_path}" in how_to_load(tmp_path, "timm")
    assert str(tmp_path / "README.md") in how_to_load(tmp_path, "torchvision")
    assert f"MODEL.WEIGHTS {tmp_path / 'model.pkl'}" in how_to_load(tmp_path, "detectron2")
