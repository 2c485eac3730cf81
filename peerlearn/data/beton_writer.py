"""Packing: the images of a dataset, decoded or as JPEG files, in one file of ffcv's format.

The pages of the format are filled here, and not by ffcv's own writer, which waits for ever where an image, a process
or the disk fails. Images are decoded by worker processes.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from peerlearn.data.beton_facts import PackedFacts, PackedFormat, facts_file, write_facts
from peerlearn.data.beton_file import JPEG, SUFFIX, UNREADABLE, decode_jpeg
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.ffcv_package import require_ffcv
from peerlearn.data.unreadable import (
    Unreadable,
    check_unreadable_rate,
    decode_images,
    warn_of_unreadable,
)
from peerlearn.data.workers import results, worker_pool
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256, replacing
from peerlearn.runs.progress import phase

# Images that a worker hands over together.
_CHUNK = 64
# ffcv reads a file by pages of so many bytes, where it does not leave that to the system.
_PAGE_BYTES = 2**23
# That of ffcv's own writer.
_JPEG_QUALITY = 90
# Another decoder may be off by so many grey levels on average. A file that differs more is encoded anew.
_DECODERS_DIFFER = 4.0
_JPEG_START = b"\xff\xd8"


def pack(
    dataset: ImageDataset,
    output: Path,
    *,
    format: PackedFormat,
    shorter_side: int | None = None,
    workers: int = 0,
    max_unreadable_percent: float = 1.0,
) -> PackedFacts:
    """Write the images and labels of a dataset to a packed file, and its facts beside it. Both appear when whole.

    An image that cannot be decoded keeps its place, and is listed in the facts. A JPEG file that is not to be resized
    is stored as it is, where ffcv's decoder reads it.

    Args:
        dataset: images to pack.
        output: file to write, FILE.beton, which must not be there yet.
        format: raw (pixels) or jpeg.
        shorter_side: length to which the shorter side of larger images is resized; None = all keep their size.
        workers: number of processes that decode and encode image files; 0 = this one.
        max_unreadable_percent: largest share of images that may be unreadable.

    Raises:
        UserError: ffcv is missing, the output is there already or cannot be written, or too many images cannot be
            decoded.
    """
    require_ffcv("packing images")
    if output.suffix != SUFFIX:
        raise UserError(f"{output} must end in {SUFFIX}: choose another file by --output")
    for path in (output, facts_file(output)):
        if os.path.lexists(path):
            raise UserError(f"{path} is there already: remove it, or choose another by --output")
    encode = partial(_encoded, format=format, shorter_side=shorter_side)
    if isinstance(dataset.images, Tensor):
        # The work is less than that of starting processes.
        workers = 0
    pool = worker_pool(encode, _chunks(dataset.images), workers=workers, device=torch.device("cpu"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(output, durable=True) as file,
            phase("packing", len(dataset)) as advance,
        ):
            pages = _Pages(file, dataset)
            for encoded in results(pool):
                pages.add(encoded)
                advance(len(encoded.rows))
            unreadable = _named(pages.failures, dataset)
            check_unreadable_rate(len(unreadable), len(dataset), max_unreadable_percent, unreadable)
            pages.finish()
        facts = _facts(dataset, output, unreadable, format=format, shorter_side=shorter_side)
        write_facts(output, facts)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}): make room, or choose another place by --output"
        ) from error
    warn_of_unreadable(dataset, unreadable, f"keep their places (listed in {facts_file(output)})")
    return facts


def content_sha256(dataset: ImageDataset) -> str:
    """A SHA-256 of the names of the classes, the labels, and the number or the names of the images."""
    images = dataset.images
    digest = hashlib.sha256(repr(dataset.class_names).encode())
    if dataset.labels is not None:
        digest.update(dataset.labels.numpy().astype("<i8").tobytes())
    if isinstance(images, Tensor):
        digest.update(repr(tuple(images.shape)).encode())
    else:
        base = os.path.commonpath([path.parent for path in images])
        names = (os.path.relpath(path, base) for path in images)
        digest.update("\0".join(names).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _facts(
    dataset: ImageDataset,
    output: Path,
    unreadable: Sequence[Unreadable],
    *,
    format: PackedFormat,
    shorter_side: int | None,
) -> PackedFacts:
    shared = {field.name for field in dataclasses.fields(PackedFacts)}
    own = {
        field.name: getattr(dataset, field.name)
        for field in dataclasses.fields(ImageDataset)
        if field.name in shared - {"images"}
    }
    stat = os.stat(output)
    return PackedFacts(
        sha256=file_sha256(output),
        size_bytes=stat.st_size,
        modified_ns=stat.st_mtime_ns,
        format=format,
        shorter_side=shorter_side,
        content_sha256=content_sha256(dataset),
        unreadable=tuple(unreadable),
        images=len(dataset),
        labelled=dataset.labels is not None,
        **own,
    )


def _named(failures: dict[int, str], dataset: ImageDataset) -> list[Unreadable]:
    assert not (failures and isinstance(dataset.images, Tensor))
    return [
        Unreadable(index, str(dataset.images[index]), reason) for index, reason in failures.items()
    ]


def _chunks(images: Tensor | Sequence[Path]) -> Iterator[np.ndarray | Sequence[Path]]:
    for first in range(0, len(images), _CHUNK):
        chunk = images[first : first + _CHUNK]
        yield chunk.numpy() if isinstance(chunk, Tensor) else chunk


class _Encoded(NamedTuple):
    """Some images as they are stored.

    Attributes:
        failures: position -> why that image cannot be decoded.
        rows: what the file tells of each, by ffcv's type, without where it lies; an image in a tensor of bytes.
        sizes: size of each in bytes.
        stored: the bytes of all of them, one after another, uint8.
    """

    failures: dict[int, str]
    rows: Tensor
    sizes: list[int]
    stored: Tensor


def _encoded(
    images: np.ndarray | Sequence[Path], *, format: PackedFormat, shorter_side: int | None
) -> _Encoded:
    require_ffcv("packing images")
    from ffcv.fields import RGBImageField

    field = RGBImageField({"raw": "raw", "jpeg": "jpg"}[format], jpeg_quality=_JPEG_QUALITY)
    files: Sequence[Path | None]
    failures: dict[int, str]
    if isinstance(images, np.ndarray):
        files, decoded, failures = [None] * len(images), list(torch.from_numpy(images)), {}
    else:
        files, (decoded, failures) = images, decode_images(images)
    rows = np.zeros(len(decoded), field.metadata_type)
    stored: list[np.ndarray] = []
    for position, (file, image) in enumerate(zip(files, decoded, strict=True)):
        row = rows[position : position + 1]
        if position in failures:
            row["mode"], row["height"], row["width"] = UNREADABLE, 1, 1
            stored.append(np.zeros(3, np.uint8))
            continue
        resized = _resized(image, shorter_side)
        pixels = resized.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        kept = _own_jpeg(file, pixels) if format == "jpeg" and resized is image else None
        if kept is None:
            field.encode(row, pixels, partial(_allocated, stored))
        else:
            row["mode"], row["height"], row["width"] = JPEG, *pixels.shape[:2]
            stored.append(kept)
    return _Encoded(
        failures,
        torch.from_numpy(rows.view(np.uint8).reshape(len(rows), -1)),
        [each.size for each in stored],
        torch.from_numpy(np.concatenate(stored)),
    )


def _resized(image: Tensor, shorter_side: int | None) -> Tensor:
    """The image (channels, height, width), made smaller where its shorter side is longer; else the same tensor."""
    height, width = image.shape[1:]
    if shorter_side is None or min(height, width) <= shorter_side:
        return image
    scale = shorter_side / min(height, width)
    size = (round(height * scale), round(width * scale))
    smaller = interpolate(image[None].to(torch.float32), size, mode="bilinear", antialias=True)
    return smaller[0].round_().clamp_(0, 255).to(torch.uint8)


def _own_jpeg(file: Path | None, pixels: np.ndarray) -> np.ndarray | None:
    """The bytes of a JPEG file of which ffcv's decoder makes these pixels, (height, width, 3); None for other files."""
    content = b"" if file is None else file.read_bytes()
    if not content.startswith(_JPEG_START):
        return None
    stored, decoded = np.frombuffer(content, np.uint8), np.empty_like(pixels)
    if not decode_jpeg(stored, decoded):
        return None
    difference = np.abs(decoded.astype(np.int16) - pixels).mean()
    return stored if difference <= _DECODERS_DIFFER else None


