import json
import shutil
from pathlib import Path

import pytest

from peerlearn.errors import UserError
from peerlearn.evaluation.selection import Selection, differences, select_networks
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import network_folder
from peerlearn.runs.step_folders import step_folder, write_best, write_latest


def exports_of(run: Path | None, step: int, config: str = "") -> Selection:
    if run is not None:
        run.mkdir()
        (run / "config.yaml").write_text(config)
    return Selection(
        folders={"0": Path("x")}, ensemble=False, alone=True, exports=Path("x"), run=run, step=step
    )


def test_runs_that_differ_in_their_seeds_are_alike(tmp_path):
    config = "run: {0}\nseed: {0}\nbase_lr: 0.1\ncohort:\n  networks: 2\n"
    runs = [exports_of(tmp_path / str(seed), 9, config.format(seed)) for seed in range(3)]
    assert differences(runs) == []


def test_what_tells_runs_of_two_kinds_apart_is_named(tmp_path):
    one = exports_of(tmp_path / "a", 9, "seed: 0\nbase_lr: 0.1\ncohort:\n  backbones: [conv4]\n")
    other = exports_of(tmp_path / "b", 15, "seed: 1\nbase_lr: 0.2\ncohort:\n  backbones: [wrn]\n")
    third = exports_of(tmp_path / "c", 9, "seed: 2\nbase_lr: 0.1\ncohort:\n  backbones: [wrn]\n")
    assert differences([one, other, third]) == [
        "step (9, 15)",
        "base_lr (0.1, 0.2)",
        "cohort.backbones (['conv4'], ['wrn'])",
    ]
    assert differences([one]) == []


def test_exports_without_a_run_are_compared_by_their_steps(tmp_path):
    run = exports_of(tmp_path / "a", 9, "base_lr: 0.1\n")
    assert differences([run, exports_of(None, 9)]) == []
    assert differences([run, exports_of(None, 0)]) == ["step (9, 0)"]


# What is gone


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two networks that is done, with exports of three steps."""
    run = tmp_path / "run"
    directory = RunDirectory(run)
    run.mkdir()
    directory.config.write_text("cohort:\n  networks: 2\n")
    for step in (4, 8, 12):
        for network in ("0", "1", "key-0"):
            folder = directory.exports / step_folder(step) / network_folder(network)
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text("")
    write_latest(directory.exports / step_folder(12))
    directory.event("done", step=12)
    directory.mark_done()
    return run


def selected(run: Path, network: str = "all") -> tuple[int, list[str], bool]:
    found = select_networks(run, network)
    return found.step, list(found.folders), found.chosen_by_validation


def refusal(run: Path, network: str = "all") -> str:
    with pytest.raises(UserError) as raised:
        select_networks(run, network)
    return str(raised.value)


@pytest.mark.parametrize("pointer", [b"step-00000012\n", None, b"", b"\xff", b"../..", b"1" * 5000])
def test_the_last_exports_are_those_of_the_last_step_or_none(run, pointer):
    latest = run / "export" / "latest"
    latest.unlink() if pointer is None else latest.write_bytes(pointer)
    assert selected(run) == (12, ["0", "1"], False)
    shutil.rmtree(run / "export" / step_folder(12))
    gone = f"{run}/export/step-00000012 is gone, the last exports of the run: restore it, or "
    assert (
        refusal(run)
        == refusal(run, "0")
        == gone
        + (
            f"`peerlearn resume {run}` writes it again, or name others by --checkpoint {run}/export/step-N"
        )
    )
    assert selected(run / "export" / step_folder(8)) == (8, ["0", "1"], False)
    # Of a run that goes on, and whose `latest` tells nothing, they are the newest.
    (run / "DONE").unlink()
    if pointer != b"step-00000012\n":
        assert selected(run) == (8, ["0", "1"], False)


@pytest.mark.parametrize("pointer", [b"step-00000004\n", None, b"", b"\xff"])
def test_the_exports_that_validation_chose_are_they_or_none(run, pointer):
    """Where `best` is gone or spoilt, the event tells what it named."""
    best = run / "export" / "best"
    write_best(run / "export" / step_folder(4))
    RunDirectory(run).event("exported", step=4, best=True)
    best.unlink() if pointer is None else best.write_bytes(pointer)
    assert selected(run) == (4, ["0", "1"], True)
    shutil.rmtree(run / "export" / step_folder(4))
    assert refusal(run).startswith(f"{run}/export/step-00000004 is gone, the best exports")
    if pointer is not None:
        (run / "events.jsonl").write_text(json.dumps({"event": "done", "step": 12}))
        best.write_bytes(b"")
        assert refusal(run) == (
            f"{best} names no step: restore it, or name others by --checkpoint {run}/export/step-N"
        )


def test_a_network_that_is_missing_is_named_where_all_are_asked_for(run):
    folder = run / "export" / step_folder(12)
    shutil.rmtree(folder / "net-1")
    missing = f"{folder}/net-1 is missing, one of 2 networks of {run}: restore it, or choose by --network: 0"
    assert refusal(run) == refusal(run, "ensemble") == refusal(folder) == missing
    assert selected(run, "0") == (12, ["0"], False)
    assert selected(run, "key-0") == (12, ["key-0"], False)
    # Where the config tells nothing, what is there is all.
    for config in ("", "[]", "cohort: 3", "cohort: {networks: .inf}", "a: [", "[" * 5000):
        (run / "config.yaml").write_text(config)
        assert selected(run) == (12, ["0"], False)
