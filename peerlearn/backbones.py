"""The networks a cohort is made of: every timm network, and the small ones of the CIFAR papers.

All of them map images (B, channels, height, width) to pooled features (B, num_features). Importing
this module registers with timm the CIFAR networks as NAME_cifar and, for timm's ResNet family,
networks with a small-image stem as NAME_small, so that exports of both load through timm too.

Dimensions: B batch.
"""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers.patch_embed import PatchEmbed
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg_value,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from torch import nn

from peerlearn.errors import UserError
from peerlearn.networks.cifar import (
    CIFAR_NETWORKS,
    CONV4_IMAGE_SIZE,
    CONV4_NETWORKS,
    initialise_conv,
    plain_conv,
)

__all__ = ["create_backbone", "patch_pixels", "size_arguments"]

# Below this likeness another name is not what was meant.
_NEAR = 0.8
_CONV4_IN_TIMM = {f"{name}_cifar" for name in CONV4_NETWORKS}


def create_backbone(
    name: str,
    *,
    in_chans: int = 3,
    small_images: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """A network with random initial weights, without its classifier.

    Args:
        name: name of the network: one of `CIFAR_NETWORKS`, or any name timm knows.
        in_chans: channels of the images.
        small_images: whether the stem is a 3x3 convolution without stride and pooling, for images
            of about 32 pixels. The CIFAR networks have such a stem in any case. Of timm's networks
            the ResNet family (module `resnet`) can have it.
        image_size: height and width of the images in pixels. Only conv4, conv4_wide and timm's
            networks of fixed input size, such as ViTs, depend on it. None = the network's default.

    Returns:
        A module from images (B, in_chans, height, width) to features (B, num_features), with
        `.num_features` and timm's `.pretrained_cfg`.

    Raises:
        UserError: the name is unknown, the network has no small-image stem, or it cannot take
            images of this size.

    Example:
        >>> import torch
        >>> from peerlearn.backbones import create_backbone
        >>> backbone = create_backbone("resnet32", in_chans=1)
        >>> backbone.num_features
        64
        >>> backbone(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """
    network_name = _timm_name(name, small_images)
    try:
        backbone = timm.create_model(
            network_name,
            num_classes=0,
            in_chans=in_chans,
            **size_arguments(network_name, image_size),
        )
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        size = "its default size" if image_size is None else f"{image_size} pixels"
        raise UserError(
            f"network {name!r} cannot be built for images of {in_chans} channels and {size}: "
            f"{error or type(error).__name__}"
        ) from error
    # timm's num_features is the width of the last convolution. Where layers follow the pooling
    # (MobileNetV3, EfficientViT), head_hidden_size is the width of the output.
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    return backbone


def size_arguments(network_name: str, image_size: int | None) -> dict[str, Any]:
    """The argument by which `timm.create_model(network_name, ...)` learns the image size, if any.

    Args:
        network_name: a name timm knows.
        image_size: height and width of the images in pixels; None = the network's default.
    """
    if image_size is None:
        return {}
    if network_name in _CONV4_IN_TIMM:
        return {"image_size": image_size}
    if get_pretrained_cfg_value(network_name, "fixed_input_size"):
        return {"img_size": image_size}
    return {}


def patch_pixels(backbone: nn.Module) -> int:
    """The side of the patches that a ViT or its like cuts images into; what is less than a patch it does not see.

    1 = the network sees every pixel.
    """
    patches = [module for module in backbone.modules() if isinstance(module, PatchEmbed)]
    if not patches or patches[0].dynamic_img_pad:
        return 1
    return int(patches[0].patch_size[0])


def _timm_name(name: str, small_images: bool) -> str:
    if name in CIFAR_NETWORKS:
        return f"{name}_cifar"
    if name in TIMM_NETWORKS:
        return name
    if not is_model(name):
        near = difflib.get_close_matches(
            name.lower(), [*CIFAR_NETWORKS, *list_models()], cutoff=_NEAR
        )
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise UserError(f"no network is called {name!r}; {hint}")
    if "." in name:
        raise UserError(
            f"{name!r} names published weights, and networks are named without them here; write "
            f"{name.split('.')[0]!r}, and in pretraining cohort.init timm for weights that timm's cache holds"
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


def _small_stem(
    timm_name: str,
    *,
    padding: int = 1,
    activated: bool = True,
    pooled: bool = False,
    **model_arguments: Any,
) -> nn.Module:
    """A network of timm's ResNet family that keeps the image's resolution up to its first stage.

    Args:
        timm_name: name of the network in timm.
        padding: zeros around the image; solo-learn has 2, and so two pixels more.
        activated: whether a ReLU follows; lightly's examples number the layers of its ResNet, and so lose it.
        pooled: whether the max-pool stays, as where the convolution alone was replaced.
        model_arguments: arguments of the network.
    """
    network: nn.Module = model_entrypoint(timm_name)(**model_arguments)
    stem: Any = network.conv1
    if isinstance(stem, nn.Conv2d):
        network.conv1 = plain_conv(stem.in_channels, stem.out_channels, 3).to(stem.weight)
        network.conv1.padding = (padding, padding)
        initialise_conv(network.conv1)
    else:
        stem[0].stride = (1, 1)
    if not activated:
        network.act1 = nn.Identity()
    if not pooled:
        network.maxpool = nn.Identity()
    feature_info: Any = network.feature_info
    for info in feature_info:
        info["reduction"] //= 2 if pooled or info["module"] == "act1" else 4
    return network


# Name in timm -> the function that builds the network, and how many resolutions it can give a detector.
TIMM_NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    f"{name}_cifar": (network, 4 if name in CONV4_NETWORKS else 3)
    for name, network in CIFAR_NETWORKS.items()
} | {f"{name}_small": (partial(_small_stem, name), 5) for name in list_models(module="resnet")}
# Small stems of other programs, which tensors do not tell from the plain one.
_SMALL_STEMS: dict[str, dict[str, Any]] = {
    "small_padding2": {"padding": 2},
    "small_pooled": {"pooled": True},
    "small_no_relu": {"activated": False},
}
TIMM_NETWORKS |= {
    f"{name}_{kind}": (partial(_small_stem, name, **stem), 5)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
    for kind, stem in _SMALL_STEMS.items()
}

# timm's register_model looks for a network's default configuration under this name.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, *[CONV4_IMAGE_SIZE if name in _CONV4_IN_TIMM else 32] * 2),
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
