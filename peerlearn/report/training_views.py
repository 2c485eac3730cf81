"""A picture of some training images and of the views that their run draws of them."""

import torch
from torch import Tensor

from peerlearn.counter_random import SHOWN_IMAGES, permutation
from peerlearn.data.augment import distort, draw_view_parameters, pixels, resized_crop
from peerlearn.data.datasets import ImageDataset
from peerlearn.report.parts import Picture
from peerlearn.report.run_images import RunImages
from peerlearn.report.tiles import Tile, TileRow, tile_picture

_IMAGES, _VIEWS = 5, 6
# Images of a data set are shown by one order, so that those of several runs can be compared.
TRAIN_ORDER, TEST_ORDER = 0, 1


def shown_order(dataset: ImageDataset, order: int) -> Tensor:
    """The numbers of all images in the order in which they are chosen to be shown: int64 (N,)."""
    return permutation(len(dataset), SHOWN_IMAGES, order)


def draw_views(
    images: RunImages, index: int, *, epochs: int, image_size: int
) -> list[list[Tensor]]:
    """The views that the run draws of an image in its first epochs: the views of each epoch, float (channels, S, S).

    Args:
        images: images of the run.
        index: number of the image in the run's training set.
        epochs: number of epochs.
        image_size: side S of the views in pixels.

    Raises:
        DecodeError: the image file cannot be decoded.
    """
    image, number = images.trained.read(index), torch.tensor([index])
    drawn = []
    for epoch in range(epochs):
        views = []
        for view, recipe in enumerate(images.recipes):
            parameters = draw_view_parameters(
                recipe,
                seed=images.seed,
                epoch=epoch,
                index=number,
                draw=torch.zeros_like(number),
                view=view,
                height=image.shape[1],
                width=image.shape[2],
            )
            crop = pixels(resized_crop(image[None], parameters.box, image_size), image.device)
            views.append(distort(crop, parameters, recipe)[0])
        drawn.append(views)
    return drawn


def views_picture(key: str, images: RunImages, *, image_size: int) -> Picture:
    """The picture of some training images with the views of the first epochs.

    Args:
        key: name of the picture, which no other one of the page has.
        images: images of the run.
        image_size: side of the views in pixels.

    Raises:
        DecodeError: an image file cannot be decoded.
    """
    trained, views = images.trained, len(images.recipes)
    epochs = _VIEWS // views
    chosen = shown_order(trained, TRAIN_ORDER)[:_IMAGES].tolist()
    rows = []
    for index in chosen:
        drawn = draw_views(images, index, epochs=epochs, image_size=image_size)
        tiles = [trained.read(index), *(view for each in drawn for view in each)]
        rows.append(
            TileRow(
                lines=image_lines(trained, index), tiles=tuple(Tile(image=each) for each in tiles)
            )
        )
    columns = [(epoch, view) for epoch in range(epochs) for view in range(views)]
    titles = [
        (f"epoch {epoch}", *([f"view {view + 1}"] if views > 1 else [])) for epoch, view in columns
    ]
    what = (
        f"{len(chosen)} of the {len(trained):,} training images of {trained.title} {trained.split}"
    )
    drawn_text = (
        f"views of {image_size} pixels that the run draws of them in its first {epochs} epochs"
    )
    words = "; ".join(
        f"view {number}: {recipe.in_words()}" if len({*images.recipes}) > 1 else recipe.in_words()
        for number, recipe in enumerate(dict.fromkeys(images.recipes), start=1)
    )
    return Picture(
        image=tile_picture(key, [("image",), *titles], rows),
        caption=f"Left: {what}, drawn at random. Right: the {drawn_text}, seed {images.seed}. Recipe: {words}.",
        alternative=f"{what}, each with {_VIEWS // views * views} {drawn_text}: {words}. The images: "
        + "; ".join(" ".join(row.lines) for row in rows),
    )


def image_lines(dataset: ImageDataset, index: int) -> tuple[str, ...]:
    """The class of an image, if it has one, and its number in the data set."""
    number = f"image {index:,}"
    label = -1 if dataset.labels is None else int(dataset.labels[index])
    return (number,) if label < 0 else (dataset.class_names[label], number)
