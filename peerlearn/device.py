"""The device that a config's ``device`` key names."""

import torch

from peerlearn.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of a config's ``device`` key; auto prefers a GPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here: use auto, cpu or a listed GPU (`peerlearn doctor`)"
        ) from error
    return device
