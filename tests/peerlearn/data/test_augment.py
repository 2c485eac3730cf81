"""Views: what is drawn for each, and their pixels beside torchvision's."""

import colorsys
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from peerlearn.data.augment import (
    ViewParameters,
    distort,
    draw_view_parameters,
    evaluation_view,
    normalise,
    resized_crop,
)
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
EVERYTHING = Augmentation(
    jitter=(0.8, 0.7, 0.9, 0.5),
    jitter_probability=0.9,
    grayscale_probability=0.3,
    blur_probability=0.6,
    blur_sigma=(0.1, 2.0),
)
# Apart: at its threshold the last bit of a value makes all the difference.
SOLARIZING = replace(EVERYTHING, solarize_probability=0.4, solarize_threshold=0.6)


def drawn(augmentation, batch, *, height=32, width=32, first=0, seed=0, epoch=0, draw=0, view=0):
    return draw_view_parameters(
        augmentation,
        seed=seed,
        epoch=epoch,
        index=torch.arange(first, first + batch),
        draw=torch.full((batch,), draw),
        view=view,
        height=height,
        width=width,
    )


def parameters_for(batch, **chosen) -> ViewParameters:
    """Parameters that change nothing, but for the chosen fields."""
    off = torch.zeros(batch, dtype=torch.bool)
    one = torch.ones(batch, dtype=torch.float64)
    neutral = ViewParameters(
        box=torch.zeros(batch, 4, dtype=torch.int64),
        flip=off,
        jitter=off,
        brightness=one,
        contrast=one,
        saturation=one,
        hue=one * 0,
        order=torch.arange(4).repeat(batch, 1),
        grayscale=off,
        blur=off,
        sigma=one,
        solarize=off,
    )
    return neutral._replace(**chosen)


def images_of(batch, channels, height, width, seed=0) -> Tensor:
    return torch.rand(
        (batch, channels, height, width), generator=torch.Generator().manual_seed(seed)
    )


def torchvision_distorted(image: Tensor, parameters: ViewParameters, i: int, gray_first: bool):
    """One image through torchvision's functions, one after the other."""
    channels, size = image.shape[0], image.shape[-1]
    factors = torch.stack(parameters[3:7])[:, i].tolist()

    def jitter(image):
        for operation in parameters.order[i].tolist() if parameters.jitter[i] else ():
            image = ADJUST[operation](image, factors[operation])
        return image

    def gray(image):
        return tv.rgb_to_grayscale(image, channels) if parameters.grayscale[i] else image

    if parameters.flip[i]:
        image = tv.horizontal_flip(image)
    image = jitter(gray(image)) if gray_first else gray(jitter(image))
    if parameters.blur[i]:
        kernel_size = 2 * min(6, size - 1) + 1
        image = tv.gaussian_blur(image, kernel_size, parameters.sigma[i].item())
    return image


def assert_distorts_like_torchvision(crops, parameters, augmentation, atol=4e-6):
    before_solarising = torch.stack(
        [
            torchvision_distorted(crop, parameters, i, augmentation.grayscale_first)
            for i, crop in enumerate(crops)
        ]
    )
    threshold = augmentation.solarize_threshold
    expected = before_solarising.clone()
    for i in parameters.solarize.nonzero()[:, 0].tolist():
        expected[i] = tv.solarize(before_solarising[i], threshold)
    # Rounding decides which side of the threshold a value lies on that is as good as there.
    decided = (before_solarising - threshold).abs() > atol
    decided |= ~parameters.solarize[:, None, None, None]
    assert decided.double().mean() > 0.99
    distorted = distort(crops, parameters, augmentation)
    torch.testing.assert_close(distorted[decided], expected[decided], atol=atol, rtol=0)


# Drawing


