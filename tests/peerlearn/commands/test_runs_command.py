"""`peerlearn runs` and `peerlearn note`: exact tables, conditions, orders, the index; damaged and growing runs."""

import csv
import io
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.config import config_to_yaml
from peerlearn.runs import run_contents
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import append_text
from peerlearn.runs.heartbeat import process_started_at
from peerlearn.runs.run_index import INDEX_FILE
from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from tests.e2e.runs import command, environment

KNN, NET = "ensemble/knn_top1", "net/0/knn_top1"
PROTOCOL = {"knn/k": 20, "knn/temperature": 0.1}


def write_run(folder: Path, scores: list[float] = (), mark: str = "DONE", **config: object) -> Path:
    """A run with a row of metrics for each score, one of losses before each, and its mark."""
    run = RunDirectory(folder)
    run.create_folder()
    run.write_config(config_to_yaml(PretrainConfig(run=str(folder), **config)))
    for number, score in enumerate(scores, start=1):
        run.append_metrics({"step": 10 * number - 5, "net/0/loss": 1.0})
        run.append_metrics({"step": 10 * number, NET: score - 1, KNN: score, **PROTOCOL})
    if mark:
        (folder / mark).write_text("rank 0: out of memory\n" if mark == "FAILED" else "")
    return folder


def write_result(run: Path, name: str, top1: float, step: int = 20) -> None:
    content = {"task": "linear", "dataset": "digits", "network": "ensemble", "step": step}
    content["metrics"] = {"top1": top1, "calibration_error": 99.0, "n": 10}
    (run / "results").mkdir(exist_ok=True)
    (run / "results" / name).write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Three runs in folders of several depths, and what is no run; the folder is the working directory's runs."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    cohort = CohortConfig(networks=4)
    write_run(root / "my study/grid/b", [70.0, 72.5, 71.0], seed=1, cohort=cohort, method="simclr")
    write_run(root / "a", [60.0], "FAILED", base_lr=0.1)
    write_run(root / "my study/c", [], "")
    write_result(root / "a", "linear-1.json", 80.0)
    write_result(root / "a", "linear-2.json", 81.25, step=10)
    (root / "my study/study.yaml").write_text("runs: []\n")
    (root / "my study/config.yaml").write_text("no run\n")
    (root / "my study/empty").mkdir()
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "again").symlink_to("a")
    write_run(root / "a/results/trained within")
    write_run(root / ".hidden/run")
    return root


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    return json.loads(printed(capsys, *words, "--json"))


