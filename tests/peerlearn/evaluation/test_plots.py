"""Pictures that only show: drawn whatever the names and the environment are, or given up with one warning."""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from peerlearn.evaluation.confusion import plot_confusion
from peerlearn.evaluation.plots import (
    COLORS,
    LINES,
    cut_errors,
    draw,
    end_at_100,
    plain_style,
    series_style,
    shortened,
    text_inches,
    thin_x_labels,
    wrapped,
)
from peerlearn.runs.text import printable
from tests.drawn import check_texts

NAMES = ["$x^^$", "a\nb", "x" * 300, "😀", "gr\udcfcn", "_under", "\\frac{", "%d {x} [red]"]
TITLE = "cash$x^^$ " + "y" * 300


def picture(names: list[str] = NAMES, title: str = TITLE) -> partial:
    confusion = torch.eye(len(names), dtype=torch.int64)
    return partial(plot_confusion, confusion=confusion, class_names=names, title=title)


def test_names_of_all_kinds_are_drawn_as_they_are(tmp_path, caplog, recwarn):
    draw(picture(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300
    assert not caplog.records
    assert not recwarn.list


def test_a_formula_in_a_name_is_drawn_as_its_signs(tmp_path):
    """The same picture as of another text of the same signs in another order could not tell; so: it differs."""
    for number, name in enumerate(["$x$", "x"]):
        draw(picture([name, "b"], "t"), tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_pictures_that_fail_alike_are_one_warning_and_leave_no_file(tmp_path, caplog):
    def broken(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    for name in ("a.png", "b.png"):
        draw(broken, tmp_path / name)
    (record,) = caplog.records
    expected = f"{tmp_path / 'a.png'} could not be drawn (No space left on device); the score beside it stands"
    assert record.getMessage() == expected
    assert not list(tmp_path.iterdir())


def test_what_the_library_says_is_kept_short(tmp_path, caplog):
    def broken(file: Path) -> None:
        raise ValueError("a\nlong " * 100)

    draw(broken, tmp_path / "a.png")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < len(str(tmp_path)) + 220


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_picture_is_the_same_file(ending, tmp_path, monkeypatch):
    """Whatever the hour, which SVG and PDF files would hold."""
    for number, now in enumerate(["1000000000", "1700000000"]):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", now)
        draw(picture(), tmp_path / f"{number}.{ending}")
    first, second = ((tmp_path / f"{number}.{ending}").read_bytes() for number in (0, 1))
    assert first == second
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert first.startswith(begin)
    assert b"200" not in first[:200] or ending == "png"


def test_text_of_vector_pictures_is_text_in_truetype_fonts(tmp_path):
    for ending in ("svg", "pdf"):
        draw(picture(["Ankle boot", "Bag"], "Fashion"), tmp_path / f"a.{ending}")
    svg, pdf = (tmp_path / "a.svg").read_text(), (tmp_path / "a.pdf").read_bytes()
    assert ">Ankle boot</text>" in svg
    assert ">Fashion</text>" in svg
    assert "<dc:date>" not in svg
    assert b"/FontFile2" in pdf  # TrueType; Type 3 fonts have none.
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf


def test_series_differ_in_more_than_their_colour():
    styles = [series_style(number) for number in range(49)]
    assert len({tuple(style.values()) for style in styles}) == 49
    assert len({(style["color"], style["marker"]) for style in styles}) == 49
    assert [style["color"] for style in styles[:7]] == list(COLORS)
    assert [style["linestyle"] for style in styles[:4]] == list(LINES)


@plain_style()
@settings(deadline=None, max_examples=30)
@given(st.text(max_size=80), st.sampled_from([0.8, 1.3]))
def test_names_are_shortened_to_a_width(name, inches):
    shown = shortened(name, inches)
    assert text_inches(shown) <= inches or len(shown) <= 6
    if shown != printable(name):
        assert "..." in shown


@plain_style()
@settings(deadline=None, max_examples=30)
@given(st.text(max_size=120))
def test_titles_are_wrapped_and_lose_nothing(title):
    lines = wrapped(title, 3.2).split("\n")
    assert all(text_inches(line, 8) <= 3.2 for line in lines)
    words = " ".join(printable(part) for part in title.split("\n"))
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")


def test_numbers_and_their_signs_stay_on_one_line():
    assert wrapped("aaaa n = 500 images", text_inches("aaaa n = ", 8)) == "aaaa\nn = 500\nimages"


def test_percentages_end_at_0_and_100_and_do_not_exaggerate():
    axes = Figure().add_subplot()
    for limits, expected in (
        ((-5, 50), (0, 50)),
        ((60, 104), (60, 100)),
        ((80, 80.5), (79.25, 81.25)),
        ((99.9, 100.1), (99, 100)),
    ):
        axes.set_ylim(limits)
        end_at_100(axes)
        assert axes.get_ylim() == pytest.approx(expected)
    axes.set_xlim(90, 120)
    end_at_100(axes, "x")
    assert axes.get_xlim() == (90, 100)
    assert cut_errors([1, 50, 99.5], [2, 2, 2]) == ([1, 2, 2], [2, 2, 0.5])


@plain_style()
def test_labels_that_touch_are_left_out_and_their_ticks_stay():
    figure = Figure(figsize=(3.3, 2), layout="constrained")
    axes = figure.add_subplot()
    places = [0, 0.001, 5, 10]
    axes.set_xticks(places, ["nothing", "near", "half", "ten"])
    figure.draw_without_rendering()
    thin_x_labels(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["nothing", "", "half", "ten"]
    assert list(axes.get_xticks()) == places
    check_texts(figure)


# Nothing but the program imports matplotlib: a test module would, before the program can look after it.
DRAWS = """
import sys
from functools import partial
from pathlib import Path
import torch
from peerlearn.evaluation.confusion import plot_confusion
from peerlearn.evaluation.plots import draw
names = ["$x^^$", "\\u00e9", "_under"]
confusion = torch.eye(3, dtype=torch.int64)
draw(partial(plot_confusion, confusion=confusion, class_names=names, title="a"), Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["backend", "notebook", "matplotlibrc", "no home", "C", "ascii"])
def test_the_environment_of_others_does_not_matter(case: str, tmp_path):
    rc = tmp_path / "matplotlibrc"
    rc.write_text("text.usetex: True\nfont.family: No Such Font\nbackend: nonsense\nbogus: 1\n")
    more = {
        "backend": {"MPLBACKEND": "nonsense"},
        "notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        "matplotlibrc": {"MATPLOTLIBRC": str(rc)},
        "no home": {
            "HOME": "/proc/none",
            "XDG_CACHE_HOME": "/proc/none",
            "XDG_CONFIG_HOME": "/proc",
        },
        "C": {"LC_ALL": "C"},
        "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }[case]
    done = subprocess.run(
        [sys.executable, "-c", DRAWS, str(tmp_path / "a.png")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **more},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").stat().st_size > 1000
