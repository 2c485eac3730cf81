"""What is printed may be lost: the work goes on, and the exit code is that of the work."""

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from peerlearn.cli import main
from peerlearn.runs.output import lossy_output, show, with_lossy_output

PRINTS = """
import sys
from peerlearn.runs.output import show, with_lossy_output
from rich.table import Table
def verb(words):
    for number in range(3000):
        print("a line", number, flush=True)
    table = Table(title="t")
    table.add_row("x")
    show(table)
    print("done", file=sys.stderr)
    return 7
code = with_lossy_output(verb, read=len(sys.argv) > 1)([])
open(FILE, "w").write(str(code))
sys.exit(code)
"""


def run_and_leave(tmp_path, *words: str, stdout: int) -> tuple[int, str]:
    file = tmp_path / "code"
    script = PRINTS.replace("FILE", repr(str(file)))
    done = subprocess.run([sys.executable, "-c", script, *words], stdout=stdout, timeout=100)
    return done.returncode, file.read_text()


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def test_work_goes_on_where_nobody_reads_or_the_disk_is_full(tmp_path):
    assert run_and_leave(tmp_path, stdout=closed_pipe()) == (7, "7")
    full = os.open("/dev/full", os.O_WRONLY)
    assert run_and_leave(tmp_path, stdout=full) == (7, "7")


def test_work_that_is_only_read_ends_well_where_nobody_does(tmp_path):
    assert run_and_leave(tmp_path, "read", stdout=closed_pipe()) == (0, "0")


def test_no_file_takes_the_number_of_a_standard_stream_that_is_closed(tmp_path):
    """Libraries written in C write to it."""
    script = (
        "import os\n"
        "from peerlearn.runs.output import lossy_output\n"
        "with lossy_output(), open(FILE, 'w') as file:\n"
        "    os.write(1, b'noise'), os.write(2, b'noise')\n"
        "    file.write('whole')\n"
    ).replace("FILE", repr(str(tmp_path / "file")))
    command = f'{sys.executable} -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, script], timeout=100).returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_wrong_word_exits_with_its_code_all_the_same(closing: str):
    command = f"{sys.executable} -m peerlearn nonsense {closing}"
    assert subprocess.run(["sh", "-c", command], timeout=100).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_signs_that_the_terminal_lacks_are_escaped(encoding: str, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with lossy_output():
        print("gr\udcfcn €")
    assert raw.getvalue() == b"gr\\udcfcn \\u20ac\n"


def test_a_stream_that_is_closed_costs_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert with_lossy_output(lambda words: print("x") or 3, read=False)([]) == 3
    assert sys.stdout is closed


def test_a_process_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert with_lossy_output(lambda words: print("x") or 3, read=False)([]) == 3


def table_of(name: str) -> Table:
    table = Table(title=Text(name))
    table.add_column("network", overflow="fold", min_width=7)
    for heading in ("top-1", "95 % interval", "calibration error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(Text(name), "62.31 +- 0.40", "60.05 .. 64.50", "0.01")
    return table


@pytest.mark.parametrize("columns", ["0", "1", "12", "80", "x"])
@pytest.mark.parametrize("name", ["[red]", "[/]", "net[/bold]", "{x}", "grün 😀"])
def test_tables_keep_their_numbers_and_names_in_any_pane(columns, name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    show(table_of(name))
    out = capsys.readouterr().out
    assert "62.31 +- 0.40 " in out
    assert " 60.05 .. 64.50 " in out
    assert "calibration error" in out
    assert name.split()[0] in out


def test_a_table_that_cannot_be_printed_is_one_warning(caplog, capsys):
    class Broken:
        def __rich__(self) -> str:
            raise RuntimeError("no such font")

    show(Broken(), table_of("a"))
    (record,) = caplog.records
    message = "a table could not be printed (no such font): the files have its numbers"
    assert record.getMessage() == message


def test_an_error_with_a_line_break_in_a_name_is_one_line(capsys):
    assert main(["knn", "--checkpoint", "a\nb"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