@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS.values(), EVERYTHING])
def test_parameters_are_bit_equal_in_any_batch(augmentation):
    whole = drawn(augmentation, 1000, height=47, width=61)
    for batch in (1, 3, 7, 64):
        for first in (0, 11, 1000 - batch):
            part = drawn(augmentation, batch, first=first, height=47, width=61)
            for name, values, expected in zip(part._fields, part, whole, strict=True):
                assert torch.equal(values, expected[first : first + batch]), name


def test_parameters_are_pinned_so_that_no_refactoring_changes_runs():
    parameters = drawn(AUGMENTATIONS["moco_v2"], 3, height=48, width=40, seed=5, epoch=2, view=1)
    assert parameters.box.tolist() == [[12, 2, 23, 23], [1, 0, 47, 38], [9, 1, 23, 27]]
    assert parameters.order.tolist() == [[2, 1, 0, 3], [0, 2, 1, 3], [1, 3, 0, 2]]
    assert parameters.brightness.tolist() == [
        0.9801297048717483,
        1.1980160827829924,
        0.798239246739315,
    ]
    assert parameters.hue.tolist() == [
        -0.07626857870534387,
        0.03503951239036904,
        0.046318673781645336,
    ]


def test_each_of_seed_epoch_index_draw_and_view_changes_the_view():
    base = {"seed": 3, "epoch": 4, "first": 50, "draw": 1, "view": 0}
    draws = [drawn(EVERYTHING, 40, **base)]
    draws += [drawn(EVERYTHING, 40, **base | {name: base[name] + 100}) for name in base]
    for one, other in itertools.combinations(draws, 2):
        assert not (one.hue == other.hue).any()
        assert not (one.box == other.box).all(dim=1).all()
        assert not torch.equal(one.order, other.order)
    assert torch.equal(drawn(EVERYTHING, 40, **base).hue, draws[0].hue)


def test_images_of_unlike_sizes_draw_as_they_would_alone():
    heights, widths = torch.tensor([32, 500, 20, 375]), torch.tensor([32, 375, 90, 1])
    together = drawn(EVERYTHING, 4, height=heights, width=widths)
    for i in range(4):
        alone = drawn(EVERYTHING, 1, first=i, height=int(heights[i]), width=int(widths[i]))
        assert torch.equal(together.box[i], alone.box[0])


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**62))
def test_boxes_lie_within_the_image(height, width, seed):
    box = drawn(Augmentation(), 50, height=height, width=width, seed=seed).box
    top, left, box_height, box_width = box.unbind(1)
    assert box.dtype == torch.int64
    assert (box >= 0).all()
    assert (box_height > 0).all()
    assert (box_width > 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (32, 32), (40, 90), (300, 180)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_boxes_are_distributed_like_torchvision_s(height, width, scale):
    torch.manual_seed(0)
    ratio = (3 / 4, 4 / 3)
    blank = torch.empty(1, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(3000)]
    )
    ours = drawn(Augmentation(crop_scale=scale), 6000, height=height, width=width).box

    def measures(box):
        top, left, box_height, box_width = box.double().unbind(1)
        shares = top / (height - box_height).clamp(min=1), left / (width - box_width).clamp(min=1)
        return box_height * box_width, box_width / box_height, *shares

    for our_measure, their_measure in zip(measures(ours), measures(theirs), strict=True):
        assert stats.ks_2samp(our_measure, their_measure).pvalue > 1e-3


def test_log_of_the_ratio_is_uniform():
    # So large that rounding to pixels does not show.
    augmentation = Augmentation(crop_scale=(0.01, 0.02), crop_ratio=(0.5, 2.0))
    box = drawn(augmentation, 20_000, height=10**6, width=10**6).box.double()
    log_ratio = (box[:, 3] / box[:, 2]).log()
    assert stats.kstest(log_ratio, "uniform", args=(-math.log(2), 2 * math.log(2))).pvalue > 1e-3
    area = box[:, 2] * box[:, 3] / 1e12
    assert stats.kstest(area, "uniform", args=(0.01, 0.01)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(11, 200), (200, 11), (7, 23), (30, 31), (1, 9)])
