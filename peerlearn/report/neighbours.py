"""A picture of test images and the training images whose features are nearest. Dimensions: N candidates, Q queries."""

from collections.abc import Sequence

from torch import Tensor

from peerlearn.data.augment import evaluation_view
from peerlearn.data.datasets import ImageDataset
from peerlearn.knn import unit_rows
from peerlearn.report.parts import Picture, Table
from peerlearn.report.tiles import Mark, Tile, TileRow, tile_picture

NEIGHBOURS = 5


def nearest_images(candidates: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The candidates of the highest cosine with each query; of equal ones the first.

    Args:
        candidates: features, (N, D).
        queries: features, (Q, D).
        k: number of neighbours, at most N.

    Returns:
        Numbers of the candidates, int64 (Q, k), the nearest first; their cosines, float64 (Q, k).
    """
    cosines = unit_rows(queries) @ unit_rows(candidates).T
    numbers = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    return numbers, cosines.gather(1, numbers)


def varied(labels: Tensor, count: int) -> list[int]:
    """The places of the first images of different classes, and where there are too few classes, of further images."""
    places = range(len(labels))
    first = list({int(label): place for place, label in reversed([*enumerate(labels)])}.values())
    return sorted(sorted(places, key=lambda place: (place not in first, place))[:count])


def neighbour_picture(
    key: str,
    known: ImageDataset,
    asked: ImageDataset,
    *,
    numbers: Tensor,
    cosines: Tensor,
    image_size: int,
    who: str,
    source: str,
) -> Picture:
    """The picture of queries and their neighbours.

    Args:
        key: name of the picture, which no other one of the page has.
        known: candidates, with labels.
        asked: queries, with labels of the same classes.
        numbers: numbers of each query's neighbours, (Q, k).
        cosines: cosines of each query's neighbours, (Q, k).
        image_size: side of the view that the network sees, in pixels.
        who: name of the network with its step.
        source: words for the candidates and queries.

    Raises:
        DecodeError: an image file cannot be decoded.
    """
    assert known.labels is not None
    assert asked.labels is not None
    names, labels = asked.class_names, asked.labels.tolist()
    rows, cells, right = [], [], 0
    for query, label in enumerate(labels):
        found = known.labels[numbers[query]].tolist()
        right += sum(each == label for each in found)
        tiles = [Tile(image=_seen(asked, query, image_size))]
        for number, each, cosine in zip(
            numbers[query].tolist(), found, cosines[query].tolist(), strict=True
        ):
            tiles.append(
                Tile(
                    image=_seen(known, number, image_size),
                    mark=Mark.RIGHT if each == label else Mark.WRONG,
                    text=f"{cosine:.3f}",
                )
            )
        agreeing = f"{sum(each == label for each in found)} of {len(found)}"
        rows.append(TileRow(lines=(names[label], agreeing), tiles=tuple(tiles)))
        cells.append((names[label], *_in_words(found, cosines[query].tolist(), names)))
    k, total = numbers.shape[1], numbers.numel()
    counted = f"{right} of {total} neighbours are of the class of their test image"
    return Picture(
        image=tile_picture(
            key, [("test", "image"), *(("nearest", f"{n + 1}") for n in range(k))], rows
        ),
        caption=f"{who}: {len(labels)} test images and for each the {k} nearest of {source}, by the cosine of "
        f"features, which stands below. Full frame and hook: of the same class; broken frame and cross: of another. "
        f"{counted}.",
        alternative=f"{who}, test images with their {k} nearest images: {counted}. "
        + "; ".join(f"{row.lines[0]}: {row.lines[1]}" for row in rows),
        numbers=Table(
            caption=f"Classes and cosines of these neighbours, {who}",
            headings=("test image", *(f"nearest {n + 1}" for n in range(k))),
            rows=tuple(cells),
            is_folded=True,
        ),
    )


def _in_words(found: Sequence[int], cosines: Sequence[float], names: Sequence[str]) -> list[str]:
    return [f"{names[each]} ({cosine:.3f})" for each, cosine in zip(found, cosines, strict=True)]


def _seen(dataset: ImageDataset, index: int, image_size: int) -> Tensor:
    """The image as the network sees it, before its values are normalised."""
    return evaluation_view(dataset.read(index)[None], size=image_size)[0]
