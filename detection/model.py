"""Faster R-CNN on an exported network: Detectron2's out of torchvision's parts, or torchvision's as it comes.

`d2_fpn` and `d2_c4` replace what torchvision does differently: anchors, RoIAlign, samplers, box losses, initial
weights, norm layers. The numbers are those of Detectron2's PascalVOC-Detection configs and of MoCo's detection folder.

Dimensions: B images, C classes, A anchors of an image, R regions of an image.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, box_area, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.backbone import Body
from detection.config import ModelConfig
from peerlearn.counter_random import DETECTION_ANCHORS, DETECTION_REGIONS, random_bits
from peerlearn.errors import UserError

_RATIOS = (0.5, 1.0, 2.0)
_REGION_SIDE, _C4_REGION_SIDE = 7, 14
_SCORE_THRESHOLD, _DETECTIONS_PER_IMAGE = 0.05, 100
# FPN's rule: a region of this side, in pixels, is pooled from the map whose stride is 2 to this power.
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4
_LEVEL_MARGIN = 1e-8


def build_detector(config: ModelConfig, body: Body, classes: int) -> GeneralizedRCNN:
    """A detector with new heads on a network. Its weights are drawn from torch's global generator.

    In training it takes images, float32 (channels, H, W) in [0, 1] each, and targets {boxes float32 (n, 4),
    labels int64 (n,) from 1 on}, and returns its four losses. Else it returns {boxes, scores, labels} of every image.

    Args:
        config: kind of the detector, and its sizes.
        body: the network.
        classes: number of classes without the background, which becomes class 0.

    Raises:
        UserError: there are not as many sizes of anchors as the pyramid has maps.
    """
    if config.detector == "d2_c4":
        return _d2_c4(config, body, classes)
    _check_anchors(config, body)
    if config.detector == "d2_fpn":
        return _d2_fpn(config, body, classes)
    return _torchvision_fpn(config, body, classes)


def _d2_fpn(config: ModelConfig, body: Body, classes: int) -> GeneralizedRCNN:
    backbone = _Pyramid(body, config.fpn_channels, norm=_fpn_norm(config))
    anchors = FixedAnchors([(size,) for size in config.anchor_sizes], _pyramid_strides(body))
    rpn = _RPN(config, anchors, _FloatRPNHead(config.fpn_channels, len(_RATIOS)))
    head = TwoMLPHead(config.fpn_channels * _REGION_SIDE**2, config.head_features)
    predictor = _FloatPredictor(config.head_features, classes + 1)
    draw_heads(head, predictor)
    regions = _Regions(config, RegionPooler(body.strides, _REGION_SIDE), head, predictor)
    return GeneralizedRCNN(backbone, rpn, regions, _Batched(body, side_multiple=32))


def _d2_c4(config: ModelConfig, body: Body, classes: int) -> GeneralizedRCNN:
    backbone = _C4(body)
    sizes = tuple(config.anchor_sizes)
    rpn_head = _FloatRPNHead(backbone.out_channels, len(sizes) * len(_RATIOS))
    rpn = _RPN(config, FixedAnchors([sizes], body.strides), rpn_head)
    head = _Res5Head(body)
    predictor = _FloatPredictor(body.res5_channels, classes + 1)
    draw_heads(head, predictor)
    regions = _Regions(config, RegionPooler(body.strides, _C4_REGION_SIDE), head, predictor)
    return GeneralizedRCNN(backbone, rpn, regions, _Batched(body, side_multiple=1))


def _pyramid_strides(body: Body) -> list[int]:
    """Strides of the pyramid's maps: those of the network's, and that of the pooled one."""
    return [*body.strides, 2 * body.strides[-1]]


def _check_anchors(config: ModelConfig, body: Body) -> None:
    strides = _pyramid_strides(body)
    if len(config.anchor_sizes) != len(strides):
        raise UserError(
            f"model.anchor_sizes has {len(config.anchor_sizes)} sizes, and the pyramid on network {body.architecture} "
            f"has {len(strides)} maps, of strides {', '.join(map(str, strides))}: give one size for each"
        )


def _torchvision_fpn(config: ModelConfig, body: Body, classes: int) -> FasterRCNN:
    """torchvision's detector with its defaults; images are resized within it."""
    return FasterRCNN(
        _Pyramid(body, config.fpn_channels, norm=None),
        min_size=tuple(config.short_sides),
        max_size=config.longest_side,
        image_mean=list(body.mean),
        image_std=list(body.std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (_RATIOS,) * len(config.anchor_sizes)
        ),
        rpn_head=_FloatRPNHead(config.fpn_channels, len(_RATIOS)),
        box_predictor=_FloatPredictor(config.head_features, classes + 1),
        rpn_pre_nms_top_n_train=config.rpn_candidates_train,
        rpn_pre_nms_top_n_test=config.rpn_candidates_test,
        rpn_post_nms_top_n_train=config.rpn_proposals_train,
        rpn_post_nms_top_n_test=config.rpn_proposals_test,
        rpn_batch_size_per_image=config.anchors_per_image,
        box_batch_size_per_image=config.regions_per_image,
    )


