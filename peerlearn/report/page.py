"""A page of sections as HTML: one text with its own styles and script, which loads nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from peerlearn.report.numbers import column_texts, is_number, sort_key
from peerlearn.report.parts import Entry, Paragraph, Part, Picture, Section, Table

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_TEMPLATE = "page.html.j2"
_STYLE, _SORT, _LIVE = "page.css", "sort.js", "live.js"


@dataclass(frozen=True, kw_only=True)
class _Column:
    heading: str
    is_number: bool


@dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    path: str
    sort_key: str | None
    is_missing: bool
    is_number_column: bool


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    live: bool = False,
    links: Sequence[Entry] = (),
) -> str:
    """The HTML of a page. Equal input gives equal text.

    Args:
        title: title of the page.
        sections: sections of the page; one without parts is left out. Their anchors differ.
        live: whether the page fetches itself anew from where it came, every few seconds.
        links: other pages of the same server.
    """
    return _template().render(
        title=_encodable(title),
        sections=[_view(section) for section in sections if section.parts],
        # They are the package's own, and hold no end tag.
        style=Markup(_read(_STYLE)),
        script=Markup(_script(live=live)),
        policy=page_policy(live=live),
        is_live=live,
        links=links,
    )


def page_policy(*, live: bool = False) -> str:
    """What a browser lets a page do: nothing but run its own script and show the images in it.

    Styles may stand in the page: pictures have them at each element, and no text of a user's gets there.
    """
    digest = base64.b64encode(hashlib.sha256(_script(live=live).encode()).digest()).decode()
    rules = [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules + (["connect-src 'self'"] if live else []))


def _script(*, live: bool) -> str:
    return _read(_SORT) + (_read(_LIVE) if live else "")


def _encodable(text: str) -> str:
    """Text that has a place in a file: a byte of a file's name that is no UTF-8 has none, and is escaped."""
    return text.encode(errors="backslashreplace").decode()


def _view(section: Section) -> dict[str, Any]:
    return {
        "anchor": section.anchor,
        "title": _encodable(section.title),
        "parts": [_part_view(part) for part in section.parts],
    }


def _part_view(part: Part) -> dict[str, Any]:
    if isinstance(part, Paragraph):
        return {"kind": "paragraph", "text": _encodable(part.text)}
    if isinstance(part, Picture):
        return {
            "kind": "picture",
            "image": part.image,
            "caption": _encodable(part.caption),
            "alternative": _encodable(part.alternative),
            "numbers": part.numbers and _table_view(part.numbers),
        }
    return _table_view(part)


def _table_view(table: Table) -> dict[str, Any]:
    """A table with its cells as text. A column in which all that is there are numbers is one of numbers."""
    columns, texts = [], []
    for number, heading in enumerate(table.headings):
        values = [row[number] for row in table.rows]
        there = [value for value in values if value is not None]
        columns.append(
            _Column(
                heading=_encodable(heading), is_number=bool(there) and all(map(is_number, there))
            )
        )
        texts.append(column_texts(values))
    rows = [
        [
            _Cell(
                text=_encodable(texts[n][place]),
                path=value.path if isinstance(value, Entry) else "",
                sort_key=sort_key(value),
                is_missing=value is None,
                is_number_column=columns[n].is_number,
            )
            for n, value in enumerate(row)
        ]
        for place, row in enumerate(table.rows)
    ]
    return {
        "kind": "table",
        "caption": _encodable(table.caption),
        "columns": columns,
        "rows": rows,
        "is_folded": table.is_folded,
    }


@cache
def _read(name: str) -> str:
    return files("peerlearn.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _template() -> "Template":
    return _environment().from_string(_read(_TEMPLATE))


def _environment() -> "Environment":
    # Imported here: `--help` should not wait for it.
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
