"""Learning rates, and the momentum of moving averages, as pure functions of the step."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves, per step.

    Attributes:
        name: form of the schedule: cosine (to 0), step (times gamma at each milestone) or constant.
        warmup_epochs: length of the linear rise from 0, in epochs, before the schedule proper.
        milestones_epochs: epochs at which step multiplies the learning rate by gamma.
        gamma: factor of step at each milestone.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    milestones_epochs: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        require(
            self.warmup_epochs >= 0,
            f"schedule.warmup_epochs must be at least 0, got {self.warmup_epochs}",
        )
        require(
            self.milestones_epochs == sorted(self.milestones_epochs),
            f"schedule.milestones_epochs must rise, got {self.milestones_epochs}",
        )
        require(
            all(epoch >= 1 for epoch in self.milestones_epochs),
            f"schedule.milestones_epochs must be at least 1, got {self.milestones_epochs}",
        )
        require(self.gamma > 0, f"schedule.gamma must be positive, got {self.gamma}")


def learning_rate(
    step: int, *, lr: float, schedule: ScheduleConfig, steps_per_epoch: int, total_steps: int
) -> float:
    """The learning rate of optimiser step ``step``, counted from 0.

    Warm-up rises linearly and reaches ``lr`` at step ``warmup_epochs * steps_per_epoch``. Then cosine falls from
    ``lr`` to 0 at ``total_steps`` (Loshchilov & Hutter 2017, no restarts). Step multiplies by gamma at every
    milestone. Milestones count epochs from the start of training.

    NOTE: MoCo changes its cosine once per epoch; here it moves every step.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return lr * step / warmup_steps
    if schedule.name == "cosine":
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones_epochs)
        return lr * schedule.gamma**passed
    return lr


def ema_momentum(
    step: int, *, momentum: float, schedule: Literal["constant", "cosine"], total_steps: int
) -> float:
    """The momentum of a moving average of weights at optimiser step ``step``, counted from 0.

    Cosine rises from ``momentum`` to 1 at ``total_steps``: ``1 - (1 - momentum) (cos(pi step / total_steps) + 1) / 2``
    (BYOL, Grill et al. 2020, section 3.2; MoCo v3 has the same).
    """
    if schedule == "constant":
        return momentum
    return 1 - (1 - momentum) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