class _Pyramid(nn.Module):
    """A network and its feature pyramid (Lin et al. 2017), with one coarser map by max-pooling: p2 .. p6."""

    def __init__(self, body: Body, channels: int, *, norm: Any) -> None:
        super().__init__()
        self.body = body.network
        self.fpn = FeaturePyramidNetwork(
            body.channels, channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm
        )
        self.out_channels = channels
        self._levels = len(body.channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, channels, H, W) -> maps by name, finest first, (B, fpn_channels, H / stride, W / stride)."""
        maps = self.body(images)[-self._levels :]
        pyramid: dict[str, Tensor] = self.fpn(
            OrderedDict((str(level), each) for level, each in enumerate(maps))
        )
        return pyramid


class _C4(nn.Module):
    """A ResNet up to its last stage but one."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body.network
        self.out_channels = body.channels[-1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, channels, H, W) -> {"0": (B, out_channels, H / 16, W / 16)}."""
        return {"0": self.body(images)[-1]}


class _Res5Head(nn.Sequential):
    """A ResNet's last stage on every region, and MoCo's extra norm after it: (R, channels, 14, 14) -> (R, features)."""

    def __init__(self, body: Body) -> None:
        assert body.res5 is not None
        super().__init__(
            OrderedDict(
                layer4=body.res5,
                norm=nn.BatchNorm2d(body.res5_channels),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
            )
        )


def _fpn_norm(config: ModelConfig) -> Any:
    """Norm layers of the pyramid: none beside frozen ones, as in Detectron2; the backbone's kind in MoCo's recipe."""
    return None if config.norm == "frozen" else nn.BatchNorm2d


class _Batched(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size with the mean colour. The loader has resized them.

    Only a pyramid needs sides that are multiples of 32. As in Detectron2, no more is padded without one.
    """

    def __init__(self, body: Body, *, side_multiple: int) -> None:
        super().__init__(1, 1, list(body.mean), list(body.std), size_divisible=side_multiple)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """The image and its target as they are."""
        return image, target


