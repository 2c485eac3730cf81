"""The board's server: who is answered, what is answered, and what becomes of clients that do nothing."""

import contextlib
import csv
import gzip
import http.client
import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from peerlearn.cli import main
from peerlearn.report import board as board_module
from peerlearn.report import run_watch, server
from peerlearn.report.admission import Door
from peerlearn.report.answers import Answer, whole
from peerlearn.report.board import Board, PageStore
from peerlearn.report.run_files import metrics_csv
from peerlearn.report.server import BoardServer
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.notes import add_note
from tests.peerlearn.commands.test_runs_command import write_run

EVIL = "<script>alert(1)</script>"
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@contextmanager
def serving(answer: Callable[[str], Answer | None], door: Door | None = None) -> Iterator[int]:
    """The port of a server in a thread."""
    opened = BoardServer(0, door or Door(takes_token=False), answer)
    thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield opened.port
    finally:
        opened.shutdown()
        thread.join()
        opened.server_close()


def write_runs(root: Path) -> Path:
    """Runs with names of all kinds, and a file beside the folder that is nobody's business."""
    write_run(root / "a", [60.0, 61.5], seed=1)
    write_run(root / EVIL, [50.0], "FAILED")
    write_run(root / "my study/50% #1 größe ?", [], "")
    write_run(root / os.fsdecode(b"caf\xe9"), [40.0])
    (root / "my study/study.yaml").write_text("runs: []\n")
    (root / "empty study").mkdir()
    (root / "empty study/study.yaml").write_text("runs: []\n")
    (root / "self").symlink_to("self")
    (root.parent / "secret").write_text("secret of the owner")
    return root


@contextmanager
def watching(root: Path) -> Iterator[int]:
    """The port of a board that sees at once what has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_watch, "_LEAST_SECONDS", 0.0)
        patch.setattr(run_watch, "_REST", 0.0)
        patch.setattr(board_module, "_REST", 0.0)
        with serving(Board(root).answer) as at:
            yield at


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a board whose folder stays as it is."""
    with watching(write_runs(tmp_path_factory.mktemp("still") / "runs")) as at:
        yield at


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "runs")


@pytest.fixture
def changing(folder: Path) -> Iterator[int]:
    """Of a board whose folder the test changes."""
    with watching(folder) as at:
        yield at