def names(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    return [Path(run["run"]).name for run in listed(capsys, *words)]


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("peerlearn: ")


def test_the_table_is_this(runs, capsys):
    assert main(["note", "runs/a", "too fast", "--tag", "lr"]) == 0
    assert [line.rstrip() for line in printed(capsys).splitlines() if "───" not in line] == [
        f"{'knn_top1':>100}                    top1",
        f"{'run':22}{'state':9}{'differs':61}ensemble  linear-digits/ensemble  tags, notes",
        f"{'runs/a':22}failed   seed 0, method moco, base_lr 0.1, cohort.networks 2             60.00  "
        "         81.25 (80.00)  #lr; too fast",
        f"{'runs/my study/c':22}stopped  seed 0, method moco, base_lr 0.03, cohort.networks 2                -  "
        "                     -",
        "runs/my study/grid/b  done     seed 1, method simclr, base_lr 0.03, cohort.networks 4  72.50 (71.00)  "
        "                     -",
        f"{KNN}: best (last) in %, k 20, temperature 0.1",
        "linear-digits/ensemble/top1: best (last) in %, linear-2.json",
        "runs/a has failed: rank 0: out of memory",
    ]


def test_json_tells_everything(runs, capsys):
    first, second, third = listed(capsys)
    assert [run.pop("config")["seed"] for run in (first, second, third)] == [0, 0, 1]
    score = {"best": 60.0, "best_step": 10, "last": 60.0, "last_step": 10}
    linear = {"best": 81.25, "best_step": 10, "last": 80.0, "last_step": 20, "by": "linear-2.json"}
    by = "k 20, temperature 0.1"
    assert first == {
        "run": "runs/a",
        "state": "failed",
        "reason": "rank 0: out of memory",
        "step": 10,
        "differs": {"seed": 0, "method": "moco", "base_lr": 0.1, "cohort.networks": 2},
        "scores": {
            NET: {**score, "best": 59.0, "last": 59.0, "by": by},
            KNN: {**score, "by": by},
            "linear-digits/ensemble/top1": linear,
        },
        "tags": [],
        "notes": [],
        "problems": [],
    }
    assert (second["run"], second["state"], second["step"]) == ("runs/my study/c", "stopped", None)
    assert third["scores"][KNN] == {
        "best": 72.5,
        "best_step": 20,
        "last": 71.0,
        "last_step": 30,
        "by": by,
    }


def test_csv_reads_back_one_line_for_each_run(runs, tmp_path, capsys):
    note = 'grün, "quoted"\nsecond line \x1b[31mred'
    assert main(["note", "runs/a", note, "--tag", "x", "--tag", "y"]) == 0
    text = printed(capsys, "--csv", "-")
    assert printed(capsys, "--csv", str(tmp_path / "out.csv")) == ""
    assert (tmp_path / "out.csv").read_text() == text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    first, _, third = csv.DictReader(io.StringIO(text))
    assert (first["run"], first["state"], first["base_lr"]) == ("runs/a", "failed", "0.1")
    assert first["tags"] == "x y"
    assert first["notes"] == 'grün, "quoted"\\nsecond line \\x1b[31mred'
    assert (third[f"{KNN} best"], third[f"{KNN} last"]) == ("72.5", "71.0")
    assert (third["linear-digits/ensemble/top1 best"], third["method"]) == ("", "simclr")
    missing = str(tmp_path / "none/out.csv")
    assert refused(capsys, 1, "runs", "--csv", missing) == (
        f"{missing}: cannot be written (No such file or directory): choose another --csv"
    )


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["method=moco"], ["a", "c"]),
        (["method!=moco"], ["b"]),
        (["method=moco", "state=failed"], ["a"]),
        (["cohort.networks>2"], ["b"]),
        (["base_lr=1e-1"], ["a"]),
        (["base_lr<0.1"], ["c", "b"]),
        ([f"{KNN}>=60"], ["a", "b"]),
        ([f"{KNN}>60"], ["b"]),
        (["step<=10"], ["a"]),
        (["tag=x"], ["b"]),
        (["tag!=x"], ["a", "c"]),
        (["data.root=null", "symmetric=false"], ["a", "c", "b"]),
        (["run=runs/my study/c"], ["c"]),
        (["seed=7"], []),
    ],
)
def test_conditions_choose_runs(runs, capsys, conditions, found):
    assert main(["note", "runs/my study/grid/b", "--tag", "x"]) == 0
    assert names(capsys, "--where", *conditions) == found


def test_orders_put_the_best_score_first_and_runs_without_it_last(runs, capsys):
    assert names(capsys, "--sort", KNN) == ["b", "a", "c"]
    assert names(capsys, "--sort", "base_lr") == ["c", "b", "a"]
    assert names(capsys, "--sort", "method") == ["a", "c", "b"]
    assert names(capsys, "--sort", "linear-digits/ensemble/top1") == ["a", "c", "b"]
    assert NET.rpartition("/")[0] in printed(capsys, "--sort", NET).splitlines()[1].split()


def test_wrong_words_name_what_was_meant(runs, capsys):
    assert refused(capsys, 2, "runs", "--where", "metod=moco") == (
        "--where: no run has a key 'metod'; did you mean 'method'? (`peerlearn runs --json` shows all keys)"
    )
    assert "did you mean 'cohort.networks'?" in refused(capsys, 2, "runs", "--sort", "networks")
    assert f"did you mean {KNN!r}?" in refused(capsys, 2, "runs", "--sort", "ensemble/knn_top")
    assert "expected KEY=VALUE" in refused(capsys, 2, "runs", "--where", "method")
    assert "seed< needs a number, got 'x'" in refused(capsys, 2, "runs", "--where", "seed<x")
    assert refused(capsys, 1, "runs", "none").startswith("none: No such file or directory: name")
    assert refused(capsys, 1, "runs", "runs/my study/empty").startswith("no run in runs/my study")


