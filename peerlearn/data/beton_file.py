"""Packed files (FILE.beton, of ffcv's format): their images by number, read by any number of threads at once.

The image with the number i of a packed file has the path FILE.beton/i, by which it passes for a file.
Dimensions: N images, B batch.
"""

import os
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peerlearn.data.ffcv_package import require_ffcv
from peerlearn.errors import UserError
from peerlearn.runs.text import printable

SUFFIX = ".beton"
# ffcv's numbers for an image that is stored as a JPEG file and as its pixels; and ours for the black pixel in the place
# of an image that could not be decoded, which ffcv takes for pixels too.
JPEG, RAW, UNREADABLE = 0, 1, 255


class PackedFile:
    """The images of a packed file.

    Attributes:
        file: the file.
        channels: number of channels of the images; the file holds grey images thrice.
        heights: height of each image in pixels, int64 (N,).
        widths: width of each image in pixels, int64 (N,).
        labels: label of each image, int64 (N,); -1 without one.
        unreadable: whether each image could not be decoded when it was packed, bool (N,). In its place is a black
            pixel.

    Raises:
        UserError: the file cannot be read, or ffcv is missing.
    """

    def __init__(self, file: Path) -> None:
        require_ffcv(str(file))
        from ffcv.reader import Reader

        self.file = file
        try:
            reader = Reader(str(file))
            self.channels = int(reader.field_descriptors["arguments"][0][0])
            images, labels = (reader.metadata[name] for name in ("f0", "f1"))
            table = np.sort(reader.alloc_table, order="ptr")
            self._offsets = images["data_ptr"]
            self._sizes = table["size"][np.searchsorted(table["ptr"], self._offsets)]
            self._descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): mend data.packed") from error
        except Exception as error:  # Damaged bytes can make the reader raise anything.
            raise UserError(
                f"{file} is no packed file ({printable(str(error))}): `peerlearn data build` makes one"
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self._jpeg = images["mode"] == JPEG
        self.unreadable = torch.from_numpy(images["mode"] == UNREADABLE)
        self.heights, self.widths, self.labels = (
            torch.from_numpy(values.astype(np.int64))
            for values in (images["height"], images["width"], labels)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def extent(self, number: int) -> tuple[int, int]:
        """Width and height of the image with this number."""
        return int(self.widths[number]), int(self.heights[number])

    def read(self, number: int) -> Tensor:
        """The image with this number: uint8 (height, width, channels).

        Raises:
            UserError: the file is damaged.
        """
        width, height = self.extent(number)
        pixels = np.empty((height, width, 3), np.uint8)
        self._read_into(number, pixels)
        return torch.from_numpy(pixels)[..., : self.channels]

    def read_each(self, numbers: Tensor) -> list[Tensor]:
        """`read` of several."""
        return [self.read(number) for number in numbers.tolist()]

    def read_together(self, numbers: Tensor, *, pinned: bool = False) -> Tensor:
        """Images at the top left of canvases as large as the largest: uint8 (B, height, width, channels), else black.

        Args:
            numbers: numbers of the images, (B,).
            pinned: whether they lie in memory that CUDA copies from by itself.

        Raises:
            UserError: the file is damaged.
        """
        heights, widths = self.heights[numbers], self.widths[numbers]
        shape = (len(numbers), int(heights.max()), int(widths.max()), 3)
        canvases = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        whole = (heights == shape[1]) & (widths == shape[2])
        if not whole.all():
            canvases.zero_()
        array = canvases.numpy()
        for row, (number, fills) in enumerate(zip(numbers.tolist(), whole.tolist(), strict=True)):
            if fills:
                self._read_into(number, array[row])
            else:
                pixels = self.read(number)
                canvases[row, : pixels.shape[0], : pixels.shape[1], : self.channels] = pixels
        return canvases[..., : self.channels]

    def _read_into(self, number: int, pixels: np.ndarray) -> None:
        """Set ``pixels``, uint8 (height, width, 3), to an image."""
        size = int(self._sizes[number])
        jpeg = bool(self._jpeg[number])
        stored = np.empty(size, np.uint8) if jpeg else pixels.reshape(-1)
        if stored.size != size or not self._read_bytes(stored, int(self._offsets[number])):
            raise self._damaged(number)
        if jpeg and not decode_jpeg(stored, pixels):
            raise self._damaged(number)

    def _read_bytes(self, stored: np.ndarray, offset: int) -> bool:
        """Fill an array from the file; whether there is so much in it."""
        # Not through a mapping: a disk that fails would end the process by SIGBUS, and not with a line.
        try:
            return os.preadv(self._descriptor, [stored.data], offset) == stored.size
        except OSError as error:
            raise UserError(
                f"cannot read {self.file} ({error.strerror}): see to its disk"
            ) from error

    def _damaged(self, number: int) -> UserError:
        return UserError(
            f"image {number} of {self.file} is damaged: copy the file again, or make it by `peerlearn data build`"
        )


def decode_jpeg(stored: np.ndarray, pixels: np.ndarray) -> bool:
    """Decode the bytes of a JPEG file into ``pixels``, uint8 (height, width, 3), by ffcv's decoder.

    Returns:
        Whether nothing is wrong with them, which ffcv itself does not ask.
    """
    from ffcv.libffcv import imdecode

    height, width = pixels.shape[:2]
    code: int = imdecode(stored, pixels, height, width, height, width)
    return code == 0


def open_packed(file: Path) -> PackedFile:
    """A packed file, opened once in this process for as long as it does not change.

    Raises:
        UserError: it cannot be read.
    """
    try:
        stat = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): mend data.packed") from error
    return _opened(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(file: Path, size_bytes: int, modified_ns: int) -> PackedFile:
    return PackedFile(file)


def packed_path(file: Path, number: int) -> Path:
    """The path by which an image of a packed file passes for a file."""
    return file / str(number)


def packed_place(path: Path) -> tuple[Path, int] | None:
    """The packed file of such a path, and the number of the image in it; None for any other path."""
    if path.parent.suffix != SUFFIX or not path.name.isdecimal():
        return None
    return path.parent, int(path.name)


def packed_rows(paths: Sequence[Path]) -> tuple[PackedFile, Tensor]:
    """The packed file that all these paths lead into, and the number of each image in it, (N,)."""
    (file,) = {path.parent for path in paths}
    return open_packed(file), torch.tensor([int(path.name) for path in paths])
