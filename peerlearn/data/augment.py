"""Random views of image batches: one set of parameters per image, all images in few tensor operations.

Parameters are drawn on the CPU from counters (``counter_random``), pixels live on any device.
Dimensions: B batch. Image tensors are (B, channels, height, width) with 1 or 3 channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, interpolate, pad

from peerlearn.compute.device import full_float32
from peerlearn.counter_random import VIEWS, random_bits, uniform
from peerlearn.data.recipes import Augmentation

_CROP_ATTEMPTS = 10
# The jitter operations in ``ViewParameters.order``, torchvision's numbering; 0 is brightness.
_CONTRAST, _SATURATION, _HUE = range(1, 4)
# ITU-R 601-2 luma as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)
_BLOCK_VALUES = 3 * 2**18


class ViewParameters(NamedTuple):
    """What one view does to each of B images; all tensors on the CPU.

    Boxes lie inside the image, except for recipes with ``crop_padding``.
    The factors are those of torchvision's ``adjust_*``. They count only where ``jitter`` is set.
    ``sigma`` is in pixels and counts only where ``blur`` is set.
    """

    box: Tensor  # (B, 4) int64: top, left, height, width
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool
    brightness: Tensor  # (B,) float64
    contrast: Tensor  # (B,) float64
    saturation: Tensor  # (B,) float64
    hue: Tensor  # (B,) float64, in turns
    order: Tensor  # (B, 4) int64: the jitter operation (0 brightness .. 3 hue) at each position
    grayscale: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float64
    solarize: Tensor  # (B,) bool


def draw_view_parameters(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    draw: Tensor,
    view: int,
    height: int | Tensor,
    width: int | Tensor,
) -> ViewParameters:
    """Draw one view of B images.

    The result for an image depends on (seed, epoch, index, draw, view), its size and the recipe
    alone, bit for bit.

    Args:
        augmentation: recipe to draw from.
        seed: seed of the run.
        epoch: number of the epoch.
        index: number of each image in the dataset, (B,).
        draw: how often the epoch has drawn each image before, (B,).
        view: number of the view.
        height: height of the images in pixels, (B,) where sizes differ.
        width: width of the images in pixels, (B,) where sizes differ.
    """
    key = random_bits(VIEWS, seed, epoch, view, index, draw)
    # What is added comes last: a draw keeps its place for ever, or every run would change.
    counts = (2 * _CROP_ATTEMPTS + 2, 4, 4, 4, 1, 1)
    draws = uniform(key[:, None], torch.arange(sum(counts)))
    box, switches, factors, order, sigma, solarize = draws.split(counts, dim=1)
    probabilities = (
        augmentation.flip_probability,
        augmentation.jitter_probability,
        augmentation.grayscale_probability,
        augmentation.blur_probability,
    )
    flip, jitter, grayscale, blur = (switches < _row(probabilities)).unbind(1)
    *strengths, hue_strength = augmentation.jitter
    low = _row([max(0.0, 1 - strength) for strength in strengths] + [-hue_strength])
    high = _row([1 + strength for strength in strengths] + [hue_strength])
    brightness, contrast, saturation, hue = _between(factors, low, high).unbind(1)
    return ViewParameters(
        box=_draw_boxes(augmentation, box, height, width),
        flip=flip,
        jitter=jitter,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        order=order.argsort(dim=1, stable=True),
        grayscale=grayscale,
        blur=blur,
        sigma=_between(sigma[:, 0], *augmentation.blur_sigma),
        solarize=solarize[:, 0] < augmentation.solarize_probability,
    )


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _between(draws: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return draws * (high - low) + low


def _draw_boxes(
    augmentation: Augmentation, draws: Tensor, height: int | Tensor, width: int | Tensor
) -> Tensor:
    """Boxes (B, 4) by the rule of torchvision's RandomResizedCrop, from draws (B, 2 * attempts + 2).

    With ``crop_padding`` they follow the rule of torchvision's RandomCrop.
    """
    batch = draws.shape[0]
    heights = torch.as_tensor(height).expand(batch).to(torch.float64)
    widths = torch.as_tensor(width).expand(batch).to(torch.float64)
    if augmentation.centred:
        side = torch.minimum(heights, widths)
        top, left = ((extent - side).div(2).floor() for extent in (heights, widths))
        return torch.stack((top, left, side, side), dim=1).to(torch.int64)
    if augmentation.crop_padding:
        padding = augmentation.crop_padding
        top, left = ((draws[:, -2:] * (2 * padding + 1)).floor() - padding).unbind(1)
        return torch.stack((top, left, heights, widths), dim=1).to(torch.int64)

    areas = _between(draws[:, :_CROP_ATTEMPTS], *augmentation.crop_scale)
    areas = areas * (heights * widths)[:, None]
    ratios = _log_uniform(draws[:, _CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS], augmentation.crop_ratio)
    box_widths = _rounded_root(areas * ratios)
    box_heights = _rounded_root(areas / ratios)
    fits = (box_widths > 0) & (box_widths <= widths[:, None])
    fits &= (box_heights > 0) & (box_heights <= heights[:, None])
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    any_fits = fits.gather(1, first)[:, 0]

    # Where no attempt fits: the largest centred box within the range of ratios.
    low, high = augmentation.crop_ratio
    largest_width = torch.minimum(widths, (heights * high).round())
    largest_height = torch.minimum(heights, (widths / low).round())
    box_width = torch.where(any_fits, box_widths.gather(1, first)[:, 0], largest_width)
    box_height = torch.where(any_fits, box_heights.gather(1, first)[:, 0], largest_height)

    slack_top, slack_left = heights - box_height, widths - box_width
    top = torch.where(any_fits, draws[:, -2] * (slack_top + 1), slack_top / 2).floor()
    left = torch.where(any_fits, draws[:, -1] * (slack_left + 1), slack_left / 2).floor()
    return torch.stack((top, left, box_height, box_width), dim=1).to(torch.int64)


def _rounded_root(values: Tensor) -> Tensor:
    # Not torch.sqrt: its vector library may round the last bit by the position in the batch. numpy
    # uses the processor's square root, which is exactly rounded in every lane.
    return torch.from_numpy(np.sqrt(values.numpy())).round()


def _log_uniform(draws: Tensor, limits: tuple[float, float]) -> Tensor:
    """Turn draws in [0, 1) into values whose logarithm is uniform between the limits."""
    low, high = map(math.log, limits)
    exponent = (draws - 0.5) * (high - low)
    # Not torch.exp: its last bit may depend on the position in the batch. Products and sums are
    # exactly rounded everywhere. For ratios within 3/4 .. 4/3 the series is exact to 1e-13.
    value = torch.ones_like(exponent)
    for degree in range(10, 0, -1):
        value = value * exponent / degree + 1
    return value * math.exp((low + high) / 2)


def resized_crop(images: Tensor, box: Tensor, size: int) -> Tensor:
    """Cut one box from each image and resize it, bilinear with antialiasing.

    Args:
        images: images, (B, channels, height, width), uint8 or float in [0, 1].
        box: boxes as in ``ViewParameters``, (B, 4) int64; what lies outside the image is black.
        size: height and width of the result in pixels.

    Returns:
        float32 (B, channels, size, size) in [0, 1], up to rounding equal to torchvision's
        ``resized_crop(antialias=True)`` of the float image padded with zeros.
    """
    margins = _margins(box, images.shape[2], images.shape[3])
    box = box.to(images.device, non_blocking=True)
    crops = torch.empty((*images.shape[:2], size, size), device=images.device)
    # Products in a shorter format would be off by a grey level. Inference mode spares autograd's bookkeeping.
    with torch.inference_mode(), full_float32(images.device):
        for block in _blocks(crops):
            _resized_crop(images[block], box[block], margins, crops[block])
    return crops


def _margins(box: Tensor, height: int, width: int) -> tuple[int, int]:
    """How many pixels the boxes reach beyond the image at most: above or below it, and to its sides."""
    if not box.shape[0]:
        return 0, 0
    start, length = box[:, :2], box[:, 2:]
    extent = torch.tensor([height, width], device=box.device)
    beyond = torch.maximum(-start, start + length - extent).amax(dim=0)
    vertical, horizontal = beyond.clamp_min(0).tolist()
    return vertical, horizontal


def _blocks(images: Tensor) -> list[slice]:
    """Cut the batch so that the temporaries of a block stay in the CPU's cache; other devices get one block."""
    batch = images.shape[0]
    on_cpu = images.device.type == "cpu"
    length = max(1, _BLOCK_VALUES // images[:1].numel() if on_cpu else batch)
    return [slice(start, start + length) for start in range(0, batch, length)]


def _resized_crop(images: Tensor, box: Tensor, margins: tuple[int, int], crops: Tensor) -> None:
    rows = _resize_weights(box[:, 0], box[:, 2], images.shape[2], crops.shape[2], margins[0])
    columns = _resize_weights(box[:, 1], box[:, 3], images.shape[3], crops.shape[3], margins[1])
    if images.dtype == torch.uint8:
        rows.div_(255)
    _filter(images.to(torch.float32), rows, columns, crops)


def _filter(images: Tensor, rows: Tensor, columns: Tensor, filtered: Tensor) -> None:
    """Set ``filtered`` to rows @ image @ columns^T for every channel.

    Args:
        images: images, (B, channels, height, width).
        rows: weights of the rows, (B, rows, height).
        columns: weights of the columns, (B, columns, width).
        filtered: the output, (B, channels, rows, columns), contiguous.
    """
    channels, height = images.shape[1:3]
    # (B, channels * height, width) @ (B, width, columns) -> (B * channels, height, columns)
    narrow = torch.bmm(images.flatten(1, 2), columns.mT).view(-1, height, columns.shape[1])
    # (B * channels, rows, height) @ (B * channels, height, columns) -> (B * channels, rows, columns)
    per_channel = rows[:, None].expand(-1, channels, -1, -1).flatten(0, 1)
    torch.bmm(per_channel, narrow, out=filtered.flatten(0, 1))


def _resize_weights(start: Tensor, length: Tensor, extent: int, size: int, margin: int) -> Tensor:
    """Weights (B, size, extent) of a triangle filter from ``length`` pixels at ``start`` to ``size`` pixels.

    The filter is as wide as the larger of the two grids' steps and is normalised inside the box. The box may reach up
    to ``margin`` pixels beyond the extent. Those pixels are black and need no weights.
    """
    step = length.to(torch.float64)[:, None] / size  # (B, 1)
    steps = torch.arange(size, device=start.device) + 0.5
    centres = start[:, None] + step * steps  # (B, size)
    pixels = torch.arange(-margin, extent + margin, device=start.device) + 0.5
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    # Pixels outside the box are moved too far from every centre to count.
    pixels = torch.where(inside, pixels, 1e9)  # (B, extent + 2 * margin)
    distances = (pixels[:, None] - centres.to(torch.float32)[:, :, None]).abs_()
    weights = distances.mul_(-1 / step.clamp(min=1).to(torch.float32)[:, :, None]).add_(1)
    weights.clamp_(min=0)
    weights.div_(weights.sum(dim=2, keepdim=True))
    return weights[:, :, margin : margin + extent]


def distort(crops: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> Tensor:
    """Flip, jitter, grey, blur and solarise each crop in the recipe's order.

    Values equal those of torchvision's functions on the float image, clamped as there. On one
    channel saturation, hue and greying do nothing.

    Args:
        crops: crops, float32 (B, channels, size, size) in [0, 1].
        parameters: what happens to each crop.
        augmentation: recipe that the parameters were drawn from.

    Returns:
        A new tensor of the same shape.
    """
    distorted = torch.empty_like(crops)
    with torch.inference_mode(), full_float32(crops.device):
        for block in _blocks(crops):
            images, chosen = distorted[block], ViewParameters(*(p[block] for p in parameters))
            _flip(crops[block], chosen.flip, images)
            if augmentation.grayscale_first:
                _grayscale(images, chosen, augmentation)
            _jitter(images, chosen, augmentation)
            if not augmentation.grayscale_first:
                _grayscale(images, chosen, augmentation)
            _blur(images, chosen, augmentation)
            _solarize(images, chosen, augmentation)
    return distorted


def _flip(crops: Tensor, flip: Tensor, flipped: Tensor) -> None:
    """Set ``flipped`` to the crops, mirrored where ``flip`` is set."""
    weight = flip.to(crops.dtype).to(crops.device, non_blocking=True)
    # lerp is exact at 0 and 1, and several times faster on a CPU than where.
    torch.lerp(crops, crops.flip(3), weight[:, None, None, None], out=flipped)


def _positions(mask: Tensor, device: torch.device) -> Tensor:
    # Counted on the CPU, where the parameters are: counting on the device would wait for the GPU.
    return mask.nonzero()[:, 0].to(device, non_blocking=True)


def _luma(images: Tensor) -> Tensor:
    """A new tensor (B, 1, height, width)."""
    if images.shape[1] == 1:
        return images.clone()
    red, green, blue = images.split(1, dim=1)
    luma: Tensor = red * _LUMA[0]
    return luma.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _grayscale(images: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> None:
    """In place: three equal channels of luma."""
    if not augmentation.grayscale_probability or images.shape[1] == 1:
        return
    chosen = _positions(parameters.grayscale, images.device)
    images.index_copy_(0, chosen, _luma(images.index_select(0, chosen)).expand(-1, 3, -1, -1))


def _jitter(images: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> None:
    """In place: the four jitter operations, each image in its own order.

    Brightness, contrast and saturation are blends, hue is not. So every image takes three blends,
    in its own order, and one hue shift before, between or after them. The images are sorted by the
    position of the hue. Then the images that take the n-th blend before the hue lie in front of the
    others, and the images without jitter lie at the end.
    """
    if not augmentation.jitter_probability:
        return
    hue_position = torch.where(parameters.jitter, parameters.order.argmax(dim=1), -1)
    sorting = hue_position.argsort(descending=True, stable=True)
    jittered, *before_hue = (hue_position >= torch.arange(4)[:, None]).sum(dim=1).tolist()
    chosen = sorting[:jittered]
    blends = _blend_weights(parameters, chosen, images.shape[1])
    blends = blends.to(images.device, non_blocking=True)[..., None, None, None]
    hue = parameters.hue[chosen].to(torch.float32).to(images.device, non_blocking=True)
    work = images.index_select(0, sorting.to(images.device, non_blocking=True))
    for blend, count in zip(blends, before_hue, strict=True):
        _blend(work[:count], blend[:, :count])
    if images.shape[1] == 3:
        _shift_hue(work[:jittered], hue)
    for blend, count in zip(blends, before_hue, strict=True):
        _blend(work[count:jittered], blend[:, count:])
    unsorting = sorting.argsort().to(images.device, non_blocking=True)
    torch.index_select(work, 0, unsorting, out=images)


def _blend_weights(parameters: ViewParameters, chosen: Tensor, channels: int) -> Tensor:
    """Weights of image, mean luma and luma in the three blends: float32 (3 blends, 3, chosen).

    A blend is factor * image + (1 - factor) * target with black (brightness), the mean luma
    (contrast) or the luma (saturation) as target.
    """
    neutral = torch.ones_like(parameters.saturation)
    saturation = parameters.saturation if channels == 3 else neutral
    factors = torch.stack((parameters.brightness, parameters.contrast, saturation), dim=1)
    order = parameters.order[chosen]
    order = order[order != _HUE].view(-1, 3)
    factor = factors[chosen].gather(1, order)
    rest = 1 - factor
    weights = (factor, rest * (order == _CONTRAST), rest * (order == _SATURATION))
    return torch.stack(weights).permute(2, 0, 1).to(torch.float32)


def _blend(images: Tensor, weights: Tensor) -> None:
    """In place: weighted sum of the image, its mean luma and its luma, clamped to [0, 1]."""
    if images.shape[0] == 0:
        return
    of_image, of_mean, of_luma = weights
    luma = _luma(images)
    mean = luma.mean(dim=(2, 3), keepdim=True)
    target = luma.mul_(of_luma).add_(mean * of_mean)
    images.mul_(of_image).add_(target).clamp_(0, 1)


def _shift_hue(images: Tensor, turns: Tensor) -> None:
    """In place: turn the HSV hue of (B, 3, height, width) by (B,) turns; value and chroma stay.

    Angles are in sextants of the colour circle. They count from cyan, the opposite of red, towards
    blue. In every sextant (chroma + value + red - green - blue) / chroma is the size of the angle,
    and blue - green has its sign. This replaces the three branches of the textbook. On the way back
    a channel lies below the value by the chroma times a trapezoid of the angle, which is a clamped
    absolute value.
    """
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    # In place where possible: new memory costs a CPU as much time as the arithmetic.
    chroma = torch.sub(value, low, out=low)
    angle = (value - green).add_(red).sub_(blue)
    scratch = blue - green
    # A grey pixel has no hue. Its angle has no effect below, but it must be finite.
    angle.div_(chroma.clamp(min=1e-30)).add_(1).copysign_(scratch)
    angle.add_(6 * turns[:, None, None, None])
    angle.sub_(torch.mul(angle, 1 / 6, out=scratch).round_(), alpha=6)
    above = value + chroma
    share = torch.add(angle, 1, out=scratch).abs_().clamp_(1, 2)
    torch.addcmul(above, chroma, share, value=-1, out=green)
    share = torch.sub(angle, 1, out=scratch).abs_().clamp_(1, 2)
    torch.addcmul(above, chroma, share, value=-1, out=blue)
    torch.addcmul(value.sub_(chroma, alpha=2), chroma, angle.abs_().clamp_(1, 2), out=red)


def _blur(images: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> None:
    """In place: Gaussian blur with reflected borders.

    The kernel reaches three times the recipe's largest sigma, but no further than a reflection can
    (size - 1).

    NOTE: MoCo v2 blurs with PIL, which approximates the Gaussian by boxes.
    """
    if not augmentation.blur_probability:
        return
    size = images.shape[3]
    radius = min(math.ceil(3 * augmentation.blur_sigma[1]), size - 1)
    chosen = _positions(parameters.blur, images.device)
    sigma = parameters.sigma[parameters.blur].to(torch.float32)
    sigma = sigma.to(images.device, non_blocking=True)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = (offsets / sigma[:, None]).square().mul(-0.5).softmax(dim=1)  # (blurred, taps)
    # Tails below the resolution of float32 give subnormal products, which are a hundred times slower.
    kernels = kernels * (kernels > 1e-9)
    # taps[source, target, offset] is 1 where that tap of that target reads that source.
    identity = torch.eye(size, device=images.device)
    taps = pad(identity[None], (radius, radius), mode="reflect")[0].unfold(1, 2 * radius + 1, 1)
    weights = torch.einsum("sto,bo->bts", taps, kernels)
    work = images.index_select(0, chosen)
    _filter(work, weights, weights, work)
    images.index_copy_(0, chosen, work)


def _solarize(images: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> None:
    """In place: values from the threshold on are inverted."""
    if not augmentation.solarize_probability:
        return
    chosen = _positions(parameters.solarize, images.device)
    work = images.index_select(0, chosen)
    bright = work >= augmentation.solarize_threshold
    images.index_copy_(0, chosen, torch.where(bright, 1 - work, work))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel, of float images (B, channels, height, width)."""
    means, variances = torch.tensor((mean, [value**2 for value in std]), dtype=images.dtype)
    means = means.to(images.device, non_blocking=True)
    variances = variances.to(images.device, non_blocking=True)
    # Batch norm with fixed statistics is the same formula in one pass over the pixels.
    return batch_norm(images, means, variances, eps=0.0)


# `evaluation_view` in words, for protocols and for the keys of kept features: another view needs other words.
EVALUATION_VIEW = (
    "images of the network's size as they are; with a shorter side of 64 pixels or more resized to 256/224 of it and "
    "centre-cropped; smaller ones resized whole; bilinear with antialias"
)


def evaluation_view(images: Tensor, *, size: int) -> Tensor:
    """The view that evaluations see.

    Images of this size stay as they are. Other images with a shorter side of at least 64 pixels are
    resized so that this side is size * 256 / 224, and the centre is cut out: the test transform of
    MoCo's linear protocol (facebookresearch/moco main_lincls.py: resize 256, centre crop 224). In
    smaller images the object fills the frame; they are resized whole.

    Args:
        images: images, (B, channels, height, width), uint8 or float in [0, 1].
        size: height and width of the view in pixels.

    Returns:
        float32 (B, channels, size, size) in [0, 1].
    """
    height, width = images.shape[2:]
    pixels = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images.float()
    if (height, width) == (size, size):
        return pixels
    if is_seen_whole(height, width, size=size):
        return _resize(pixels, size, size)
    shorter, side = min(height, width), resized_side(size)
    pixels = _resize(pixels, height * side // shorter, width * side // shorter)
    top, left = (round((extent - size) / 2) for extent in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def is_seen_whole(height: int, width: int, *, size: int) -> bool:
    """Whether the evaluation view of ``size`` pixels shows the whole image, not its centre alone."""
    return (height, width) == (size, size) or min(height, width) < 64


def resized_side(size: int) -> int:
    """The shorter side in pixels to which an image is resized before its centre of ``size`` pixels is cut out."""
    return round(size * 256 / 224)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    return interpolate(images, (height, width), mode="bilinear", antialias=True)


def pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images on the device as float32 in [0, 1]."""
    images = images.to(device, non_blocking=True)
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images
