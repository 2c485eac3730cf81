"""`peerlearn report`: where the page goes, what is refused, and how large it may become."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peerlearn.cli import main
from peerlearn.report.page import render_page
from peerlearn.report.parts import Picture
from peerlearn.report.result_pictures import data_url, picture_section
from peerlearn.report.run_facts import read_facts
from peerlearn.report.run_page import sections_of
from peerlearn.report.series import RunSeries, Series
from tests.peerlearn.report.run_folders import make_run, measured, row, write_top1

OTHERS = ("rankme", "lidar", "alignment", "uniformity", "feature_std", "gradient_norm")
LOSSES = [{"step": step, "attempt": 1, "loss": 1.0} for step in (10, 20)]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a", LOSSES)


def report(*words, capsys):
    code = main(["report", *map(str, words), "--no_images"])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_the_page_of_a_run_lies_in_the_run(run, capsys):
    code, out, _ = report(run.root, capsys=capsys)
    page = run.root / "report.html"
    assert (code, out) == (0, f"report: {page} ({page.stat().st_size / 1e6:.2f} MB)\n")
    assert "<title>Run a</title>" in page.read_text()


def test_the_page_of_several_runs_lies_here(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report("a", make_run(Path("b"), LOSSES).root, capsys=capsys)[0] == 0
    assert "<title>2 runs: a, b</title>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere is not there"),
        (["file"], "file is a file"),
        (["empty"], "empty is neither a run nor a study"),
        (["a", "-o", "empty"], "empty is a folder"),
        (["a", "-o", "gone/x.html"], "gone/x.html: cannot be written (No such file or directory)"),
        (["a", "study"], "study is a study: a page is of one study, or of runs"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("empty", "study"):
        (tmp_path / name).mkdir()
    (tmp_path / "study" / "study.yaml").write_text("")
    code, _, err = report(*words, capsys=capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert told in err


def test_no_file_of_the_run_is_replaced(run, capsys):
    before = run.config.read_bytes()
    assert report(run.root, "-o", run.config, capsys=capsys)[0] == 2
    assert run.config.read_bytes() == before


def test_a_page_that_cannot_be_written_leaves_the_one_before(run, monkeypatch, capsys):
    page = run.root / "report.html"
    page.write_text("before")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert report(run.root, capsys=capsys)[0] == 1
    assert page.read_text() == "before"
    assert [each.name for each in run.root.glob(".report*")] == []


@pytest.mark.slow(20)
def test_the_page_of_ten_long_runs_is_small(run):
    (facts,) = read_facts([run])
    random = np.random.default_rng(0)
    names = [*row(1, **measured(1, 70.0)), *(f"net/{m}/{name}" for m in "01" for name in OTHERS)]
    many = [
        replace(facts, label=f"run-{number}", series=long_series(names, random))
        for number in range(10)
    ]
    sections = sections_of(many)
    pictures = [part for each in sections for part in each.parts if isinstance(part, Picture)]
    assert len(pictures) > 15
    assert 500_000 < len(render_page("T", sections).encode()) < 3_000_000


def long_series(names, random):
    steps = np.arange(1, 20_001)
    series = {
        name: Series(steps=steps, values=random.normal(size=len(steps)))
        for name in names
        if name not in ("step", "epoch", "seconds", "attempt")
    }
    return RunSeries(
        by_name=series,
        restarts=tuple(range(100, 20_000, 100)),
        rows=len(steps),
        last_step=20_000,
        last_epoch=1.0,
        problems=(),
    )


def noise(file, side):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def test_a_small_picture_stands_as_it_is_and_a_large_one_smaller(tmp_path):
    noise(tmp_path / "small.png", 40)
    noise(tmp_path / "large.png", 1500)
    assert data_url(tmp_path / "small.png").startswith("data:image/png;base64,")
    large = data_url(tmp_path / "large.png")
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < (tmp_path / "large.png").stat().st_size / 4


def test_pictures_of_results_are_told_in_words(run):
    file = write_top1(run, 71.0)
    noise(file.with_suffix(".png"), 40)
    file.with_name(f"{file.stem}-curves.png").write_bytes(b"no picture")
    file.with_suffix(".svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"
    )
    *pictures, rest = picture_section(read_facts([run])).parts
    assert [str(each.image)[:30] for each in pictures] == [
        '<img alt="" src="data:image/pn',
        '<img alt="" src="data:image/sv',
    ]
    told = "a: knn on digits, ensemble, step 100. top-1 (%) 71.00, n = 400"
    assert pictures[0].caption == f"{told}. Protocol: k 200, temperature 0.1."
    assert pictures[0].alternative == f"Picture of the result {told}."
    assert "cannot identify image file" in rest.text
