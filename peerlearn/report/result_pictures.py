"""The pictures that evaluators left beside their results, as data URLs: small enough for a page, told in words."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from peerlearn.report.failures import reason_text
from peerlearn.report.numbers import column_texts
from peerlearn.report.parts import Paragraph, Part, Picture, Section
from peerlearn.report.run_facts import RunFacts
from peerlearn.report.run_results import RunResult
from peerlearn.report.scores import result_scores
from peerlearn.runs.files import open_regular
from peerlearn.runs.text import printable

# Bytes of a picture that is taken as it is, and of all pictures of a page.
_SMALL_BYTES, _ALL_BYTES = 60_000, 900_000
# Bytes of the largest files that are read.
_LARGEST_SVG_BYTES, _LARGEST_PNG_BYTES = 200_000, 50_000_000
# Pixels of the longer side, beyond which a picture is made smaller, and of the largest picture that is read at all.
_SIDE_PIXELS, _MOST_PIXELS = 1_100, 60_000_000
_LONGEST_PROTOCOL = 240
_MOST_PICTURES = 40
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What the ends of files' names tell.
_SHOWN = {"-detections": "detections in test images", "-curves": "curves"}


def picture_section(facts: Sequence[RunFacts]) -> Section:
    """The pictures of all results, as many as a page may hold."""
    parts: list[Part] = []
    left_out: list[str] = []
    room = _ALL_BYTES
    files = [(each, *found) for each in facts for found in _files(each)]
    for each, result, file in files[:_MOST_PICTURES]:
        try:
            url = data_url(file)
        except (OSError, ValueError) as error:
            left_out.append(printable(f"{file}: {error}"))
            continue
        if len(url) > room:
            left_out.append(printable(f"{file}: the page would become too large"))
            continue
        room -= len(url)
        parts.append(_picture(each, result, file, url))
    if len(files) > _MOST_PICTURES:
        left_out.append(f"those of {len(files) - _MOST_PICTURES:,} more files")
    if left_out:
        parts.append(Paragraph(text="Pictures that are not shown:\n" + "\n".join(left_out)))
    return Section(anchor="pictures", title="Pictures of results", parts=tuple(parts))


def _files(facts: RunFacts) -> Iterator[tuple[RunResult, Path]]:
    for result in facts.results:
        for file in result.pictures:
            yield result, file


def _picture(facts: RunFacts, result: RunResult, file: Path, url: str) -> Picture:
    scores = [each for each in result_scores(facts) if each.result is result]
    figures = ", ".join(f"{each.metric} {column_texts([each.value])[0]}" for each in scores)
    n = result.content["metrics"].get("n")
    step = result.content["step"]
    of = f"{facts.label}: {result.score}, {result.network}, step {column_texts([step])[0]}"
    shown = next((words for end, words in _SHOWN.items() if file.stem.endswith(end)), "")
    told = ". ".join(
        filter(None, [of, shown, figures + (f", n = {column_texts([n])[0]}" if n else "")])
    )
    return Picture(
        image=Markup('<img alt="" src="{}">').format(url),
        caption=f"{told}. Protocol: {printable(result.protocol, _LONGEST_PROTOCOL)}.",
        alternative=f"Picture of the result {told}.",
    )


def data_url(file: Path) -> str:
    """A picture as a data URL; a large one is made smaller.

    An SVG is text of a user's: within `img` it runs nothing and loads nothing, so that it never stands in the page.

    Raises:
        OSError: the file cannot be read, or is no picture.
        ValueError: the picture is too large or damaged.
    """
    most = _LARGEST_SVG_BYTES if file.suffix == ".svg" else _LARGEST_PNG_BYTES
    # A link could lead to a file that its reader alone may read, and that a page would carry along.
    with open_regular(file, follows_links=False) as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"the file is larger than {most:,} bytes")
    if file.suffix == ".svg":
        return _url("image/svg+xml", content)
    try:
        return _pixels_url(content)
    except (OSError, ValueError):
        raise
    except Exception as error:  # Of a damaged picture the library raises what it likes.
        raise ValueError(f"the picture is damaged ({reason_text(error)})") from error


def _pixels_url(content: bytes) -> str:
    from PIL import Image

    # Before the library opens it, which warns of large pictures.
    width, height = _png_size(content)
    if width * height > _MOST_PIXELS:
        raise ValueError(f"the picture is too large: {width:,} x {height:,} pixels")
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        if len(content) <= _SMALL_BYTES and max(width, height) <= _SIDE_PIXELS:
            image.verify()
            return _url("image/png", content)
        small = image.convert("RGB")
        small.thumbnail((_SIDE_PIXELS, _SIDE_PIXELS))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=80, method=4)
        return _url("image/webp", stream.getvalue())


def _png_size(content: bytes) -> tuple[int, int]:
    """The width and height that a PNG's header tells, in pixels; of another file 0."""
    head = content[:24]
    if not head.startswith(_PNG_SIGNATURE):
        return 0, 0
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
