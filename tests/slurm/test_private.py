"""Who else could change what a job runs: other accounts try it, under the umasks with which groups share folders."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slurm.executors
import slurm.submission
from peerlearn import PACKAGES
from peerlearn.errors import UserError
from peerlearn.runs.output import _told
from slurm.config import SubmitConfig
from slurm.private_folder import (
    PRIVATE_OR_EXIT,
    _who_may_write,
    private_or_exit,
    root_of,
    warn_of_parents,
)
from slurm.submission import (
    BATCH_SCRIPTS,
    EXECUTED,
    Submission,
    Task,
    create_submission,
    record_jobs,
    submission_to_run,
)
from slurm.submit_command import read_cluster
from tests.e2e.runs import SMALL, command, environment
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import submit

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another account, as root")
# A member of the group that the folders belong to, and somebody in it with us.
MEMBER, GROUP = 65534, 100


@pytest.fixture(params=[0o002, 0o000], ids=["umask 002", "umask 000"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of a project: its group may write, and what is made in it belongs to the group."""
    before = os.umask(request.param)
    # Others may not enter the tests' own temporary folders.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        project = Path(folder) / "project"
        project.mkdir()
        os.chown(project, 0, GROUP)
        project.chmod(0o2775)
        yield project
    os.umask(before)


def submission_in(run: Path) -> Submission:
    config = SubmitConfig(environment=["TOKEN=s3cret"])
    task = Task(words=["configs"], run=str(run), config_yaml="a: 1\n")
    submission = create_submission(run / "slurm", [task], config)
    record_jobs(submission, ["7"])
    return submission


