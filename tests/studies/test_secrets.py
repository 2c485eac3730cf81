"""What a study writes, and where: the profile of its cluster may hold passwords, and others may plant links."""

import os
import stat
from pathlib import Path

import pytest

import slurm.executors
import studies.cluster
from peerlearn.cli import main
from studies.here import _spawn
from tests.studies.small_studies import KNN, write_config


def test_a_study_keeps_the_path_of_a_profile_and_none_of_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Also under a umask by which everybody may write."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("environment: [TOKEN=s3cret]\nsetup: [export KEY=s3cret]\n")
    profile.chmod(0o600)
    monkeypatch.setattr(slurm.executors, "call", lambda *_, **__: "7\n")
    monkeypatch.setattr(studies.cluster, "own_jobs", lambda **_: [])
    file = write_config(tmp_path, evaluate=[KNN], seeds=[0])
    before = os.umask(0)
    try:
        assert main(["study", str(file), "--cluster", str(profile)]) == 0
    finally:
        os.umask(before)
    study = tmp_path / "s"
    submitted = {file.parent for file in study.glob("slurm/*/submission.json")}
    assert {folder.name for folder in submitted} == {"pretrain-1", "watch-1"}
    assert f"cluster: {profile}\n" in (study / "study.yaml").read_text()
    paths = [study, *study.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode & 0o022} == {}
    holding = [path for path in paths if path.is_file() and b"s3cret" in path.read_bytes()]
    assert set(holding) == {
        each / name for each in submitted for name in ("submission.json", "start.sh")
    }
    assert {modes[path] for path in holding} == {0o600}
    assert {modes[folder] for folder in submitted} == {0o700}
    printed, complained = capfd.readouterr()
    assert "s3cret" not in printed + complained


def test_what_its_processes_print_goes_where_no_link_leads(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "a.log").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        _spawn(["--version"], tmp_path / "a.log", os.environ)
    assert precious.read_text() == "precious"