def _allocated(stored: list[np.ndarray], size: int) -> tuple[int, np.ndarray]:
    """What ffcv's encoder asks for: where the image will lie, which is not known yet, and an array for it."""
    stored.append(np.empty(size, np.uint8))
    return 0, stored[-1]


class _Pages:
    """The file as it grows, page by page. An image lies within a page, or begins one if it is larger."""

    def __init__(self, file: BinaryIO, dataset: ImageDataset) -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.types import FieldDescType, HeaderType, get_metadata_type

        self.failures: dict[int, str] = {}
        self._file = file
        self._fields = {"image": RGBImageField(), "label": IntField()}
        self._header = np.zeros(1, HeaderType)
        self._descriptors = np.zeros(len(self._fields), FieldDescType)
        self._rows = np.zeros(len(dataset), get_metadata_type(list(self._fields.values())))
        self._rows["f1"] = -1 if dataset.labels is None else dataset.labels.numpy()
        self._sizes = np.zeros(len(dataset), np.uint64)
        self._channels = dataset.channels
        self._done = 0
        tables = self._header.nbytes + self._descriptors.nbytes + self._rows.nbytes
        self._end = _next_page(tables)

    def add(self, encoded: _Encoded) -> None:
        """Write the next images."""
        first, stored, start = self._done, encoded.stored.numpy(), 0
        self._done += len(encoded.sizes)
        rows = self._rows["f0"][first : self._done]
        rows[:] = encoded.rows.numpy().reshape(-1).view(rows.dtype)
        for row, size in enumerate(encoded.sizes):
            if self._end % _PAGE_BYTES + size > _PAGE_BYTES:
                self._end = _next_page(self._end)
            rows["data_ptr"][row] = self._end
            self._file.seek(self._end)
            self._file.write(stored[start : start + size].data)
            start += size
            self._end += size
        self._sizes[first : self._done] = encoded.sizes
        self.failures |= {first + place: reason for place, reason in encoded.failures.items()}

    def finish(self) -> None:
        """Write the tables."""
        from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER

        places = np.zeros(len(self._rows), ALLOC_TABLE_TYPE)
        places["sample_id"] = np.arange(len(self._rows))
        places["ptr"], places["size"] = self._rows["f0"]["data_ptr"], self._sizes
        self._end = _next_page(self._end)
        self._file.seek(self._end)
        self._file.write(places.tobytes())
        type_ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
        for descriptor, (name, field) in zip(self._descriptors, self._fields.items(), strict=True):
            descriptor["type_id"] = type_ids[type(field)]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        # ffcv itself has no arguments for images.
        self._descriptors["arguments"][0][0] = self._channels
        self._header["version"] = CURRENT_VERSION
        self._header["num_fields"] = len(self._fields)
        self._header["num_samples"] = len(self._rows)
        self._header["page_size"] = _PAGE_BYTES
        self._header["alloc_table_ptr"] = self._end
        self._file.seek(0)
        for table in (self._header, self._descriptors, self._rows):
            self._file.write(table.tobytes())


def _next_page(end: int) -> int:
    """Where the first page begins that nothing before ``end`` touches."""
    return -(-end // _PAGE_BYTES) * _PAGE_BYTES