def test_crops_that_never_fit_are_torchvision_s_centre_crop(height, width):
    # The whole area in one of these shapes never fits a longer image, and (30, 31) never a shape
    # this long.
    ratio = (3 / 4, 4 / 3) if max(height, width) > 1.5 * min(height, width) else (0.1, 0.2)
    augmentation = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=ratio)
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], list(ratio))
    box = drawn(augmentation, 20, height=height, width=width).box
    assert box.tolist() == [list(expected)] * 20


@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS.values(), EVERYTHING, SOLARIZING])
def test_switches_have_their_probabilities(augmentation):
    count = 20_000
    parameters = drawn(augmentation, count)
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        probability = getattr(augmentation, f"{name}_probability")
        happened = int(getattr(parameters, name).sum())
        if probability in (0, 1):
            assert happened == probability * count
        else:
            assert stats.binomtest(happened, count, probability).pvalue > 1e-3


def test_factors_are_uniform_in_torchvision_s_ranges():
    augmentation = replace(EVERYTHING, jitter=(0.4, 1.5, 0.2, 0.1), blur_sigma=(0.5, 1.25))
    parameters = drawn(augmentation, 20_000)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.5, 1.25),
    ):
        values = getattr(parameters, name)
        assert values.dtype == torch.float64
        assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3, name


def test_a_value_changes_nothing_but_what_it_names():
    before = drawn(EVERYTHING, 500)
    for changes, fields in (
        ({"solarize_probability": 0.5}, ["solarize"]),
        ({"blur_probability": 0.1, "blur_sigma": (1.0, 3.0)}, ["blur", "sigma"]),
        ({"crop_scale": (0.5, 0.6)}, ["box"]),
        ({"jitter": (0.1, 0.7, 0.9, 0.5)}, ["brightness"]),
    ):
        after = drawn(replace(EVERYTHING, **changes), 500)
        differing = [
            name
            for name in ViewParameters._fields
            if not torch.equal(getattr(before, name), getattr(after, name))
        ]
        assert differing == fields


def test_the_24_orders_of_jitter_are_equally_likely():
    order = drawn(EVERYTHING, 24_000).order
    codes = order @ torch.tensor([64, 16, 4, 1])
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_parameters_of_a_view_and_of_both_views_are_uncorrelated():
    count = 20_000
    columns = []
    for view in range(2):
        p = drawn(SOLARIZING, count, height=10**4, width=10**4, view=view)
        rows = [value.double().reshape(count, -1).T for value in p]
        columns += [torch.cat(rows)[1:]]
    correlation = torch.corrcoef(torch.cat(columns))
    # Within box (with its own shape) and within order (a permutation) values do depend.
    names = [0] * 3 + list(range(1, 7)) + [7] * 4 + list(range(8, 12))
    groups = torch.tensor(names + [100 + name for name in names])
    unlike = groups[:, None] != groups
    assert correlation[unlike].abs().max() < 5.5 / math.sqrt(count)


# Crops


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 28), (32, 32, 32), (47, 61, 33), (20, 90, 24), (9, 7, 31), (96, 150, 64)],
)
def test_crops_equal_torchvision_s(channels, height, width, size):
    images = images_of(24, channels, height, width)
    box = drawn(Augmentation(crop_scale=(0.02, 1.0)), 24, height=height, width=width).box
    box[0] = torch.tensor([0, 0, height, width])
    box[1] = torch.tensor([height - 1, width - 1, 1, 1])
    crops = resized_crop(images, box, size)
    expected = [
        tv.resized_crop(image, *one.tolist(), size=[size, size], antialias=True)
        for image, one in zip(images, box, strict=True)
    ]
    assert crops.dtype == torch.float32
    torch.testing.assert_close(crops, torch.stack(expected), atol=1e-5, rtol=0)


