"""The device that a config names, and arithmetic that must stay in full float32 on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peerlearn.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of a config's ``device`` key. ``auto`` prefers a GPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is no device to train on")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here: use auto, cpu or a listed GPU (`peerlearn doctor`)"
        ) from error
    return device


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch off autocast and matrix products in TF32 or bf16, which training may use, inside the block."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.matmul.fp32_precision = precision
