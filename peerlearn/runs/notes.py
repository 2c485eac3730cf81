"""Notes and tags of a run, which people give it.

    RUN/notes.jsonl    {"time", "text", "tags"} adds, {"time", "text", "tags", "removed": true} takes away

Lines are only ever added, so that writers at the same time lose nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peerlearn.runs.environment import now_text
from peerlearn.runs.files import append_json_line, read_json_lines


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What people have noted of a run.

    Attributes:
        texts: notes, in the order in which they were written.
        tags: tags, in the order in which they were given.
    """

    texts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def read_notes(file: Path) -> Notes:
    """The notes in a file; none where it is not there. Lines that cannot be read are left out.

    Raises:
        OSError: the file is there and cannot be read.
    """
    texts: dict[str, None] = {}
    tags: dict[str, None] = {}
    for row in read_json_lines(file):
        for kept, values in ((texts, [row.get("text")]), (tags, row.get("tags"))):
            for value in values if isinstance(values, list) else ():
                if not isinstance(value, str):
                    continue
                if row.get("removed") is True:
                    kept.pop(value, None)
                else:
                    kept[value] = None
    return Notes(texts=tuple(texts), tags=tuple(tags))


def add_note(
    file: Path, text: str | None = None, tags: Sequence[str] = (), *, removed: bool = False
) -> None:
    """Add a line to the file.

    Args:
        file: notes of the run.
        text: note; None = tags alone.
        tags: tags.
        removed: whether note and tags are taken away, not added.

    Raises:
        OSError: the disk does not take the line. The file is as it was.
    """
    row = {"time": now_text(), **({} if text is None else {"text": text}), "tags": [*tags]}
    append_json_line(file, row | ({"removed": True} if removed else {}), durable=True)
