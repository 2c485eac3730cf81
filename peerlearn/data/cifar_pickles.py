"""CIFAR's python version: pickles, read without running anything that they name.

A pickle may name any function and have it called. The CIFAR files need few functions. Stand-ins
are called in their place, which accept an array of bytes and nothing else. Every other name is
refused.

Dimensions: N images.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlearn.data.files import read_bytes
from peerlearn.errors import UserError

_PIXELS_PER_IMAGE = 3 * 32 * 32


def read_batch(path: Path, *, labels_key: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch file.

    Returns:
        Pixels, uint8 (N, 3072), and labels, uint8. The caller checks that there are N labels.

    Raises:
        UserError: the file holds no such arrays, or asks for anything to be run. The message names it.
    """
    content = _load(path)
    data, labels = content.get("data"), content.get(labels_key)
    pixels = data.values if isinstance(data, _ByteArray) else None
    if pixels is None or pixels.shape[1:] != (_PIXELS_PER_IMAGE,):
        raise UserError(f"{path} holds no rows of {_PIXELS_PER_IMAGE} bytes as data: {_FETCH}")
    if not isinstance(labels, list) or not all(
        isinstance(label, int) and 0 <= label <= 255 for label in labels
    ):
        raise UserError(f"{path} holds no list of small numbers as {labels_key}: {_FETCH}")
    return torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.uint8)


def read_class_names(path: Path, *, key: str) -> tuple[str, ...]:
    """The names of the classes.

    Raises:
        UserError: the file holds no list of names, or asks for anything to be run.
    """
    names = _load(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise UserError(f"{path} holds no list of names as {key}: {_FETCH}")
    return tuple(map(_text, names))


_FETCH = "it is damaged, fetch it again"


def _load(path: Path) -> dict[Any, Any]:
    # Python 2's strings hold pixels in some entries, and words in others.
    unpickler = _Unpickler(io.BytesIO(read_bytes(path)), encoding="bytes")
    try:
        content = unpickler.load()
    except Exception as error:  # Damaged bytes can make the unpickler raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}): {_FETCH}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dictionary: {_FETCH}")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'!r}, which was not run and which no CIFAR file needs"
            ) from None


class _ByteArray:
    """Stand-in for numpy.ndarray, of uint8 alone."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _ByteType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("its arrays are not of bytes")
        # Copied, as PyTorch wants memory that may be written.
        flat = np.frombuffer(bytearray(content), dtype=np.uint8)
        self.values = flat.reshape(shape, order="F" if fortran_order else "C")


class _ByteType:
    """Stand-in for the numpy.dtype of uint8. Its state does not matter for bytes."""

    def __setstate__(self, state: Any) -> None:
        pass


def _byte_type(code: Any, *flags: Any) -> _ByteType:
    if _text(code) not in ("u1", "|u1"):
        raise pickle.UnpicklingError(f"its arrays are of {code!r}, not of bytes")
    return _ByteType()


def _reconstruct(*arguments: Any) -> _ByteArray:
    # The arguments describe an empty array, which the state then replaces.
    return _ByteArray()


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand-in for _codecs.encode: Python 3 writes bytes as such a call in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something other than bytes")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    # Only ever handed to _reconstruct, which does not look at it.
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _byte_type,
    ("_codecs", "encode"): _encode,
}
