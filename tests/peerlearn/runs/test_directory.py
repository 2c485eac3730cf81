"""The plain files of a run: lines that are whole or not there, files that are old or new."""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from peerlearn.runs.training_facts import TrainingFacts

FACTS = TrainingFacts(dataset="digits", data_root=None, images=1437, seed=3, lr=0.1, processes=2)
VALUES = st.one_of(st.floats(), st.integers(), st.text(max_size=6), st.none())
ROWS = st.lists(
    st.tuples(st.integers(0, 20), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)).map(
        lambda pair: {**pair[1], "step": pair[0]}
    ),
    max_size=6,
)


def as_json(row: dict) -> dict:
    """NaN and Inf are no JSON: null stands for them."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def appended(root: Path, rows: list[dict]) -> RunDirectory:
    run = RunDirectory(root)
    for row in rows:
        run.append_metrics(row)
    return run


# Lines


@settings(max_examples=60)
@given(rows=ROWS)
def test_rows_come_back_in_order_one_line_each(rows, tmp_path_factory):
    """Also where a text holds what some call the end of a line."""
    root = tmp_path_factory.mktemp("run")
    run = appended(root, rows)
    assert list(run.metric_rows()) == [as_json(row) for row in rows]
    content = run.metrics.read_bytes() if rows else b""
    assert content.count(b"\n") == len(rows)
    assert [json.loads(line) for line in content.split(b"\n")[:-1]] == list(run.metric_rows())
    shutil.rmtree(root)


@settings(max_examples=60)
@given(rows=ROWS, last=ROWS.filter(bool), data=st.data())
def test_a_line_torn_anywhere_costs_that_line_alone(rows, last, data, tmp_path_factory):
    """Only its line end lost, and it is still a row. After a cut, rows follow as if nothing had been."""
    root = tmp_path_factory.mktemp("run")
    run = appended(root, rows)
    start = run.metrics.stat().st_size if rows else 0
    appended(root, last[:1])
    end = run.metrics.stat().st_size
    os.truncate(run.metrics, data.draw(st.integers(start, end - 1)))
    left = [*rows, *last[: run.metrics.stat().st_size == end - 1]]
    assert list(run.metric_rows()) == [as_json(row) for row in left]
    run.cut_metrics(20)
    appended(root, last)
    assert list(run.metric_rows()) == [as_json(row) for row in (*left, *last)]
    shutil.rmtree(root)


@settings(max_examples=40)
@given(rows=ROWS.filter(lambda rows: len(rows) > 1), data=st.data())
def test_a_damaged_line_before_the_last_is_named(rows, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    run = appended(root, rows)
    lines = run.metrics.read_text().split("\n")
    number = data.draw(st.integers(1, len(rows) - 1))
    lines[number - 1] = lines[number - 1][:-1]
    run.metrics.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"metrics.jsonl: line {number} is damaged: mend or"):
        list(run.metric_rows())
    shutil.rmtree(root)


@settings(max_examples=60)
@given(rows=ROWS, step=st.integers(0, 21))
def test_a_cut_keeps_the_lines_up_to_a_step_to_the_byte_and_at_step_0_none(
    rows, step, tmp_path_factory
):
    root = tmp_path_factory.mktemp("run")
    run = appended(root, rows)
    lines = run.metrics.read_bytes().split(b"\n")[:-1] if rows else []
    kept = [line for line in lines if step > 0 and json.loads(line)["step"] <= step]
    for _ in range(2):
        run.cut_metrics(step)
        assert run.metrics.read_bytes() == b"".join(line + b"\n" for line in kept)
    shutil.rmtree(root)


@settings(max_examples=60)
@given(appends=st.lists(st.tuples(st.integers(0, 60), st.one_of(st.none(), st.integers(0, 120)))))
def test_lines_that_a_full_disk_does_not_take_follow_once_it_does(
    appends, files_up_to, tmp_path_factory
):
    """Rows of any length, with room for so many bytes more: the file holds whole rows, the first
    ones, at all times; in the end each is there once."""
    root = tmp_path_factory.mktemp("run")
    run, rows = RunDirectory(root), []
    for step, (length, room) in enumerate(appends):
        rows.append({"step": step, "text": "x" * length})
        size = run.metrics.stat().st_size if run.metrics.exists() else 0
        with files_up_to(2**30 if room is None else size + room):
            run.append_metrics(rows[-1])
        content = run.metrics.read_text()
        assert content == "" or content.endswith("\n")
        found = [json.loads(line) for line in content.splitlines()]
        assert found == rows[: len(found)]
        assert found == rows or room is not None
    rows.append({"step": len(appends)})
    run.append_metrics(rows[-1])
    assert list(run.metric_rows()) == rows
    shutil.rmtree(root)


def test_a_full_disk_is_told_of_once_until_it_has_room_again(tmp_path, files_up_to, caplog):
    run = RunDirectory(tmp_path)
    told = []
    with caplog.at_level(logging.WARNING):
        for room in (0, 0, 0, 99, 0, 0, 99):
            size = run.metrics.stat().st_size if run.metrics.exists() else 0
            with files_up_to(size + room):
                run.append_metrics({"step": 1})
            told.append(len(caplog.records))
    assert told == [1, 1, 1, 1, 2, 2, 2]
    assert "metrics.jsonl cannot be written (File too large): keeping its lines" in caplog.text
    assert len(list(run.metric_rows())) == 7


def test_every_file_keeps_its_own_lines(tmp_path, files_up_to):
    run = RunDirectory(tmp_path)
    with files_up_to(0):
        run.append_metrics({"step": 1})
        run.event("a", step=1)
    run.event("b")
    assert list(run.metric_rows()) == []
    assert [event["event"] for event in run.events()] == ["a", "b"]
    run.append_metrics({"step": 2})
    assert [row["step"] for row in run.metric_rows()] == [1, 2]


@pytest.mark.parametrize("damaged", [b"", b'{"event": "b', b"7", b"null", b"[1]", b"\0\0\0"])
def test_events_that_cannot_be_read_are_left_out(tmp_path, damaged):
    run = RunDirectory(tmp_path)
    run.event("a", step=3)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(damaged + b"\n")
    run.event("c")
    (first, last) = run.events()
    assert (first["event"], first["step"], last["event"]) == ("a", 3, "c")


# Files that are replaced as a whole


def test_until_the_new_text_is_on_the_disk_the_old_one_stands(tmp_path, monkeypatch):
    """At the moment it is synced, the file is still the old one and what is synced holds the new one."""
    file, synced = tmp_path / "state", []
    file.write_text("old")

    def fsync(descriptor: int) -> None:
        written = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((written.read_text(), file.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(file, "the new text")
    assert synced == [("the new text", "old")]
    assert file.read_text() == "the new text"
    write_text(file, "newer", durable=False)
    assert len(synced) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@settings(max_examples=40)
@given(
    old=st.none() | st.text("ab", max_size=9),
    new=st.text("cd", max_size=30),
    size=st.integers(0, 30),
)
def test_a_text_that_does_not_fit_leaves_the_old_one_and_nothing_else(
    old, new, size, files_up_to, tmp_path_factory
):
    root = tmp_path_factory.mktemp("text")
    file = root / "state"
    if old is not None:
        file.write_text(old)
    if len(new) > size:
        with files_up_to(size), pytest.raises(OSError, match="File too large"):
            write_text(file, new)
    else:
        with files_up_to(size):
            write_text(file, new)
    expected = new if len(new) <= size else old
    found = {path.name: path.read_text() for path in root.iterdir()}
    assert found == ({} if expected is None else {"state": expected})
    shutil.rmtree(root)


@pytest.mark.parametrize("broken", [(os, "fsync"), (Path, "replace")])
def test_a_disk_that_fails_later_leaves_the_old_text_and_nothing_else(
    tmp_path, monkeypatch, broken
):
    file = tmp_path / "state"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*broken, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"state": "old"}


# Starts of the program


@settings(max_examples=8)
@given(
    earlier=st.sets(st.integers(1, 120), max_size=5),
    odd=st.sets(st.sampled_from(["attempt-", "attempt-x", "attempt-1.old"])),
)
def test_a_start_is_numbered_after_the_highest_before_it(earlier, odd, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    for name in (*odd, *(f"attempt-{number}" for number in earlier)):
        (root / "logs" / name).mkdir(parents=True)
    run = RunDirectory(root)
    run.mark_done()
    run.mark_failed("before")
    attempt = run.start_attempt("pretrain", FACTS)
    assert attempt == max(earlier, default=0) + 1
    assert run.logs(attempt).is_dir()
    assert TrainingFacts.read(root / "env.json") == FACTS
    assert not run.done
    assert not (root / "FAILED").exists()
    assert run.start_attempt("pretrain", FACTS) == attempt + 1
    shutil.rmtree(root)


def test_events_of_some_names_are_those(tmp_path):
    run = RunDirectory(tmp_path)
    assert list(run.events("done")) == []
    run.event("started", step=0)
    run.event("failed", reason="done")
    run.event("done", step=3)
    with run.event_log.open("ab") as file:
        file.write(b'{"event": "done", \n["done"]\n{"event": ["done"]}\n')
    assert [event["step"] for event in run.events("done")] == [3]
    assert [event["event"] for event in run.events("done", "failed")] == ["failed", "done"]
    assert [event["event"] for event in run.events()][:3] == ["started", "failed", "done"]
