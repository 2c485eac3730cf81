"""Learning rates and momenta against closed forms and torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.compute.schedules import ScheduleConfig, ema_momentum, learning_rate


def rates(schedule: ScheduleConfig, *, epochs: int, steps_per_epoch: int, lr: float = 0.3):
    total = epochs * steps_per_epoch
    return [
        learning_rate(
            step, lr=lr, schedule=schedule, steps_per_epoch=steps_per_epoch, total_steps=total
        )
        for step in range(total)
    ]


def test_cosine_equals_torchs_cosine_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=35)
    expected = []
    for _ in range(35):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(ScheduleConfig(), epochs=5, steps_per_epoch=7) == pytest.approx(expected)


def test_step_falls_at_the_first_step_of_each_milestone():
    schedule = ScheduleConfig(name="step", milestones_epochs=[2, 3], gamma=0.1)
    expected = [0.3] * 10 + [0.03] * 5 + [0.003] * 5
    assert rates(schedule, epochs=4, steps_per_epoch=5) == pytest.approx(expected)


def test_warm_up_rises_linearly_and_meets_the_schedule():
    schedule = ScheduleConfig(warmup_epochs=1.5)
    found = rates(schedule, epochs=4, steps_per_epoch=4)
    assert found[:7] == pytest.approx([0.3 * step / 6 for step in range(7)])
    assert found[11] == pytest.approx(0.3 * 0.5 * (1 + math.cos(math.pi * 5 / 10)))


@given(
    name=st.sampled_from(["cosine", "step", "constant"]),
    warmup=st.floats(0, 3),
    epochs=st.integers(1, 6),
    steps_per_epoch=st.integers(1, 9),
)
def test_never_negative_nor_above_the_peak(name, warmup, epochs, steps_per_epoch):
    schedule = ScheduleConfig(name=name, warmup_epochs=warmup, milestones_epochs=[1, 2])
    for rate in rates(schedule, epochs=epochs, steps_per_epoch=steps_per_epoch):
        assert 0 <= rate <= 0.3 * (1 + 1e-12)


def test_the_cosine_of_a_momentum_rises_to_one():
    momenta = [
        ema_momentum(step, momentum=0.9, schedule="cosine", total_steps=12) for step in range(13)
    ]
    assert momenta[0] == 0.9
    assert momenta[4] == pytest.approx(1 - 0.1 * 3 / 4)
    assert momenta[6] == pytest.approx(0.95)
    assert momenta[8] == pytest.approx(1 - 0.1 * 1 / 4)
    assert momenta[12] == 1.0
    assert momenta == sorted(momenta)


def test_a_constant_momentum_stays():
    assert {
        ema_momentum(step, momentum=0.999, schedule="constant", total_steps=3) for step in range(4)
    } == {0.999}
