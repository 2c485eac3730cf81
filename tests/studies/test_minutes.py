"""How long a study would take: the arithmetic with times that are given, and one small study that is really timed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from peerlearn.cli import main
from peerlearn.config import config_to_yaml
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from studies import minutes
from studies.minutes import Pace, Share, estimate, share_of, time_variant, total_text, wall_seconds
from studies.study import Study, StudyRun, Variant, plan_study
from studies.study_file import read_study
from tests.studies.small_studies import write_config
from tests.warm import ProgramsPopen

ALL, HARD, ONE = "base", "terms-scl_hard", "cohort.networks-1"
GRIDS = {
    "terms": {"loss terms": {"all": "", "hard": "--terms scl_hard"}},
    "networks": {"networks": {"two": "", "one": "--cohort.networks 1"}},
}
SHARE = Share(at_once=2, variables={"OMP_NUM_THREADS": "4"}, cores=8)


def make(home: Path, **keys: object) -> Study:
    """Three configs with three seeds each."""
    keys = {"seeds": [0, 1, 2], "grids": GRIDS, "throttle": 2, **keys}
    return plan_study(read_study(write_config(home, **keys)))


def begin(run: StudyRun, *rows: tuple[int, int, float], done: bool = False) -> None:
    """A run directory with rows of (step, attempt, seconds)."""
    directory = RunDirectory(run.folder)
    directory.create_folder()
    config = replace(run.variant.config, seed=run.seed, run=str(run.folder))
    directory.write_config(config_to_yaml(config))
    for step, attempt, seconds in rows:
        directory.append_metrics({"step": step, "attempt": attempt, "seconds": seconds})
    if done:
        directory.mark_done()


def run_of(study: Study, name: str, seed: int) -> StudyRun:
    return next(run for run in study.runs if (run.variant.name, run.seed) == (name, seed))


def fixed(paces: Mapping[str, Pace], asked: list[tuple[str, int]]) -> minutes.Timer:
    """A timer that knows the pace of each config, and notes what it was asked for."""

    def timer(variant: Variant, processes: int, variables: Mapping[str, str]) -> Pace:
        assert variables == SHARE.variables
        asked.append((variant.name, processes))
        if variant.name not in paces:
            raise UserError("its images are not here")
        return paces[variant.name]

    return timer


def test_rows_are_the_configs_of_runs_that_have_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = make(tmp_path)
    begin(run_of(study, ALL, 1), (6, 1, 9.0))
    for seed in study.config.seeds:
        begin(run_of(study, HARD, seed), (6, 1, 9.0))
    asked: list[tuple[str, int]] = []
    paces = {ALL: Pace(step_seconds=0.5, steps=720), ONE: Pace(step_seconds=0.25, steps=720)}
    rows = estimate(study, SHARE, fixed(paces, asked))
    assert [(row.title, row.runs, row.pace) for row in rows] == [
        ("terms: all; networks: two", 2, paces[ALL]),
        ("networks: one", 3, paces[ONE]),
    ]
    assert asked == [(ALL, 2), (ONE, 2)]
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "minutes: config 1 of 2: terms: all; networks: two: timing a few steps",
        "minutes: config 2 of 2: networks: one: timing a few steps",
    ]
    # 2 runs of 360 s and 3 of 180 s: 1,260 s on 4 cores. Two at once in the order seed 0 (all, one), seed 1 (one),
    # seed 2 (all, one): one place has 360 + 360 s, the other 180 + 180 + 180 s.
    assert total_text(study, rows, SHARE) == (
        "total: 5 runs, 1.40 core-hours, 0.200 hours from start to end (2 at once, 4 threads each)"
    )


def test_a_done_run_tells_its_own_time_over_all_attempts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = make(tmp_path)
    # A row of step 0 is the monitor's. The second attempt went on from step 4.
    begin(
        run_of(study, ALL, 0), (0, 1, 1.0), (2, 1, 3.0), (4, 1, 7.0), (5, 2, 2.0), (6, 2, 5.0),
        done=True,
    )  # fmt: skip
    # Done, but its time is not known.
    begin(run_of(study, ONE, 0), done=True)
    asked: list[tuple[str, int]] = []
    pace = Pace(step_seconds=1.0, steps=6)
    rows = estimate(study, SHARE, fixed({HARD: pace, ONE: pace}, asked))
    assert [(row.variant.name, row.runs) for row in rows] == [(ALL, 2), (HARD, 3), (ONE, 2)]
    assert rows[0].pace == Pace(step_seconds=2.0, steps=6, is_measured=True)
    assert rows[0].pace.run_seconds == 12.0
    assert [name for name, _ in asked] == [HARD, ONE]
    assert "terms: all; networks: two: a run of it is done" in capsys.readouterr().err


def test_a_done_run_of_another_seed_counts_and_of_several_one_in_the_middle(tmp_path: Path) -> None:
    study = make(tmp_path)
    for seed, seconds in ((0, 60.0), (1, 20.0), (2, 30.0)):
        begin(run_of(study, ALL, seed), (10, 1, seconds), done=True)
    file = tmp_path / "s" / "study.yaml"
    file.write_text(config_to_yaml(study.config))
    later = plan_study(read_study(file, seeds=[3]), ["terms"])
    rows = estimate(later, SHARE, fixed({HARD: Pace(step_seconds=1.0, steps=6)}, []))
    assert [(row.runs, row.pace) for row in rows] == [
        (1, Pace(step_seconds=3.0, steps=10, is_measured=True)),
        (1, Pace(step_seconds=1.0, steps=6)),
    ]


def test_what_cannot_be_timed_is_unknown_and_the_total_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    study = make(tmp_path)
    known = {HARD: Pace(step_seconds=3600.0, steps=2)}
    monkeypatch.setattr(minutes, "share_of", lambda config: SHARE)
    monkeypatch.setattr(minutes, "time_variant", fixed(known, []))
    minutes.print_minutes(study)
    printed = capsys.readouterr().out.splitlines()
    # 3 runs of 2 hours on 4 cores, two at once.
    assert [line.split() for line in printed if "hard" in line] == [
        ["terms:", "hard", "3", "2", "3,600", "120", "360", "timed"]
    ]
    assert [line.split()[-6:] for line in printed if line.startswith("networks: one")] == [
        ["3", "-", "-", "-", "-", "unknown"]
    ]
    assert printed[-4:] == [
        "unknown: terms: all; networks: two: its images are not here",
        "unknown: networks: one: its images are not here",
        "not timed: the monitor, the evaluations, starts, saves, exports, and runs that have begun",
        "total: 3 runs, 24.0 core-hours, 4.00 hours from start to end (2 at once, 4 threads each); "
        "without 6 runs whose time is unknown",
    ]
    rows = estimate(study, SHARE, fixed({}, []))
    assert total_text(study, rows, SHARE) == "total: unknown (2 at once, 4 threads each)"


def test_nothing_is_timed_where_every_run_has_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = make(tmp_path)
    for run in study.runs:
        begin(run)
    minutes.print_minutes(study)
    assert capsys.readouterr() == ("minutes: no run is still to begin\n", "")


@pytest.mark.parametrize(
    ("runs", "at_once", "seconds"),
    [
        ([3.0, 2.0, 2.0], 1, 7.0),
        ([3.0, 2.0, 2.0], 2, 4.0),
        ([3.0, 2.0, 2.0], 3, 3.0),
        ([2.0, 2.0, 3.0], 2, 5.0),
        ([5.0], 4, 5.0),
        ([1.0, 4.0, 1.0, 1.0, 1.0], 2, 4.0),
    ],
)
def test_a_run_begins_once_a_place_is_free(runs: list[float], at_once: int, seconds: float) -> None:
    assert wall_seconds(runs, at_once) == seconds


@pytest.mark.parametrize(
    ("keys", "set_by_user", "threads", "cores_of_run"),
    [
        ({"throttle": None}, None, 8, 8),
        ({"throttle": 2}, None, 4, 4),
        ({"throttle": 3}, None, 2, 2),
        # More runs than cores: each has a thread, and half a core.
        ({"throttle": 16}, None, 1, 0.5),
        ({"throttle": 2}, "1", 1, 1),
        ({"throttle": 2}, "8,2", 8, 4),
        # A job of this machine has the threads of its profile, and hands them down.
        ({"throttle": 2, "cluster": "local"}, None, 1, 1),
        ({"throttle": 2, "cluster": "local"}, "3", 3, 3),
    ],
)
def test_a_run_has_its_share_of_the_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, object],
    set_by_user: str | None,
    threads: int,
    cores_of_run: float,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    share = share_of(make(tmp_path, **keys).config)
    assert share.at_once == (keys["throttle"] or 1)
    assert (share.threads, share.cores_of_run) == (threads, cores_of_run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--minutes goes with --dry_run"),
        (["--dry_run", "--cluster", "slurm"], "--minutes: cluster slurm is another machine"),
    ],
)
def test_minutes_are_those_of_this_machine_before_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    file = write_config(tmp_path)
    assert main(["study", str(file), "--minutes", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "s").exists()


# A process that answers without training: it leaves a file where its run would be, and waits to be told to begin.
ANSWERS = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[-1])
(run / "left").touch()
print("ready", flush=True)
sys.stdin.read()
print(json.dumps({"seconds": [1, 2, 6] if run.name == "0" else [3, 9, 9], "steps": 6}), flush=True)
"""


