"""A detector for Detectron2: every tensor by its name there, and the same outputs from Detectron2's structure."""

import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.config import ModelConfig
from detection.detectron2_file import (
    _detectron2_detector_name,
    detectron2_config,
    detectron2_file,
    detectron2_weights,
)
from peerlearn import HOME
from peerlearn.errors import UserError
from tests.peerlearn.exchange.test_export_formats import Detectron2ResNet

CLASSES = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def detector(name: str, *, fpn_norm: bool) -> FasterRCNN:
    """None of its parameters and statistics is what a new network starts with."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    if fpn_norm:
        for blocks in (backbone.fpn.inner_blocks, backbone.fpn.layer_blocks):
            for block in blocks:
                block[0].bias = None
                block.append(nn.BatchNorm2d(len(block[0].weight)))
    model = FasterRCNN(backbone, CLASSES + 1, image_mean=MEAN, image_std=STD).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.rand(tensor.shape) + 0.5).add_(0.01 * torch.rand(tensor.shape))
    return model


class NormedConv(nn.Conv2d):
    """Detectron2's Conv2d: its norm, if it has one, is a part of it, and takes the place of the bias."""

    def __init__(self, inputs: int, outputs: int, size: int, *, has_norm: bool):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=not has_norm)
        self.norm = nn.BatchNorm2d(outputs) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


