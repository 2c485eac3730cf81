"""Small detection data, exports to stand a detector on, and the words that train one in seconds."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from peerlearn.backbones import create_backbone
from peerlearn.data.voc import voc
from peerlearn.export import save_export
from tests.detection_trees import VocObject, voc_xml

CLASSES = ("square", "disc")
SPLITS = {"train": 14, "val": 5, "test": 8}
STEPS = 6


def write_shapes(root: Path, *, even: bool = False) -> Path:
    """VOCdevkit: squares and discs on noise, upright and lying images of several sizes, some without objects.

    Args:
        root: folder above it.
        even: whether all images are of one size.
    """
    folder = root / "VOCdevkit/VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    number = 0
    for split, count in SPLITS.items():
        names = [f"{number + place:06}" for place in range(count)]
        number += count
        for name in names:
            _write_image(folder, name, even=even)
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{n}\n" for n in names))
    return folder.parent


def _write_image(folder: Path, name: str, *, even: bool) -> None:
    random = np.random.default_rng(int(name))
    shorter = int(random.integers(40, 56))
    width, height = (64, 64) if even else random.permutation([shorter, 64]).tolist()
    noise = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    objects: list[VocObject] = []
    for place in range(int(name) % 3):
        side, kind = int(random.integers(14, 26)), int(random.integers(2))
        x, y = (int(random.integers(1, end - side)) for end in (width, height))
        corners = (x - 1, y - 1, x + side - 2, y + side - 2)
        (draw.ellipse if kind else draw.rectangle)(corners, fill=(250, 120 * kind, 60))
        hard = int(place == 1 and int(name) % 4 == 1)
        objects.append((CLASSES[kind], x, y, x + side - 1, y + side - 1, hard, 0))
    image.save(folder / f"JPEGImages/{name}.png")
    (folder / f"Annotations/{name}.xml").write_text(voc_xml(objects, (width, height)))


def write_coco_file(file: Path, split: str, devkit: Path) -> None:
    """The same images and objects in COCO's format; what is difficult is a crowd there."""
    dataset = voc(split, devkit, class_names=CLASSES)
    images, annotations = [], []
    for number, path in enumerate(dataset.images):
        width, height = dataset.sizes[number].tolist()
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        objects = zip(
            dataset.boxes[number].tolist(),
            dataset.labels[number].tolist(),
            dataset.difficult[number].tolist(),
            strict=True,
        )
        for (x1, y1, x2, y2), label, hard in objects:
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"image_id": number, "category_id": label, "bbox": box, "iscrowd": int(hard)}
            annotations.append({"id": len(annotations), **entry})
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))


def write_export(
    folder: Path, architecture: str = "resnet18", channels: int = 1, seed: int = 0
) -> None:
    """An export of a network as it is drawn."""
    size = 224 if architecture.endswith("224") else 64
    torch.manual_seed(seed)
    save_export(
        create_backbone(architecture, in_chans=channels, image_size=size),
        folder,
        architecture=architecture,
        in_chans=channels,
        small_images=False,
        image_size=size,
        mean=[0.4] * channels,
        std=[0.2] * channels,
        provenance={},
    )


def words(place: Path, results: Path, *more: str, export: str = "grey") -> list[str]:
    """A training of `STEPS` steps on what `write_all` wrote; of keys that are given twice the last one counts."""
    return [
        *("detect", "--checkpoint", str(place / export), "--results", str(results)),
        *("--data.root", str(place / "VOCdevkit"), "--data.classes", f"[{','.join(CLASSES)}]"),
        *("--data.train", "train2007", "--data.test", "test2007", "--data.workers", "0"),
        *("--iterations", str(STEPS), "--milestones", "[4,5]", "--warmup_iterations", "2"),
        *("--batch_size", "2", "--base_batch_size", "2", "--precise_bn_iterations", "2"),
        *("--model.short_sides", "[48,64]", "--model.longest_side", "80"),
        *("--model.anchor_sizes", "[8,16,24,32,48]", "--model.fpn_channels", "16"),
        *("--model.anchors_per_image", "32", "--model.regions_per_image", "16"),
        *("--model.rpn_candidates_train", "50", "--model.rpn_candidates_test", "50"),
        *("--model.rpn_proposals_train", "30", "--model.rpn_proposals_test", "30"),
        *("--device", "cpu", *more),
    ]


def write_all(place: Path) -> None:
    """The devkit, the same as JSON files, exports of networks for grey and for colour, a cohort of two."""
    devkit = write_shapes(place)
    for split in SPLITS:
        write_coco_file(place / f"{split}.json", f"{split}2007", devkit)
    write_shapes(place / "even", even=True)
    write_export(place / "grey")
    write_export(place / "colour", channels=3)
    for m in (0, 1):
        write_export(place / f"cohort/step-00000003/net-{m}", seed=m)


def training_of(results: Path) -> Path:
    """The run directory of the only training beside these results."""
    (folder,) = (path for path in results.glob("detect-*") if path.is_dir())
    return folder


def scores(results: Path) -> dict[str, dict]:
    """What the result files hold, clocks apart, by the rows of the table."""
    files = [json.loads(file.read_text()) for file in sorted(results.glob("detect-*.json"))]
    for content in files:
        del content["seconds"]
    return {f"{each['network']} {each['variant']}".strip(): each for each in files}


def flip_a_weight(file: Path) -> None:
    """Flip a bit of the last weight, which stays a number."""
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
