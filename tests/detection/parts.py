"""A small detector on a ResNet-18, for tests of its parts."""

from detection.backbone import new_body
from detection.config import ModelConfig

CLASSES = 4


def body(c4: bool = False, architecture: str = "resnet18"):
    return new_body(
        architecture,
        channels=3,
        image_size=64,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        c4=c4,
    )


def small(**changes) -> ModelConfig:
    return ModelConfig(
        **{
            "short_sides": [64],
            "longest_side": 96,
            "anchor_sizes": [8, 16, 32, 64, 128],
            "fpn_channels": 16,
            "head_features": 32,
            "regions_per_image": 16,
            **changes,
        }
    )
