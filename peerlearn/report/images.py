"""What a run's images look like, and to its networks: views, nearest neighbours and maps of features."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peerlearn.compute.device import choose_device
from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import ImageDataset, load_dataset, select_images
from peerlearn.data.downloads import without_downloads
from peerlearn.data.published import is_split_by_class
from peerlearn.errors import UserError
from peerlearn.evaluation.data import check_same_classes
from peerlearn.evaluation.feature_cache import Extraction, load_features
from peerlearn.evaluation.selection import Selection, select_networks
from peerlearn.report.failures import reason_text
from peerlearn.report.feature_maps import FEWEST_IMAGES, map_features
from peerlearn.report.map_picture import map_picture
from peerlearn.report.neighbours import NEIGHBOURS, nearest_images, neighbour_picture, varied
from peerlearn.report.parts import Paragraph, Part, Section
from peerlearn.report.run_images import RunImages, read_run_images
from peerlearn.report.training_views import TEST_ORDER, TRAIN_ORDER, shown_order, views_picture
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import CONFIG_FILE
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.progress import progress
from peerlearn.runs.text import printable

TEST_IMAGES = 1000
# For each test image there are so many images among which its neighbours are looked for.
_CANDIDATES = 5
_QUERIES = 6
# Of more networks, the pictures would make the page too large.
_MOST_NETWORKS = 4
_BATCH_SIZE, _WORKERS = 128, 2
# Of views and of what networks take, in pixels.
_LARGEST_SIDE = 1_024


@dataclass(frozen=True, kw_only=True)
class _LabelledImages:
    """Images of the same classes.

    Attributes:
        known: images among which neighbours are looked for.
        asked: test images.
        source: what ``known`` are, in words.
        drawn_from: what ``asked`` are drawn from, in words.
    """

    known: ImageDataset
    asked: ImageDataset
    source: str
    drawn_from: str


def image_section(
    run: RunDirectory, *, label: str, anchor: str, test_images: int = TEST_IMAGES
) -> Section:
    """The section about the images of a run, by the networks of its best or else of its last export.

    Equal runs give equal bytes on the same machine. Nothing is downloaded, and nothing is written into the run.
    Features are kept as evaluators keep them. What cannot be shown is told in a paragraph.

    Args:
        run: run directory.
        label: short name of the run.
        anchor: id of the section, which no other section of the page has.
        test_images: largest number of test images; neighbours are looked for among five times as many images.
    """
    with without_downloads():
        parts = _parts(run, anchor, test_images)
    return Section(anchor=anchor, title=f"Images of {label}", parts=tuple(parts))


def _parts(run: RunDirectory, anchor: str, test_images: int) -> list[Part]:
    try:
        images = read_run_images(run)
    except Exception as error:  # A config that no run writes fails anywhere.
        return [Paragraph(text=f"No images are shown: {reason_text(error)}.")]
    selection, why_none = _selection(run)
    parts = _tried("The views are not shown", lambda: _views(anchor, images, selection))
    if selection is None:
        return [
            *parts,
            Paragraph(text=f"Neighbours and maps of features are not shown: {why_none}."),
        ]
    return parts + _tried(
        "Neighbours and maps of features are not shown",
        lambda: _feature_parts(anchor, images, selection, test_images),
    )


def _tried(what_not: str, make: Callable[[], Iterable[Part]]) -> list[Part]:
    try:
        return list(make())
    except Exception as error:  # A config that no run writes fails anywhere.
        return [Paragraph(text=f"{what_not}: {reason_text(error)}.")]


def _selection(run: RunDirectory) -> tuple[Selection | None, str]:
    try:
        return select_networks(run.root, "all"), ""
    except Exception as error:  # So do exports that no run writes.
        return None, reason_text(error)


def _views(anchor: str, images: RunImages, selection: Selection | None) -> list[Part]:
    if images.image_size is not None:
        size = images.image_size
    elif selection is not None:
        size = _input_size(selection)
    elif isinstance(images.trained.images, Tensor):
        size = images.trained.images.shape[-1]
    else:
        raise UserError("the exports, which tell the size of the views, are not there")
    return [views_picture(f"{anchor}-views", images, image_size=_checked_size(size))]


def _checked_size(size: object) -> int:
    """A side in pixels that a picture can have.

    Raises:
        UserError: it is none, or needs more memory than a page is worth.
    """
    if not isinstance(size, int) or not 1 <= size <= _LARGEST_SIDE:
        raise UserError(
            f"images of {printable(str(size), 40)} pixels cannot be shown, only of 1 to {_LARGEST_SIDE:,}"
        )
    return size


def _input_size(selection: Selection) -> int:
    """The side of the images that the networks take, in pixels."""
    file = next(iter(selection.folders.values())) / CONFIG_FILE
    try:
        size = int(read_json_object(file)["pretrained_cfg"]["input_size"][1])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not tell the size of the images") from error
    return _checked_size(size)


def _feature_parts(
    anchor: str, images: RunImages, selection: Selection, test_images: int
) -> list[Part]:
    sets = _labelled_images(images, test_images)
    networks = dict(list(selection.folders.items())[:_MOST_NETWORKS])
    how = Extraction(
        ranks=Ranks(choose_device("auto")),
        batch_size=_BATCH_SIZE,
        workers=_WORKERS,
        cached=True,
    )
    known, asked = (load_features(networks, split, how) for split in (sets.known, sets.asked))
    parts: list[Part] = []
    if len(networks) < len(selection.folders):
        parts.append(
            Paragraph(
                text=f"The first {len(networks)} of {len(selection.folders)} networks are shown."
            )
        )
    assert sets.asked.labels is not None
    queries = torch.tensor(varied(sets.asked.labels, _QUERIES))
    size = _input_size(selection)
    for name in networks:
        numbers, cosines = nearest_images(
            known[name], asked[name][queries], min(NEIGHBOURS, len(sets.known))
        )
        parts.append(
            neighbour_picture(
                f"{anchor}-neighbours-{name}",
                sets.known,
                select_images(sets.asked, queries),
                numbers=numbers,
                cosines=cosines,
                image_size=size,
                who=_who(name, selection),
                source=sets.source,
            )
        )
    return parts + _map_parts(anchor, asked, sets, selection)


def _map_parts(
    anchor: str, asked: Mapping[str, Tensor], sets: _LabelledImages, selection: Selection
) -> list[Part]:
    if len(sets.asked) < FEWEST_IMAGES:
        return [
            Paragraph(
                text=f"Maps of features are not shown: {sets.drawn_from} are {len(sets.asked)} images, and a map takes "
                f"{FEWEST_IMAGES}."
            )
        ]
    parts: list[Part] = []
    with progress(len(asked), "maps", name="mapping features") as report:
        for name, features in asked.items():
            found = map_features(features)
            who = _who(name, selection)
            parts.append(
                map_picture(
                    f"{anchor}-map-{name}", found, sets.asked, who=who, drawn_from=sets.drawn_from
                )
                if found
                else Paragraph(text=f"{who} has no map: its features of all images are the same.")
            )
            report.advance()
    return parts


def _who(name: str, selection: Selection) -> str:
    chosen = ", which validation chose" if selection.chosen_by_validation else ""
    return f"Network {name} of step {selection.step:,}{chosen}"


def _labelled_images(images: RunImages, test_images: int) -> _LabelledImages:
    """Images to show neighbours of and among, chosen by counters.

    Raises:
        UserError: they are not there or have no classes.
    """
    name, root = images.trained.name, images.root
    by_class = images.is_split_by_class or is_split_by_class(name)
    trained = images.trained
    if not by_class and not _is_labelled(trained):
        trained = load_dataset(name, "train", root=root)
        _check_labelled(trained)
    test = load_dataset(name, "test", root=root, own_classes=by_class)
    _check_labelled(test)
    order = shown_order(test, TEST_ORDER)
    if by_class:
        # No class of the test split is among the training images.
        count = min(test_images, len(test) // 2)
        rest = order[count : count + _CANDIDATES * test_images]
        known, of = test, "other test images, as no training image is of their classes"
    else:
        check_same_classes(trained, test)
        count = test_images
        rest = shown_order(trained, TRAIN_ORDER)[: _CANDIDATES * test_images]
        known, of = trained, f"training images of {trained.title}"
    # Rising, as the images of a folder are read best.
    known = select_images(known, rest.sort().values)
    asked = select_images(test, order[:count].sort().values)
    return _LabelledImages(
        known=known,
        asked=asked,
        source=f"{len(known):,} {of}",
        drawn_from=f"{len(asked):,} of the {len(test):,} images of {test.title} {test.split}",
    )


def _is_labelled(dataset: ImageDataset) -> bool:
    return dataset.labels is not None and int(dataset.labels.min()) >= 0


def _check_labelled(dataset: ImageDataset) -> None:
    if not _is_labelled(dataset):
        why = f" ({dataset.why_unlabelled})" if dataset.why_unlabelled else ""
        raise UserError(f"{dataset.title} {dataset.split} has no classes{why}")
