"""CIFAR's python version: pickles, read without running anything that they name (`peerlearn.data.pickles`).

Dimensions: N images.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peerlearn.data.pickles import array_in, read_pickled_dictionary, text_in
from peerlearn.errors import UserError

_PIXELS_PER_IMAGE = 3 * 32 * 32
_FETCH = "it is damaged, fetch it again"


def read_batch(path: Path, *, labels_key: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch file.

    Returns:
        Pixels, uint8 (N, 3072), and labels, uint8. The caller checks that there are N labels.

    Raises:
        UserError: the file holds no such arrays, or asks for anything to be run. The message names it.
    """
    content = read_pickled_dictionary(path, advice=_FETCH)
    pixels, labels = array_in(content.get("data")), content.get(labels_key)
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS_PER_IMAGE,):
        raise UserError(f"{path} holds no rows of {_PIXELS_PER_IMAGE} bytes as data: {_FETCH}")
    if not isinstance(labels, list) or not all(
        isinstance(label, int) and 0 <= label <= 255 for label in labels
    ):
        raise UserError(f"{path} holds no list of small numbers as {labels_key}: {_FETCH}")
    # Copied, as PyTorch wants memory that may be written.
    return torch.from_numpy(pixels.copy()), torch.tensor(labels, dtype=torch.uint8)


def read_class_names(path: Path, *, key: str) -> tuple[str, ...]:
    """The names of the classes.

    Raises:
        UserError: the file holds no list of names, or asks for anything to be run.
    """
    names = read_pickled_dictionary(path, advice=_FETCH).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise UserError(f"{path} holds no list of names as {key}: {_FETCH}")
    return tuple(map(text_in, names))
