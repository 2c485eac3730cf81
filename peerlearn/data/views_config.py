"""The config of the random views: what a run changes in the recipe that `data.augmentation` names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peerlearn.config import require
from peerlearn.data.recipes import AUGMENTATIONS, SECOND_VIEWS, SWITCHED_BY, Augmentation

_KEYS = "data.views."
_SECOND_KEYS = "data.views.second."


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What is done to views; null = as in the recipe.

    Attributes:
        crop_ratio: smallest and largest width of a crop divided by its height.
        crop_padding: largest shift of the crop in pixels; where it is positive, crops are as large as the image, and
            black beyond it.
        centred: whether the crop is the largest centred square.
        flip_probability: probability of a horizontal flip.
        jitter: strengths of the colour jitter: brightness, contrast, saturation and hue (at most 0.5), as in
            torchvision's ColorJitter.
        jitter_probability: probability of the colour jitter.
        grayscale_probability: probability of greying.
        grayscale_first: whether greying comes before the jitter, not after it.
        blur_probability: probability of the Gaussian blur.
        blur_sigma: smallest and largest sigma of the blur in pixels of the finished view.
        solarize_probability: probability of the solarisation, which inverts bright values and comes last.
        solarize_threshold: least value that solarisation inverts, within 0..1; 1 is white.
    """

    crop_ratio: list[float] | None = None
    crop_padding: int | None = None
    centred: bool | None = None
    flip_probability: float | None = None
    jitter: list[float] | None = None
    jitter_probability: float | None = None
    grayscale_probability: float | None = None
    grayscale_first: bool | None = None
    blur_probability: float | None = None
    blur_sigma: list[float] | None = None
    solarize_probability: float | None = None
    solarize_threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class SecondViewConfig(ViewConfig):
    """What is done to the second view alone; null = as in the first view, or in the recipe's own second view.

    Attributes:
        crop_scale: smallest and largest share of the image's area that a crop keeps.
    """

    crop_scale: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(ViewConfig):
    """What is done to both views; null = as in the recipe.

    Attributes:
        second: values of the second view alone.
    """

    second: SecondViewConfig = field(default_factory=SecondViewConfig)


def recipes_of(
    augmentation: str, crop_scale: list[float] | None, views: ViewsConfig
) -> tuple[Augmentation, Augmentation]:
    """The recipes of the first and of the second view.

    Args:
        augmentation: name of the recipe to begin with.
        crop_scale: `data.crop_scale`.
        views: what is changed.

    Raises:
        ValueError: a value lies outside its range, or has no effect. The message begins with its key.
    """
    both, own = given(views, _KEYS), given(views.second, _SECOND_KEYS)
    if crop_scale is not None:
        both["crop_scale"] = tuple(crop_scale)
    start = AUGMENTATIONS[augmentation]
    first = _changed(start, both, _KEYS)
    second = _changed(SECOND_VIEWS.get(augmentation, start), both, _KEYS)
    second = _changed(second, own, _SECOND_KEYS)
    for name, value in both.items():
        key = "data.crop_scale" if name == "crop_scale" else f"{_KEYS}{name}"
        if not second.counts(name):
            _require_effect(first, name, value, key, both)
    for name, value in own.items():
        _require_effect(second, name, value, f"{_SECOND_KEYS}{name}", both | own)
    return first, second


def given(view: ViewConfig, prefix: str = _SECOND_KEYS) -> dict[str, Any]:
    """The values that are not null, by their names in a recipe.

    Raises:
        ValueError: a list has too few values, or too many.
    """
    found: dict[str, Any] = {}
    for each in fields(view):
        value = getattr(view, each.name)
        if isinstance(value, list):
            length = len(getattr(AUGMENTATIONS["crop_flip"], each.name))
            require(
                len(value) == length,
                f"{prefix}{each.name} must be {length} numbers, got {value}",
            )
            found[each.name] = tuple(value)
        elif value is not None and not isinstance(value, ViewConfig):
            found[each.name] = value
    return found


def _changed(recipe: Augmentation, values: Mapping[str, Any], prefix: str) -> Augmentation:
    try:
        return replace(recipe, **values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _require_effect(
    recipe: Augmentation, name: str, value: Any, key: str, chosen: Mapping[str, Any]
) -> None:
    """Refuse a value that changes nothing: most likely another one was forgotten.

    Args:
        recipe: recipe of the view.
        name: name of the value in it.
        value: value that was given.
        key: key that gave it.
        chosen: all that was given for this view. A chance that was set to 0 is meant to be 0.
    """
    if recipe.counts(name) or not value:
        return
    switch, prefix = SWITCHED_BY.get(name), key.removesuffix(name)
    if switch in chosen:
        return
    fix = {
        "crop_padding": f"must be 0, or {_KEYS}centred false: the centred square is never shifted",
        "jitter_probability": f"must be 0, or {prefix}jitter given: its strengths are all 0",
    }.get(name, f"must be null, or {prefix}{switch} above 0: it is 0")
    if name.startswith("crop_") and name != "crop_padding":
        fix = f"must be null, or {_KEYS}crop_padding 0 and {_KEYS}centred false: crops of a fixed size are not scaled"
    raise ValueError(f"{key} {fix}")
