"""Names that people give, as text for others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.runs.text import file_name_part, listed, markdown_cell, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("grün 😀 $x^^$ [red] %d", "grün 😀 $x^^$ [red] %d"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("gr\udcfcn", "gr\\xfcn"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("", ""),
    ],
)
def test_printable(name: str, shown: str):
    assert printable(name) == shown


def test_long_names_lose_their_middle():
    assert printable("abcdefghijklmnop", 10) == "abcd...nop"
    assert printable("abcdefghij", 10) == "abcdefghij"


@given(st.text(st.characters(), max_size=40), st.integers(8, 60))
def test_printable_text_is_one_line_of_utf8(name: str, longest: int):
    shown = printable(name)
    shown.encode()
    assert shown.isprintable()
    assert printable(shown) == shown
    assert len(printable(name, longest)) <= longest


def test_names_of_a_list():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("folder", "folder"),
        ("my_own_photos < 0.001", "my_own_photos < 0.001"),
        ("a|b\nc", "a\\|b\\\\nc"),
        ("<script>&lt;", "\\<script>\\&lt;"),
        ("[x](y) *b* _i_ `c` $x$", "\\[x\\](y) \\*b\\* \\_i\\_ \\`c\\` \\$x\\$"),
        (12, "12"),
    ],
)
def test_a_cell_of_markdown_has_no_markup_of_its_own(text: object, cell: str):
    assert markdown_cell(text) == cell


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("fashion_mnist", "fashion_mnist"),
        ("my photos/2019", "my_photos_2019"),
        ("-x $y\n😀", "-x__y__"),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_part_of_a_files_name(text: str, part: str):
    assert file_name_part(text) == part
