"""The devices that a config may name. Nothing here waits for torch."""

import re

from peerlearn.config import require

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")


def require_device(name: str) -> None:
    """Refuse a config's ``device`` that no machine has; for ``__post_init__``.

    Raises:
        ValueError: it is none.
    """
    require(
        _DEVICE.fullmatch(name) is not None,
        f"device must be auto, cpu, mps, cuda or cuda:N, got {name!r}",
    )