def test_without_the_index_the_answer_is_the_same(runs, capsys, monkeypatch):
    first = listed(capsys)
    opened: list[Path] = []
    read = run_contents._read_config

    def noted(file: Path, earlier: object) -> dict:
        opened.append(file)
        return read(file, earlier)

    monkeypatch.setattr(run_contents, "_read_config", noted)
    index = json.loads((runs / INDEX_FILE).read_text())
    assert [*index["runs"]] == ["a", "my study/c", "my study/grid/b"]
    # What the index says is believed as long as the files are the same.
    index["runs"]["a"]["config"]["values"]["seed"] = 77
    (runs / INDEX_FILE).write_text(json.dumps(index))
    assert listed(capsys)[0]["config"]["seed"] == 77
    (runs / INDEX_FILE).unlink()
    assert listed(capsys) == first
    assert len(opened) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({"version": 1, "runs": {"a": 3}}),
        lambda text: "",
    ],
)
def test_a_damaged_index_costs_one_line_and_is_mended(runs, capsys, caplog, damage):
    first = listed(capsys)
    text = (runs / INDEX_FILE).read_text()
    (runs / INDEX_FILE).write_text(damage(text))
    assert listed(capsys) == first
    assert [record.getMessage() for record in caplog.records] == [
        f"runs/{INDEX_FILE} cannot be read: the runs are read without it"
    ]
    assert (runs / INDEX_FILE).read_text() == text


@pytest.mark.parametrize(
    "part", ["config", "metrics", "results", "values", "scores", "offset", "before", "stamp"]
)
def test_an_index_whose_entries_make_no_sense_is_read_over(runs, capsys, part):
    first = listed(capsys)
    text = (runs / INDEX_FILE).read_text()

    def spoil(value: object) -> object:
        if isinstance(value, dict):
            return {k: {"x": {"y": [1]}} if k == part else spoil(v) for k, v in value.items()}
        return value

    (runs / INDEX_FILE).write_text(json.dumps(spoil(json.loads(text))))
    if part in ("offset", "before"):
        # They count when a run has gone on.
        append_text(runs / "a/metrics.jsonl", json.dumps({"step": 90, KNN: 1.0}) + "\n")
        first[0]["step"] = 90
        first[0]["scores"][KNN] |= {"last": 1.0, "last_step": 90}
    assert listed(capsys) == first


def test_an_index_that_cannot_be_written_costs_one_line(runs, capsys, caplog):
    (runs / INDEX_FILE).mkdir()
    assert names(capsys) == ["a", "c", "b"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"runs/{INDEX_FILE} cannot be read: the runs are read without it",
        f"runs/{INDEX_FILE} cannot be written (Is a directory): the next look reads the runs again",
    ]


def test_a_run_that_goes_on_is_read_on_from_where_it_ended(runs, capsys, monkeypatch):
    taken: list[int] = []
    take = run_contents._take_row

    def noted(line: bytes, memory: dict) -> None:
        taken.append(json.loads(line)["step"])
        take(line, memory)

    monkeypatch.setattr(run_contents, "_take_row", noted)
    listed(capsys)
    assert sorted(taken) == [10, 10, 20, 30]
    run = RunDirectory(runs / "my study/grid/b")
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 40, KNN: 90.0}) + '\n{"step": 50, "ensemble/kn')
    before = taken.copy()
    score = listed(capsys)[2]["scores"][KNN]
    assert taken[len(before) :] == [40]
    assert (score["best"], score["best_step"], score["last"]) == (90.0, 40, 90.0)
    # The half line is finished; then the run is resumed from an earlier save, which cuts rows.
    with run.metrics.open("a") as file:
        file.write('n_top1": 95.0}\n')
    assert listed(capsys)[2]["scores"][KNN]["best"] == 95.0
    run.cut_metrics(20)
    assert listed(capsys)[2]["scores"][KNN] | {"by": ""} == {
        "best": 72.5,
        "best_step": 20,
        "last": 72.5,
        "last_step": 20,
        "by": "",
    }
    # Rows in the place of others, and more of them, in the same file.
    run.metrics.write_text(
        "".join(json.dumps({"step": s, KNN: 10.0, "x": "y" * 99}) + "\n" for s in range(9))
    )
    assert listed(capsys)[2]["scores"][KNN]["best"] == 10.0


