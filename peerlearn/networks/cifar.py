"""The small networks of the CIFAR and few-shot papers, built with timm's names and methods.

All of them map images (B, channels, height, width) to pooled features (B, num_features). `peerlearn.backbones`
registers them with timm.

Dimensions: B batch, C classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import Tensor, nn

from peerlearn.errors import UserError

HEAD_MODULES = ("global_pool", "fc")
# Height and width in pixels that Conv-4 is built for unless told otherwise: those of miniImageNet.
CONV4_IMAGE_SIZE = 84


class Stage(NamedTuple):
    """Layers that end at one resolution: 1/`reduction` of the image's height and width."""

    module: nn.Module
    channels: int
    reduction: int


class StagedNetwork(nn.Module):
    """stem -> layer1 .. layerN -> final -> global_pool -> fc, with timm's names and methods.

    Args:
        stem: layers before the first stage.
        stages: the stages, low to high.
        final: layers after the last stage, before the pooling.
        in_chans: channels of the images.
        num_classes: number of classes C; 0 = no classifier.
        global_pool: one of timm's poolings, or "flatten": every position of the last stage gives
            features of its own.
        drop_rate: probability of dropout before the classifier.
        positions: height times width of the last stage, for "flatten".
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        final: nn.Module,
        *,
        in_chans: int,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        positions: int = 1,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.positions = positions
        self.feature_info: list[dict[str, Any]] = []
        self.stem = stem
        for number, stage in enumerate(stages, start=1):
            name = f"layer{number}"
            self.add_module(name, stage.module)
            self.feature_info.append(
                {"num_chs": stage.channels, "reduction": stage.reduction, "module": name}
            )
        self.final = final
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialise_conv(module)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier (none for 0 classes) and, where `global_pool` is given, another pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            channels = self.feature_info[-1]["num_chs"]
            if global_pool == "flatten":
                self.global_pool: nn.Module = nn.Flatten()
                self.num_features = channels * self.positions
            else:
                pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
                self.global_pool = pool
                self.num_features = channels * pool.feat_mult()
            self.head_hidden_size = self.num_features
        device = next(self.parameters()).device
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=device)
            if num_classes > 0
            else nn.Identity()
        )

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> the output of the last stage, before the pooling."""
        features = images
        for name, module in self.named_children():
            if name not in HEAD_MODULES:
                features = module(features)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of `forward_features` -> (B, num_features), or (B, C) with a classifier."""
        pooled: Tensor = self.global_pool(features)
        if self.drop_rate:
            pooled = F.dropout(pooled, p=self.drop_rate, training=self.training)
        if pre_logits:
            return pooled
        output: Tensor = self.fc(pooled)
        return output

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, num_features), or (B, C) with a classifier."""
        return self.forward_head(self.forward_features(images))


def plain_conv(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)


def initialise_conv(conv: nn.Conv2d) -> None:
    """Draw the initial weights of He et al. 2015, fan-out, as the original CIFAR networks do."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Module:
    """The shortcut of a ResNet's block: a projection where the shape changes, else nothing."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(plain_conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """The two-convolution block of ResNet (He et al. 2016), projecting where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = plain_conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = plain_conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x), inplace=True)


