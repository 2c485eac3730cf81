"""The command `peerlearn` with an architecture of your own, as timm wants it registered. docs/backbones.md tells more.

python scripts/own_backbone.py pretrain mcl_fashion_mnist_demo --cohort.backbones two_layers --run runs/own
"""

import sys
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from peerlearn.cli import main

default_cfgs = generate_default_cfgs(
    {"two_layers": {"input_size": (3, 32, 32), "first_conv": "body.0", "classifier": "fc"}}
)


class TwoLayers(torch.nn.Module):
    """A network with the methods that timm's have: a body, and a head that can be exchanged."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = 64
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(in_chans, 64, 3, stride=2), torch.nn.BatchNorm2d(64), torch.nn.ReLU()
        )
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchange the classifier; without classes the features come through."""
        self.num_classes = num_classes
        self.fc = torch.nn.Linear(64, num_classes) if num_classes else torch.nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 64, h, w)."""
        return self.body(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 64, h, w) -> (B, 64), or logits (B, num_classes)."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits, or features without classes."""
        return self.forward_head(self.forward_features(images))


@register_model
def two_layers(pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
    """Under this name timm knows it, and so does `--cohort.backbones`."""
    return build_model_with_cfg(TwoLayers, "two_layers", pretrained, **arguments)


if __name__ == "__main__":
    sys.exit(main())
