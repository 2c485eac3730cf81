"""Whether the loss can run in Triton kernels here, and if not, one line that says why."""

import functools
import importlib.util
import logging
import os
from typing import Any

import torch
from torch import Tensor

from pretrain.row_sums import Form

logger = logging.getLogger(__name__)


def runs_in_triton(query: Tensor, form: Form) -> bool:
    """Whether `pretrain.triton_passes` can compute this; the first time that it cannot, a warning says why."""
    obstacle = _obstacle(query, form)
    if obstacle:
        _warn(obstacle)
    return obstacle is None


def _obstacle(query: Tensor, form: Form) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if query.dtype != torch.float32:
        return f"it computes in float32, not {str(query.dtype).removeprefix('torch.')}"
    if not form.is_safe:
        return (
            f"a temperature of {form.temperature} with soft_temperature {form.soft_temperature} needs shifted "
            "exponentials"
        )
    if query.device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "it needs a CUDA device"
    return _lack_of_shared_memory(query)


def _lack_of_shared_memory(query: Tensor) -> str | None:
    from pretrain.triton_passes import SHARED_BYTES_PER_COLUMN, padded_size

    properties: Any = torch.cuda.get_device_properties(query.device)
    there = int(properties.shared_memory_per_block_optin)
    needed = SHARED_BYTES_PER_COLUMN * padded_size(query.shape[2])
    if needed <= there:
        return None
    return (
        f"embeddings of size {query.shape[2]} need {needed:,} bytes of shared memory, of {there:,}"
    )


@functools.cache
def _warn(obstacle: str) -> None:
    logger.warning("the loss is computed without Triton kernels: %s", obstacle)
