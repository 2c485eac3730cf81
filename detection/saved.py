"""Detectors on disk: a folder with model.safetensors (torchvision's names) and config.json (what it takes to build it).

RUN/detector/   the last one    RUN/detector-best/   the best one of a validation split
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detection.backbone import Body, new_body
from detection.config import ModelConfig
from detection.detectron2_file import detectron2_config, detectron2_file
from detection.model import build_detector
from detection.norms import prepare_norms
from peerlearn.errors import UserError
from peerlearn.exchange.export_formats import DETECTRON2_FILE
from peerlearn.export import check_seal, sealed, state_misfits, write_folder
from peerlearn.runs.export_folders import (
    CONFIG_FILE,
    DETECTOR_KEY,
    LAST_DETECTOR,
    SEAL,
    WEIGHTS_FILE,
)

LAST, BEST = LAST_DETECTOR, "detector-best"
DETECTRON2_CONFIG_FILE = "detectron2.yaml"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a detector is, beside its weights.

    Attributes:
        model: config of the detector.
        architecture: name of the network that it stands on.
        image_channels: number of channels of its images.
        image_size: side of the images that the network was pretrained on, in pixels.
        mean: mean by which images in [0, 1] are normalised.
        std: standard deviation by which they are divided.
        class_names: names of the classes, without the background.
        network: name of the network in the run that pretrained it.
        weights: weights that the network started from: export or random.
        dataset: name of the data that it was trained on.
        step: number of steps of its training.
    """

    model: ModelConfig
    architecture: str
    image_channels: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str]
    network: str
    weights: str
    dataset: str
    step: int


def describe(
    body: Body,
    model: ModelConfig,
    class_names: Sequence[str],
    *,
    network: str,
    weights: str,
    dataset: str,
    step: int,
) -> Description:
    """The description of a detector on a network."""
    return Description(
        model=model,
        architecture=body.architecture,
        image_channels=body.image_channels,
        image_size=body.image_size,
        mean=body.mean,
        std=body.std,
        class_names=class_names,
        network=network,
        weights=weights,
        dataset=dataset,
        step=step,
    )


def save_detector(folder: Path, detector: GeneralizedRCNN, description: Description) -> None:
    """Write a detector's folder, at once; one that is there is replaced."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in detector.state_dict().items()}
    content = {DETECTOR_KEY: description.model.detector, **dataclasses.asdict(description)}
    weights = save(tensors)
    files = {
        WEIGHTS_FILE: weights,
        CONFIG_FILE: (json.dumps(sealed(content, weights), indent=2) + "\n").encode(),
    }
    write_folder(folder, files | _detectron2_files(tensors, description))


def _detectron2_files(tensors: Mapping[str, Tensor], about: Description) -> dict[str, bytes]:
    """The same detector for Detectron2; nothing where Detectron2 has no such model."""
    if about.model.detector != "d2_fpn":
        return {}
    try:
        config = detectron2_config(
            tensors,
            about.model,
            architecture=about.architecture,
            num_classes=len(about.class_names),
            mean=about.mean,
            std=about.std,
        )
    except UserError:
        return {}
    weights = detectron2_file(tensors, num_classes=len(about.class_names))
    return {DETECTRON2_FILE: weights, DETECTRON2_CONFIG_FILE: config.encode()}


def load_detector(folder: Path) -> tuple[GeneralizedRCNN, Description]:
    """A detector in eval mode on the CPU.

    Raises:
        UserError: the folder does not hold a whole detector.
    """
    file = folder / CONFIG_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        facts = {key: content[key] for key in content.keys() - {DETECTOR_KEY, SEAL}}
        description = Description(**{**facts, "model": ModelConfig(**facts["model"])})
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): a detector has {WEIGHTS_FILE} and {CONFIG_FILE}"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{file} is not the config of a detector ({error}): train it again"
        ) from error
    body = new_body(
        description.architecture,
        channels=description.image_channels,
        image_size=description.image_size,
        mean=description.mean,
        std=description.std,
        c4=description.model.detector == "d2_c4",
    )
    detector = build_detector(description.model, body, len(description.class_names))
    prepare_norms(description.model, detector)
    weights = folder / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read ({error}): train the detector again") from error
    if misfits := state_misfits(detector.state_dict(), tensors):
        raise UserError(
            f"{weights} does not fit the detector of {CONFIG_FILE}: {misfits[0]}: train it again"
        )
    # Comes late: the messages above say more plainly what does not fit.
    check_seal(folder, content, remedy="train the detector again")
    detector.load_state_dict(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{weights}: {name} holds NaN or Inf: train the detector again")
    return detector.eval(), description
