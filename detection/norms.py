"""Norm layers of a detector: their kind, the stages that are fixed with them, and their weight decay."""

from typing import Any

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FrozenBatchNorm2d

from detection.config import ModelConfig
from peerlearn.compute.dist import Ranks
from peerlearn.compute.sync_batch_norm import sync_batch_norm
from peerlearn.errors import UserError

# The classes that timm's norm layers are of.
_NORM_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def prepare_norms(
    config: ModelConfig, detector: GeneralizedRCNN, ranks: Ranks | None = None
) -> None:
    """Make a new detector's norm layers of the kind that the config asks for, and fix its low stages, in place.

    Args:
        config: config of the detector.
        detector: what `build_detector` made.
        ranks: processes that share statistics in training; None where the detector is not trained.

    Raises:
        UserError: low stages of another network than a ResNet cannot be fixed, or its batch norm cannot be of that
            kind.
    """
    body = detector.backbone.body
    _freeze_stages(body, config.trainable_stages)
    if config.norm == "frozen":
        _freeze_norm(body)
        _freeze_norm(detector.roi_heads.box_head)
    elif config.norm == "sync" and ranks is not None:
        try:
            sync_batch_norm(detector, ranks)
        except ValueError as error:
            raise UserError(f"model.norm sync: {error}: set model.norm batch") from error


def _freeze_norm(module: nn.Module) -> None:
    """Turn every batch norm below ``module`` into a fixed scale and shift, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if type(child) is not nn.BatchNorm2d:
                # It holds its activation too, which would be lost.
                raise UserError(
                    f"the network's {name} is a {type(child).__name__}, which cannot be fixed: set model.norm batch "
                    "and model.trainable_stages 5"
                )
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            _freeze_norm(child)


def _freeze_stages(body: nn.Module, trained: int) -> None:
    """Fix the stem and the low stages of a ResNet with their norms, but for the last ``trained`` of five.

    Detectron2's FREEZE_AT 2 trains 3 stages, FREEZE_AT 0 all 5.
    """
    if trained == 5:
        return
    stages = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][: 5 - trained]
    for name in (name for names in stages for name in names):
        child = getattr(body, name, None)
        if child is None:
            raise UserError(
                f"model.trainable_stages {trained} needs a ResNet, whose stages have names: set it to 5"
            )
        child.requires_grad_(False)
        holder = nn.ModuleDict({name: child})
        _freeze_norm(holder)
        setattr(body, name, holder[name])


def parameter_groups(
    detector: nn.Module, *, weight_decay: float, norm_weight_decay: float
) -> list[dict[str, Any]]:
    """The trained parameters, those of norm layers apart, each with its weight decay."""
    norms = [module for module in detector.modules() if isinstance(module, _NORM_LAYERS)]
    of_norms = {id(p) for module in norms for p in module.parameters()}
    trained = [p for p in detector.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in of_norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in of_norms], "weight_decay": norm_weight_decay},
    ]