def ask(
    port: int, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        client.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            client.putheader(name.replace("_", "-"), value)
        client.endheaders()
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        client.close()


def raw(port: int, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(content)
        return b"".join(iter(lambda: client.recv(65536), b""))


def run_path(name: str, page: str = "") -> str:
    return f"/run/{quote(os.fsencode(name))}{page}"


def test_the_overview_has_every_run_and_study(port: int):
    status, headers, body = ask(port, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    html = body.decode()
    assert "<script>alert(1)" not in html
    assert (
        html.count("&lt;script&gt;alert(1)&lt;/script&gt;</a>") == 2
    )  # its row, and why it failed
    for path in (
        *("/run/a", "/run/my%20study/50%25%20%231%20gr%C3%B6%C3%9Fe%20%3F", "/run/caf%E9"),
        *("/study/my%20study", "/study/empty%20study"),
    ):
        assert f'href="{path}"' in html
        assert ask(port, path)[0] == 200


@pytest.mark.parametrize("name", ["a", EVIL, "my study/50% #1 größe ?", os.fsdecode(b"caf\xe9")])
def test_a_run_has_a_page_and_its_metrics(port: int, name: str):
    status, headers, body = ask(port, run_path(name))
    assert status == 200
    assert "script-src 'sha256-" in headers["Content-Security-Policy"]
    assert b"<script>alert(1)" not in body
    assert ask(port, run_path(name, "/log"))[0] == 200


def test_the_metrics_are_the_rows(changing: int, folder: Path):
    with RunDirectory(folder / "a").metrics.open("a") as file:
        file.write('half a line\n[1]\n{"step": 30, "=cmd": "=1+1", "net/0/loss": null}\n')
    status, headers, body = ask(changing, "/run/a/metrics.csv")
    assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8")
    rows = list(csv.DictReader(io.StringIO(body.decode())))
    assert [row["step"] for row in rows] == ["5", "10", "15", "20", "30"]
    assert [row["ensemble/knn_top1"] for row in rows] == ["", "60.0", "", "61.5", ""]
    assert rows[-1]["'=cmd"] == "'=1+1"
    assert rows[-1]["net/0/loss"] == ""


def test_the_table_as_csv_computes_nothing(changing: int, folder: Path):
    for note in ("=1+1", "+1+1", "-1+1", "@SUM(1)", "-0.5", "a=b"):
        add_note(folder / "a" / "notes.jsonl", note)
        _, _, body = ask(changing, "/runs.csv")
        rows = {row["run"]: row for row in csv.DictReader(io.StringIO(body.decode()))}
        is_safe = note in ("-0.5", "a=b")
        assert rows[str(folder / "a")]["notes"] == (note if is_safe else f"'{note}")
        add_note(folder / "a" / "notes.jsonl", note, removed=True)


def test_the_log_is_plain_text(changing: int, folder: Path):
    logs = RunDirectory(folder / "a").logs(2)
    logs.mkdir(parents=True)
    lines = [f"line {n}" for n in range(1000)]
    lines += ["\x1b[31mred\x1b[0m \x1b]0;title\x07\tend\x00\x9b\u202e", " 1 %\r50 %\r99 %\r"]
    (logs / "rank-0.log").write_text("\n".join(lines) + "\n")
    status, headers, body = ask(changing, "/run/a/log")
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    shown = body.decode().split("\n")
    assert shown[-3:] == ["red \tend", "99 %", ""]
    assert shown[0] == "line 603"


def test_no_link_or_pipe_is_opened(changing: int, folder: Path):
    run = RunDirectory(folder / "a")
    secret = folder.parent / "secret"
    run.logs(1).mkdir(parents=True)
    log = run.logs(1) / "rank-0.log"
    log.symlink_to(secret)
    assert b"secret" not in ask(changing, "/run/a/log")[2]
    log.unlink()
    os.mkfifo(log)
    assert b"no log" in ask(changing, "/run/a/log")[2]
    (folder.parent / "attempt-2").mkdir()
    (folder.parent / "attempt-2/rank-0.log").write_text("secret")
    run.logs(2).symlink_to(folder.parent / "attempt-2")
    assert b"secret" not in ask(changing, "/run/a/log")[2]
    secret.write_text('{"step": 1, "secret": 2}\n')
    run.metrics.unlink()
    run.metrics.symlink_to(secret)
    assert ask(changing, "/run/a/metrics.csv")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/run/", "/run", "/run/b", "/run/a/", "/run/a/config.yaml", "/run/a/log/", "/study/a"),
        *("/run/../../secret", "/run/a/../../secret", "/run/%2e%2e/secret", "/run/..%2f..%2fsecret"),
        *("/run//etc/passwd", "/run/%2Fetc%2Fpasswd", "/run/a%00", "/run/a%00/log", "/run/self"),
        *("/run/\\..\\secret", "/.peerlearn-index.json"),
        *("/study/my%20study/log", "/study/..", "/favicon.ico", "/run/%ff%fe", "/index.html"),
    ],
)  # fmt: skip
def test_what_was_not_found_is_not_there(port: int, path: str):
    assert ask(port, path)[::2] == (404, b"404: there is no such page\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "GeT"])  # fmt: skip
def test_it_is_read_alone(port: int, method: str):
    status, headers, _ = ask(port, "/", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_long_path_is_not_there(port: int):
    for part in ("a", "../", "%2e%2e/", "a/", "%00"):
        assert ask(port, "/run/" + 9_000 * part)[0] == 404
    assert ask(port, "/run/" + 70_000 * "a")[0] == 414


def test_head_is_get_without_content(port: int):
    status, headers, body = ask(port, "/run/a", "HEAD")
    got, theirs, content = ask(port, "/run/a")
    assert (status, body) == (got, b"")
    assert headers["Content-Length"] == theirs["Content-Length"] == str(len(content))
    assert ask(port, "/run/a/metrics.csv", "HEAD")[::2] == (200, b"")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9999", 200),
        ("[::1]:8777", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:8777", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost:80:80", 403),
        ("localhost/", 403),
        ("192.168.0.1", 403),
        ("0.0.0.0", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_the_name_of_the_host_is_this_machines(port: int, host: str, status: int):
    assert ask(port, "/", Host=host)[0] == status


def test_a_request_names_one_host(port: int):
    two = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw(port, two).startswith(b"HTTP/1.1 403 ")
    assert raw(port, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    absolute = b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(port, absolute).startswith(b"HTTP/1.1 400 ")
    assert raw(port, b"\x16\x03\x01\x02\r\n\r\n").find(b"400") >= 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 403),
        (LINK | {"Sec-Fetch-Dest": "iframe"}, 403),
        (LINK, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)  # fmt: skip
def test_another_page_gets_nothing(port: int, headers: dict[str, str], status: int):
    found, theirs, _ = ask(port, "/", **headers)
    assert found == status
    assert not [name for name in theirs if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/run/a", "/run/a/log", "/run/a/metrics.csv", "/nothing"])
def test_each_answer_is_closed_to_others(port: int, path: str):
    _, headers, _ = ask(port, path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "Python" not in headers["Server"]


def test_the_token_opens_the_board():
    door = Door()
    with serving(lambda path: board_module.whole("content"), door) as port:
        assert ask(port, "/")[0] == 403
        assert ask(port, "/?token=wrong")[0] == 403
        assert ask(port, f"/run/a?token={door.token}")[0] == 403
        assert ask(port, "/?token=%ff%00", Cookie="\xff=\xff; ; =")[0] == 403
        assert ask(port, f"/?token={door.token}", Host="evil.example")[0] == 403
        # The page goes on to / by itself: a link from elsewhere would come without the cookie.
        status, headers, body = ask(port, f"/?token={door.token}", **LINK)
        assert status == 200
        assert b'content="0; url=/"' in body
        cookie, *rules = headers["Set-Cookie"].split("; ")
        assert rules == ["Path=/", "HttpOnly", "SameSite=Strict"]
        name, _, value = cookie.partition("=")
        assert ask(port, "/", Cookie=f"other=1; bad; {cookie}")[2] == b"content"
        assert ask(port, "/", Cookie=f"{name}=wrong")[0] == 403
        assert ask(port, "/", Cookie=f"other={value}")[0] == 403
        assert ask(port, "/", Cookie=cookie, Origin="https://evil.example")[0] == 403


def test_what_has_not_changed_is_not_sent_again(changing: int, folder: Path):
    for path in ("/", "/run/a", "/study/my%20study"):
        _, headers, _ = ask(changing, path)
        status, again, body = ask(changing, path, If_None_Match=headers["ETag"])
        assert (status, body, again["ETag"]) == (304, b"", headers["ETag"]), path
    etag = ask(changing, "/run/a")[1]["ETag"]
    RunDirectory(folder / "a").append_metrics({"step": 70, "net/0/loss": 1.0})
    status, changed, _ = ask(changing, "/run/a", If_None_Match=etag)
    assert status == 200
    assert changed["ETag"] != etag


def test_an_unchanged_page_is_not_made_again(changing: int, monkeypatch: pytest.MonkeyPatch):
    made = []
    ours = board_module.render_page
    monkeypatch.setattr(
        board_module,
        "render_page",
        lambda title, *a, **k: made.append(title) or ours(title, *a, **k),
    )
    for _ in range(3):
        ask(changing, "/")
        ask(changing, "/run/a")
    assert len(made) == 2


def test_a_run_that_comes_later_is_there_and_one_that_goes_is_not(changing: int, folder: Path):
    assert ask(changing, "/run/later")[0] == 404
    write_run(folder / "later")
    assert ask(changing, "/run/later")[0] == 200
    (folder / "later").rename(folder.parent / "later")
    assert ask(changing, "/run/later")[0] == 404


def test_a_folder_that_vanishes_comes_back(changing: int, folder: Path):
    assert ask(changing, "/")[0] == 200
    folder.rename(folder.with_name("away"))
    status, _, body = ask(changing, "/")
    assert status == 503
    assert b"No such file or directory" in body
    folder.with_name("away").rename(folder)
    assert ask(changing, "/")[0] == 200


def test_long_pages_are_zipped_where_the_reader_unzips():
    text = "word " * 10_000
    with serving(lambda path: board_module.whole(text)) as port:
        _, headers, body = ask(port, "/", Accept_Encoding="gzip, br")
        assert headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(body).decode() == text
        assert ask(port, "/")[2].decode() == text


def test_clients_that_do_nothing_are_left(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server._Handler, "timeout", 600.0)
    held = [
        socket.create_connection(("127.0.0.1", port)) for _ in range(server._MOST_CONNECTIONS + 10)
    ]
    try:
        for client in held[::3]:
            with contextlib.suppress(OSError):
                client.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        assert ask(port, "/run/a")[0] == 200
        assert threading.active_count() < server._MOST_CONNECTIONS + 20
        # The oldest was left for the newest.
        held[0].settimeout(10)
        assert held[0].recv(1) == b""
    finally:
        for client in held:
            client.close()


def test_a_client_that_falls_silent_is_left(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server._Handler, "timeout", 0.2)
    assert raw(port, b"GET / HTTP/1.1\r\nHost:") == b""


def test_an_error_is_told_once_and_not_to_the_reader(caplog: pytest.LogCaptureFixture):
    def fails(path: str) -> None:
        raise ValueError("inner words")

    with serving(fails) as port:
        status, _, body = ask(port, "/")
    assert status == 500
    assert b"inner" not in body
    assert [record.getMessage() for record in caplog.records] == [
        "an answer failed: ValueError('inner words')"
    ]


def test_the_board_writes_nothing(changing: int, folder: Path):
    before = sorted((path, os.lstat(path).st_mtime_ns) for path in folder.rglob("*"))
    for path in ("/", "/runs.csv", "/run/a", "/run/a/metrics.csv"):
        assert ask(changing, path)[0] == 200
    assert sorted((path, os.lstat(path).st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_taken_port_is_refused_and_the_usual_ones_give_way(tmp_path: Path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["board", str(tmp_path), "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"peerlearn: 127.0.0.1:{port} cannot be had (Address already in use): "
        "choose another --port, or 0 for any that is free"
    )


@pytest.mark.parametrize(
    ("words", "code"), [(["--port", "70000"], 2), (["--port", "x"], 2), (["nowhere"], 1)]
)
def test_wrong_words_are_refused(words: list[str], code: int, capsys):
    assert main(["board", *words]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_metrics_that_are_cut_short_while_they_are_read_come_to_an_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    row = '{"step": 1, "loss": 2.0}\n'
    run.metrics.write_text(row * 2_000)
    pieces = metrics_csv(run)
    assert pieces is not None
    assert next(pieces).count(b"\n") > 1
    os.truncate(run.metrics, len(row))
    assert len(list(pieces)) <= 1_000


def test_a_page_that_is_drawn_keeps_none_waiting_that_was_there() -> None:
    store, begun, goes_on = PageStore(), threading.Event(), threading.Event()

    def slow() -> Answer:
        begun.set()
        assert goes_on.wait(60)
        return whole("slow")

    first = store.page("/run/a", 1, lambda: whole("first"))
    drawing = threading.Thread(target=store.page, args=("/run/b", 1, slow))
    drawing.start()
    assert begun.wait(60)
    try:
        # Its content has changed, and it would wait for the other one.
        assert store.page("/run/a", 2, lambda: whole("second")) is first
    finally:
        goes_on.set()
        drawing.join()
    assert store.page("/run/a", 2, lambda: whole("second")) == whole("second")
