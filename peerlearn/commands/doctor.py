"""`peerlearn doctor`: what this machine has, what is missing, and the command that installs it.

Nothing here uses the internet. `sinfo` asks the cluster's own controller.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from peerlearn.compute.cpu import BF16_UNITS, cpu_flags
from peerlearn.config import ArgumentParser
from peerlearn.data.ffcv_package import HOW_TO_INSTALL
from peerlearn.errors import DONE, FAILURE
from peerlearn.runs.trackers import KINDS, requirement

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_FASHION_MNIST_FILES = [
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
_MINIMUM_PYTHON = (3, 11)
_LOW_DISK_GIB = 10
_SINFO_TIMEOUT_SECONDS = 5

# Required distributions without a row of their own. A test compares all minima with pyproject.toml.
OTHER_LIBRARIES = {
    "rich": "13",
    "tensorboard": "2.18",
    "scikit-learn": "1.5",
    "scipy": "1.13",
    "matplotlib": "3.9",
    "jinja2": "3.1",
    "markupsafe": "2.1",
    "filelock": "3.20.3",
    "safetensors": "0.5",
    "submitit": "1.5",
    "pillow": "11",
    "simplejpeg": "1.9",
    "numpy": "2",
    "pyyaml": "6",
    "wrapt": "1.16",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table.

    Args:
        name: name of the thing that was looked for.
        ok: whether it is there and usable.
        required: whether peerlearn cannot run without it.
        found: result of the search in one line.
        fix: what the user can do; empty if nothing is wrong or nothing can be done.
    """

    name: str
    ok: bool
    required: bool
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        # A check states its fix without asking whether one is needed.
        if self.ok:
            object.__setattr__(self, "fix", "")


def check_python() -> Check:
    wanted = ".".join(map(str, _MINIMUM_PYTHON))
    return Check(
        name="Python",
        ok=sys.version_info[:2] >= _MINIMUM_PYTHON,
        required=True,
        found=platform.python_version(),
        fix=f"install Python {wanted} or newer",
    )


def check_torch() -> Check:
    # The other minima are the versions that peerlearn is tested with. This one is a matter of safety.
    return _check_package(
        "torch",
        minimum="2.10",
        why="older ones let a checkpoint file run code, even under weights_only: CVE-2026-24747",
    )


def check_torchvision() -> Check:
    # The two are built for each other: an upgrade of one alone breaks torchvision's operators.
    return _check_package(
        "torchvision", minimum="0.25", fix="pip install --upgrade torch torchvision"
    )


def check_timm() -> Check:
    return _check_package("timm", minimum="1.0.20")


def check_accelerate() -> Check:
    return _check_package("accelerate", minimum="1.10")


def check_other_libraries() -> Check:
    wrong = {
        name: minimum
        for name, minimum in OTHER_LIBRARIES.items()
        if not _at_least(_version_of(name), minimum)
    }
    count = len(OTHER_LIBRARIES)
    return Check(
        name="other libraries",
        ok=not wrong,
        required=True,
        found=f"missing or too old: {', '.join(wrong)}" if wrong else f"all {count}",
        fix="pip install " + " ".join(f"'{name}>={wanted}'" for name, wanted in wrong.items()),
    )


def check_cuda() -> Check:
    torch = _import("torch")
    if isinstance(torch, str):
        return Check(name="CUDA devices", ok=False, required=False, found="unknown without torch")
    try:
        with warnings.catch_warnings():
            # An unusable driver is reported in the row, not as a warning above the table.
            warnings.simplefilter("ignore")
            count = torch.cuda.device_count()
            devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    except Exception as error:  # torch wraps the driver's errors in several types
        found, devices = f"unusable: {_first_line(error)}", []
    else:
        found = "; ".join(
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"{'bf16' if device.major >= 8 else 'no bf16'}"
            for device in devices
        )
    fix = (
        f"the driver is here but torch {torch.__version__} uses no device: look at "
        "CUDA_VISIBLE_DEVICES, or install a torch whose CUDA the driver supports"
    )
    return Check(
        name="CUDA devices",
        ok=bool(devices),
        required=False,
        found=found or "none: training runs on the CPU",
        fix=fix if shutil.which("nvidia-smi") else "",
    )


