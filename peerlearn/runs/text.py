"""Names that people give to files, folders and classes, as text for terminals, pictures, tables and other files."""

import re
from collections.abc import Sequence

_LISTED = 8
_LONGEST_FILE_NAME_PART = 60
# A spreadsheet computes a cell that begins so; in some languages, with the wide form of the sign.
_FORMULA = re.compile("[=+\\-@\uff1d\uff0b\uff0d\uff20]")


def printable(text: str, longest: int | None = None) -> str:
    r"""Text on one line that every terminal takes: a line break becomes ``\n``, a byte that is no UTF-8 ``\xfc``.

    Args:
        text: any text, also a name that the file system has in other bytes than UTF-8.
        longest: number of characters beyond which the middle is left out; None = all stay.
    """
    shown = "".join(map(_printable_character, text))
    if longest is None or len(shown) <= longest:
        return shown
    return f"{shown[: longest // 2 - 1]}...{shown[-(longest // 2 - 2) :]}"


def _printable_character(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        # So Python reads a byte of a file's name that is no UTF-8.
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are: ``cat, dog and 3 more``."""
    shown = ", ".join(map(printable, names[:_LISTED]))
    return shown + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")


def markdown_cell(value: object) -> str:
    """A value as the text of one cell of a Markdown table, without any markup or HTML of its own."""
    return re.sub(r"([\\`*$\[\]|]|<(?=\S)|&(?=[#\w])|\b_|_\b)", r"\\\1", printable(str(value)))


def file_name_part(text: str) -> str:
    """Text as a part of a file's name, for any file system and shell; what else it holds becomes ``_``."""
    return re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)[:_LONGEST_FILE_NAME_PART]


def csv_cell(text: str) -> str:
    """Text as a cell that no spreadsheet computes: what would be a formula begins with ``'``. Numbers stay."""
    shown = printable(text)
    return f"'{shown}" if _FORMULA.match(shown) and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