def test_crops_of_large_images_are_closer_to_float64_than_torchvision_s():
    images = images_of(1, 1, 500, 375).double()
    box = (31, 17, 451, 350)

    def weights(start, length, extent):
        step = length / 224
        centres = start + step * (torch.arange(224, dtype=torch.float64) + 0.5)
        distances = (torch.arange(extent) + 0.5 - centres[:, None]).abs()
        inside = (torch.arange(extent) >= start) & (torch.arange(extent) < start + length)
        triangle = (1 - distances / max(step, 1)).clamp(min=0) * inside
        return triangle / triangle.sum(dim=1, keepdim=True)

    exact = weights(31, 451, 500) @ images @ weights(17, 350, 375).T
    ours = resized_crop(images, torch.tensor([box]), 224)
    theirs = tv.resized_crop(images.float(), *box, size=[224, 224], antialias=True)
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    assert (ours - exact).abs().max() < 2e-5


def test_crops_of_bytes_are_those_of_the_floats():
    images = (images_of(5, 3, 40, 30) * 256).to(torch.uint8)
    box = drawn(Augmentation(), 5, height=40, width=30).box
    crops = resized_crop(images, box, 32)
    torch.testing.assert_close(crops, resized_crop(images / 255, box, 32), atol=1e-6, rtol=0)
    assert crops.max() <= 1 + 1e-6


# Crops with padding


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_of_the_image_s_size_are_shifted_without_interpolation(channels, dtype):
    """Every shift up to the size of the image and beyond, where nothing is left of it."""
    shifts = torch.cartesian_prod(torch.arange(-8, 9), torch.arange(-8, 9))
    images = images_of(len(shifts), channels, 7, 7)
    images = (images * 256).to(torch.uint8) if dtype == torch.uint8 else images
    box = torch.cat((shifts, torch.full_like(shifts, 7)), dim=1)
    crops = resized_crop(images, box, 7)
    padded = tv.pad(images, [8, 8, 8, 8], fill=0)
    for crop, image, (top, left) in zip(crops, padded, shifts.tolist(), strict=True):
        expected = tv.crop(image, top + 8, left + 8, 7, 7)
        if dtype == torch.uint8:
            assert torch.equal((crop * 255).round().to(torch.uint8), expected)
            expected = expected / 255
            torch.testing.assert_close(crop, expected, atol=1e-7, rtol=0)
        else:
            assert torch.equal(crop, expected)


@settings(max_examples=100)
@given(
    box=st.tuples(
        st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 30), st.integers(1, 30)
    ),
    other=st.tuples(
        st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 30), st.integers(1, 30)
    ),
    size=st.integers(1, 20),
)
def test_boxes_may_reach_outside_where_all_is_black(box, other, size):
    """Interpolated across the border as if the image had black margins; whatever else is in the batch."""
    images = images_of(2, 3, 11, 13)
    crops = resized_crop(images, torch.tensor([box, other]), size)
    for crop, image, (top, left, height, width) in zip(crops, images, (box, other), strict=True):
        padded = tv.pad(image, [50, 50, 50, 50], fill=0)
        expected = tv.resized_crop(
            padded, top + 50, left + 50, height, width, size=[size, size], antialias=True
        )
        torch.testing.assert_close(crop, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("padding", [1, 4])
def test_shifts_of_padded_crops_are_uniform(padding):
    count = 20_000
    box = drawn(Augmentation(crop_padding=padding), count, height=32, width=20).box
    assert (box[:, 2:] == torch.tensor([32, 20])).all()
    side = 2 * padding + 1
    cells = (box[:, 0] + padding) * side + box[:, 1] + padding
    assert int(box[:, :2].abs().max()) == padding
    counts = cells.bincount(minlength=side * side)
    assert len(counts) == side * side
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_padding_changes_the_box_alone():
    padded, plain = (drawn(Augmentation(crop_padding=p), 50) for p in (4, 0))
    for name, ours, theirs in zip(plain._fields, padded, plain, strict=True):
        assert torch.equal(ours, theirs) == (name != "box")


def test_supervised_imagenet_crops_are_random_resized_crop_s_default():
    default = RandomResizedCrop(224)
    recipe = AUGMENTATIONS["supervised_imagenet"]
    assert recipe.crop_scale == default.scale
    assert recipe.crop_ratio == pytest.approx(default.ratio)
    box = drawn(recipe, 4000, height=500, width=500).box.double()
    share = box[:, 2] * box[:, 3] / 500**2
    assert 0.08 - 0.002 < share.min() < 0.1
    assert share.max() > 0.95
    for name in ("supervised_cifar", "supervised_imagenet"):
        assert not drawn(AUGMENTATIONS[name], 100).jitter.any()
        assert not drawn(AUGMENTATIONS[name], 100).grayscale.any()
        assert not drawn(AUGMENTATIONS[name], 100).blur.any()
        assert stats.binomtest(int(drawn(AUGMENTATIONS[name], 2000).flip.sum()), 2000).pvalue > 1e-3
    assert AUGMENTATIONS["supervised_cifar"].crop_padding == 4


# Pixels


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "solarizing"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 5)])
def test_recipes_equal_torchvision_s_functions(name, channels, size):
    augmentation = AUGMENTATIONS.get(name, SOLARIZING)
    crops = images_of(64, channels, size, size)
    assert_distorts_like_torchvision(crops, drawn(augmentation, 64), augmentation)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grayscale_first", [False, True])
def test_every_order_of_jitter_equals_torchvision_s(channels, grayscale_first):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    # Each order with and without greying, far out in the ranges, where clamps act.
    batch = 96
    drawn_factors = drawn(Augmentation(jitter=(1.0, 1.0, 1.0, 0.5), jitter_probability=1), batch)
    parameters = drawn_factors._replace(
        order=orders.repeat(4, 1),
        flip=torch.arange(batch) % 5 == 0,
        grayscale=torch.arange(batch) >= 72,
    )
    augmentation = replace(EVERYTHING, grayscale_first=grayscale_first, blur_probability=0)
    assert_distorts_like_torchvision(images_of(batch, channels, 9, 9), parameters, augmentation)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", range(4))
def test_each_operation_alone_equals_torchvision_s(channels, operation):
    batch = 7
    field = ("brightness", "contrast", "saturation", "hue")[operation]
    low, high = ((0, 2.5), (0, 2.5), (0, 2.5), (-0.5, 0.5))[operation]
    factors = torch.linspace(low, high, batch, dtype=torch.float64)
    on = torch.ones(batch, dtype=torch.bool)
    crops = images_of(batch, channels, 11, 11)
    distorted = distort(crops, parameters_for(batch, jitter=on, **{field: factors}), EVERYTHING)
    for crop, result, factor in zip(crops, distorted, factors, strict=True):
        expected = ADJUST[operation](crop, factor.item())
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)
    if channels == 1 and operation in (SATURATION, HUE):
        assert torch.equal(distorted, crops)


@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    turns=st.floats(-0.5, 0.5, allow_subnormal=False),
)
@settings(max_examples=300)
def test_hue_turns_as_in_the_standard_library(colour, turns):
    crop = torch.tensor(colour).view(1, 3, 1, 1) / 255
    parameters = parameters_for(
        1, jitter=torch.tensor([True]), hue=torch.tensor([turns], dtype=torch.float64)
    )
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    distorted = distort(crop, parameters, EVERYTHING).flatten().tolist()
    assert distorted == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_leaves_greys_and_keeps_primaries_pure(turns):
    greys = torch.linspace(0, 1, 11).expand(3, 11)
    primaries = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).T
    nearly_grey = 0.7 + torch.eye(3) * 6e-8
    crop = torch.cat((greys, primaries, nearly_grey), dim=1)[None, :, None]
    parameters = parameters_for(
        1, jitter=torch.tensor([True]), hue=torch.tensor([turns], dtype=torch.float64)
    )
    distorted = distort(crop, parameters, AUGMENTATIONS["moco_v1"])
    torch.testing.assert_close(distorted[..., :11], crop[..., :11], atol=1e-7, rtol=0)
    assert distorted.min() >= -1e-6
    assert distorted.max() <= 1 + 1e-6
    expected = tv.adjust_hue(crop[0], turns)
    torch.testing.assert_close(distorted[0], expected, atol=2e-6, rtol=0)


