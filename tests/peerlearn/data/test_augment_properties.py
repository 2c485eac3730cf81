"""Views as functions of counters: whatever the batch, whatever the recipe, whatever the size of the image."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlearn.data.augment import ViewParameters, draw_view_parameters
from peerlearn.data.recipes import Augmentation

INT64 = st.integers(-(2**63), 2**63 - 1)
SIDES = st.integers(1, 600)
# (seed, epoch, index, draw, view); small ones too, so that one often stands in the place of another.
COUNTERS = st.tuples(*[st.one_of(st.integers(0, 3), INT64)] * 5)
# Index, draw, height and width of an image in a batch.
IMAGES = st.tuples(INT64, st.integers(0, 5), SIDES, SIDES)


@st.composite
def ranges(draw: st.DrawFn, low: float, middle: float, high: float) -> tuple[float, float]:
    """A range around the middle."""
    return draw(st.floats(low, middle)), draw(st.floats(middle, high))


@st.composite
def recipes(draw: st.DrawFn) -> Augmentation:
    share, scale = st.floats(0, 1), sorted(draw(st.tuples(*[st.floats(0.001, 1)] * 2)))
    return Augmentation(
        crop_scale=(scale[0], scale[1]),
        crop_ratio=draw(ranges(1 / 3, 1, 3)),
        flip_probability=draw(share),
        jitter=draw(st.tuples(*[st.floats(0, 3)] * 3, st.floats(0, 0.5))),
        jitter_probability=draw(share),
        grayscale_probability=draw(share),
        blur_probability=draw(share),
        blur_sigma=draw(ranges(0.01, 1, 5)),
    )


def drawn(
    recipe: Augmentation, images: list[tuple[int, int, int, int]], *, seed=0, epoch=0, view=0
) -> ViewParameters:
    index, draw, height, width = torch.tensor(images).unbind(1)
    return draw_view_parameters(
        recipe,
        seed=seed,
        epoch=epoch,
        index=index,
        draw=draw,
        view=view,
        height=height,
        width=width,
    )


@given(
    recipe=recipes(),
    images=st.lists(IMAGES, min_size=1, max_size=9),
    seed=INT64,
    epoch=INT64,
    view=st.integers(0, 3),
    data=st.data(),
)
def test_an_image_draws_in_any_company_what_it_draws_alone(recipe, images, seed, epoch, view, data):
    """Bit for bit: in any order, beside any others, beside itself, and with its size given as a number."""
    counters = {"seed": seed, "epoch": epoch, "view": view}
    rows = data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=12))
    together = drawn(recipe, [images[row] for row in rows], **counters)
    for position, row in enumerate(rows):
        index, draw, height, width = images[row]
        alone = draw_view_parameters(
            recipe,
            **counters,
            index=torch.tensor([index]),
            draw=torch.tensor([draw]),
            height=height,
            width=width,
        )
        for name, values, expected in zip(alone._fields, together, alone, strict=True):
            assert torch.equal(values[position], expected[0]), name


def numbers(counters: tuple[int, int, int, int, int]) -> list[float]:
    """All that one view draws of what is continuous."""
    seed, epoch, index, draw, view = counters
    recipe = Augmentation(jitter=(1.0, 1.0, 1.0, 0.5))
    one = drawn(recipe, [(index, draw, 99, 99)], seed=seed, epoch=epoch, view=view)
    return torch.cat((one.brightness, one.contrast, one.saturation, one.hue, one.sigma)).tolist()


@given(st.lists(COUNTERS, min_size=2, max_size=6, unique=True))
def test_no_two_views_draw_the_same_numbers(counters):
    """Nor does a view draw one of its numbers twice, or a number that another view draws elsewhere."""
    draws = [numbers(one) for one in counters]
    # Back to the unit interval, in which two draws that came from the same bits are alike.
    low, high = torch.tensor([0, 0, 0, -0.5, 0.1]).double(), torch.tensor([2, 2, 2, 0.5, 2.0])
    units = (torch.tensor(draws, dtype=torch.float64) - low) / (high.double() - low)
    assert len({round(unit, 12) for unit in units.flatten().tolist()}) == 5 * len(counters)


@given(recipe=recipes(), images=st.lists(IMAGES, min_size=1, max_size=30), seed=INT64)
def test_what_is_drawn_lies_in_the_ranges_of_the_recipe(recipe, images, seed):
    view = drawn(recipe, images, seed=seed)
    limits = {
        name: (max(0.0, 1 - strength), 1 + strength)
        for name, strength in zip(view._fields[3:6], recipe.jitter[:3], strict=True)
    }
    limits |= {"hue": (-recipe.jitter[3], recipe.jitter[3]), "sigma": recipe.blur_sigma}
    for name, (low, high) in limits.items():
        values = getattr(view, name)
        assert (values >= low - 1e-12).all(), name
        assert (values <= high + 1e-12).all(), name
    assert (view.order.sort(dim=1).values == torch.arange(4)).all()
    for name in ("flip", "jitter", "grayscale", "blur"):
        happens, probability = getattr(view, name), getattr(recipe, f"{name}_probability")
        assert happens.dtype == torch.bool
        if probability in (0, 1):
            assert (happens == bool(probability)).all()


@settings(max_examples=150)
@given(recipe=recipes(), images=st.lists(IMAGES, min_size=1, max_size=30), seed=INT64)
def test_a_box_is_inside_its_image_and_of_the_recipes_area_and_shape_or_the_largest_that_fits(
    recipe, images, seed
):
    """Up to the rounding of its sides; "largest that fits" as torchvision says it, shape by shape."""
    low, high = recipe.crop_ratio
    for box, (_, _, height, width) in zip(
        drawn(recipe, images, seed=seed).box.tolist(), images, strict=True
    ):
        top, left, h, w = box
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width
        smallest, largest = (scale * height * width for scale in recipe.crop_scale)
        of_area = (h - 0.5) * (w - 0.5) <= largest and smallest <= (h + 0.5) * (w + 0.5)
        of_shape = (w - 0.5) / (h + 0.5) <= high and low <= (w + 0.5) / (h - 0.5)
        if width / height < low:
            fallback = (round(width / low), width)
        elif width / height > high:
            fallback = (height, round(height * high))
        else:
            fallback = (height, width)
        centred = ((height - h) // 2, (width - w) // 2)
        assert (of_area and of_shape) or ((h, w) == fallback and (top, left) == centred)
