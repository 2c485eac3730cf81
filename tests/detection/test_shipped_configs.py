"""The shipped recipes of `detect`: each is valid, and says where it comes from and how it is started."""

import shlex
from pathlib import Path

import pytest
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.command import SHIPPED
from detection.config import DetectConfig
from detection.model import build_detector
from peerlearn.commands.configs_command import HEADER_FIELDS, read_header
from peerlearn.config import parse_config
from tests.detection.parts import CLASSES, body


def recipe(*words: str) -> DetectConfig:
    config, _ = parse_config(
        DetectConfig, words, verb="detect", description="", example="", shipped=SHIPPED
    )
    return config


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_says_where_it_comes_from_and_its_command_is_valid(path: Path):
    header = read_header(path)
    assert set(header) == set(HEADER_FIELDS)
    assert all(header.values())
    command = shlex.split(header["command"])
    assert command[:3] == ["peerlearn", "detect", path.stem]
    assert recipe(*command[2:]).checkpoints()


def test_own_data_compares_weights_and_shares_by_one_budget():
    config = recipe("own_data", "--checkpoint", "x")
    assert config.weights == ["export", "random"]
    assert (config.data.percents, config.trials, config.data.leakage) == ([1, 10, 100], 3, "warn")
    # As many images a step as in the published recipes take twice the rate.
    published = recipe("d2_fpn", "--checkpoint", "x")
    assert config.lr / config.batch_size == published.lr / published.batch_size
    assert config.chosen_rule == "coco"


class TestRecipes:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {},
                "lr 0.02 (base_lr 0.02 x 16/16), / 10 after steps 12,000 and 16,000, 18,000 steps of 16 images",
            ),
            (
                {"batch_size": 8},
                "lr 0.01 (base_lr 0.02 x 8/16), / 10 after steps 24,000 and 32,000, 36,000 steps of 8",
            ),
            (
                {"iterations": 13_000},
                "x 16/16), / 10 after steps 12,000, 13,000 steps of 16 images",
            ),
            (
                {"iterations": 500},
                "x 16/16), the same to the end, 500 steps of 16 images (500 iterations of 16)",
            ),
        ],
    )
    def test_what_follows_from_the_batch_size_is_told(self, changes, words):
        assert words in DetectConfig(checkpoint="runs/a", **changes).scaling()

    def test_d2_fpn(self):
        config, model = (
            recipe("d2_fpn", "--checkpoint", "x"),
            recipe("d2_fpn", "--checkpoint", "x").model,
        )
        assert (config.iterations, config.milestones) == (18_000, [12_000, 16_000])
        assert (config.batch_size, config.base_lr, config.warmup_iterations) == (16, 0.02, 100)
        assert (config.momentum, config.weight_decay, config.norm_weight_decay) == (0.9, 1e-4, 0)
        assert config.precise_bn_iterations == 200
        assert model.short_sides == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
        assert (model.longest_side, model.anchor_sizes) == (1333, [32, 64, 128, 256, 512])
        assert (model.rpn_candidates_train, model.rpn_candidates_test) == (2000, 1000)
        assert (model.rpn_proposals_train, model.rpn_proposals_test) == (1000, 1000)
        assert (model.norm, model.trainable_stages, model.box_loss_beta) == ("sync", 5, 0)
        assert (model.anchors_per_image, model.regions_per_image) == (256, 512)
        assert (model.fpn_channels, model.head_features) == (256, 1024)
        assert config.data.difficult == "keep"

    def test_moco_c4(self):
        config, model = (
            recipe("moco_c4", "--checkpoint", "x"),
            recipe("moco_c4", "--checkpoint", "x").model,
        )
        assert (config.iterations, config.milestones) == (24_000, [18_000, 22_000])
        assert (model.detector, model.norm, model.trainable_stages) == ("d2_c4", "sync", 5)
        assert (model.rpn_candidates_train, model.rpn_candidates_test) == (12_000, 6000)
        assert (model.rpn_proposals_train, model.rpn_proposals_test) == (2000, 1000)
        assert config.precise_bn_iterations == 200

    def test_torchvision_fpn_is_the_library_as_it_comes(self):
        config = recipe("torchvision_fpn", "--checkpoint", "x").model
        detector = build_detector(config, body(), CLASSES)
        assert detector._get_name() == "FasterRCNN"
        theirs = FasterRCNN(
            resnet_fpn_backbone(
                backbone_name="resnet18",
                weights=None,
                norm_layer=nn.BatchNorm2d,
                trainable_layers=5,
            ),
            CLASSES + 1,
        )
        assert {n: t.shape for n, t in detector.state_dict().items()} == {
            n: t.shape for n, t in theirs.state_dict().items()
        }
        for name in ("min_size", "max_size", "image_mean", "image_std", "size_divisible"):
            assert getattr(detector.transform, name) == getattr(theirs.transform, name), name
        for name in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"):
            assert getattr(detector.rpn, name) == getattr(theirs.rpn, name), name
        for name in ("score_thresh", "nms_thresh", "detections_per_img"):
            assert getattr(detector.roi_heads, name) == getattr(theirs.roi_heads, name), name
        pooler = detector.roi_heads.box_roi_pool
        assert (pooler.output_size, pooler.sampling_ratio) == ((7, 7), 2)
        assert type(detector.rpn.anchor_generator) is AnchorGenerator
        assert type(detector.rpn.fg_bg_sampler) is BalancedPositiveNegativeSampler
