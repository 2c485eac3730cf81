"""Detections in the pixels of the files, whatever sizes the detector saw; and what the rules of evaluation compare."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection.config import ModelConfig
from detection.inference import detect, for_rule, view_of
from peerlearn.compute.dist import Ranks
from peerlearn.compute.precision import Precision
from peerlearn.data.detection_sets import dataset_of, no_objects
from peerlearn.errors import UserError

RANKS = Ranks(torch.device("cpu"))
SIZES = [(40, 30), (25, 50), (60, 60)]


@pytest.fixture
def dataset(tmp_path):
    """Images of known sizes with one object each, the last one difficult."""
    annotated = []
    for number, (width, height) in enumerate(SIZES):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((height, width, 3), 51 * number, np.uint8)).save(path)
        objects = no_objects((width, height))
        objects.add((2.0, 3.0, 12.0, 23.0), number % 2, difficult=number == 2)
        annotated.append((path, (width, height), objects))
    return dataset_of("own", "test", ("nut", "screw"), annotated, "Own")


class Stub(nn.Module):
    """Finds in every image its whole area, and its left half; it notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], float, bool]] = []

    def forward(self, images):
        (image,) = images
        self.seen.append((tuple(image.shape), float(image.mean()), self.training))
        height, width = image.shape[1:]
        boxes = torch.tensor([[0, 0, width, height], [0, 0, width / 2, height]])
        return [
            {
                "boxes": boxes.float(),
                "scores": torch.tensor([0.9, 0.5]),
                "labels": torch.tensor([1, 2]),
            }
        ]


def found_by(stub, dataset, model, **more):
    arguments = {"channels": 3, "precision": Precision("fp32", RANKS.device), "workers": 0}
    return detect(stub, dataset, model, ranks=RANKS, **(arguments | more))


def test_corners_are_in_the_pixels_of_the_file(dataset):
    stub = Stub().train()
    found = found_by(stub, dataset, ModelConfig(short_sides=[20, 100], longest_side=150))
    # To the last of the short sides, and not beyond the longest side.
    assert [shape for shape, _, _ in stub.seen] == [(3, 100, 133), (3, 150, 75), (3, 100, 100)]
    assert [mean for _, mean, _ in stub.seen] == pytest.approx([0, 0.2, 0.4])
    assert not any(training for _, _, training in stub.seen)
    assert stub.training
    for each, (width, height) in zip(found, SIZES, strict=True):
        expected = torch.tensor([[0, 0, width, height], [0, 0, width / 2, height]])
        torch.testing.assert_close(each["boxes"], expected.float())
        assert each["scores"].tolist() == pytest.approx([0.9, 0.5])
        # The background is no class of the data.
        assert each["labels"].tolist() == [0, 1]
        assert each["labels"].dtype == torch.int64


def test_torchvisions_detector_sees_images_as_they_are(dataset):
    stub = Stub()
    model = ModelConfig(detector="torchvision_fpn", short_sides=[100], longest_side=150)
    found = found_by(stub, dataset, model)
    assert [shape[1:] for shape, _, _ in stub.seen] == [(h, w) for w, h in SIZES]
    assert found[1]["boxes"][0].tolist() == [0, 0, 25, 50]
    assert view_of(model, training=True).short_sides == ()


def test_grey_detectors_see_grey_images(dataset):
    stub = Stub()
    found_by(stub, dataset, ModelConfig(short_sides=[30], longest_side=60), channels=1)
    assert [shape[0] for shape, _, _ in stub.seen] == [1, 1, 1]


def test_an_image_that_cannot_be_decoded_is_named(dataset):
    dataset.images[1].write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"1\.png"):
        found_by(Stub(), dataset, ModelConfig(short_sides=[30], longest_side=60))


def test_the_rules_of_voc_count_pixels_from_one_and_that_of_coco_from_zero(dataset):
    detections = [
        {
            "boxes": torch.tensor([[2.04, 3.06, 11.96, 23.0]]),
            "scores": torch.tensor([0.12345]),
            "labels": torch.tensor([0]),
        }
    ] * 3
    found, targets = for_rule(detections, dataset, rule="voc07", rounded=False)
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[3.04, 4.06, 11.96, 23.0]]))
    # As the devkit has it: xmin and ymin alone had lost 1.
    assert targets[0]["boxes"].tolist() == [[3, 4, 12, 23]]
    assert [each["difficult"].tolist() for each in targets] == [[False], [False], [True]]
    assert [each["labels"].tolist() for each in targets] == [[0], [1], [0]]
    found, targets = for_rule(detections, dataset, rule="coco", rounded=False)
    torch.testing.assert_close(found[0]["boxes"], detections[0]["boxes"])
    assert targets[0]["boxes"].tolist() == [[2, 3, 12, 23]]
    found, _ = for_rule(detections, dataset, rule="voc10", rounded=True)
    assert found[0]["boxes"].tolist() == [[3.0, 4.1, 12.0, 23.0]]
    assert found[0]["scores"].tolist() == [0.123]