def test_processes_side_by_side_have_one_median_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = make(tmp_path).variants[0]
    start_instead(ANSWERS, tmp_path, monkeypatch)
    assert time_variant(variant, 1, os.environ) == Pace(step_seconds=2, steps=6)
    assert time_variant(variant, 2, os.environ) == Pace(step_seconds=4.5, steps=6)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "ended without an answer"),
        ("print('ready')", "ended without an answer"),
        ("""print('{"reason": "no such GPU"}')""", "^no such GPU$"),
        ("""print('ready'); print('{"reason": "too many NaN"}')""", "^too many NaN$"),
    ],
    ids=["killed at its start", "killed among its steps", "cannot start", "cannot train"],
)
def test_a_process_that_tells_no_time_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    variant = make(tmp_path).variants[0]
    start_instead(program, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message):
        time_variant(variant, 2, os.environ)
    assert not list((tmp_path / "temporary").iterdir())


def start_instead(program: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have another program started, and temporary folders made in ``home``/temporary."""
    monkeypatch.setattr(
        minutes, "module_words", lambda home, module: [sys.executable, "-c", program]
    )
    make_temporary_in(home / "temporary", monkeypatch)


def make_temporary_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.slow(20)
def test_a_small_study_is_timed_by_its_own_steps_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    grids = {
        "size": {"networks": {"two": "", "one": "--cohort.networks 1"}},
        "data": {"images": {"not here": "--data.name cifar100 --data.limit 64"}},
    }
    file = write_config(tmp_path, grids=grids, throttle=2)
    make_temporary_in(tmp_path / "temporary", monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "Popen", ProgramsPopen)
    assert main(["study", str(file), "--dry_run", "--minutes"]) == 0
    told = capsys.readouterr()
    printed = told.out.splitlines()
    timed = [line.split()[2:] for line in printed if line.rstrip().endswith("  timed")]
    assert len(timed) == 2
    seconds_of_a_run = []
    for seeds, steps, step_seconds, of_a_run, of_all, _ in timed:
        assert (seeds, steps) == ("2", "6")
        assert float(step_seconds) > 0
        # Each figure has three digits.
        assert float(of_a_run) == pytest.approx(6 * float(step_seconds) / 60, rel=0.01)
        assert float(of_all) == pytest.approx(2 * float(of_a_run), rel=0.01)
        seconds_of_a_run.append(6 * float(step_seconds))
    hours = float(printed[-1].split(" core-hours, ")[1].split()[0])
    assert hours == pytest.approx(sum(seconds_of_a_run) / 3600, rel=0.02)
    assert printed[-1].endswith("; without 2 runs whose time is unknown")
    (unknown,) = [line for line in printed if line.startswith("unknown: ")]
    assert unknown.startswith("unknown: data: not here: ")
    assert "cifar100" in unknown
    assert [line[: len("minutes: config 1 of 3")] for line in told.err.splitlines()] == [
        f"minutes: config {number} of 3" for number in (1, 2, 3)
    ]
    # Libraries leave folders of their own there.
    assert not list((tmp_path / "temporary").rglob("variant.yaml"))
    assert not (tmp_path / "s").exists()