def test_a_changed_config_and_a_changed_result_are_read_again(runs, capsys):
    listed(capsys)
    config = runs / "a/config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    write_result(runs / "a", "linear-3.json", 90.0, step=30)
    (runs / "a/results/linear-2.json").unlink()
    (first, *_) = listed(capsys)
    assert first["config"]["seed"] == 5
    assert first["scores"]["linear-digits/ensemble/top1"]["best"] == 90.0


def test_damaged_runs_are_listed_with_what_can_be_read(runs, capsys):
    run = RunDirectory(runs / "my study/grid/b")
    run.config.write_text("seed: [\n")
    rows = run.metrics.read_text().splitlines(keepends=True)
    rows[1] = rows[1][:20] + "\n"
    run.metrics.write_text("".join(rows) + '{"step": 31, "net')
    write_result(run.root, "linear-1.json", 50.0)
    (run.results / "linear-0.json").write_text("{")
    run.notes.write_bytes(b'\xff\n{"tags": [3, "kept"], "text": 4}\n[]\n')
    run.done_mark.unlink()
    (_, _, found) = listed(capsys)
    assert found["problems"] == [
        "config.yaml is damaged (line 2)",
        "metrics.jsonl has 1 line that cannot be read",
        "results/linear-0.json is damaged, or no result",
        "metrics.jsonl ends in half a line",
    ]
    assert (found["config"], found["step"], found["tags"], found["notes"]) == ({}, 30, ["kept"], [])
    assert found["scores"][KNN]["best"] == 72.5
    assert found["scores"]["linear-digits/ensemble/top1"]["best"] == 50.0
    assert "runs/my study/grid/b: config.yaml is damaged (line 2)" in printed(capsys)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("", "is damaged (it holds no keys)"),
        ("- 1\n", "is damaged (it holds no keys)"),
        ("a: &a\n  b: *a\n", "is damaged (it is nested too deeply)"),
        (
            "a0: &a0 {x: 1, y: 2}\n"
            + "".join(
                f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n"
                for n in range(1, 7)
            ),
            "is damaged (it has too many keys)",
        ),
        ("x: 1\n" * 300_000, "is damaged (it is too large)"),
        ("x: !!python/object/apply:os.abort []\n", "is damaged (line 1)"),
    ],
)
def test_what_is_no_config_is_said(tmp_path, capsys, config, problem):
    write_run(tmp_path / "run", [50.0])
    (tmp_path / "run/config.yaml").write_text(config)
    (found,) = listed(capsys, str(tmp_path))
    assert found["problems"] == [f"config.yaml {problem}"]
    assert found["scores"][KNN]["best"] == 50.0


def test_values_that_json_has_not_are_text(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(
        "a: .nan\nb: 2020-01-01\nc: [1, [2], {d: 3}]\n1: {}\n"
    )
    assert listed(capsys, str(tmp_path))[0]["config"] == {
        "a": "nan",
        "b": "2020-01-01",
        "c": [1, "...", "..."],
        "1": "",
    }
    assert listed(capsys, str(tmp_path), "--where", "c=[1, ..., ...]")


def test_a_run_that_a_live_process_holds_is_running(runs, capsys):
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    owner["started"] = process_started_at(os.getpid())
    (runs / "my study/c/owner.json").write_text(json.dumps(owner))
    with (runs / "my study/c/metrics.jsonl").open("w") as file:
        file.write('{"step": 1}\n{"st')
    found = listed(capsys)[1]
    # The half line is being written.
    assert (found["state"], found["step"], found["problems"]) == ("running", 1, [])
    (runs / "my study/c/owner.json").write_text(json.dumps(owner | {"started": 1}))
    assert listed(capsys)[1]["state"] == "stopped"


def test_runs_that_are_named_twice_or_by_links_stand_once_and_get_no_index(runs, capsys):
    assert names(capsys, "runs/a", "runs/again", "runs/a") == ["a"]
    assert not (runs / "a" / INDEX_FILE).exists()
    assert [run["run"] for run in listed(capsys, "runs/my study", "runs")] == [
        "runs/my study/c",
        "runs/my study/grid/b",
        "runs/a",
    ]
    assert [*json.loads((runs / INDEX_FILE).read_text())["runs"]] == ["a"]


def test_readers_at_the_same_time_leave_a_whole_index(runs, capsys):
    first = listed(capsys)
    (runs / INDEX_FILE).unlink()
    words = command("runs", "runs", "--json")
    started = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, cwd=runs.parent)
        for _ in range(3)
    ]
    for each in started:
        out, _ = each.communicate(timeout=60)
        assert json.loads(out) == first
    assert [*json.loads((runs / INDEX_FILE).read_text())["runs"]] == [
        *("a", "my study/c", "my study/grid/b"),
    ]
    assert not list(runs.glob(f".{INDEX_FILE}*"))


