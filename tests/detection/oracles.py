"""What `detection.voc.evaluate` is compared with: the devkit's rule box by box, and pycocotools. Slow, and plain.

Each gives the AP, in percent, of every class (row) at every IoU threshold (column); NaN where no object counts.
"""

import io
from contextlib import redirect_stdout

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

THRESHOLDS = np.arange(50, 100, 5) / 100


def plain_devkit(detections, targets, num_classes, rule):
    return 100 * np.array(
        [
            [_devkit_ap(detections, targets, label, t, rule) for t in THRESHOLDS]
            for label in range(num_classes)
        ]
    )


def _devkit_ap(detections, targets, label, threshold, rule):
    objects = [
        [
            {"box": box, "difficult": difficult, "taken": False}
            for box, its, difficult in rows(target, "difficult")
            if its == label
        ]
        for target in targets
    ]
    total = sum(not each["difficult"] for image in objects for each in image)
    if total == 0:
        return np.nan
    found = [
        (score, image, box)
        for image, detection in enumerate(detections)
        for box, its, score in rows(detection, "scores")
        if its == label
    ]
    right = wrong = 0
    recalls, precisions = [], []
    for _, image, box in sorted(found, key=lambda one: -one[0]):
        best = max(objects[image], key=lambda each: pixel_iou(box, each["box"]), default=None)
        if best is None or not pixel_iou(box, best["box"]) > threshold:
            wrong += 1
        elif best["difficult"]:
            pass
        elif best["taken"]:
            wrong += 1
        else:
            best["taken"] = True
            right += 1
        recalls.append(right / total)
        precisions.append(right / max(right + wrong, 1))
    if rule == "voc07":
        reached = [
            max((p for r, p in zip(recalls, precisions, strict=True) if r >= level), default=0)
            for level in np.arange(0, 1.1, 0.1)
        ]
        return sum(reached) / 11
    area, before = 0.0, 0.0
    for i, recall in enumerate(recalls):
        area += (recall - before) * max(precisions[i:])
        before = recall
    return area


def rows(image, key):
    return zip(image["boxes"].tolist(), image["labels"].tolist(), image[key].tolist(), strict=True)


def pixel_iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (one, other)]
    return width * height / (areas[0] + areas[1] - width * height)


def pycocotools(detections, targets, num_classes):
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco(targets, "difficult", num_classes),
            _coco(detections, "scores", num_classes),
            "bbox",
        )
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0].mean(axis=1).T  # (C, T)
    return 100 * np.where(precision < 0, np.nan, precision)


def _coco(images, key, num_classes):
    coco = COCO()
    annotations = [
        {
            "image_id": number,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": value,
            # pycocotools overwrites `ignore`, and ignores for their area objects that are no crowd.
            "area": 2e10 if key == "difficult" and value else (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        for number, image in enumerate(images)
        for (x1, y1, x2, y2), label, value in rows(image, key)
    ]
    coco.dataset = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": label} for label in range(num_classes)],
        # The number 0 means "no match" to pycocotools.
        "annotations": [{"id": i} | each for i, each in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco
