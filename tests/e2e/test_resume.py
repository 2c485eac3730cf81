"""Runs that are killed, damaged or changed, and then resumed."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peerlearn.cli import main
from peerlearn.runs import lock
from peerlearn.runs.checkpoint import saved_steps
from peerlearn.runs.standing import Standing, StandingLog
from tests.e2e.runs import (
    SMALL,
    STEPS,
    assert_same_run,
    command,
    environment,
    events,
    flip_last_byte,
    pretrain,
    rows,
    standing,
    wait_for,
    without_clocks,
)
from tests.owners import beating
from tests.warm import Process
from tests.warm import run as run_process

KEYS = ["--checkpoint.export_key_networks", "true"]
KILLER = Path(__file__).parent / "killed_at_a_file_operation.py"


def run_command(*words: str, driver: Path | None = None) -> subprocess.CompletedProcess:
    return run_process(
        command(*words, driver=driver), env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def undisturbed(once) -> Path:
    def make(run: Path) -> None:
        found = run_command("pretrain", *SMALL, "--run", str(run), *KEYS)
        assert found.returncode == 0, found.stderr

    return once("undisturbed", make)


def resume(run: Path, *more: str) -> subprocess.CompletedProcess:
    return run_command("resume", str(run), *more)


@pytest.mark.slow(30)
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_any_moment_then_resume_equals_the_undisturbed_run(undisturbed, tmp_path, seed):
    """Killed again and again after random waits, in start-up and in mid-epoch too, until it gets through."""
    wait = random.Random(seed)
    # One of them in the seconds of a real start too.
    start = subprocess.Popen if seed == 0 else Process
    run = tmp_path / "c"
    words = ["pretrain", *SMALL, "--run", str(run), *KEYS, "--checkpoint.every_steps", "1"]
    for _ in range(3):
        process = start(
            command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        before = len(saved_steps(run / "checkpoints"))
        if wait.random() < 0.7:
            # To hit training itself and not only the seconds that imports take.
            while process.poll() is None and len(saved_steps(run / "checkpoints")) == before:
                time.sleep(0.005)
        time.sleep(wait.uniform(0, 0.5))
        process.kill()
        process.communicate()
        if (run / "config.yaml").exists():
            words = ["resume", str(run)]
    found = run_command(*words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert_same_run(run, undisturbed)


def test_sigterm_saves_exits_75_and_resume_equals_the_undisturbed_run(undisturbed, tmp_path):
    run = tmp_path / "c"
    words = ["pretrain", *SMALL, "--run", str(run), *KEYS, "--checkpoint.every_steps", "2"]
    slowly = environment(STEP_SECONDS="0.2")
    process = Process(command(*words), env=slowly, stdout=subprocess.PIPE)
    wait_for(lambda: (run / "checkpoints/step-00000002").exists(), [process])
    process.terminate()
    # A second one while it saves changes nothing.
    process.terminate()
    process.communicate(timeout=240)
    assert process.returncode == 75
    assert not (run / "DONE").exists()
    assert resume(run).returncode == 0
    assert_same_run(run, undisturbed)


def killed_in_save(run: Path, operation: int, step: int, *more: str) -> str:
    """Run until that file operation of the save of that step, 0 = to the end; returns what was printed."""
    words = ["pretrain", *SMALL, "--run", str(run), *KEYS, *more]
    place = [str(operation), str(run / "checkpoints"), str(step)]
    found = run_command(*place, *words, driver=KILLER)
    assert found.returncode == (-signal.SIGKILL if operation else 0), found.stderr
    return found.stdout


@pytest.mark.slow(30)
def test_sigkill_at_every_step_of_a_save(undisturbed, tmp_path, capsys):
    """Temporary folder, each file, each fsync, manifest, renames, `latest`, removal of the oldest save."""
    often = ["--checkpoint.every_steps", "3"]
    printed = killed_in_save(tmp_path / "counted", 0, 9, *often)
    operations = int(re.search(r"file operations: (\d+)", printed)[1])
    assert operations > 20
    # Every fourth of them, and the last ones one by one.
    for number in (*range(1, operations - 3, 4), *range(operations - 3, operations + 1)):
        run = tmp_path / str(number)
        killed_in_save(run, number, 9, *often)
        assert main(["resume", str(run)]) == 0, (number, capsys.readouterr().err)
        assert not events(run, "checkpoint_damaged"), number
        assert not list((run / "checkpoints").glob(".tmp*")), number
        assert_same_run(run, undisturbed)


@pytest.mark.slow(10)
def test_a_signal_before_the_first_step_stops_a_real_start_at_once(tmp_path):
    run = tmp_path / "s"
    words = command("pretrain", *SMALL, "--run", str(run))
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        # The line comes before TensorBoard is imported and the networks are measured.
        assert "steps 0 to 12" in process.stdout.readline()
        process.terminate()
        assert process.wait(240) == 75
        assert f"`peerlearn resume {run}` starts again" in process.stdout.read()
    assert not saved_steps(run / "checkpoints")
    assert main(["resume", str(run)]) == 0


@pytest.fixture(scope="session")
def killed(once) -> Path:
    """A run killed after the save of step 9, with that of step 6 beside it."""
    run = once("killed", lambda run: killed_in_save(run, 1, 12, "--checkpoint.every_steps", "3"))
    assert [p.name for p in saved_steps(run / "checkpoints")] == ["step-00000009", "step-00000006"]
    return run


@pytest.fixture
def half_done(killed, tmp_path) -> Path:
    run = tmp_path / "d"
    shutil.copytree(killed, run)
    return run


def damage(file: Path, kind: str) -> None:
    if kind == "flip":
        flip_last_byte(file)
    elif kind == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("networks.safetensors", "flip"),
        ("queue.safetensors", "truncate"),
        ("rng.safetensors", "delete"),
        ("state.json", "flip"),
        ("manifest.json", "empty"),
        ("manifest.json", "delete"),
    ],
)
def test_a_damaged_save_is_set_aside_and_the_one_before_it_taken(
    undisturbed, half_done, name, kind
):
    damage(half_done / "checkpoints/step-00000009" / name, kind)
    found = resume(half_done)
    assert found.returncode == 0, found.stderr
    assert "set aside a damaged checkpoint as step-00000009.bad" in found.stderr
    (event,) = events(half_done, "checkpoint_damaged")
    assert event["folder"] == "step-00000009"
    assert name in event["reason"]
    assert (half_done / "checkpoints/step-00000009.bad").is_dir()
    assert [e["step"] for e in events(half_done, "started")] == [0, 6]
    assert_same_run(half_done, undisturbed)


def test_a_start_stands_with_the_scores_up_to_the_step_it_goes_on_from(half_done, monkeypatch):
    """Killed after the scores of the second epoch, it goes back to step 9; those of the first, at step 6, stay."""
    first, second = rows(half_done)[6], rows(half_done)[-1]
    assert (first["step"], second["step"]) == (6, 12)
    assert (standing(half_done).knn_epoch, standing(half_done).knn_top1) == (
        2.0,
        second["ensemble/knn_top1"],
    )
    rates = [row["images_per_second"] for row in rows(half_done)[5:10]]
    written = []
    write = StandingLog.write

    def noted(log):
        write(log)
        written.append(standing(half_done))

    monkeypatch.setattr(StandingLog, "write", noted)
    assert main(["resume", str(half_done)]) == 0
    assert written[0] == Standing(
        step=9,
        total_steps=STEPS,
        images_per_second=statistics.median(rates),
        knn_top1=first["ensemble/knn_top1"],
        knn_network="ensemble",
        knn_epoch=1.0,
        knn_k=5,
        knn_temperature=0.1,
    )
    rates = [row["images_per_second"] for row in rows(half_done)[-5:]]
    assert written[-1] == replace(
        written[0],
        step=STEPS,
        images_per_second=statistics.median(rates),
        seconds_left=0.0,
        knn_top1=second["ensemble/knn_top1"],
        knn_epoch=2.0,
    )


@pytest.mark.parametrize("content", [None, "", "step-00000001\n", "../../x\n"])
def test_the_latest_file_is_for_people_and_not_relied_on(undisturbed, half_done, content):
    latest = half_done / "checkpoints/latest"
    latest.unlink() if content is None else latest.write_text(content)
    assert resume(half_done).returncode == 0
    assert [e["step"] for e in events(half_done, "started")] == [0, 9]
    assert latest.read_text() == "step-00000012\n"
    assert_same_run(half_done, undisturbed)


@pytest.mark.parametrize("how", ["damaged", "deleted", "damaged twice", "without events"])
def test_without_a_whole_save_nothing_starts_over(half_done, how, capsys):
    before = (half_done / "metrics.jsonl").read_bytes()
    for save in saved_steps(half_done / "checkpoints"):
        flip_last_byte(save / "networks.safetensors")
    if how == "deleted":
        shutil.rmtree(half_done / "checkpoints")
    if how == "without events":
        (half_done / "events.jsonl").unlink()
        for save in saved_steps(half_done / "checkpoints"):
            shutil.rmtree(save)
    if how == "damaged twice":
        assert main(["resume", str(half_done)]) == 1
    assert main(["resume", str(half_done)]) == 1
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert (half_done / "metrics.jsonl").read_bytes() == before
    assert (half_done / "FAILED").read_text().endswith("start a new run\n")


def test_rows_of_later_steps_tell_that_there_were_saves(half_done, capsys):
    """Everything that names a save is gone, but metrics.jsonl is past the step of the first one."""
    shutil.rmtree(half_done / "checkpoints")
    (half_done / "events.jsonl").unlink()
    before = (half_done / "metrics.jsonl").read_bytes()
    assert main(["resume", str(half_done)]) == 1
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert (half_done / "metrics.jsonl").read_bytes() == before


def test_before_the_first_save_too_a_changed_config_is_refused(tmp_path, capsys):
    run = tmp_path / "e"
    killed_in_save(run, 1, 6)
    before = (run / "config.yaml").read_bytes()
    assert main(["resume", str(run), "--seed", "3"]) == 1
    assert "changed since the last save: seed 0 -> 3" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    assert main(["resume", str(run), "--epochs", "3"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "elsewhere"], "--run: a run goes on where it lies"),
        (["--run=elsewhere"], "--run: a run goes on where it lies"),
        (["--epocs", "3"], "did you mean 'epochs'?"),
    ],
)
def test_words_that_resume_does_not_take(half_done, words, message, capsys):
    assert main(["resume", str(half_done), *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["resume", "--allow_elastic"]) == 2
    assert "RUN comes before --allow_elastic" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_save_under_another_steps_name_is_set_aside(undisturbed, half_done, how):
    saves = half_done / "checkpoints"
    if how == "renamed":
        (saves / "step-00000009").rename(saves / "step-00000011")
    else:
        shutil.copytree(saves / "step-00000006", saves / "step-00000011")
    found = resume(half_done)
    assert found.returncode == 0, found.stderr
    (event,) = events(half_done, "checkpoint_damaged")
    assert event["folder"] == "step-00000011"
    assert [e["step"] for e in events(half_done, "started")] == [0, 6 if how == "renamed" else 9]
    assert_same_run(half_done, undisturbed)


def test_a_file_that_the_manifest_does_not_name_is_not_read(undisturbed, half_done):
    (half_done / "checkpoints/step-00000009/evil.safetensors").write_bytes(b"\x80\x04K\x01.")
    assert resume(half_done).returncode == 0
    assert [e["step"] for e in events(half_done, "started")] == [0, 9]
    assert_same_run(half_done, undisturbed)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format_version": 1e999}', "[]", "7"])
def test_a_manifest_of_nonsense_is_a_damaged_save(undisturbed, half_done, content):
    (half_done / "checkpoints/step-00000009/manifest.json").write_text(content)
    assert resume(half_done).returncode == 0
    assert [e["folder"] for e in events(half_done, "checkpoint_damaged")] == ["step-00000009"]
    assert_same_run(half_done, undisturbed)


@pytest.mark.parametrize("left", [0, 5])
def test_rows_lost_from_before_the_save_are_told(half_done, left):
    lines = (half_done / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half_done / "metrics.jsonl").write_text("".join(lines[:left]))
    found = resume(half_done)
    assert found.returncode == 0
    # The untrained networks' row and one for each step.
    assert f"has lost {10 - left} of the 10 rows up to step 9" in found.stderr
    (event,) = events(half_done, "metrics_missing")
    assert (event["rows"], event["found"]) == (10, left)


@pytest.mark.parametrize(
    "spoil", [(b'"step": 5', b'"stdp": 5'), (b'"step": 5', b'"step":"5"'), (b"loss", b"lo\xb3s")]
)
def test_a_spoilt_row_of_metrics_is_named(half_done, spoil, capsys):
    file = half_done / "metrics.jsonl"
    content = file.read_bytes()
    assert spoil[0] in content
    file.write_bytes(content.replace(*spoil, 1))
    assert main(["resume", str(half_done)]) == 1
    error = capsys.readouterr().err
    assert f"{file}: line " in error
    assert "is damaged: mend or remove it" in error


def test_spoilt_events_are_left_out(undisturbed, half_done):
    with (half_done / "events.jsonl").open("ab") as file:
        file.write(b'\xb3\n{"time": 1}\n[]\n')
    assert resume(half_done).returncode == 0
    assert_same_run(half_done, undisturbed)


def test_a_config_that_was_cut_short_is_not_filled_with_defaults(half_done, capsys):
    file = half_done / "config.yaml"
    whole = file.read_text()
    for content, message in (
        (whole.replace("epochs: 2\n", "", 1), "lacks 'epochs': the file was cut short"),
        (whole[: whole.index("optimizer:")], "more keys: the file was cut short"),
        ("", "holds no keys"),
    ):
        file.write_text(content)
        assert main(["resume", str(half_done)]) != 0
        assert message in capsys.readouterr().err


def test_a_run_of_an_earlier_version_that_knew_fewer_keys_goes_on(undisturbed, half_done):
    config = yaml.safe_load((half_done / "config.yaml").read_text())
    del config["data"]["views"], config["data"]["packed"], config["compile"]
    del config["mutual_warmup_epochs"]
    (half_done / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def without_new_keys(state: dict) -> None:
        del state["config"]["data"]["views"], state["config"]["data"]["packed"]
        del state["config"]["compile"], state["config"]["mutual_warmup_epochs"]

    for save in (half_done / "checkpoints").glob("step-*"):
        rewrite_state(save, without_new_keys)
    found = resume(half_done)
    assert found.returncode == 0, found.stderr
    assert not events(half_done, "config_changed")
    assert_same_run(half_done, undisturbed)


def test_a_save_that_cannot_be_deleted_stays_and_the_run_goes_on(half_done, tmp_path):
    """A link, which rmtree refuses."""
    old = half_done / "checkpoints/step-00000006"
    old.rename(tmp_path / "elsewhere")
    old.symlink_to(tmp_path / "elsewhere")
    found = resume(half_done)
    assert found.returncode == 0, found.stderr
    assert f"{old} could not be deleted" in found.stderr
    assert (half_done / "DONE").exists()


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_run_at_its_last_step_exports_again_what_is_not_whole(undisturbed, tmp_path, how):
    run = tmp_path / "x"
    shutil.copytree(undisturbed, run)
    (run / "DONE").unlink()
    if how == "gone":
        shutil.rmtree(run / "export")
    else:
        flip_last_byte(run / f"export/step-{STEPS:08d}/net-1/model.safetensors")
    assert main(["resume", str(run)]) == 0
    assert (run / "DONE").exists()
    assert_same_run(run, undisturbed)


@pytest.mark.slow(10)
def test_a_run_directory_that_is_moved_away_ends_the_run_and_is_not_made_anew(tmp_path):
    run, moved = tmp_path / "m", tmp_path / "moved"
    words = ["pretrain", *SMALL, "--epochs", "4", "--monitor.every_epochs", "0"]
    with Process(
        command(*words, "--run", str(run)),
        env=environment(STEP_SECONDS="0.5"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: (run / "checkpoints/latest").exists(), [process])
        run.rename(moved)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"{run} is gone: moved or removed while training" in error.splitlines()[-1]
    assert not run.exists()
    assert main(["resume", str(moved), "--monitor.every_epochs", "0"]) == 0


@pytest.mark.parametrize("content", ["abc", None, [1]])
def test_an_owner_whose_beat_makes_no_sense_is_dead(half_done, content):
    owner = {"host": "elsewhere", "pid": 4, "job": None, "since": "then", "time_seconds": content}
    (half_done / "owner.json").write_text(json.dumps(owner))
    assert main(["resume", str(half_done)]) == 0


def test_a_run_killed_before_its_first_save_starts_over_and_says_so(undisturbed, tmp_path):
    run = tmp_path / "e"
    killed_in_save(run, 1, 6)
    found = resume(run)
    assert found.returncode == 0
    assert "nothing had been saved yet: training starts over at step 0" in found.stdout
    assert_same_run(run, undisturbed)


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "diff"),
    [
        ("base_lr: 0.1", "base_lr: 0.2", "base_lr 0.1 -> 0.2"),
        ("size: 80", "size: 81", "queue.size 80 -> 81"),
        ("epochs: 2", "epochs: 1", "epochs 2 -> 1"),
        ("limit: 200", "limit: 201", "data.limit 200 -> 201"),
        ("temperature: 0.07", "temperature: 0.08", "temperature 0.07 -> 0.08"),
    ],
)
def test_a_changed_config_is_refused_with_a_diff(half_done, old, new, diff, capsys):
    edit_config(half_done, old, new)
    before = (half_done / "metrics.jsonl").read_bytes()
    assert main(["resume", str(half_done)]) == 1
    error = capsys.readouterr().err
    assert f"changed since the last save: {diff};" in error
    assert "Traceback" not in error
    assert (half_done / "metrics.jsonl").read_bytes() == before
    assert not (half_done / "FAILED").exists()
    edit_config(half_done, new, old)
    assert main(["resume", str(half_done)]) == 0


def test_a_refused_word_on_the_command_line_changes_nothing(half_done, capsys):
    def contents() -> dict[Path, bytes]:
        files = (path for path in half_done.rglob("*") if path.is_file())
        # The killed owner's record goes, once its lock has been taken.
        return {p: p.read_bytes() for p in files if p.name not in (".lock", "owner.json")}

    before = contents()
    assert main(["resume", str(half_done), "--base_lr", "0.2"]) == 1
    assert "base_lr 0.1 -> 0.2" in capsys.readouterr().err
    assert contents() == before
    assert main(["resume", str(half_done)]) == 0


def test_safe_keys_may_change_and_are_noted(half_done):
    words = ["--epochs", "3", "--monitor.every_epochs", "3", "--checkpoint.keep_last", "5"]
    found = resume(half_done, *words)
    assert found.returncode == 0, found.stderr
    (event,) = events(half_done, "config_changed")
    assert event["changes"] == {
        "epochs": [2, 3],
        "checkpoint.keep_last": [2, 5],
        "monitor.every_epochs": [1, 3],
    }
    assert "epochs 2 -> 3" in found.stderr
    assert rows(half_done)[-1]["step"] == 18
    assert "epochs: 3" in (half_done / "config.yaml").read_text()


def test_a_run_that_is_done_goes_on_with_more_epochs_and_only_then(tmp_path, capsys):
    run = tmp_path / "m"
    assert pretrain(run, "--monitor.every_epochs", "0") == 0
    assert main(["resume", str(run)]) == 0
    assert "done already; more epochs: --epochs N" in capsys.readouterr().out
    assert len(events(run, "started")) == 1
    assert main(["resume", str(run), "--epochs", "3"]) == 0
    assert (run / "DONE").exists()
    assert [e["step"] for e in events(run, "started")] == [0, STEPS]
    assert [row["step"] for row in rows(run)] == list(range(1, 19))


def test_other_data_under_the_same_config_is_refused(half_done, capsys):
    """As where a file was replaced: the save's fingerprint is another."""
    save = half_done / "checkpoints/step-00000009"
    rewrite_state(save, lambda state: state.update(dataset="0" * 64))
    assert main(["resume", str(half_done)]) == 1
    assert "other images than digits holds now" in capsys.readouterr().err