def test_a_narrow_terminal_gets_no_line_that_is_wider(runs):
    main_end, its_end = pty.openpty()
    env = environment(COLUMNS="80", TERM="dumb")
    words = command("runs", "runs", "--sort", NET)
    done = subprocess.run(words, env=env, stdout=its_end, cwd=runs.parent, timeout=60)
    os.close(its_end)
    text = b""
    with os.fdopen(main_end, "rb", buffering=0) as end:
        while True:
            try:
                part = end.read(4096)
            except OSError:
                break
            if not part:
                break
            text += part
    assert done.returncode == 0
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert "72.50" in text.decode()
    assert "(71.00)" in text.decode()


def test_no_run_is_read_with_torch(runs):
    code = (
        "import sys; from peerlearn.cli import main; main(['runs']); main(['note', 'runs/a', 'x']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)


@pytest.fixture
def note(runs, capsys) -> Callable[..., list[str]]:
    def noted(*words: str) -> list[str]:
        capsys.readouterr()
        assert main(["note", "runs/a", *words]) == 0
        return capsys.readouterr().out.splitlines()

    return noted


def test_notes_are_added_taken_away_and_printed(runs, note, capsys):
    assert note("first", "--tag", "x", "--tag", "y") == ["#x", "#y", "first"]
    assert note("a\nb\x1b[31m") == ["#x", "#y", "first", "a\\nb\\x1b[31m"]
    size = (runs / "a/notes.jsonl").stat().st_size
    assert note() == ["#x", "#y", "first", "a\\nb\\x1b[31m"]
    assert (runs / "a/notes.jsonl").stat().st_size == size
    assert note("first", "--tag", "x", "--remove") == ["#y", "a\\nb\\x1b[31m"]
    # A line is added for what is taken away.
    assert len((runs / "a/notes.jsonl").read_text().splitlines()) == 3
    assert listed(capsys)[0]["notes"] == ["a\nb\x1b[31m"]
    assert note("--tag", "x") == ["#y", "#x", "a\\nb\\x1b[31m"]


def test_wrong_notes_are_refused(runs, note, capsys):
    note("first", "--tag", "x")
    for code, words, said in (
        (1, ["--tag", "y", "--remove"], "runs/a has no tag 'y'; its tags: x"),
        (1, ["second", "--remove"], "runs/a has no note 'second': `peerlearn note runs/a` prints"),
        (2, ["--remove"], "--remove: name the note, or --tag NAME, that is to go"),
        (2, ["--tag", "a b"], "--tag: expected a word without spaces, commas and #, got 'a b'"),
        (2, ["--tag", "a\x1b"], "--tag: expected a word without spaces, commas and #"),
        (2, [" "], "TEXT is empty"),
    ):
        assert refused(capsys, code, "note", "runs/a", *words).startswith(said)
    assert refused(capsys, 1, "note", "runs", "x") == (
        "runs is not a run directory: it has no config.yaml"
    )
    (runs / "a/notes.jsonl").unlink()
    (runs / "a/notes.jsonl").symlink_to("elsewhere")
    assert "cannot be read and written" in refused(capsys, 1, "note", "runs/a", "x")
    assert note() == []


def test_a_note_survives_the_copy_and_the_resumption_of_a_run(runs, note, capsys):
    note("kept")
    shutil.copytree(runs / "a", runs / "copy")
    assert [run["notes"] for run in listed(capsys)][:2] == [["kept"], ["kept"]]
