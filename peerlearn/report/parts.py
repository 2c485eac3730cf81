"""What a page is made of: sections of paragraphs, tables and pictures.

They are plain data. `peerlearn.report.page` turns them into HTML and escapes every text in them.
"""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell that shows a text of its own.

    Attributes:
        text: text of the cell.
        path: path of the page that the text leads to, on the server of this page; "" = none.
        number: number by which the cell is sorted; None = the cell is sorted by its text.
    """

    text: str
    path: str = ""
    number: float | None = None


# None is a value that is missing. Numbers are sorted as numbers.
Cell = str | int | float | Entry | None


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """A paragraph of plain text.

    Attributes:
        text: text of the paragraph.
    """

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that a reader can sort by each column.

    Attributes:
        caption: caption of the table, with its protocol, n and spread.
        headings: heading of each column, with its unit.
        rows: cells of each row, as many as there are headings. The first one names the row.
        is_folded: whether the reader opens the table first, by its caption: what few look for.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that stands in the page itself.

    Attributes:
        image: element `svg`, or `img` with a data URL.
        caption: caption of the picture, with n and spread.
        alternative: what the picture shows, in words, for those who do not see it.
        numbers: numbers that the picture shows, which the reader opens below it; None = none.
    """

    image: Markup
    caption: str
    alternative: str
    numbers: Table | None = None


Part = Paragraph | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a page.

    Attributes:
        anchor: id of the section within its page, of lower-case letters, digits and hyphens.
        title: title of the section.
        parts: content of the section; a section without any is left out of the page.
    """

    anchor: str
    title: str
    parts: tuple[Part, ...]