def rewrite_state(save: Path, change) -> None:
    """Change state.json and make the manifest agree."""
    import hashlib

    state = json.loads((save / "state.json").read_text())
    change(state)
    (save / "state.json").write_text(json.dumps(state))
    manifest = json.loads((save / "manifest.json").read_text())
    digest = hashlib.sha256((save / "state.json").read_bytes()).hexdigest()
    manifest["sha256"]["state.json"] = digest
    (save / "manifest.json").write_text(json.dumps(manifest))


def test_other_code_or_libraries_are_a_warning_and_an_event(undisturbed, half_done):
    def older(state: dict) -> None:
        state["environment"]["versions"]["torch"] = "2.10.0"
        state["environment"]["code_sha256"] = "0" * 64

    rewrite_state(half_done / "checkpoints/step-00000009", older)
    found = resume(half_done)
    assert found.returncode == 0
    (event,) = events(half_done, "environment_changed")
    assert event["changes"]["versions.torch"][0] == "2.10.0"
    assert set(event["changes"]) == {"versions.torch", "code_sha256"}
    assert "resumed in another environment: versions.torch '2.10.0' ->" in found.stderr
    assert_same_run(half_done, undisturbed)


def test_a_save_of_a_newer_format_is_refused_and_not_set_aside(half_done, capsys):
    save = half_done / "checkpoints/step-00000009"
    manifest = json.loads((save / "manifest.json").read_text())
    (save / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert main(["resume", str(half_done)]) == 1
    assert "format 99 is newer than this program's" in capsys.readouterr().err
    assert save.is_dir()


@pytest.mark.slow(10)
def test_a_run_in_use_is_refused_and_the_owner_named(tmp_path, capsys):
    run = tmp_path / "u"
    words = command(
        *("pretrain", *SMALL, "--epochs", "4", "--monitor.every_epochs", "0", "--run", str(run))
    )
    process = Process(words, env=environment(STEP_SECONDS="1"), stdout=subprocess.PIPE)
    try:
        wait_for(lambda: (run / "checkpoints").exists(), [process])
        assert main(["resume", str(run)]) == 1
        error = capsys.readouterr().err
        assert f"{run} is in use by process {process.pid} on {socket.gethostname()}" in error
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (run / "owner.json").exists()
    assert main(["resume", str(run), "--epochs", "5"]) == 0
    (event,) = events(run, "lock_taken_over")
    assert f"process {process.pid} on" in event["owner"]
    assert not (run / "owner.json").exists()


@pytest.mark.parametrize("alive", [True, False])
def test_the_lock_of_another_machine(half_done, capsys, alive):
    """Where flock does not reach, it decides whether the owner beats, whatever its clock says."""
    owner = {"host": "elsewhere", "pid": 4, "job": None, "since": "then"}
    owner["time_seconds"] = time.time() + 3600
    (half_done / "owner.json").write_text(json.dumps(owner))
    with beating(half_done, owner) if alive else contextlib.nullcontext():
        assert main(["resume", str(half_done)]) == alive
    assert ("in use by process 4 on elsewhere" in capsys.readouterr().err) == alive


def test_a_requeued_job_takes_over_its_own_lock(half_done, monkeypatch):
    owner = {
        "host": "elsewhere",
        "pid": 4,
        "job": "77",
        "since": "then",
        "time_seconds": time.time(),
    }
    (half_done / "owner.json").write_text(json.dumps(owner))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(lock, "_DEAD_SECONDS", 1.0)
    assert main(["resume", str(half_done)]) == 0


def test_every_kth_save_stays_beside_the_newest(tmp_path):
    run = tmp_path / "k"
    words = ["--checkpoint.every_steps", "2", "--checkpoint.keep_every_steps", "4"]
    assert pretrain(run, *words, "--monitor.every_epochs", "0") == 0
    kept = [int(path.name.removeprefix("step-")) for path in saved_steps(run / "checkpoints")]
    assert kept == [12, 10, 8, 4]


def test_a_torn_last_row_of_metrics_is_dropped(undisturbed, half_done):
    with (half_done / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    assert resume(half_done).returncode == 0
    assert_same_run(half_done, undisturbed)


def test_a_line_follows_a_torn_one_on_a_line_of_its_own(tmp_path):
    from peerlearn.runs.directory import RunDirectory

    run = RunDirectory(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"event": "a"}\n{"event": "b')
    run.event("c")
    assert [event["event"] for event in run.events()] == ["a", "c"]


def test_metrics_equal_also_where_only_the_first_epoch_was_killed(undisturbed, tmp_path):
    """SIGTERM in the first epoch, before the first periodic save: the save is its own."""
    run = tmp_path / "f"
    process = Process(
        command("pretrain", *SMALL, "--run", str(run), *KEYS),
        env=environment(STEP_SECONDS="0.2"),
        stdout=subprocess.PIPE,
    )
    wait_for(lambda: (run / "metrics.jsonl").exists(), [process])
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 75
    assert resume(run).returncode == 0
    assert [without_clocks(row) for row in rows(run)] == [
        without_clocks(row) for row in rows(undisturbed)
    ]
