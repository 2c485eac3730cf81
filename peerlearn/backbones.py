"""The networks a cohort is made of: every timm network, and the small ones of the CIFAR papers.

All of them map images (B, channels, height, width) to pooled features (B, num_features). Importing
this module registers with timm the CIFAR networks as NAME_cifar and, for timm's ResNet family,
networks with a small-image stem as NAME_small, so that exports of both load through timm too.

Letters: B batch, C classes.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg_value,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from timm.models.resnet import ResNet
from torch import Tensor, nn

from peerlearn.errors import UserError

__all__ = [
    "create_backbone",
    "default_share_stages",
    "forward_shared",
    "share_low_stages",
    "size_arguments",
    "stage_names",
]

HEAD_MODULES = ("global_pool", "fc")


def create_backbone(
    name: str,
    *,
    in_chans: int = 3,
    small_images: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """A network with random initial weights, without its classifier.

    Args:
        name: one of `CIFAR_NETWORKS`, or any name timm knows.
        in_chans: channels of the images.
        small_images: 3x3 stem without stride and pooling, for images of about 32 pixels. The
            CIFAR networks have it in any case; of timm's, the ResNet family (module `resnet`).
        image_size: height and width in pixels of the images, for the few networks that depend on
            it (conv4, and timm's of fixed input size, such as ViTs); None: the network's default.

    Returns:
        A module from images (B, in_chans, height, width) to features (B, num_features), with
        `.num_features` and timm's `.pretrained_cfg`.

    Raises:
        UserError: unknown name, no small-image stem, or a size the network cannot take.
    """
    network_name = _timm_name(name, small_images)
    try:
        backbone = timm.create_model(
            network_name,
            num_classes=0,
            in_chans=in_chans,
            **size_arguments(network_name, image_size),
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        size = "its default size" if image_size is None else f"{image_size} pixels"
        raise UserError(
            f"network {name!r} cannot be built for images of {in_chans} channels and {size}: "
            f"{error or type(error).__name__}"
        ) from error
    # timm's num_features is the last convolution's width; where layers follow the pooling
    # (MobileNetV3, EfficientViT), head_hidden_size is the width of what comes out.
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    return backbone


def size_arguments(network_name: str, image_size: int | None) -> dict[str, Any]:
    """The argument by which `timm.create_model(network_name, ...)` learns the image size, if any.

    Args:
        network_name: a name timm knows.
        image_size: height and width in pixels; None: the network's default.
    """
    if image_size is None:
        return {}
    if network_name == "conv4_cifar":
        return {"image_size": image_size}
    if get_pretrained_cfg_value(network_name, "fixed_input_size"):
        return {"img_size": image_size}
    return {}


def _timm_name(name: str, small_images: bool) -> str:
    if name in CIFAR_NETWORKS:
        return f"{name}_cifar"
    if name in TIMM_NETWORKS:
        return name
    if not is_model(name):
        near = difflib.get_close_matches(name, [*CIFAR_NETWORKS, *list_models()])
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"no network is called {name!r}; {hint}")
    if "." in name:
        raise UserError(
            f"{name!r} names published weights, and networks start from random ones here; "
            f"write {name.split('.')[0]!r}"
        )
    if not small_images:
        return name
    if f"{name}_small" not in TIMM_NETWORKS:
        raise UserError(
            f"small_images: network {name!r} has no small-image stem; choose from "
            f"{', '.join(CIFAR_NETWORKS)}, or timm's ResNet family (resnet18, resnet50, "
            "resnext50_32x4d, wide_resnet50_2, ...: timm.list_models(module='resnet'))"
        )
    return f"{name}_small"


def stage_names(backbone: nn.Module) -> tuple[str, ...] | None:
    """The child modules that are the stages, low to high; None if the network has no named ones."""
    if not isinstance(backbone, StagedNetwork | ResNet):
        return None
    return tuple(name for name, _ in backbone.named_children() if name.startswith("layer"))


def default_share_stages(backbones: Sequence[nn.Module]) -> int:
    """How many low stages the paper shares (Mutual Contrastive Learning, sections 3.1 and 4.1).

    None among two networks. Among more, all but the last stage of the CIFAR networks (3 stages)
    and all but the last two of the ImageNet networks (4 stages). None among networks that cannot
    share, being unlike or without named stages.
    """
    names = stage_names(backbones[0])
    alike = all(_layout(other) == _layout(backbones[0]) for other in backbones[1:])
    if len(backbones) <= 2 or names is None or not alike:
        return 0
    return len(names) - (1 if len(names) == 3 else 2)


def share_low_stages(backbones: Sequence[nn.Module], stages: int) -> None:
    """Makes the first network's stem and first `stages` stages those of all the others.

    Every network stays complete, with a complete state dict; the shared modules are the same
    objects, so that parameters() over all of them yields each shared tensor once.

    Raises:
        UserError: unlike networks, none with named stages, or more stages than can be shared.
    """
    if stages == 0:
        return
    first = backbones[0]
    names = stage_names(first)
    if names is None:
        raise UserError(
            f"cohort.share_stages={stages}: {_architecture(first)} has no named stages; "
            "set cohort.share_stages to 0"
        )
    if not 0 < stages < len(names):
        raise UserError(
            f"cohort.share_stages={stages}: {_architecture(first)} can share 0 to "
            f"{len(names) - 1} of its {len(names)} stages"
        )
    for other in backbones[1:]:
        if _layout(other) != _layout(first):
            raise UserError(
                f"cohort.share_stages={stages}: networks of unlike architecture "
                f"({_architecture(first)}, {_architecture(other)}) cannot share stages; "
                "set cohort.share_stages to 0 or cohort.backbones to one architecture"
            )
        trunk, _ = _split(first, stages)
        for name, module in trunk.items():
            setattr(other, name, module)


def forward_shared(backbones: Sequence[nn.Module], images: Tensor, stages: int) -> list[Tensor]:
    """Features of every network, the low stages that they share run once.

    Args:
        backbones: networks after `share_low_stages(backbones, stages)`.
        images: (B, channels, height, width).
        stages: how many stages are shared; 0: the networks are independent.

    Returns:
        Per network (B, num_features), bit for bit what the whole network gives.

    Raises:
        ValueError: the networks do not share these stages.
    """
    if stages == 0:
        return [backbone(images) for backbone in backbones]
    trunk, _ = _split(backbones[0], stages)
    trunk_output = _run(trunk, images)
    features = []
    for backbone in backbones:
        low, high = _split(backbone, stages)
        if any(low[name] is not trunk[name] for name in trunk):
            raise ValueError(f"the networks do not share their first {stages} stages")
        features.append(_run(high, trunk_output))
    return features


Modules = dict[str, nn.Module]


def _split(backbone: nn.Module, stages: int) -> tuple[Modules, Modules]:
    """The modules up to and including stage number `stages`, and all those above it, by name.

    The children of a network with named stages run one after the other, as they are declared.
    """
    children = list(backbone.named_children())
    end = 1 + [name for name, _ in children].index(f"layer{stages}")
    return dict(children[:end]), dict(children[end:])


def _run(modules: Modules, x: Tensor) -> Tensor:
    for module in modules.values():
        x = module(x)
    return x


def _layout(backbone: nn.Module) -> tuple[str, dict[str, torch.Size]]:
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    return _architecture(backbone), shapes


def _architecture(backbone: nn.Module) -> str:
    config = getattr(backbone, "pretrained_cfg", {"architecture": type(backbone).__name__})
    return str(config["architecture"])


class Stage(NamedTuple):
    """Layers that end at one resolution: 1/`reduction` of the image's height and width."""

    module: nn.Module
    channels: int
    reduction: int


class StagedNetwork(nn.Module):
    """stem -> layer1 .. layerN -> final -> global_pool -> fc, with timm's names and methods.

    `global_pool` is one of timm's poolings, or "flatten": each of the `positions` (height x width)
    of the last stage gives features of its own.
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
                _initialise(module)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (none for 0 classes) and, where one is named, another pooling."""
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
        """(B, channels, height, width) -> the last stage's output, not yet pooled."""
        features = images
        for name, module in self.named_children():
            if name not in HEAD_MODULES:
                features = module(features)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """forward_features' output -> (B, num_features), or (B, C) where there is a classifier."""
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


def _conv(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)


def _initialise(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class BasicBlock(nn.Module):
    """The two-convolution block of ResNet (He et al. 2016), projecting where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, channels, 1, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x), inplace=True)


class PreActivationBlock(nn.Module):
    """The block of Wide ResNet (Zagoruyko & Komodakis 2016); a projection sees the activated x."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.shortcut = _conv(in_channels, channels, 1, stride) if in_channels != channels else None

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
        self.conv1 = _conv(in_channels, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

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


def _resnet(blocks_per_stage: int, *, in_chans: int = 3, **head: Any) -> StagedNetwork:
    """ResNet of 6 blocks_per_stage + 2 layers for CIFAR (He et al. 2016, section 4.2)."""
    stem = nn.Sequential(_conv(in_chans, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    stages = _residual_stages(BasicBlock, (16, 32, 64), blocks_per_stage)
    return StagedNetwork(stem, stages, nn.Identity(), in_chans=in_chans, **head)


def _wide_resnet(
    blocks_per_stage: int, widening: int, *, in_chans: int = 3, **head: Any
) -> StagedNetwork:
    """Wide ResNet of 6 blocks_per_stage + 4 layers (Zagoruyko & Komodakis 2016)."""
    widths = (16 * widening, 32 * widening, 64 * widening)
    stages = _residual_stages(PreActivationBlock, widths, blocks_per_stage)
    final = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
    return StagedNetwork(_conv(in_chans, 16, 3), stages, final, in_chans=in_chans, **head)


def _densenet_bc(
    layers_per_stage: int, growth: int, *, in_chans: int = 3, **head: Any
) -> StagedNetwork:
    """DenseNet-BC of 6 layers_per_stage + 4 layers, compression 0.5 (Huang et al. 2017)."""
    channels = 2 * growth
    stem = _conv(in_chans, channels, 3)
    stages = []
    for index in range(3):
        layers: list[nn.Module] = []
        if index > 0:
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                _conv(channels, channels // 2, 1),
                nn.AvgPool2d(2),
            ]
            channels //= 2
        for _ in range(layers_per_stage):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        stages.append(Stage(nn.Sequential(*layers), channels, 2**index))
    final = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return StagedNetwork(stem, stages, final, in_chans=in_chans, **head)


def _conv4(*, in_chans: int = 3, image_size: int = 84, **head: Any) -> StagedNetwork:
    """The Conv-4 of few-shot learning (Snell et al. 2017), its features flattened."""
    if image_size < 16:
        raise UserError(
            f"network 'conv4' halves the image four times: image_size {image_size} is below 16"
        )
    stages = []
    channels = in_chans
    for number in range(1, 5):
        block = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        stages.append(Stage(block, 64, 2**number))
        channels = 64
    head = {"global_pool": "flatten", **head}
    return StagedNetwork(
        nn.Identity(),
        stages,
        nn.Identity(),
        in_chans=in_chans,
        positions=(image_size // 16) ** 2,
        **head,
    )


def _small_stem(timm_name: str, **model_arguments: Any) -> nn.Module:
    """A network of timm's ResNet family that keeps the image's resolution up to its first stage."""
    network: nn.Module = model_entrypoint(timm_name)(**model_arguments)
    stem: Any = network.conv1
    if isinstance(stem, nn.Conv2d):
        network.conv1 = _conv(stem.in_channels, stem.out_channels, 3).to(stem.weight)
        _initialise(network.conv1)
    else:
        stem[0].stride = (1, 1)
    network.maxpool = nn.Identity()
    feature_info: Any = network.feature_info
    for info in feature_info:
        info["reduction"] //= 2 if info["module"] == "act1" else 4
    return network


CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet32": partial(_resnet, 5),
    "resnet56": partial(_resnet, 9),
    "resnet110": partial(_resnet, 18),
    "wrn_16_2": partial(_wide_resnet, 2, 2),
    "wrn_40_2": partial(_wide_resnet, 6, 2),
    "wrn_28_4": partial(_wide_resnet, 4, 4),
    "densenet_bc_40_12": partial(_densenet_bc, 6, 12),
    "conv4": _conv4,
}


# Every network of this module by its name in timm, and how many resolutions it can show a detector.
TIMM_NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    f"{name}_cifar": (network, 4 if name == "conv4" else 3)
    for name, network in CIFAR_NETWORKS.items()
} | {f"{name}_small": (partial(_small_stem, name), 5) for name in list_models(module="resnet")}

# timm's register_model looks for a network's default configuration under this name.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, 84, 84) if name == "conv4_cifar" else (3, 32, 32),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "classifier": "fc",
        }
        for name in TIMM_NETWORKS
    }
)


def _entrypoint(
    timm_name: str, network: Callable[..., nn.Module], resolutions: int
) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **model_arguments: Any) -> nn.Module:
        return build_model_with_cfg(
            network,
            timm_name,
            pretrained,
            feature_cfg={"out_indices": tuple(range(resolutions))},
            **model_arguments,
        )

    build.__name__ = build.__qualname__ = timm_name
    return build


for _name, (_network, _resolutions) in TIMM_NETWORKS.items():
    # Attributes of this module, because register_model adds every name to __all__.
    globals()[_name] = register_model(_entrypoint(_name, _network, _resolutions))