def check_cpu_bf16() -> Check:
    units = sorted(cpu_flags() & BF16_UNITS)
    return Check(
        name="CPU bf16 units",
        ok=bool(units),
        required=False,
        found=", ".join(units) or "none: bf16 on this CPU is many times slower than float32",
    )


def check_faiss() -> Check:
    distributions = sorted(
        name
        for name in {each.metadata["Name"] for each in importlib.metadata.distributions()}
        if name and name.lower().startswith("faiss")
    )
    if "faiss-cpu" in distributions and len(distributions) > 1:
        names = " ".join(distributions)
        return Check(
            name="faiss",
            ok=False,
            required=False,
            found=f"{' beside '.join(distributions)}: they overwrite each other's files",
            fix=f"pip uninstall {names}, then pip install faiss-gpu (it serves the CPU too)",
        )
    faiss = _import("faiss")
    # A removed wheel may leave an empty folder behind, which Python imports without complaint.
    if isinstance(faiss, str) or not hasattr(faiss, "knn"):
        return Check(
            name="faiss",
            ok=False,
            required=False,
            found=f"{faiss if isinstance(faiss, str) else 'broken'}: kNN runs on torch",
            fix="pip install faiss-gpu",
        )
    build = "GPU" if hasattr(faiss, "StandardGpuResources") else "CPU"
    return Check(name="faiss", ok=True, required=False, found=f"{faiss.__version__}, {build} build")


def check_ffcv() -> Check:
    check = _check_package(
        "ffcv",
        required=False,
        fix=HOW_TO_INSTALL,
    )
    if check.ok:
        return check
    return replace(check, found=f"{check.found}: packed files (data.backend ffcv) cannot be read")


def check_trackers() -> Check:
    """Their versions alone: some take seconds to import."""
    packages = {name: kind.minimum for name, kind in KINDS.items() if kind.minimum}
    found = {name: _version_of(name) for name in packages}
    wrong = [name for name in packages if not _at_least(found[name], packages[name])]
    return Check(
        name="trackers",
        ok=not wrong,
        required=False,
        found=", ".join(f"{name} {found[name] or 'not installed'}" for name in packages),
        fix=f"to mirror runs to them: pip install {' '.join(map(requirement, wrong))}",
    )


def check_submitit() -> Check:
    return _check_package("submitit", required=False)


def check_slurm() -> Check:
    if shutil.which("sbatch") is None:
        return Check(
            name="Slurm",
            ok=False,
            required=False,
            found="no sbatch on PATH",
            fix="for cluster jobs: run on a submit node, or apt install slurm-wlm munge",
        )
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%P"],
            capture_output=True,
            text=True,
            timeout=_SINFO_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        ok, found = False, f"sinfo does not answer: {_first_line(error)}"
    else:
        ok = answer.returncode == 0
        reason = next(iter(answer.stderr.splitlines()), f"exit code {answer.returncode}")
        partitions = ", ".join(answer.stdout.split())
        found = f"partitions: {partitions}" if ok else f"sinfo does not answer: {reason}"
    return Check(
        name="Slurm",
        ok=ok,
        required=False,
        found=found,
        fix="look at `scontrol ping`, or ask the cluster's administrator",
    )


def check_compiler() -> Check:
    # CXX is what torch.compile's CPU backend reads.
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    return Check(
        name="C++ compiler",
        ok=path is not None,
        required=False,
        found=path or f"no {compiler} on PATH: torch.compile does not work on the CPU",
        fix="apt install g++",
    )


