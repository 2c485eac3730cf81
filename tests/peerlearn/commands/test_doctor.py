import dataclasses
import importlib.metadata
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peerlearn.commands import doctor
from peerlearn.commands.doctor import Check, main
from peerlearn.compute import cpu
from peerlearn.errors import UsageError

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def check(name: str = "thing", **values: object) -> Check:
    defaults: dict[str, object] = {"ok": True, "required": True, "found": "here", "fix": "mend it"}
    return Check(name=name, **(defaults | values))


def set_version(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        wanted = versions.get(name, real(name) if name not in versions else None)
        if wanted is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return wanted

    monkeypatch.setattr(importlib.metadata, "version", version)


class TestMain:
    @pytest.mark.parametrize(
        ("checks", "code"),
        [
            ([check(), check("gpu", ok=False, required=False)], 0),
            ([check(), check("torch", ok=False), check()], 1),
            ([check("torch", ok=False), check("gpu", ok=False, required=False)], 1),
        ],
    )
    @pytest.mark.parametrize("argv", [[], ["--json"]])
    def test_only_what_is_required_fails(
        self,
        checks: list[Check],
        code: int,
        argv: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(doctor, "CHECKS", [lambda each=each: each for each in checks])
        assert main(argv) == code
        if argv:
            assert json.loads(capsys.readouterr().out) == {
                "ok": code == 0,
                "checks": [dataclasses.asdict(each) for each in checks],
            }

    def test_plain_lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [
            check("torch", found="2.15"),
            check("accelerate", ok=False, found="gone", fix="pip install accelerate"),
            check("GPU", ok=False, required=False, found="none", fix=""),
        ]
        monkeypatch.setattr(doctor, "CHECKS", [lambda row=row: row for row in rows])
        main([])
        assert capsys.readouterr().out.splitlines() == [
            "ok        torch       2.15",
            "MISSING   accelerate  gone",
            "                      fix: pip install accelerate",
            "optional  GPU         none",
        ]

    @pytest.mark.parametrize("rich_is_here", [True, False])
    def test_a_terminal_gets_a_table_where_rich_is_here(
        self,
        rich_is_here: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        row = check("disk", ok=False, found="full in /data/[red]run[/red]", fix="rm [old]")
        monkeypatch.setattr(doctor, "CHECKS", [lambda: row])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        if not rich_is_here:
            monkeypatch.setitem(sys.modules, "rich", None)
        assert main([]) == 1
        out = capsys.readouterr().out
        # Square brackets are the path's own, not markup.
        assert "full in /data/[red]run[/red]" in out
        assert "fix: rm [old]" in out
        assert ("found" in out) == rich_is_here

    def test_help_has_examples(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        assert "\n  peerlearn doctor --json" in capsys.readouterr().out

    def test_an_unknown_option_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="unrecognized arguments: --jsno"):
            main(["--jsno"])

    def test_this_machine_without_a_network(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("doctor reached for the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        assert main(["--json"]) == 0  # these tests run with everything required installed
        report = json.loads(capsys.readouterr().out)
        found = {row["name"]: row["found"] for row in report["checks"]}
        assert len(found) == len(doctor.CHECKS) == len(report["checks"])
        assert found["torch"] == importlib.metadata.version("torch")
        assert all("\n" not in row["found"] + row["fix"] for row in report["checks"])

    def test_importing_it_imports_nothing_heavy(self) -> None:
        code = "import sys, peerlearn.commands.doctor; print({'torch', 'numpy', 'rich'} & set(sys.modules))"
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=PYPROJECT.parent,
        )
        assert run.stdout.strip() == "set()"


def test_a_check_is_frozen_and_needs_no_fix_when_ok() -> None:
    assert check(ok=True).fix == ""
    assert check(ok=False).fix == "mend it"
    with pytest.raises(dataclasses.FrozenInstanceError):
        check().ok = False


class TestPackages:
    def test_trackers_that_are_missing_or_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_version(monkeypatch, {"wandb": "0.31.2", "mlflow": "2.22", "trackio": None})
        result = doctor.check_trackers()
        assert (result.ok, result.required) == (False, False)
        assert result.found == "wandb 0.31.2, mlflow 2.22, trackio not installed"
        assert result.fix.endswith("pip install 'mlflow>=3.17' 'trackio>=0.43'")

    def test_the_minima_are_those_of_pyproject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        wanted = dict(
            re.split(">=|==", line.replace("[signatures]", "")) for line in project["dependencies"]
        )
        asked = dict(doctor.OTHER_LIBRARIES)
        monkeypatch.setattr(
            doctor,
            "_check_package",
            lambda name, *, minimum, **_: asked.__setitem__(name, minimum),
        )
        for one in (
            doctor.check_torch,
            doctor.check_torchvision,
            doctor.check_timm,
            doctor.check_accelerate,
        ):
            one()
        wanted.pop("faiss-gpu")  # its own check, and the program runs without it
        assert asked == wanted
        extra = project["optional-dependencies"]["trackers"]
        minima = {name: kind.minimum for name, kind in doctor.KINDS.items() if kind.minimum}
        assert minima == dict(line.split(">=") for line in extra)
        python = ".".join(map(str, doctor._MINIMUM_PYTHON))
        assert project["requires-python"] == f">={python}"

    @pytest.mark.parametrize(
        ("run", "module", "required", "fix"),
        [
            (doctor.check_torch, "torch", True, "pip install 'torch>=2.10'"),
            (doctor.check_torchvision, "torchvision", True, "torch torchvision"),
            (doctor.check_timm, "timm", True, "pip install 'timm>=1.0.20'"),
            (doctor.check_accelerate, "accelerate", True, "pip install 'accelerate>=1.10'"),
            (
                doctor.check_ffcv,
                "ffcv",
                False,
                "packages.sh ffcv && pip install --editable '.[ffcv]'",
            ),
            (doctor.check_submitit, "submitit", False, "pip install submitit"),
        ],
    )
    def test_absence(
        self,
        run: Callable[[], Check],
        module: str,
        required: bool,
        fix: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        result = run()
        assert (result.ok, result.required) == (False, required)
        assert result.found.split(":")[0] == "not installed"
        assert result.fix.endswith(fix)

    @pytest.mark.parametrize(
        ("version", "ok"),
        [
            ("2.9.1", False),
            ("2.10", True),
            ("2.10.0a0+git12", True),
            ("2.15.0+cu132", True),
            ("10.0", True),
            ("1.13.1", False),
            (None, False),
        ],
    )
    def test_torch_versions(
        self, version: str | None, ok: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_version(monkeypatch, {"torch": version})
        result = doctor.check_torch()
        assert result.ok is ok
        if ok:
            assert result.found == version
        else:
            assert result.found.startswith(f"{version or 'unknown version'}, needs 2.10 (")
            assert "CVE-2026-24747" in result.found

    @pytest.mark.parametrize(
        ("error", "found"),
        [
            (RuntimeError("operator torchvision::nms does not exist\nmore"), "torchvision::nms"),
            (OSError("libcudart.so.13: cannot open shared object file"), "libcudart.so.13"),
            (ModuleNotFoundError("No module named 'numba'", name="numba"), "numba"),
            (AttributeError(), "AttributeError"),
        ],
    )
    def test_a_broken_package_is_no_crash(
        self, error: Exception, found: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(name: str) -> ModuleType:
            raise error

        monkeypatch.setattr(doctor.importlib, "import_module", fail)
        result = doctor.check_torchvision()
        assert not result.ok
        assert result.found.startswith("does not import: ")
        assert found in result.found
        assert "\n" not in result.found

    def test_other_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert doctor.check_other_libraries().ok
        set_version(monkeypatch, {"safetensors": None, "rich": "12.6.0", "pillow": "11.0"})
        result = doctor.check_other_libraries()
        assert (result.ok, result.required) == (False, True)
        assert result.found == "missing or too old: rich, safetensors"
        assert result.fix == "pip install 'rich>=13' 'safetensors>=0.5'"

    def test_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert doctor.check_python().ok
        monkeypatch.setattr(sys, "version_info", (3, 10, 14))
        result = doctor.check_python()
        assert (result.ok, result.required) == (False, True)
        assert result.fix == "install Python 3.11 or newer"


class TestFaiss:
    @staticmethod
    def installed(monkeypatch: pytest.MonkeyPatch, *names: str | None) -> None:
        found = [SimpleNamespace(metadata={"Name": name}) for name in names]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)

    @pytest.mark.parametrize(("gpu", "build"), [(True, "GPU build"), (False, "CPU build")])
    def test_builds(self, gpu: bool, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
        faiss = SimpleNamespace(__version__="1.15.1", knn=None)
        if gpu:
            faiss.StandardGpuResources = None
        self.installed(monkeypatch, "torch", None, "faiss-gpu")
        monkeypatch.setitem(sys.modules, "faiss", faiss)
        result = doctor.check_faiss()
        assert (result.ok, result.found) == (True, f"1.15.1, {build}")

    @pytest.mark.parametrize("module", [None, SimpleNamespace()])
    def test_absent_or_an_empty_folder(
        self, module: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.installed(monkeypatch, "torch")
        monkeypatch.setitem(sys.modules, "faiss", module)
        result = doctor.check_faiss()
        assert (result.ok, result.required) == (False, False)
        assert result.found.endswith(": kNN runs on torch")
        assert result.fix == "pip install faiss-gpu"

    def test_beside_faiss_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed(monkeypatch, "faiss-gpu", "faiss-cpu", "torch")
        result = doctor.check_faiss()
        assert (result.ok, result.required) == (False, False)
        assert result.found.startswith("faiss-cpu beside faiss-gpu")
        assert result.fix.startswith("pip uninstall faiss-cpu faiss-gpu, then pip install faiss-")

    def test_faiss_cpu_alone_is_no_conflict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed(monkeypatch, "faiss-cpu")
        faiss = SimpleNamespace(__version__="1.12", knn=None)
        monkeypatch.setitem(sys.modules, "faiss", faiss)
        assert doctor.check_faiss().ok


class TestDevices:
    @staticmethod
    def devices(monkeypatch: pytest.MonkeyPatch, *devices: SimpleNamespace) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])

    def test_two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices(
            monkeypatch,
            SimpleNamespace(name="NVIDIA H200", total_memory=139.8 * 2**30, major=9),
            SimpleNamespace(name="Tesla V100", total_memory=16 * 2**30, major=7),
        )
        result = doctor.check_cuda()
        assert result.ok
        assert result.found == "NVIDIA H200, 140 GiB, bf16; Tesla V100, 16 GiB, no bf16"

    @pytest.mark.parametrize("driver", [True, False])
    def test_none(self, driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices(monkeypatch)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
        result = doctor.check_cuda()
        assert (result.ok, result.required) == (False, False)
        assert result.found == "none: training runs on the CPU"
        assert ("CUDA_VISIBLE_DEVICES" in result.fix) == driver

    def test_a_device_that_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(index: int) -> None:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
        result = doctor.check_cuda()
        assert (result.ok, result.found) == (False, "unusable: CUDA error: out of memory")

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert doctor.check_cuda().found == "unknown without torch"

    @pytest.mark.parametrize(
        ("info", "units"),
        [
            ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "amx_bf16, avx512_bf16"),
            ("Features\t: fp asimd i8mm bf16\n", "bf16"),
            ("flags\t\t: fpu avx2 avx512f\n", None),
            (None, None),
        ],
    )
    def test_cpu_bf16(
        self,
        info: str | None,
        units: str | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if info is not None:
            (tmp_path / "cpuinfo").write_text(info)
        monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
        result = doctor.check_cpu_bf16()
        assert (result.ok, result.required) == (units is not None, False)
        assert result.found == units or result.found.startswith("none: ")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class TestSlurm:
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def test_absent(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        result = doctor.check_slurm()
        assert (result.ok, result.required) == (False, False)
        assert result.found == "no sbatch on PATH"
        assert "apt install slurm-wlm" in result.fix

    def test_answers(self, tmp_path: Path) -> None:
        program(tmp_path, "sbatch", "exit 1")
        program(tmp_path, "sinfo", 'test "$*" = "--noheader --format=%P" && echo "gpu*\ncpu"')
        result = doctor.check_slurm()
        assert (result.ok, result.found) == (True, "partitions: gpu*, cpu")

    def test_controller_down(self, tmp_path: Path) -> None:
        program(tmp_path, "sbatch", "")
        program(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1")
        result = doctor.check_slurm()
        assert (result.ok, result.required) == (False, False)
        assert result.found == "sinfo does not answer: slurm_load_partitions: Unable to contact"
        assert "scontrol ping" in result.fix

    def test_controller_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_SINFO_TIMEOUT_SECONDS", 0.2)
        program(tmp_path, "sbatch", "")
        program(tmp_path, "sinfo", "echo waiting >&2; exec sleep 30")
        result = doctor.check_slurm()
        assert not result.ok
        assert re.match("sinfo does not answer: .*timed out after 0.2 seconds", result.found)

    def test_sinfo_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(tmp_path, "sbatch", "")
        monkeypatch.setenv("PATH", str(tmp_path))
        result = doctor.check_slurm()
        assert not result.ok
        assert "No such file" in result.found


class TestFiles:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_fashion_mnist(
        self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "FASHION_MNIST", tmp_path)
        for name in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
        ):
            (tmp_path / f"{name}{suffix}").touch()
        result = doctor.check_fashion_mnist()
        assert (result.ok, result.required) == (False, False)
        assert result.found == f"{tmp_path} lacks t10k-labels-idx1-ubyte"
        assert result.fix == "apt install dataset-fashion-mnist"
        (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").touch()
        assert doctor.check_fashion_mnist().ok

    def test_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        result = doctor.check_compiler()
        assert (result.ok, result.required) == (False, False)
        assert result.fix == "apt install g++"
        program(tmp_path, "clang++", "")
        monkeypatch.setenv("CXX", "clang++")
        assert doctor.check_compiler().found == str(tmp_path / "clang++")

    @pytest.mark.parametrize(("free_gib", "ok"), [(9.9, False), (10, True), (500.26, True)])
    def test_disk(
        self, free_gib: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        usage = SimpleNamespace(free=free_gib * 2**30)
        monkeypatch.setattr(shutil, "disk_usage", {tmp_path: usage}.__getitem__)
        result = doctor.check_disk()
        assert (result.ok, result.required) == (ok, False)
        assert result.found == f"{free_gib:.1f} GiB free in {tmp_path}"