def test_moco_v1_greys_before_the_jitter_and_v2_after():
    on = torch.ones(1, dtype=torch.bool)
    factor = torch.tensor([1.4], dtype=torch.float64)
    crop = images_of(1, 3, 8, 8)
    parameters = parameters_for(1, jitter=on, grayscale=on, saturation=factor, brightness=factor)
    first = distort(crop, parameters, AUGMENTATIONS["moco_v1"])
    last = distort(crop, parameters, AUGMENTATIONS["moco_v2"])

    def jitter(image):
        return tv.adjust_saturation(tv.adjust_brightness(image, 1.4), 1.4)

    grey_first, grey_last = (
        jitter(tv.rgb_to_grayscale(crop, 3)),
        tv.rgb_to_grayscale(jitter(crop), 3),
    )
    torch.testing.assert_close(first, grey_first, atol=1e-6, rtol=0)
    torch.testing.assert_close(last, grey_last, atol=1e-6, rtol=0)
    assert (first - last).abs().max() > 0.05


@pytest.mark.parametrize("largest_sigma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (5, 1), (16, 3), (33, 1)])
def test_blur_equals_torchvision_s_with_the_kernel_of_the_largest_sigma(
    size, channels, largest_sigma
):
    batch = 6
    sigma = torch.linspace(0.1, largest_sigma, batch, dtype=torch.float64)
    on = torch.ones(batch, dtype=torch.bool)
    on[2] = False
    crops = images_of(batch, channels, size, size)
    augmentation = Augmentation(blur_probability=1, blur_sigma=(0.1, largest_sigma))
    blurred = distort(crops, parameters_for(batch, blur=on, sigma=sigma), augmentation)
    kernel_size = 2 * min(math.ceil(3 * largest_sigma), size - 1) + 1
    for i in range(batch):
        expected = tv.gaussian_blur(crops[i], kernel_size, sigma[i].item()) if on[i] else crops[i]
        torch.testing.assert_close(blurred[i], expected, atol=1e-6, rtol=0)


def test_blur_keeps_constant_images():
    crops = torch.tensor([0.0, 0.3, 1.0])[:, None, None, None].expand(3, 3, 12, 12)
    parameters = parameters_for(
        3, blur=torch.ones(3, dtype=torch.bool), sigma=torch.tensor([0.1, 0.7, 2.0]).double()
    )
    torch.testing.assert_close(distort(crops, parameters, EVERYTHING), crops, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_depend_on_the_batch_by_less_than_a_millionth(channels):
    # More than one block of the batch.
    images = images_of(700, channels, 32, 32)
    parameters = drawn(EVERYTHING, 700)
    together = distort(resized_crop(images, parameters.box, 32), parameters, EVERYTHING)
    for batch, first in ((1, 0), (1, 699), (7, 300), (64, 501)):
        part = slice(first, first + batch)
        alone = ViewParameters(*(values[part] for values in parameters))
        crops = resized_crop(images[part], alone.box, 32)
        distorted = distort(crops, alone, EVERYTHING)
        torch.testing.assert_close(distorted, together[part], atol=1e-6, rtol=0)
    again = distort(resized_crop(images, parameters.box, 32), parameters, EVERYTHING)
    assert torch.equal(again, together)


def test_distort_leaves_its_input_alone():
    for augmentation in (EVERYTHING, replace(EVERYTHING, flip_probability=0)):
        crops = images_of(16, 3, 8, 8)
        before = crops.clone()
        distort(crops, drawn(augmentation, 16), augmentation)
        assert torch.equal(crops, before)


def test_memory_format_changes_no_pixel():
    images, parameters = images_of(16, 3, 12, 12), drawn(EVERYTHING, 16, height=12, width=12)
    crops = resized_crop(images, parameters.box, 10)
    last = torch.channels_last
    assert torch.equal(resized_crop(images.to(memory_format=last), parameters.box, 10), crops)
    distorted = distort(crops.to(memory_format=last), parameters, EVERYTHING)
    expected = distort(crops, parameters, EVERYTHING)
    torch.testing.assert_close(distorted, expected, atol=1e-6, rtol=0)


def test_a_batch_without_any_distortion_comes_back():
    crops = images_of(4, 3, 8, 8)
    distorted = distort(crops, parameters_for(4), EVERYTHING)
    assert torch.equal(distorted, crops)
    assert distorted.data_ptr() != crops.data_ptr()


def test_both_views_of_an_image_differ():
    images = images_of(20, 3, 32, 32)
    views = []
    for view in range(2):
        parameters = drawn(AUGMENTATIONS["moco_cifar"], 20, view=view)
        crops = resized_crop(images, parameters.box, 32)
        views.append(distort(crops, parameters, AUGMENTATIONS["moco_cifar"]))
    assert ((views[0] - views[1]).abs().mean(dim=(1, 2, 3)) > 0.01).all()


def test_views_ignore_the_precision_of_the_training():
    # Large enough for torch to compute the products in bf16 where the processor can and it may.
    images = images_of(2, 3, 400, 500)
    parameters = drawn(EVERYTHING, 2, height=400, width=500)._replace(blur=torch.tensor([True] * 2))

    def views():
        return distort(resized_crop(images, parameters.box, 600), parameters, EVERYTHING)

    expected = views()
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(views(), expected)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = precision


def test_views_can_train_a_network():
    parameters = drawn(EVERYTHING, 4)
    views = distort(images_of(4, 3, 32, 32), parameters, EVERYTHING)
    weight = torch.ones(2, 3, 3, 3, requires_grad=True)
    torch.nn.functional.conv2d(views, weight).sum().backward()
    assert weight.grad is not None


# Evaluation


def test_normalise_centres_and_scales_each_channel():
    images = images_of(3, 3, 5, 4)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalise(images, mean, std), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalise(images[:, :1], [0.5], [0.25]), images[:, :1] * 4 - 2)


@pytest.mark.parametrize(
    ("height", "width", "size", "side"),
    [(300, 200, 224, 256), (200, 303, 224, 256), (96, 96, 64, 73), (64, 90, 84, 96)],
)
def test_evaluation_view_of_images_is_moco_s_centre_crop(height, width, size, side):
    images = (images_of(2, 3, height, width) * 256).to(torch.uint8)
    resized = tv.resize(images / 255, [side], antialias=True)
    expected = tv.center_crop(resized, [size, size])
    view = evaluation_view(images, size=size)
    torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 32), (28, 28, 32), (40, 63, 224)])
def test_evaluation_view_of_small_images_is_the_whole_image(height, width, size):
    images = images_of(2, 1, height, width)
    expected = tv.resize(images, [size, size], antialias=True)
    view = evaluation_view(images, size=size)
    torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [28, 224])
def test_evaluation_view_keeps_images_of_its_size(size):
    images = (images_of(2, 1, size, size) * 256).to(torch.uint8)
    assert torch.equal(evaluation_view(images, size=size), images / 255)
    assert torch.equal(evaluation_view(images / 255, size=size), images / 255)