class BottleneckBlock(nn.Module):
    """The three-convolution block of ResNet (He et al. 2016), a quarter as wide inside; the 3x3 one has the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        width = channels // 4
        self.conv1 = plain_conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = plain_conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = plain_conv(width, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.shortcut(x), inplace=True)


class PreActivationBlock(nn.Module):
    """The block of Wide ResNet (Zagoruyko & Komodakis 2016); a projection sees the activated x."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = plain_conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = plain_conv(channels, channels, 3)
        self.shortcut = (
            plain_conv(in_channels, channels, 1, stride) if in_channels != channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        output: Tensor = self.conv2(residual)
        return output + (x if self.shortcut is None else self.shortcut(activated))


class DenseLayer(nn.Module):
    """A bottleneck layer of DenseNet-BC (Huang et al. 2017), which adds `growth` channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = plain_conv(in_channels, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = plain_conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.bn1(x), inplace=True))
        new = self.conv2(F.relu(self.bn2(new), inplace=True))
        return torch.cat([x, new], dim=1)


def _residual_stages(
    block: Callable[[int, int, int], nn.Module], widths: Sequence[int], blocks_per_stage: int
) -> list[Stage]:
    """Stages of equal depth on top of 16 channels; all but the first halve the resolution."""
    stages = []
    channels = 16
    for index, width in enumerate(widths):
        blocks = [block(channels, width, 1 if index == 0 else 2)]
        blocks += [block(width, width, 1) for _ in range(blocks_per_stage - 1)]
        stages.append(Stage(nn.Sequential(*blocks), width, 2**index))
        channels = width
    return stages


def _resnet(
    blocks_per_stage: int, *, bottleneck: bool = False, in_chans: int = 3, **head: Any
) -> StagedNetwork:
    """ResNet for CIFAR (He et al. 2016, section 4.2) of 6 blocks_per_stage + 2 layers, or 9 + 2 with bottlenecks."""
    stem = nn.Sequential(plain_conv(in_chans, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    block, widths = (BottleneckBlock, (64, 128, 256)) if bottleneck else (BasicBlock, (16, 32, 64))
    stages = _residual_stages(block, widths, blocks_per_stage)
    return StagedNetwork(stem, stages, nn.Identity(), in_chans=in_chans, **head)


def _wide_resnet(
    blocks_per_stage: int, widening: int, *, in_chans: int = 3, **head: Any
) -> StagedNetwork:
    """Wide ResNet of 6 blocks_per_stage + 4 layers (Zagoruyko & Komodakis 2016)."""
    widths = (16 * widening, 32 * widening, 64 * widening)
    stages = _residual_stages(PreActivationBlock, widths, blocks_per_stage)
    final = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
    return StagedNetwork(plain_conv(in_chans, 16, 3), stages, final, in_chans=in_chans, **head)


def _densenet_bc(
    layers_per_stage: int, growth: int, *, in_chans: int = 3, **head: Any
) -> StagedNetwork:
    """DenseNet-BC of 6 layers_per_stage + 4 layers, compression 0.5 (Huang et al. 2017)."""
    channels = 2 * growth
    stem = plain_conv(in_chans, channels, 3)
    stages = []
    for index in range(3):
        layers: list[nn.Module] = []
        if index > 0:
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                plain_conv(channels, channels // 2, 1),
                nn.AvgPool2d(2),
            ]
            channels //= 2
        for _ in range(layers_per_stage):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        stages.append(Stage(nn.Sequential(*layers), channels, 2**index))
    final = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return StagedNetwork(stem, stages, final, in_chans=in_chans, **head)


def _conv4(
    width: int, *, in_chans: int = 3, image_size: int = CONV4_IMAGE_SIZE, **head: Any
) -> StagedNetwork:
    """The Conv-4 of few-shot learning (Snell et al. 2017), its features flattened; there each layer is 64 wide."""
    if image_size < 16:
        raise UserError(f"Conv-4 halves the image four times: image_size {image_size} is below 16")
    stages = []
    channels = in_chans
    for number in range(1, 5):
        block = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        stages.append(Stage(block, width, 2**number))
        channels = width
    head = {"global_pool": "flatten", **head}
    return StagedNetwork(
        nn.Identity(),
        stages,
        nn.Identity(),
        in_chans=in_chans,
        positions=(image_size // 16) ** 2,
        **head,
    )


# Unlike the others, these are built for an image size, on which their features depend; and they have four stages.
CONV4_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "conv4": partial(_conv4, 64),
    "conv4_wide": partial(_conv4, 128),
}
CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet32": partial(_resnet, 5),
    "resnet56": partial(_resnet, 9),
    "resnet110": partial(_resnet, 18),
    # The network that the MCL authors' and OKDDip's code calls resnet110.
    "resnet110_bottleneck": partial(_resnet, 12, bottleneck=True),
    "wrn_16_2": partial(_wide_resnet, 2, 2),
    "wrn_40_2": partial(_wide_resnet, 6, 2),
    "wrn_28_4": partial(_wide_resnet, 4, 4),
    "densenet_bc_40_12": partial(_densenet_bc, 6, 12),
    **CONV4_NETWORKS,
}