def as_member(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """What another member of the group achieves."""
    return subprocess.run(
        ["sh", "-ec", script, "sh", *map(str, words)],
        user=MEMBER,
        group=GROUP,
        extra_groups=[],
        capture_output=True,
        text=True,
    )


ATTEMPTS = {
    "the run": 'mv "$1" "$1-old"',
    "slurm": 'mv "$1/slurm" "$1/old"; cp -r /tmp "$1/slurm"',
    "code": 'mv "$2/code" "$2/old"',
    "a file of the code": 'echo evil > "$2/code/slurm/job.py"',
    "a start file": 'echo evil > "$2/start.sh"',
    "submission.json": 'echo "{}" > "$2/submission.json"',
    "another submission.json": 'rm -f "$2/submission.json"',
    "the config": 'echo "b: 2" > "$2/configs/task-0.yaml"',
    "jobs.jsonl": 'echo "{}" >> "$1/slurm/jobs.jsonl"',
    "a link for a log": 'ln -s /root/x "$2/7_0_log.out"',
    "the token": 'cat "$2/submission.json"',
    "a file of the run": 'touch "$1/FAILED"',
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_a_member_of_the_group_changes_nothing(attempt: str, shared: Path) -> None:
    run = shared / "runs" / "a"
    submission = submission_in(run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = as_member(attempt, run, submission.folder)
    assert found.returncode != 0, found.stdout
    assert "Permission denied" in found.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert submission_to_run(submission.folder).working_directory == str(Path.cwd())
    assert as_member('touch "$1/mine"', shared).returncode == 0


def test_secrets_stand_in_files_that_others_cannot_read(shared: Path) -> None:
    run = shared / "runs" / "a"
    submission_in(run)
    holding = [p for p in run.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]
    assert [path.name for path in holding] == ["submission.json"]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
    assert holding[0].parent.stat().st_mode & 0o077 == 0


def swap_the_submissions(run: Path) -> None:
    (run / "slurm").rename(run / "old")
    shutil.copytree(run / "old", run / "slurm", symlinks=True)
    for path in (run / "slurm", *(run / "slurm").rglob("*")):
        os.chown(path, MEMBER, GROUP, follow_symlinks=False)


def swap_the_run(run: Path) -> None:
    run.rename(run.with_name("old"))
    shutil.copytree(run.with_name("old"), run)
    for path in (run, *run.rglob("*")):
        os.chown(path, MEMBER, GROUP, follow_symlinks=False)


def link_the_submissions(run: Path) -> None:
    swap_the_submissions(run)
    (run / "slurm").rename(run.with_name("evil"))
    (run / "slurm").symlink_to(run.with_name("evil"))


def opened(name: str, mode: int) -> Callable[[Path], None]:
    return lambda run: (run / name).chmod(mode)


SWAPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "the run": (swap_the_run, "{run}, which decides what jobs run as you, belongs to nobody"),
    "slurm": (
        swap_the_submissions,
        "{run}/slurm, which decides what jobs run as you, belongs to nobody",
    ),
    "a link": (
        link_the_submissions,
        "{run}/slurm, which decides what jobs run as you, is a link: ",
    ),
    "the code": (
        lambda run: os.chown(run / "slurm/configs-1/code/slurm/job.py", MEMBER, -1),
        "{run}/slurm/configs-1/code/slurm/job.py, which decides what jobs run as you, belongs to",
    ),
    "the config": (
        lambda run: os.chown(run / "slurm/configs-1/configs/task-0.yaml", MEMBER, -1),
        "task-0.yaml, which decides what jobs run as you, belongs to nobody (mode 6",
    ),
    "the tasks": (
        lambda run: os.chown(run / "slurm/configs-1/submission.json", MEMBER, -1),
        "submission.json, which decides what jobs run as you, belongs to nobody (mode 600)",
    ),
    "an opened run": (
        opened("", 0o2775),
        "{run}, which decides what jobs run as you, can be changed by others (mode 2775): "
        "see that nobody has, then `chmod -R go-w {run}`",
    ),
    "opened submissions": (opened("slurm", 0o777), "{run}/slurm, which"),
    "an opened submission": (opened("slurm/configs-1", 0o770), "{run}/slurm/configs-1, which"),
}


@pytest.mark.parametrize(("swap", "message"), SWAPS.values(), ids=SWAPS)
def test_a_job_whose_files_another_could_have_changed_does_not_start(
    swap: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    run, ran = tmp_path / "runs" / "a", tmp_path / "ran"
    submission = submission_in(run)
    look = private_or_exit(submission.folder, EXECUTED)
    script = f"{look}\ntouch {ran}"
    started = ["bash", "-c", script]
    assert subprocess.run(started, capture_output=True).returncode == 0
    assert ran.exists()
    ran.unlink()
    swap(run)
    found = subprocess.run(started, capture_output=True, text=True)
    assert found.returncode == 1
    assert not ran.exists()
    assert found.stderr.startswith("peerlearn: ")
    assert found.stderr.count("\n") == 1
    assert message.format(run=run) in found.stderr
    with pytest.raises(UserError) as refused:
        submission_to_run(submission.folder)
    assert message.format(run=run) in str(refused.value)


def test_it_is_looked_at_again_after_the_job(tmp_path: Path) -> None:
    submission = submission_in(tmp_path / "a")
    (tmp_path / "ran").touch()
    script = [
        private_or_exit(submission.folder, EXECUTED),
        f"rm {tmp_path}/ran && chmod g+w {tmp_path}/a/slurm",
        PRIVATE_OR_EXIT,
        f"touch {tmp_path}/ran",
    ]
    found = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith(f"peerlearn: {tmp_path}/a/slurm, which decides what jobs run")
    assert not (tmp_path / "ran").exists()


def test_what_belongs_to_the_account_or_to_root_is_trusted(shared: Path) -> None:
    run = shared / "a"
    submission = submission_in(run)
    look = private_or_exit(submission.folder, EXECUTED)
    assert as_member(look).returncode == 1
    for path in (run, *run.rglob("*")):
        os.chown(path, MEMBER, GROUP)
    assert as_member(look).stderr == ""
    os.chown(run, 0, 0)
    assert as_member(look).stderr == ""
    os.chown(run / "slurm", 1234, 1234)
    assert f"peerlearn: {run}/slurm, which decides what" in (said := as_member(look).stderr)
    assert " belongs to 1234 (mode 2700): " in said


def test_a_path_of_any_signs_is_looked_at(tmp_path: Path) -> None:
    run = tmp_path / """a %p\\n'"`$(touch no)` *"""
    submission = submission_in(run)
    assert submission_to_run(submission.folder)
    (run / "slurm").chmod(0o720)
    with pytest.raises(UserError) as refused:
        submission_to_run(submission.folder)
    assert str(refused.value) == (
        f"{run}/slurm, which decides what jobs run as you, can be changed by others (mode 720): "
        f"see that nobody has, then `chmod -R go-w {shlex.quote(str(run))}`"
    )


def test_what_is_gone_or_cannot_be_looked_at_is_not_run(tmp_path: Path) -> None:
    submission = submission_in(tmp_path / "a")
    look = private_or_exit(submission.folder, EXECUTED)
    sh = ["/bin/sh", "-c", f"{look}\necho ran"]
    assert subprocess.run(sh, capture_output=True, text=True).stdout == "ran\n"
    no_find = ["/bin/sh", "-c", f"{look.replace('(find', '(no_find')}\necho ran"]
    found = subprocess.run(no_find, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert "cannot be looked at by find" in found.stderr
    shutil.rmtree(tmp_path / "a" / "slurm")
    found = subprocess.run(sh, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"peerlearn: {tmp_path}/a, where what jobs run as you lies, cannot be" in found.stderr


def test_a_batch_script_looks_first_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a"
    submission = create_submission(
        run / "slurm",
        [Task(words=["configs"], run=str(run))],
        SubmitConfig(environment=["TOKEN=s3cret"], setup=["export KEY=s3cret"]),
    )
    monkeypatch.setattr(slurm.executors, "call", lambda *_, **__: "7\n")
    assert slurm.executors.submit(submission, "name") == ["7"]
    (script,) = submission.folder.glob(BATCH_SCRIPTS)
    lines = script.read_text().splitlines()
    looks = [number for number, line in enumerate(lines) if line == PRIVATE_OR_EXIT]
    runs = [n for n, line in enumerate(lines) if re.search(r"start\.sh|\. .*ready|requeue ", line)]
    runs = [
        number for number in runs if "find " not in lines[number] and "#SBATCH" not in lines[number]
    ]
    assert len(looks) == 2
    assert len(runs) == 3
    assert looks[0] < runs[0] < looks[1] < runs[1]
    holding = [path for path in run.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert sorted(path.name for path in holding) == ["start.sh", "submission.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in holding} == {0o600}


@pytest.mark.slow(10)
def test_a_job_of_this_machine_takes_no_module_from_where_it_was_submitted(tmp_path: Path) -> None:
    for name in ("submitit", "typing", "peerlearn", "slurm"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    words = command("submit", "--cluster", "local", "--wait", "true", "--", "configs")
    done = subprocess.run(
        [Path(sys.executable).with_name("peerlearn"), *words[3:]],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_the_copy_of_an_open_checkout_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        (tmp_path / "home" / package / "clusters").mkdir(parents=True)
        (tmp_path / "home" / package / "__init__.py").touch()
    for path in (tmp_path / "home").rglob("*"):
        path.chmod(0o777)
    monkeypatch.setattr(slurm.submission, "HOME", tmp_path / "home")
    code = submission_in(tmp_path / "a").code
    found = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in code.rglob("*")}
    assert found == {(True, 0o700), (False, 0o600)}


def test_an_open_folder_is_refused_before_anything_is_left_there(tmp_path: Path) -> None:
    run = tmp_path / "a"
    run.mkdir()
    run.chmod(0o775)
    with pytest.raises(UserError, match=r"a, which .* can be changed by others \(mode 775\): "):
        submission_in(run)
    assert list(run.iterdir()) == []
    run.chmod(0o755)
    assert submission_in(run).folder == run / "slurm" / "configs-1"


def test_the_whole_way_up_to_the_study_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "base-seed-0" / "evaluations" / "0123"
    folder.mkdir(parents=True, mode=0o700)
    assert root_of(folder / "measure-1") == tmp_path / "s" / "base-seed-0"
    assert root_of(tmp_path / "s" / "base-seed-0" / "slurm" / "a-1") == tmp_path / "s/base-seed-0"
    study = tmp_path / "s" / "study.yaml"
    study.write_text("")
    assert root_of(folder / "measure-1") == tmp_path / "s"
    submission = create_submission(folder, [Task(words=["configs"])], SubmitConfig())
    for place in (tmp_path / "s", study, folder.parents[1], folder.parent, folder):
        mode = stat.S_IMODE(place.stat().st_mode)
        place.chmod(mode | 0o020)
        with pytest.raises(UserError, match=f"{place}, which .* can be changed by others"):
            submission_to_run(submission.folder)
        place.chmod(mode)
    assert submission_to_run(submission.folder).tasks == submission.tasks


def test_folders_that_may_be_read_by_others_do_not_stop_a_job(tmp_path: Path) -> None:
    """What a job itself leaves in its code matters only once others can come there."""
    submission = submission_in(tmp_path / "a")
    compiled = submission.code / "slurm" / "__pycache__"
    compiled.mkdir()
    compiled.chmod(0o775)
    assert submission_to_run(submission.folder)
    submission.folder.chmod(0o755)
    with pytest.raises(UserError, match=f"{compiled}, which .* can be changed by others"):
        submission_to_run(submission.folder)
    compiled.chmod(0o755)
    assert submission_to_run(submission.folder)


def test_who_could_move_the_run_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = tmp_path / "lab"
    (lab / "a").mkdir(parents=True)
    os.chown(lab, 0, GROUP)
    for mode, who in ((0o755, None), (0o3775, None), (0o1777, None), (0o2775, "the group users")):
        lab.chmod(mode)
        warn_of_parents(lab / "a" / "b")
        warn_of_parents(lab / "a" / "b")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (who is not None)
        if who is not None:
            assert said[0].startswith(f"{lab} can be changed by {who}, who could put another ")
            assert f"`chmod +t {lab}`" in said[0]


def test_who_could_change_the_packages_or_the_profile_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, profile = tmp_path / "site-packages", tmp_path / "mine.yaml"
    packages.mkdir()
    profile.write_text("executor: local\n")
    monkeypatch.setattr(sysconfig, "get_path", {"purelib": str(packages)}.__getitem__)
    for mode, who in ((0o755, None), (0o775, "the group users"), (0o777, "every account")):
        for path in (packages, profile):
            os.chown(path, 0, GROUP)
            path.chmod(mode)
        submission_in(tmp_path / str(who))
        assert read_cluster(["--cluster", str(profile)])[0].executor == "local"
        said = [record.getMessage() for record in caplog.records]
        assert [line.split(" ", 1)[0] for line in said] == (
            [str(packages), str(profile)] if who else []
        )
        assert all(f" can be changed by {who}" in line for line in said)
        _told.clear()
        caplog.clear()


def test_the_own_group_of_an_account_is_nobody_else(tmp_path: Path) -> None:
    """The group root is that of the account root alone."""
    assert _who_may_write(tmp_path) is None
    tmp_path.chmod(0o775)
    assert _who_may_write(tmp_path) is None
    os.chown(tmp_path, -1, 54321)
    assert _who_may_write(tmp_path) == "the group 54321"


def modes_of(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode)
        for path in (root, *root.rglob("*"))
    }


@pytest.mark.slow(15)
def test_what_the_command_makes_is_its_owners_alone(tmp_path: Path) -> None:
    """A job of this machine, under a umask by which anybody may write; its profile holds a token."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("executor: local\nenvironment: [TOKEN=s3cret]\nsetup: [export KEY=s3cret]\n")
    run = tmp_path / "runs" / "a"
    words = ["submit", "--cluster", str(profile), "--wait", "true", "--", "pretrain", *SMALL]
    words += ["--epochs", "1", "--run", str(run)]
    done = subprocess.run(
        ["sh", "-c", 'umask 000; exec "$@"', "sh", *command(*words)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    modes = modes_of(run.parent)
    assert len([name for name in modes if name.startswith("a/export/")]) > 5
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o022} == {}
    private = {name for name, mode in modes.items() if not mode & 0o077}
    for name in modes:
        file = run.parent / name
        if file.is_file() and b"s3cret" in file.read_bytes():
            assert {name, f"{name.rpartition('/')[0]}"} <= private
    assert "s3cret" not in done.stdout + done.stderr


def test_a_swapped_submission_does_not_run_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    run, ran = tmp_path / "a", tmp_path / "ran"
    job = submit(cluster, run, options=("--sbatch", "hold"))
    swap_the_submissions(run)
    evil = f"open({str(ran)!r}, 'w')\n"
    for file in (run / "slurm").rglob("*.py"):
        file.write_text(evil)
    cluster.call("scontrol", "release", job)
    assert cluster.wait_for_state(job, "FAILED", "COMPLETED") == "FAILED"
    (log,) = (run / "slurm").glob(f"*/{job}_*.out")
    assert f"peerlearn: {run}/slurm, which decides what jobs run as you, belongs" in log.read_text()
    assert not ran.exists()
