"""What stands beside a packed file (FILE.beton): FILE.beton.json, with its SHA-256 and what it was packed from."""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peerlearn.data.unreadable import Unreadable
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256, write_text

PackedFormat = Literal["raw", "jpeg"]

_BUILD = "`peerlearn data build` makes both"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackedFacts:
    """The facts of a packed file.

    Attributes:
        sha256: SHA-256 of the file, in hex.
        size_bytes: size of the file.
        modified_ns: time of the file's last change, as it was when the hash was last found right.
        format: how the pixels are stored: raw or jpeg.
        shorter_side: largest length of the shorter side of an image in pixels, to which longer ones were resized; None
            = all keep their size.
        content_sha256: SHA-256 of the names of the classes, the labels and the names of the images' files.
        unreadable: images that could not be decoded, whose places are kept.

    The others are those of ``ImageDataset``.
    """

    sha256: str
    size_bytes: int
    modified_ns: int
    format: PackedFormat
    shorter_side: int | None
    content_sha256: str
    unreadable: tuple[Unreadable, ...]
    name: str
    split: str
    title: str
    images: int
    labelled: bool
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    why_unlabelled: str
    sources: tuple[str, ...]


def facts_file(file: Path) -> Path:
    """The file of the facts of a packed file."""
    return file.with_name(f"{file.name}.json")


def write_facts(file: Path, facts: PackedFacts) -> None:
    """Write the facts of a packed file beside it.

    Raises:
        OSError: the disk does not take them.
    """
    write_text(facts_file(file), json.dumps(dataclasses.asdict(facts), indent=1) + "\n")


def read_facts(file: Path) -> PackedFacts:
    """The facts of a packed file.

    Raises:
        UserError: they cannot be read.
    """
    beside = facts_file(file)
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
        values["unreadable"] = tuple(Unreadable(*each) for each in values["unreadable"])
        for name in ("class_names", "mean", "std", "sources"):
            values[name] = tuple(values[name])
        return PackedFacts(**values)
    except OSError as error:
        raise UserError(
            f"cannot read {beside} ({error.strerror}), which belongs to {file}: copy it too; {_BUILD}"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{beside} is damaged: copy it again; {_BUILD}") from error


def checked_facts(file: Path, *, quiet: bool = False) -> PackedFacts:
    """The facts of a packed file, after a look whether the file is whole.

    All of it is read only where its time differs from that of the last such look.

    Args:
        file: the packed file.
        quiet: whether not to tell that it is read.

    Raises:
        UserError: the file, or its facts, cannot be read or are damaged.
    """
    try:
        stat = os.stat(file)
        facts = read_facts(file)
        if stat.st_size != facts.size_bytes:
            raise UserError(
                f"{file} is damaged: it has {stat.st_size:,} bytes, not {facts.size_bytes:,}: copy it again; {_BUILD}"
            )
        if stat.st_mtime_ns == facts.modified_ns:
            return facts
        if not quiet:
            print(f"{file}: reading all of it once, to compare its SHA-256", flush=True)
        found = file_sha256(file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): mend data.packed") from error
    if found != facts.sha256:
        raise UserError(
            f"{file} is damaged: its SHA-256 is not the one in {facts_file(file).name}: copy it again; {_BUILD}"
        )
    try:
        write_facts(file, dataclasses.replace(facts, modified_ns=stat.st_mtime_ns))
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), so each start reads all of %s: copy files with their times (cp -p)",
            *(facts_file(file), error.strerror, file),
        )
    return facts
