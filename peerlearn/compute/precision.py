"""Number formats of the networks' forward and backward passes. Losses, optimiser and weights stay float32."""

import logging
import platform
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from peerlearn.compute.cpu import BF16_UNITS, FP16_UNITS, cpu_flags

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


class Precision:
    """Autocast and, for fp16, loss scaling.

    Small gradients vanish in fp16; the loss is multiplied by a scale that grows until a gradient overflows, when that
    step is left out and the scale halved (Micikevicius et al. 2018). Ranks agree by themselves: their gradients are
    averaged before they are looked at.
    """

    def __init__(self, precision: str, device: torch.device, *, tf32: bool = False) -> None:
        self._device = device
        self._type = _AUTOCAST[precision]
        self._unscaled = False
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if device.type == "cuda":
            products = "tf32" if tf32 else "ieee"
            torch.backends.cuda.matmul.fp32_precision = products
            torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
        elif tf32:
            logger.warning("tf32 has no effect on %s: it is a format of CUDA devices", device.type)
        if device.type == "cpu" and self._type is not None and not cpu_computes(self._type):
            logger.warning(
                "precision %s is many times slower than fp32 on this CPU, which has no units for it: "
                "set precision to fp32",
                precision,
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which networks run."""
        return torch.autocast(self._device.type, self._type, enabled=self._type is not None)

    def backward(self, loss: Tensor) -> None:
        """Backward of the scaled loss."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to the loss's own scale."""
        self.scaler.unscale_(optimizer)
        self._unscaled = True

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step, unless fp16's scaling has made a gradient overflow; then only the scale shrinks."""
        self.scaler.step(optimizer)
        self.leave_out_step()

    def leave_out_step(self) -> None:
        """Be ready for the next step, whether this one was taken or not."""
        if self._unscaled:
            self.scaler.update()
        self._unscaled = False

    def overflow_is_a_fault(self) -> Tensor:
        """Whether a gradient that is not finite cannot be the scale's doing, which a smaller scale mends.

        Returns:
            bool (), on the device, so that nobody waits for it.
        """
        scale: Tensor = self.scaler.scale(torch.ones((), device=self._device))
        return scale <= 1.0

    def metrics(self) -> dict[str, float]:
        """The scale of fp16's losses; nothing otherwise."""
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, plain values."""
        return dict(self.scaler.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def cpu_computes(number_type: torch.dtype) -> bool:
    """Whether this CPU multiplies bf16 or fp16 by units of its own."""
    units = BF16_UNITS if number_type == torch.bfloat16 else FP16_UNITS
    return bool(cpu_flags() & units) or platform.system() == "Darwin"
