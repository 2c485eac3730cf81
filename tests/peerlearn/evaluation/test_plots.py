"""Pictures that only show: drawn whatever the names and the environment are, or given up with one warning."""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from peerlearn.evaluation.plots import draw, plot_confusion

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


DRAWS = """
import sys
from pathlib import Path
from tests.peerlearn.evaluation.test_plots import draw, picture
draw(picture(), Path(sys.argv[1]))
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
