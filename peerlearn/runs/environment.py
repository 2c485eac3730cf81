"""Under what a result came to be: versions, hardware, code, time."""

import datetime
import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from typing import Any

from peerlearn import HOME, PACKAGES

_LIBRARIES = ("peerlearn", "torch", "torchvision", "timm", "numpy", "faiss-gpu")


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and every result."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "code_sha256": _code_sha256(),
    }


@cache
def _code_sha256() -> str:
    """Of this project's Python files as they were when the process first asked: those it runs."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((HOME / package).rglob("*.py")):
            digest.update(file.relative_to(HOME).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def now_text() -> str:
    """The time, for people: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
