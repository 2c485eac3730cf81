"""The .wandb files of offline runs, which wandb itself only uploads: a log of LevelDB's form with protobuf records."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_FILE_HEADER = 7
_BLOCK = 32768
# Of a record: checksum, length and type.
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


def steps_of(file: Path) -> list[int]:
    """The steps of the history in a file, in its order. What a kill has cut short at the end is left out."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    records = (Record.FromString(content) for content in records_of(file.read_bytes()))
    return [
        record.history.step.num
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def records_of(content: bytes) -> Iterator[bytes]:
    """The whole records of a file. A block's end that takes no header is empty."""
    at, record = _FILE_HEADER, b""
    while at + _HEADER.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        part = content[at : at + length]
        if len(part) < length:
            return
        at += length
        record = part if kind in (_FULL, _FIRST) else record + part
        if kind in (_FULL, _LAST):
            yield record


def is_open(file: Path) -> bool:
    """Whether a process of this machine that this account can look into has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samefile(link, file):
                return True
        except OSError:
            continue
    return False
