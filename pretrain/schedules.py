"""Learning rates as pure functions of the step."""

import math

from pretrain.config import ScheduleConfig


def learning_rate(
    step: int, *, lr: float, schedule: ScheduleConfig, steps_per_epoch: int, total_steps: int
) -> float:
    """The learning rate of optimiser step ``step``, counted from 0.

    Warm-up rises linearly and reaches ``lr`` at step ``warmup_epochs * steps_per_epoch``. Then cosine falls from
    ``lr`` to 0 at ``total_steps`` (Loshchilov & Hutter 2017, no restarts); step multiplies by gamma at every
    milestone, counted in epochs from the start of training.

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