def modules(**named: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, module in named.items():
        parent.add_module(name, module)
    return parent


class Detectron2FPN(nn.Module):
    """The modules and the order of `GeneralizedRCNN` with an FPN, from the config that is written beside the file."""

    def __init__(self, config: dict):
        super().__init__()
        model = config["MODEL"]
        width, basic = model["FPN"]["OUT_CHANNELS"], model["RESNETS"]["DEPTH"] in (18, 34)
        has_norm, fc = model["FPN"]["NORM"] != "", model["ROI_BOX_HEAD"]["FC_DIM"]
        classes = model["ROI_HEADS"]["NUM_CLASSES"]
        self.backbone = modules(
            bottom_up=Detectron2ResNet(model["RESNETS"], len(model["PIXEL_MEAN"]))
        )
        for level, inputs in enumerate((64, 128, 256, 512), start=2):
            inputs *= 1 if basic else 4
            for name, channels, size in (("lateral", inputs, 1), ("output", width, 3)):
                conv = NormedConv(channels, width, size, has_norm=has_norm)
                self.backbone.add_module(f"fpn_{name}{level}", conv)
        self.proposal_generator = modules(
            rpn_head=modules(
                conv=nn.Conv2d(width, width, 3, padding=1),
                objectness_logits=nn.Conv2d(width, 3, 1),
                anchor_deltas=nn.Conv2d(width, 12, 1),
            )
        )
        self.roi_heads = modules(
            box_head=modules(fc1=nn.Linear(width * 49, fc), fc2=nn.Linear(fc, fc)),
            box_predictor=modules(
                cls_score=nn.Linear(fc, classes + 1), bbox_pred=nn.Linear(fc, 4 * classes)
            ),
        )

    def features(self, x: Tensor) -> list[Tensor]:
        body = self.backbone.bottom_up
        x = F.max_pool2d(F.relu(body.stem.conv1(x)), 3, 2, 1)
        stages = []
        for level in range(2, 6):
            x = body.get_submodule(f"res{level}")(x)
            stages.append(x)
        features: list[Tensor] = []
        above: Tensor | None = None
        for level in range(5, 1, -1):
            lateral = self.backbone.get_submodule(f"fpn_lateral{level}")(stages[level - 2])
            above = (
                lateral
                if above is None
                else lateral + F.interpolate(above, scale_factor=2, mode="nearest")
            )
            features.insert(0, self.backbone.get_submodule(f"fpn_output{level}")(above))
        return [*features, F.max_pool2d(features[-1], 1, 2)]

    def proposals(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        head = self.proposal_generator.rpn_head
        hidden = [F.relu(head.conv(x)) for x in features]
        return [head.objectness_logits(x) for x in hidden], [head.anchor_deltas(x) for x in hidden]

    def boxes(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        box, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        hidden = F.relu(box.fc2(F.relu(box.fc1(regions.flatten(1)))))
        return predictor.cls_score(hidden), predictor.bbox_pred(hidden)


@pytest.mark.parametrize(
    ("name", "fpn_norm"), [("resnet18", True), ("resnet18", False), ("resnet50", True)]
)
@torch.no_grad()
def test_detectron2s_model_of_the_config_computes_the_same(name, fpn_norm):
    ours = detector(name, fpn_norm=fpn_norm)
    state = ours.state_dict()
    text = detectron2_config(
        state, ModelConfig(), architecture=name, num_classes=CLASSES, mean=MEAN, std=STD
    )
    theirs = Detectron2FPN(yaml.safe_load(text)).eval()
    # As Detectron2 reads it.
    content = pickle.loads(detectron2_file(state, num_classes=CLASSES), encoding="latin1")
    assert content.keys() == {"model", "__author__"}
    weights = {name: torch.from_numpy(array) for name, array in content["model"].items()}
    own = theirs.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    assert weights.keys() == own.keys() - counters
    theirs.load_state_dict({**own, **weights}, strict=True)

    x = torch.randn(2, 3, 64, 96)
    features = list(ours.backbone(x).values())
    their_features = theirs.features(x)
    # The same sums in another memory format.
    close = {"rtol": 1e-4, "atol": 1e-4 * float(features[0].abs().max())}
    for one, other in zip(features, their_features, strict=True):
        torch.testing.assert_close(one, other, **close)
    for one, other in zip(ours.rpn.head(features), theirs.proposals(features), strict=True):
        for level, their_level in zip(one, other, strict=True):
            assert torch.equal(level, their_level)
    regions = torch.randn(6, 256, 7, 7)
    heads = ours.roi_heads
    logits, deltas = heads.box_predictor(heads.box_head(regions))
    their_logits, their_deltas = theirs.boxes(regions)
    # Class k of K is number k there and k + 1 here; the background is number K there and 0 here.
    torch.testing.assert_close(their_logits, torch.cat([logits[:, 1:], logits[:, :1]], 1))
    torch.testing.assert_close(their_deltas, deltas[:, 4:])


def test_rows_of_the_box_predictor_by_hand():
    state = {
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([0.0, 1, 2]),
        "roi_heads.box_predictor.cls_score.weight": torch.tensor([[0.0, 0], [1, 1], [2, 2]]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0),
        "roi_heads.box_predictor.bbox_pred.weight": torch.arange(12.0)[:, None],
    }
    weights = detectron2_weights(state, num_classes=2)
    assert weights["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
    assert weights["roi_heads.box_predictor.cls_score.weight"][:, 1].tolist() == [1, 2, 0]
    assert weights["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))
    assert weights["roi_heads.box_predictor.bbox_pred.weight"][:, 0].tolist() == list(range(4, 12))
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    for rows, classes in (("cls_score.bias", 3), ("bbox_pred.bias", 20)):
        name = f"roi_heads.box_predictor.{rows}"
        with pytest.raises(ValueError, match=f"{name}: has .* not of {classes} classes"):
            detectron2_weights({name: state[name]}, num_classes=classes)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("backbone.body.conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("backbone.body.bn1.running_var", "backbone.bottom_up.stem.conv1.norm.running_var"),
        ("backbone.body.layer1.0.bn2.bias", "backbone.bottom_up.res2.0.conv2.norm.bias"),
        (
            "backbone.body.layer4.0.downsample.1.weight",
            "backbone.bottom_up.res5.0.shortcut.norm.weight",
        ),
        ("backbone.fpn.inner_blocks.0.0.bias", "backbone.fpn_lateral2.bias"),
        ("backbone.fpn.inner_blocks.3.1.weight", "backbone.fpn_lateral5.norm.weight"),
        ("backbone.fpn.layer_blocks.1.0.weight", "backbone.fpn_output3.weight"),
        ("rpn.head.conv.0.0.weight", "proposal_generator.rpn_head.conv.weight"),
        ("rpn.head.cls_logits.bias", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("rpn.head.bbox_pred.weight", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc1.weight"),
        ("roi_heads.box_head.fc7.bias", "roi_heads.box_head.fc2.bias"),
    ],
)
def test_names_are_those_of_detectron2s_model_zoo(ours, theirs):
    assert _detectron2_detector_name(ours) == theirs


def test_a_tensor_of_another_model_is_named():
    name = "roi_heads.box_head.res5.0.conv1.weight"
    with pytest.raises(ValueError, match=f"{name}: Detectron2's FPN model has no such tensor"):
        detectron2_weights({name: torch.zeros(1)}, num_classes=2)


def sketch(*, stem: tuple[int, int] = (3, 7), width: int = 64, has_norm: bool = True) -> dict:
    """The tensors of a small detector that its config is read from."""
    channels, size = stem
    state = {
        "backbone.body.conv1.weight": torch.zeros(64, channels, size, size),
        "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(width, 64, 1, 1),
        "roi_heads.box_head.fc6.weight": torch.zeros(4 * width, 49 * width),
    }
    return {**state, **({"backbone.fpn.inner_blocks.0.1.weight": 0} if has_norm else {})}


def config_of(
    state: dict, architecture: str = "resnet18", *, detector: dict | None = None, **more: object
) -> dict:
    given = {"num_classes": 10, "mean": MEAN, "std": STD, **more}
    model = ModelConfig(**(detector or {}))
    return yaml.safe_load(detectron2_config(state, model, architecture=architecture, **given))


def test_the_config_holds_all_that_differs_from_detectron2s_defaults():
    config = config_of(
        sketch(),
        detector={
            "anchor_sizes": [8, 16, 32, 64, 128],
            "short_sides": [96, 160],
            "longest_side": 320,
            "rpn_candidates_train": 500,
            "rpn_proposals_test": 90,
        },
        weights="a/b.pkl",
    )
    model = config["MODEL"]
    assert config["INPUT"] == {"FORMAT": "RGB", "MIN_SIZE_TEST": 160, "MAX_SIZE_TEST": 320}
    assert model["WEIGHTS"] == "a/b.pkl"
    assert model["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert model["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert model["BACKBONE"] == {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0}
    assert model["RESNETS"] == {
        "DEPTH": 18,
        "STRIDE_IN_1X1": False,
        "RES2_OUT_CHANNELS": 64,
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "NORM": "naiveSyncBN",
    }
    assert model["FPN"]["OUT_CHANNELS"] == 64
    assert model["FPN"]["NORM"] == "naiveSyncBN"
    assert model["ANCHOR_GENERATOR"]["SIZES"] == [[8], [16], [32], [64], [128]]
    assert model["ROI_HEADS"]["NUM_CLASSES"] == 10
    assert model["ROI_BOX_HEAD"]["FC_DIM"] == 256
    with_groups = config_of(sketch(), "resnext50_32x4d")["MODEL"]["RESNETS"]
    assert (with_groups["DEPTH"], with_groups["NUM_GROUPS"]) == (50, 32)
    assert "RES2_OUT_CHANNELS" not in with_groups


@pytest.mark.parametrize(
    ("norm", "theirs"), [("sync", "naiveSyncBN"), ("batch", "BN"), ("frozen", "FrozenBN")]
)
def test_norms_by_detectron2s_names(norm, theirs):
    model = config_of(sketch(has_norm=False), detector={"norm": norm})["MODEL"]
    assert (model["RESNETS"]["NORM"], model["FPN"]["NORM"]) == (theirs, "")


def test_grey_images_have_their_format():
    config = config_of(sketch(stem=(1, 7)), mean=[0.5], std=[0.25])
    assert config["INPUT"]["FORMAT"] == "L"
    assert config["MODEL"]["PIXEL_MEAN"] == [127.5]


@pytest.mark.parametrize(
    ("state", "architecture", "message"),
    [
        (sketch(), "resnetv2_50", "resnetv2_50 cannot be had for Detectron2, only torchvision's"),
        ({}, "conv4_cifar", "conv4_cifar cannot be had for Detectron2, only torchvision's"),
        (sketch(stem=(3, 3)), "resnet18", "have a 7x7 stem, this resnet18 has one of 3x3"),
        (sketch(stem=(4, 7)), "resnet18", "images of 1 or 3 channels, this resnet18 takes 4"),
    ],
)
def test_what_detectron2_cannot_build_is_refused(state, architecture, message):
    with pytest.raises(UserError, match=message):
        config_of(state, architecture)


def test_the_config_in_the_docs_is_the_one_that_is_written():
    text = (HOME / "docs/detection.md").read_text()
    (block,) = re.findall(r"```yaml detectron2\n(.*?)```", text, flags=re.DOTALL)
    documented = yaml.safe_load(block)
    written = config_of(sketch())
    assert documented["INPUT"]["FORMAT"] == written["INPUT"]["FORMAT"]
    model = written["MODEL"]
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert documented["MODEL"].pop(key) == model[key]
    assert documented["MODEL"].pop("WEIGHTS").endswith(model["WEIGHTS"])
    for group, values in documented["MODEL"].items():
        assert values.items() <= model[group].items()
