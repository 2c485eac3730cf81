"""What only a GPU can show: the tests that need one, speed, memory, number formats, and how a run resumes there.

    sh scripts/gpu_check.sh OUT            (or: python -m benchmarks.gpu_check OUT [--small] [--only loss steps])

Each part runs in a process of its own with a time limit, so that one that fails or hangs costs the others nothing. All
figures go to OUT/gpu_check.json and, as tables, to OUT/gpu_check.md. ``--small`` takes the smallest sizes, for a CPU.
Times are wall seconds between two waits for the device; ratios are those of medians, with the range over rounds.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import DEVICE, PARTS

# Seconds for each part; 20 minutes together.
LIMITS = {"tests": 420, "loss": 240, "steps": 300, "knn": 60, "resume": 120, "data_wait": 60}


def run_part(name: str, *, small: bool) -> dict[str, Any]:
    """A part in a process of its own: its rows, or why there are none."""
    words = ["--part", name, *(["--small"] if small else [])]
    # The smallest sizes are for machines that may be busy.
    limit = LIMITS[name] * (10 if small else 1)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"failed": f"it took more than {limit} s"}
    taken = round(time.monotonic() - start, 1)
    if process.returncode:
        return {"failed": (said.strip().splitlines() or ["no reason given"])[-1], "took": taken}
    return {"rows": json.loads(printed.splitlines()[-1]), "took": taken}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in report["facts"].items())
    lines = ["# GPU check", "", facts]
    for name, part in report["parts"].items():
        (subject, *_) = (PARTS[name].__doc__ or "").splitlines()
        lines += ["", f"## {name}", "", subject, ""]
        if "failed" in part:
            lines.append(f"**Failed**: {part['failed']}")
            continue
        keys = list(dict.fromkeys(key for row in part["rows"] for key in row))
        lines += [_line(keys), _line(["---"] * len(keys))]
        lines += [_line([_cell(row.get(key)) for key in keys]) for row in part["rows"]]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " .. ".join(_cell(each) for each in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def main() -> int:
    """Run all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="folder of the report")
    parser.add_argument("--small", action="store_true", help="the smallest sizes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](small=options.small)))
        return 0
    if options.output is None:
        parser.error("OUT is missing: the folder that the report is written to")
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    facts = {"device": device, "python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "triton"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "missing"
    report: dict[str, Any] = {"facts": facts, "small": options.small, "parts": {}}
    for name in options.only:
        part = report["parts"][name] = run_part(name, small=options.small)
        print(f"{name}: {part.get('failed') or str(len(part['rows'])) + ' rows'}", flush=True)
        # After each part, so that what is known stands if the machine is taken away.
        (options.output / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.output / "gpu_check.md").write_text(page(report))
    bad = [
        row
        for part in report["parts"].values()
        for row in part.get("rows", [])
        if row.get("exit_code")
    ]
    return 1 if bad or any("failed" in part for part in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
