"""`peerlearn report` of runs that hold what no training writes: there is always a page."""

import json
import os
import struct
import zlib

import pytest

from peerlearn.cli import main
from peerlearn.report.images import image_section
from peerlearn.report.numbers import sort_key
from peerlearn.report.report_command import _title
from peerlearn.report.result_pictures import data_url, picture_section
from peerlearn.report.run_facts import read_facts
from peerlearn.report.run_page import sections_of
from peerlearn.report.study_page import _newer_results, _picture, _study_parts
from tests.peerlearn.report.run_folders import make_run, write_top1

HUGE = 10**400


def chunk(kind, content, crc=None):
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, crc=None):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head, crc) + chunk(b"IDAT", b"x", crc)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content", [png(9, 9, crc=1), png(20_000, 20_000), png(10_000, 10_000)])
def test_a_damaged_picture_is_told(tmp_path, content):
    (tmp_path / "table.png").write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        data_url(tmp_path / "table.png")
    (part,) = _picture(tmp_path)
    assert part.text.startswith("table.png is not shown: ")


@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e400, -1e308])
@pytest.mark.parametrize("name", ["loss", "epoch", "x\udc80" + "y" * 100_000])
def test_hostile_rows_have_a_page(tmp_path, name, value):
    rows = [{"step": step, "attempt": 1, name: value} for step in (1, 2)]
    run = make_run(tmp_path / "a", [*rows, {"step": 3, "attempt": 1, name: 1e308}])
    with run.event_log.open("a") as events:
        events.write(json.dumps({"event": "e" * 9_999, "step": HUGE, "time": "t" * 9_999}) + "\n")
    assert main(["report", str(run.root), "--no_images"]) == 0
    assert (run.root / "report.html").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("value", "key"), [(HUGE, "Infinity"), (-HUGE, "-Infinity"), (float("nan"), None), (7, "7")]
)
def test_sort_keys(value, key):
    assert sort_key(value) == key


def test_a_damaged_table_is_told(tmp_path):
    score = dict.fromkeys(("grid", "line", "task", "dataset", "variant", "metric"), "g")
    score |= {"shown": True, "published": None, "mean": HUGE, "baseline": "b", "network": "0"}
    score |= {"labels": []}
    content = {"scores": [score], "tables": [], "config": {"grids": {"g": []}}, "problems": []}
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert "it is damaged" in _study_parts(tmp_path, [])[0].text


def test_a_dangling_result_is_not_newer(tmp_path):
    run = make_run(tmp_path / "a")
    run.results.mkdir()
    (run.results / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "table.json").write_text("{}")
    assert _newer_results(tmp_path / "table.json", [read_facts([run])[0].registered]) == 0


def test_of_many_metrics_and_pictures_the_first_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("peerlearn.report.curves._MOST_FIGURES", 2)
    monkeypatch.setattr("peerlearn.report.result_pictures._MOST_PICTURES", 2)
    run = make_run(tmp_path / "a", [{"step": 1, "attempt": 1} | {f"m{n}": 1.0 for n in range(5)}])
    file = write_top1(run, 71.0)
    for number in range(5):
        file.with_name(f"{file.stem}-{number}.svg").write_text("<svg/>")
    facts = read_facts([run])
    other = next(each for each in sections_of(facts) if each.title == "Other metrics")
    assert len(other.parts) == 3
    assert other.parts[-1].text.startswith("The first 2 metrics are drawn; 3 more")
    assert picture_section(facts).parts[-1].text.endswith("those of 3 more files")


def test_a_figure_that_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("peerlearn.report.curves.picture_of", lambda _: 1 / 0)
    facts = read_facts([make_run(tmp_path / "a", [{"step": 1, "attempt": 1, "loss": 1.0}])])
    loss = next(each for each in sections_of(facts) if each.title == "Loss")
    assert "cannot be drawn (ZeroDivisionError" in loss.parts[0].text


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), OverflowError("x")])
def test_a_config_that_no_run_writes_is_one_paragraph(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr("peerlearn.report.images.read_run_images", fail)
    (part,) = image_section(make_run(tmp_path / "a"), label="a", anchor="i").parts
    assert part.text == f"No images are shown: {type(error).__name__}: x."


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("peerlearn.report.report_command.is_study", fail)
    assert main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path} cannot be read (Permission denied)" in capsys.readouterr().err


def test_an_unwritable_output_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a")
    monkeypatch.setattr("peerlearn.report.report_command.run_sections", lambda *_, **__: 1 / 0)
    assert main(["report", str(run.root), "-o", str(tmp_path / "gone" / "x.html")]) == 1
    assert "cannot be written (No such file" in capsys.readouterr().err


def test_a_run_named_thrice_is_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", [{"step": 1, "attempt": 1, "loss": 1.0}])
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "a/", "a/../a", "--no_images"]) == 0
    assert "<title>Run a</title>" in (run.root / "report.html").read_text()

    assert ".." not in _title([run.root / "x" / ".."], is_of_study=False)


def test_a_linked_picture_and_a_pipe_are_not_read(tmp_path):
    (tmp_path / "secret").write_text("of others")
    (tmp_path / "a.svg").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "b.png")
    for name in ("a.svg", "b.png"):
        with pytest.raises(OSError, match=r"symbolic links|no regular file"):
            data_url(tmp_path / name)