class FixedAnchors(AnchorGenerator):
    """Anchors of exact corners at fixed strides, one after another by size, then by ratio (Detectron2).

    torchvision rounds the corners, and takes image side // map side for the stride, which is 61 for a side of 800.

    Args:
        sizes: square roots of the anchors' areas for every map, in pixels.
        strides: stride of every map, in pixels.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...]], strides: Sequence[int]) -> None:
        super().__init__(tuple(sizes), (_RATIOS,) * len(sizes))
        self._strides = strides

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> Tensor:
        """Corners of the anchors around (0, 0): (len(scales) * len(aspect_ratios), 4)."""
        sides = [
            (size / math.sqrt(ratio), size * math.sqrt(ratio))
            for size in scales
            for ratio in aspect_ratios
        ]
        corners = [(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides]
        return torch.tensor(corners, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of every image, float32 (A, 4), the same for all."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self._strides]
        grids = [list(each.shape[-2:]) for each in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class RegionPooler(nn.Module):
    """RoIAlign with exact corners (aligned) and as many samples as a bin has pixels, of the map that fits the region.

    torchvision's pooler takes two samples a side and shifts by half a pixel, and has no argument for either.

    Args:
        strides: strides of the maps that regions are pooled from, finest first.
        side: side of the pooled map.
    """

    def __init__(self, strides: Sequence[int], side: int) -> None:
        super().__init__()
        self._strides = strides
        self._levels = [int(math.log2(stride)) for stride in strides]
        self._side = side

    def forward(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any
    ) -> Tensor:
        """The regions of all images, float32 (sum of R, channels, side, side)."""
        maps = list(features.values())[: len(self._strides)]
        image = torch.cat([b.new_full((len(b), 1), number) for number, b in enumerate(boxes)])
        regions = torch.cat([image, torch.cat(boxes)], dim=1).float()
        level = self._level_of(regions[:, 1:])
        pooled = regions.new_zeros(len(regions), maps[0].shape[1], self._side, self._side)
        for number, (each, stride) in enumerate(zip(maps, self._strides, strict=True)):
            (here,) = torch.where(level == number)
            pooled[here] = roi_align(
                *(each.float(), regions[here], self._side, 1 / stride),
                sampling_ratio=0,
                aligned=True,
            )
        return pooled

    def _level_of(self, boxes: Tensor) -> Tensor:
        sides = box_area(boxes).sqrt()
        level = _CANONICAL_LEVEL + torch.log2(sides / _CANONICAL_SIDE + _LEVEL_MARGIN)
        return level.floor().clamp(self._levels[0], self._levels[-1]).long() - self._levels[0]


class CounterSampler(BalancedPositiveNegativeSampler):
    """torchvision's balanced sampler, which draws by counters in place of the global generator.

    Attributes:
        words: words of every image of the batch that its draws are a function of, beside the stream.
    """

    def __init__(self, stream: int, number: int, positive_fraction: float) -> None:
        super().__init__(number, positive_fraction)
        self.words: Sequence[tuple[int, ...]] = ()
        self._stream = stream

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Two masks, uint8 (n,), of every image: the positive (>= 1) and the negative (0) entries that are drawn."""
        chosen = [
            self._draw(matched, words)
            for matched, words in zip(matched_idxs, self.words, strict=True)
        ]
        return [positive for positive, _ in chosen], [negative for _, negative in chosen]

    def _draw(self, matched: Tensor, words: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        (positive,), (negative,) = torch.where(matched >= 1), torch.where(matched == 0)
        positives = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
        negatives = min(len(negative), self.batch_size_per_image - positives)
        masks = []
        for among, number in ((positive, positives), (negative, negatives)):
            order = random_bits(self._stream, *words, among).argsort(stable=True)
            mask = torch.zeros_like(matched, dtype=torch.uint8)
            mask[among[order[:number]]] = 1
            masks.append(mask)
        return masks[0], masks[1]


def set_draws(detector: GeneralizedRCNN, words: Sequence[tuple[int, ...]]) -> None:
    """Set what the samplers' draws for the images of the next batch are a function of."""
    for sampler in (detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler):
        if isinstance(sampler, CounterSampler):
            sampler.words = words


class _FloatRPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and box deltas of every map in float32: boxes of half precision would be off by pixels."""
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


class _FloatPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, classes + 1) and box deltas (R, 4 (classes + 1)) of the regions in float32, likewise."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class _RPN(RegionProposalNetwork):
    def __init__(self, config: ModelConfig, anchors: FixedAnchors, head: RPNHead) -> None:
        super().__init__(
            *(anchors, head, 0.7, 0.3, config.anchors_per_image, 0.5),
            {"training": config.rpn_candidates_train, "testing": config.rpn_candidates_test},
            {"training": config.rpn_proposals_train, "testing": config.rpn_proposals_test},
            0.7,
        )
        self.fg_bg_sampler = CounterSampler(DETECTION_ANCHORS, config.anchors_per_image, 0.5)
        self._beta = config.box_loss_beta

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes, over the anchors drawn: smooth L1 of width beta, which 0 makes L1.

        NOTE: Detectron2 divides by 256 anchors for every image, also where an image has fewer.
        """
        positive, negative = (torch.cat(each) > 0 for each in self.fg_bg_sampler(labels))
        drawn = positive | negative
        boxes = box_loss(
            pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], self._beta
        )
        is_object = F.binary_cross_entropy_with_logits(
            objectness.flatten()[drawn], torch.cat(labels)[drawn]
        )
        return is_object, boxes / drawn.sum()


class _Regions(RoIHeads):
    def __init__(
        self, config: ModelConfig, pooler: RegionPooler, head: nn.Module, predictor: nn.Module
    ) -> None:
        super().__init__(
            *(pooler, head, predictor, 0.5, 0.5, config.regions_per_image, 0.25, None),
            *(_SCORE_THRESHOLD, 0.5, _DETECTIONS_PER_IMAGE),
        )
        self.fg_bg_sampler = CounterSampler(DETECTION_REGIONS, config.regions_per_image, 0.25)
        self._beta = config.box_loss_beta

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of every image; in training none, and the losses of classes and boxes over the regions drawn."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)  # type: ignore[no-any-return]
        proposals, _, each_label, each_target = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        labels, box_targets = torch.cat(each_label), torch.cat(each_target)
        (positive,) = torch.where(labels > 0)
        # A box of each class, of which the right one learns.
        of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        boxes = box_loss(of_class, box_targets[positive], self._beta) / len(labels)
        return [], {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": boxes}


def box_loss(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """The sum of smooth L1 over boxes, (n, 4): 0.5 x^2 / beta where |x| < beta, else |x| - beta / 2; beta 0 is L1."""
    return F.smooth_l1_loss(deltas, targets, beta=beta, reduction="sum")


def draw_heads(head: nn.Module, predictor: FastRCNNPredictor) -> None:
    """Detectron2's initial weights: c2_xavier for the fully connected layers, N(0, .01) and N(0, .001) for the last.

    torchvision leaves them at the defaults of nn.Linear. Those of the RPN and of the pyramid are the same in both.
    """
    for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
    for last, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(last.weight, std=std)
        nn.init.zeros_(last.bias)