def check_fashion_mnist() -> Check:
    missing = [
        name
        for name in _FASHION_MNIST_FILES
        if not any((FASHION_MNIST / file).is_file() for file in (name, f"{name}.gz"))
    ]
    return Check(
        name="Fashion-MNIST",
        ok=not missing,
        required=False,
        found=f"{FASHION_MNIST} lacks {', '.join(missing)}" if missing else str(FASHION_MNIST),
        fix="apt install dataset-fashion-mnist",
    )


def check_disk() -> Check:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check(
        name="disk space",
        ok=free_gib >= _LOW_DISK_GIB,
        required=False,
        found=f"{free_gib:.1f} GiB free in {Path.cwd()}",
        fix=f"checkpoints may need more than {_LOW_DISK_GIB} GiB: write elsewhere with --run FOLDER",
    )


CHECKS: Sequence[Callable[[], Check]] = (
    check_python,
    check_torch,
    check_torchvision,
    check_timm,
    check_accelerate,
    check_other_libraries,
    check_cuda,
    check_cpu_bf16,
    check_faiss,
    check_ffcv,
    check_trackers,
    check_submitit,
    check_slurm,
    check_compiler,
    check_fashion_mnist,
    check_disk,
)


def main(argv: list[str]) -> int:
    """Print the table, or JSON.

    Returns:
        0 if nothing required is missing, else 1.
    """
    parser = ArgumentParser(
        prog="peerlearn doctor",
        description="Show what this machine has, what is missing and how to install it.",
        epilog="examples:\n  peerlearn doctor\n  peerlearn doctor --json > doctor.json\n\n"
        "exit code: 0 if nothing required is missing, else 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    arguments = parser.parse_args(argv)

    checks = [check() for check in CHECKS]
    ok = all(check.ok for check in checks if check.required)
    if arguments.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    elif sys.stdout.isatty() and not isinstance(_import("rich"), str):
        _print_rich(checks)
    else:
        _print_plain(checks)
    return DONE if ok else FAILURE


def _print_plain(checks: Sequence[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{_mark(check):8}  {check.name:{width}}  {check.found}")
        if check.fix:
            print(f"{'':8}  {'':{width}}  fix: {check.fix}")


def _print_rich(checks: Sequence[Check]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "MISSING": "bold red", "optional": "yellow"}
    table = Table("", "what", "found", box=box.SIMPLE)
    for check in checks:
        mark = _mark(check)
        # Text, because rich would read square brackets in a path as its own markup.
        found = Text(check.found, overflow="fold")
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="cyan")
        table.add_row(Text(mark, style=colours[mark]), check.name, found)
    Console().print(table)


def _mark(check: Check) -> str:
    if check.ok:
        return "ok"
    return "MISSING" if check.required else "optional"


def _check_package(
    name: str, *, minimum: str = "", required: bool = True, why: str = "", fix: str = ""
) -> Check:
    """Import the package and compare its version: an installed package may still be broken."""
    reason = f" ({why})" if why else ""
    module = _import(name)
    version = _version_of(name)
    if isinstance(module, str):
        found, ok = module, False
    elif not minimum or _at_least(version, minimum):
        found, ok = version or "unknown version", True
    else:
        found, ok = f"{version or 'unknown version'}, needs {minimum}{reason}", False
    wanted = f"'{name}>={minimum}'" if minimum else name
    return Check(
        name=name, ok=ok, required=required, found=found, fix=fix or f"pip install {wanted}"
    )


def _import(module: str) -> ModuleType | str:
    """The module, or the reason why it cannot be imported, in one line."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module else f"does not import: {error}"
    except Exception as error:  # a broken binary raises anything, and the table must still appear
        return f"does not import: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _at_least(version: str, minimum: str) -> bool:
    numbers = [[int(n) for n in re.findall(r"\d+", text)[:3]] for text in (version, minimum)]
    return bool(version) and numbers[0] >= numbers[1]
