"""The images that a run has trained on and the recipes of their views, from what its folder tells."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peerlearn.data.beton_dataset import packed_dataset
from peerlearn.data.datasets import ImageDataset, first_images, load_dataset, select_images
from peerlearn.data.ffcv_package import why_no_ffcv
from peerlearn.data.recipes import Augmentation
from peerlearn.data.subsets import few_shots, hold_out
from peerlearn.data.views_config import SecondViewConfig, ViewConfig, ViewsConfig, recipes_of
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.training_facts import TrainingFacts, training_verb

_VERB = "pretrain"
# The methods that draw one view of each image, and that which trains on some classes and is tested on others.
_ONE_VIEW = ("supervised", "prototypical")
_SPLIT_BY_CLASS = "prototypical"


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """What a run draws its views of.

    Attributes:
        trained: training images, without those that are held out.
        root: folder of the dataset; None = the usual places.
        recipes: recipe of each view.
        seed: seed of the views.
        is_split_by_class: whether the run is tested on other classes than it trains on.
        image_size: side of the views in pixels; None where the config leaves it open.
    """

    trained: ImageDataset
    root: str | None
    recipes: tuple[Augmentation, ...]
    seed: int
    is_split_by_class: bool
    image_size: int | None


def read_run_images(run: RunDirectory) -> RunImages:
    """The training images of a run of `peerlearn pretrain`, which are not downloaded.

    Raises:
        UserError: the run is of another verb, its files do not tell its images, these are not there, or they are no
            longer those that it has trained on.
    """
    verb = training_verb(run.env)
    if verb != _VERB:
        raise UserError(
            f"the run trains by `peerlearn {verb}`; only views of {_VERB} runs can be drawn"
        )
    facts = TrainingFacts.read(run.env)
    config = _read_config(run.config)
    data, method = config.get("data") or {}, config.get("method")
    by_class = method == _SPLIT_BY_CLASS
    trained = _trained_images(facts, data, own_classes=by_class)
    if len(trained) != facts.images:
        raise UserError(
            f"{trained.title} {trained.split} has {len(trained):,} images for the run's config now, and the run has "
            f"trained on {facts.images:,}: the data has changed"
        )
    return RunImages(
        trained=trained,
        root=facts.data_root,
        recipes=_recipes(run.config, data, views=1 if method in _ONE_VIEW else 2),
        seed=facts.seed,
        is_split_by_class=by_class,
        image_size=data.get("image_size"),
    )


def _read_config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: mend or restore it") from error


def _trained_images(
    facts: TrainingFacts, data: Mapping[str, Any], *, own_classes: bool
) -> ImageDataset:
    """The images that the config takes of the split, in the run's order."""
    split, limit = data.get("split", "train"), data.get("limit")
    packed = data.get("packed")
    if packed is not None and not why_no_ffcv():
        dataset = packed_dataset(Path(packed).expanduser(), facts.dataset, split, quiet=True)
        dataset = dataset if limit is None else first_images(dataset, limit)
    else:
        dataset = load_dataset(
            facts.dataset, split, root=facts.data_root, limit=limit, own_classes=own_classes
        )
    if dataset.labels is not None and data.get("validation_percent"):
        kept, _ = hold_out(dataset.labels, data["validation_percent"], seed=facts.seed)
        dataset = select_images(dataset, kept)
    if dataset.labels is not None and data.get("shots") is not None:
        dataset = select_images(dataset, few_shots(dataset.labels, data["shots"], seed=facts.seed))
    return dataset


def _recipes(file: Path, data: Mapping[str, Any], *, views: int) -> tuple[Augmentation, ...]:
    changes = dict(data.get("views") or {})
    second = SecondViewConfig(**_known(SecondViewConfig, changes.pop("second", None) or {}))
    try:
        recipes = recipes_of(
            data["augmentation"],
            data.get("crop_scale"),
            ViewsConfig(**_known(ViewConfig, changes), second=second),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not tell the views of the run ({error})") from error
    return recipes[:views]


def _known(config: type[ViewConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the class has; a run of another version may have others."""
    return {
        field.name: values[field.name]
        for field in fields(config)
        if values.get(field.name) is not None
    }
