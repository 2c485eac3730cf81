"""Low stages that several networks of one architecture share, run once per forward pass.

Dimensions: B batch.
"""

from collections.abc import Sequence

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from peerlearn.errors import UserError
from peerlearn.networks.cifar import StagedNetwork


def stage_names(backbone: nn.Module) -> tuple[str, ...] | None:
    """The names of the child modules that are stages, low to high; None if the network has no named stages."""
    if not isinstance(backbone, StagedNetwork | ResNet):
        return None
    return tuple(name for name, _ in backbone.named_children() if name.startswith("layer"))


def default_share_stages(backbones: Sequence[nn.Module]) -> int:
    """How many low stages the paper shares (Mutual Contrastive Learning, sections 3.1 and 4.1).

    Two networks share none. More than two share all but the last stage of the CIFAR networks
    (3 stages), and all but the last two of the ImageNet networks (4 stages). Networks of unlike
    architecture, or without named stages, cannot share and share none.
    """
    names = stage_names(backbones[0])
    alike = all(_layout(other) == _layout(backbones[0]) for other in backbones[1:])
    if len(backbones) <= 2 or names is None or not alike:
        return 0
    return len(names) - (1 if len(names) == 3 else 2)


def share_low_stages(backbones: Sequence[nn.Module], stages: int) -> None:
    """Make the stem and the first `stages` stages of the first network those of all the others.

    Every network stays complete, with a complete state dict; the shared modules are the same
    objects, so that parameters() over all of them yields each shared tensor once.

    Raises:
        UserError: the networks are of unlike architecture, they have no named stages, or `stages` is
            more than they can share.
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
    """The features of every network; shared low stages run once.

    Args:
        backbones: networks after `share_low_stages(backbones, stages)`.
        images: images, (B, channels, height, width).
        stages: number of shared stages; 0 = the networks are independent.

    Returns:
        (B, num_features) for each network, bit for bit what the whole network gives.

    Raises:
        ValueError: the networks do not share these stages.
    """
    check_shared(backbones, stages)
    trunk = run_low_stages(backbones[0], images, stages) if stages else images
    return [run_high_stages(backbone, trunk, stages) for backbone in backbones]


def run_low_stages(backbone: nn.Module, images: Tensor, stages: int) -> Tensor:
    """What the stem and the first `stages` stages of one network make of images, (B, channels, height, width)."""
    return _run(_split(backbone, stages)[0], images)


def run_high_stages(backbone: nn.Module, trunk: Tensor, stages: int) -> Tensor:
    """The features (B, num_features) of one network, from the output of its first `stages` stages."""
    if stages == 0:
        features: Tensor = backbone(trunk)
        return features
    return _run(_split(backbone, stages)[1], trunk)


def check_shared(backbones: Sequence[nn.Module], stages: int) -> None:
    """Make sure that the networks share their first `stages` stages.

    Raises:
        ValueError: they do not.
    """
    if stages == 0:
        return
    shared, _ = _split(backbones[0], stages)
    for backbone in backbones:
        low, _ = _split(backbone, stages)
        if any(low[name] is not shared[name] for name in shared):
            raise ValueError(f"the networks do not share their first {stages} stages")


Modules = dict[str, nn.Module]


def _split(backbone: nn.Module, stages: int) -> tuple[Modules, Modules]:
    """The modules up to and including stage number `stages`, and all modules above it, by name.

    The children of a network with named stages run one after the other, in the order of their declaration.
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
