"""Small detection data sets, written in the layouts in which they are published."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# name, xmin, ymin, xmax, ymax, difficult, truncated
VocObject = tuple[str, float, float, float, float, int, int]


def write_jpeg(path: Path, seed: int, size: tuple[int, int] = (60, 40)) -> None:
    """A picture of smooth random colours: two of different seeds are not near to each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


def voc_xml(objects: Sequence[VocObject], size: tuple[int, int] = (60, 40), file: str = "") -> str:
    """An annotation as published, with a part that has a name and a box of its own in every object."""
    parts = [
        "<object><part><name>head</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></part>"
        f"<name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated>"
        f"<difficult>{difficult}</difficult><bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin>"
        f"<ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox></object>"
        for name, xmin, ymin, xmax, ymax, difficult, truncated in objects
    ]
    return (
        f"<annotation><folder>VOC2007</folder><filename>{file}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{''.join(parts)}</annotation>"
    )


OBJECTS: dict[str, list[VocObject]] = {
    "000001": [("dog", 1, 1, 60, 40, 0, 1), ("person", 10, 5, 30, 35, 1, 0)],
    "000002": [("aeroplane", 3, 4, 3, 4, 0, 0)],
    "000003": [],
    "000004": [("tvmonitor", 45.5, 1, 59, 12.25, 0, 0)],
}
LISTS_2007 = {"train": ["000001"], "val": ["000002"], "test": ["000003", "000004"]}
LISTS_2007["trainval"] = ["000001", "000002"]


def write_year(
    folder: Path,
    objects: Mapping[str, Sequence[VocObject]],
    lists: Mapping[str, Sequence[str]],
    first_seed: int = 0,
) -> None:
    for seed, (name, of_image) in enumerate(objects.items(), first_seed):
        write_jpeg(folder / f"JPEGImages/{name}.jpg", seed)
        path = folder / f"Annotations/{name}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(voc_xml(of_image, file=f"{name}.jpg"))
    for split, names in lists.items():
        path = folder / f"ImageSets/Main/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))


def write_devkit(parent: Path) -> Path:
    """VOCdevkit with four images of 2007 and two of 2012."""
    devkit = parent / "VOCdevkit"
    write_year(devkit / "VOC2007", OBJECTS, LISTS_2007)
    objects = {"2008_000001": OBJECTS["000001"], "2008_000002": OBJECTS["000003"]}
    lists = {"trainval": list(objects), "train": ["2008_000001"], "val": ["2008_000002"]}
    write_year(devkit / "VOC2012", objects, lists, first_seed=10)
    return devkit


def coco_content() -> dict[str, list[dict]]:
    """Two images with objects, one without; the ids of the categories are neither rising nor dense."""
    return {
        "images": [
            {"id": 7, "file_name": "a/one.jpg", "width": 60, "height": 40},
            {"id": 3, "file_name": "b/two.jpg", "width": 60, "height": 40},
            {"id": 5, "file_name": "three.jpg", "width": 60, "height": 40},
        ],
        "categories": [{"id": 90, "name": "screw"}, {"id": 2, "name": "nut"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 2, "bbox": [0, 0, 60, 40], "iscrowd": 1},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [1.5, 2, 10, 20.25], "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 90, "bbox": [5, 6, 7, 8]},
        ],
    }


def write_coco(folder: Path, first_seed: int = 20) -> Path:
    """images/ and annotations.json; the latter is returned."""
    content = coco_content()
    for seed, image in enumerate(content["images"], first_seed):
        write_jpeg(folder / "images" / image["file_name"], seed)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path
