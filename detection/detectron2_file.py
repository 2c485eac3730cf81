"""An FPN detector for Detectron2: its weights by Detectron2's names, and the config that builds the model for them.

The names and shapes are those of Detectron2's source (`detectron2/modeling`): backbone/resnet.py (stem.conv1,
res2.0.conv1, .norm, .shortcut), backbone/fpn.py (bottom_up, fpn_lateral2, fpn_output2), proposal_generator/rpn.py
(rpn_head: conv, objectness_logits, anchor_deltas), roi_heads/box_head.py (fc1, fc2) and roi_heads/fast_rcnn.py
(cls_score of K + 1 rows with the background last, bbox_pred of 4 K rows without it).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from detection.config import ModelConfig
from peerlearn.errors import UserError
from peerlearn.exchange.export_formats import (
    DETECTRON2_FILE,
    DETECTRON2_IMAGE_FORMATS,
    RESNETS,
    detectron2_name,
    detectron2_resnet,
    pickle_arrays,
)

_BODY = "backbone.body."
_FPN_LAYERS = {"inner_blocks": "fpn_lateral", "layer_blocks": "fpn_output"}
_HEADS = {
    "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
    "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
    "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
}
# naiveSyncBN computes on CPUs too.
_NORMS = {"sync": "naiveSyncBN", "batch": "BN", "frozen": "FrozenBN"}


def detectron2_weights(
    state_dict: Mapping[str, Tensor], *, num_classes: int
) -> dict[str, np.ndarray]:
    """The weights of a detector by Detectron2's names.

    Args:
        state_dict: tensors of torchvision's FasterRCNN with an FPN on a ResNet; class 0 is the background.
        num_classes: number of classes K, without the background.

    Raises:
        ValueError: a tensor has no place in Detectron2's FPN model, or is not of so many classes.
    """
    weights = {}
    for name, tensor in state_dict.items():
        # Detectron2 counts no batches.
        if name.endswith("num_batches_tracked"):
            continue
        values = tensor.detach().cpu()
        if name.startswith("roi_heads.box_predictor."):
            values = _background_last(name, values, num_classes)
        weights[_detectron2_detector_name(name)] = values.float().numpy()
    return weights


def detectron2_file(state_dict: Mapping[str, Tensor], *, num_classes: int) -> bytes:
    """The content of the file that Detectron2's MODEL.WEIGHTS names: `detectron2_weights`, pickled.

    Raises:
        ValueError: as `detectron2_weights` does.
    """
    weights = detectron2_weights(state_dict, num_classes=num_classes)
    # The names are exact, so Detectron2 need not guess.
    return pickle_arrays({"model": weights, "__author__": "peerlearn"})


def _detectron2_detector_name(name: str) -> str:
    if name.startswith(_BODY):
        return "backbone.bottom_up." + detectron2_name(name.removeprefix(_BODY))
    fpn = re.fullmatch(r"backbone\.fpn\.(inner_blocks|layer_blocks)\.(\d)\.([01])\.(\w+)", name)
    if fpn:
        layer, level, is_norm, last = fpn.groups()
        norm = "norm." if is_norm == "1" else ""
        return f"backbone.{_FPN_LAYERS[layer]}{int(level) + 2}.{norm}{last}"
    layer, _, last = name.rpartition(".")
    if layer not in _HEADS:
        raise ValueError(f"{name}: Detectron2's FPN model has no such tensor")
    return f"{_HEADS[layer]}.{last}"


def _background_last(name: str, values: Tensor, num_classes: int) -> Tensor:
    """The rows of the box predictor in Detectron2's order: of all classes, then of the background, if there are any."""
    is_boxes = "bbox_pred" in name
    rows_per_class = 4 if is_boxes else 1
    if len(values) != rows_per_class * (num_classes + 1):
        raise ValueError(f"{name}: has {len(values)} rows, which are not of {num_classes} classes")
    background, classes = values[:rows_per_class], values[rows_per_class:]
    return classes.clone() if is_boxes else torch.cat([classes, background])


def detectron2_config(
    state_dict: Mapping[str, Tensor],
    detector: ModelConfig,
    *,
    architecture: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    weights: str = DETECTRON2_FILE,
) -> str:
    """The config that builds Detectron2's model for `detectron2_file`, as YAML for `cfg.merge_from_file`.

    Args:
        state_dict: tensors of the detector, as for `detectron2_weights`.
        detector: config of the detector.
        architecture: name of the backbone.
        num_classes: number of classes, without the background.
        mean: mean of images in [0, 1], for each channel.
        std: standard deviation of images in [0, 1], for each channel.
        weights: path of the file of weights.

    Raises:
        UserError: Detectron2 has no such backbone, or reads no images of so many channels.
    """
    if architecture not in RESNETS:
        raise UserError(
            f"{architecture} cannot be had for Detectron2, only torchvision's ResNets can: {', '.join(RESNETS)}"
        )
    stem = state_dict["backbone.body.conv1.weight"]
    if stem.shape[-1] != 7:
        raise UserError(
            f"Detectron2's ResNets have a 7x7 stem, this {architecture} has one of {stem.shape[-1]}x{stem.shape[-1]}: "
            "train without small_images"
        )
    if stem.shape[1] not in DETECTRON2_IMAGE_FORMATS:
        raise UserError(
            f"Detectron2 reads images of 1 or 3 channels, this {architecture} takes {stem.shape[1]}"
        )
    lateral = "backbone.fpn.inner_blocks.0"
    stages = [f"res{level}" for level in range(2, 6)]
    levels = [f"p{level}" for level in range(2, 7)]
    model = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": weights,
        "PIXEL_MEAN": _of_bytes(mean),
        "PIXEL_STD": _of_bytes(std),
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            **detectron2_resnet(RESNETS[architecture]),
            "OUT_FEATURES": stages,
            "NORM": _NORMS[detector.norm],
        },
        "FPN": {
            "IN_FEATURES": stages,
            "OUT_CHANNELS": len(state_dict[f"{lateral}.0.weight"]),
            "NORM": _NORMS[detector.norm] if f"{lateral}.1.weight" in state_dict else "",
        },
        "ANCHOR_GENERATOR": {
            "SIZES": [[size] for size in detector.anchor_sizes],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "RPN": {
            "IN_FEATURES": levels,
            "PRE_NMS_TOPK_TRAIN": detector.rpn_candidates_train,
            "PRE_NMS_TOPK_TEST": detector.rpn_candidates_test,
            "POST_NMS_TOPK_TRAIN": detector.rpn_proposals_train,
            "POST_NMS_TOPK_TEST": detector.rpn_proposals_test,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "IN_FEATURES": levels[:-1],
            "NUM_CLASSES": num_classes,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "NUM_FC": 2,
            "FC_DIM": len(state_dict["roi_heads.box_head.fc6.weight"]),
            "POOLER_RESOLUTION": 7,
        },
    }
    images = {
        "FORMAT": DETECTRON2_IMAGE_FORMATS[stem.shape[1]],
        "MIN_SIZE_TEST": detector.short_sides[-1],
        "MAX_SIZE_TEST": detector.longest_side,
    }
    config: dict[str, Any] = {"VERSION": 2, "MODEL": model, "INPUT": images}
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=100)


def _of_bytes(values: Sequence[float]) -> list[float]:
    """Mean or standard deviation of images in 0..255, without digits that only rounding makes."""
    return [float(f"{255 * value:.7g}") for value in values]
