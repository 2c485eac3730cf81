"""Queue, momentum, schedules, generators, guards and config changes, against references written apart."""

import copy
import json
import math
import random
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peerlearn.compute.guards import DivergedError, NonFiniteError, StepGuard
from peerlearn.compute.resume import config_changes
from peerlearn.compute.schedules import ScheduleConfig, learning_rate
from peerlearn.runs.generators import generator_states, load_generator_states, seed_generators
from pretrain.cohort import Cohort, momentum_peers, update_momentum
from pretrain.faults import gradient_fault, term_fault, terms_are_finite
from pretrain.finite import deferred_checks, first_fault, require_finite
from pretrain.key_queue import KeyQueue
from pretrain.losses import MCLTerms

CPU = torch.device("cpu")
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])

# The queue of keys


def keys_of(images: Sequence[int], networks: int, dim: int) -> torch.Tensor:
    """Keys (M, B, D) of which no two numbers are alike, whatever the image, network or coordinate."""
    image = torch.tensor(list(images), dtype=torch.float32)[None, :, None]
    return image * 100 + torch.arange(networks)[:, None, None] * 10 + torch.arange(dim)


def oldest_first(queue: KeyQueue) -> torch.Tensor:
    return queue.keys.roll(-queue.cursor, 1)[:, queue.size - queue.filled :]


@given(
    networks=st.integers(1, 3),
    size=st.integers(1, 7),
    dim=st.integers(1, 3),
    batches=st.lists(st.integers(0, 11), max_size=7),
)
def test_a_queue_is_one_deque_of_images_for_all_networks(networks, size, dim, batches):
    queue, images = KeyQueue(networks, size, dim), deque(maxlen=size)
    first = 0
    for batch in batches:
        fresh = range(first, first + batch)
        queue.enqueue(keys_of(fresh, networks, dim))
        images.extend(fresh)
        first += batch
        assert queue.filled == len(images)
        assert torch.equal(oldest_first(queue), keys_of(images, networks, dim))


@given(size=st.integers(1, 7), total=st.integers(0, 25), data=st.data())
def test_how_keys_are_cut_into_batches_changes_nothing(size, total, data):
    """Micro-batches and ranks cut them; rows, filled and cursor are those of one key at a time."""
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    keys = keys_of(range(total), 2, 3)
    in_batches, one_by_one = KeyQueue(2, size, 3), KeyQueue(2, size, 3)
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        in_batches.enqueue(keys[:, start:stop])
    for i in range(total):
        one_by_one.enqueue(keys[:, i : i + 1])
    assert torch.equal(in_batches.keys, one_by_one.keys)
    assert (in_batches.filled, in_batches.cursor) == (one_by_one.filled, one_by_one.cursor)


@given(size=st.integers(1, 6), before=st.integers(0, 15), there=st.integers(0, 15))
def test_a_queue_saved_at_any_moment_goes_on_in_one_that_held_others(size, before, there):
    ours, theirs = KeyQueue(2, size, 3), KeyQueue(2, size, 3)
    ours.enqueue(keys_of(range(before), 2, 3))
    theirs.enqueue(-keys_of(range(there), 2, 3))
    theirs.load_state_tensors(safetensors.torch.load(safetensors.torch.save(ours.state_tensors())))
    for queue in (ours, theirs):
        queue.enqueue(keys_of(range(50, 54), 2, 3))
    assert torch.equal(oldest_first(ours), oldest_first(theirs))
    assert (ours.filled, ours.cursor) == (theirs.filled, theirs.cursor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_queue_keeps_copies_without_a_gradient_in_its_own_type(dtype):
    keys = keys_of(range(3), 2, 1).to(dtype).requires_grad_()
    queue, expected = KeyQueue(2, 5, 1), keys.detach().float()
    queue.enqueue(keys)
    with torch.no_grad():
        keys.zero_()
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad
    assert torch.equal(oldest_first(queue), expected)


# The momentum update


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Networks of three layers, any of which some of them may share."""
    networks = draw(st.integers(1, 4))
    layers = [
        [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(networks)]
        for _ in range(3)
    ]
    chosen = st.lists(st.integers(0, networks - 1), min_size=networks, max_size=networks)
    taken = [draw(chosen) for _ in layers]
    backbones = [
        nn.Sequential(*(layer[whose[m]] for layer, whose in zip(layers, taken, strict=True)))
        for m in range(networks)
    ]
    return Cohort(backbones, [nn.Linear(2, 2) for _ in range(networks)]).double()


def move(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(noise.to(tensor.dtype))


def parameters_by_network(cohort: Cohort) -> list[dict[str, nn.Parameter]]:
    """Every network's own view: what it shares appears in each."""
    return [
        dict(nn.ModuleList(parts).named_parameters())
        for parts in zip(cohort.backbones, cohort.heads, strict=True)
    ]


@settings(max_examples=60)
@given(cohort=cohorts(), momentum=st.floats(0, 1), steps=st.integers(1, 4))
def test_momentum_equals_a_loop_that_counts_shared_weights_once(cohort, momentum, steps):
    peers = momentum_peers(cohort)
    buffers = [buffer.clone() for buffer in peers.buffers()]
    values = [
        {name: parameter.detach().numpy().copy() for name, parameter in network.items()}
        for network in parameters_by_network(peers)
    ]
    for step in range(steps):
        move(cohort, step)
        update_momentum(peers, cohort, momentum)
        for network, queries in zip(values, parameters_by_network(cohort), strict=True):
            for name, query in queries.items():
                # A network's own copy of a shared weight moves once a step, whoever else has it.
                network[name] = momentum * network[name] + (1 - momentum) * query.detach().numpy()
    for expected, network in zip(values, parameters_by_network(peers), strict=True):
        for name, parameter in network.items():
            np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, peers.buffers(), buffers))


@given(momentum=st.floats(0, 1), steps=st.integers(0, 50))
def test_towards_a_network_that_stands_still_momentum_decays_geometrically(momentum, steps):
    cohort = Cohort([nn.Linear(2, 2)], [nn.Linear(2, 2)]).double()
    peers = momentum_peers(cohort)
    move(peers, 0)
    start = [key.clone() for key in peers.parameters()]
    for _ in range(steps):
        update_momentum(peers, cohort, momentum)
    left = momentum**steps
    for key, first, query in zip(peers.parameters(), start, cohort.parameters(), strict=True):
        torch.testing.assert_close(key, left * first + (1 - left) * query, rtol=1e-9, atol=1e-12)


# Learning rates

STEPS = st.integers(1, 12)


def rate(schedule: ScheduleConfig, step: int, *, total: int, steps_per_epoch: int = 1) -> float:
    return learning_rate(
        step, lr=0.3, schedule=schedule, steps_per_epoch=steps_per_epoch, total_steps=total
    )


@given(warmup=st.integers(0, 9), after=st.integers(1, 30), data=st.data())
def test_cosine_falls_from_the_peak_to_nothing_alike_on_both_sides(warmup, after, data):
    """Also against cos^2(pi p / 2), the same curve by the half-angle formula."""
    schedule, total = ScheduleConfig(warmup_epochs=warmup), warmup + after
    rates = [rate(schedule, step, total=total) for step in range(warmup, total + 1)]
    assert rates[0] == 0.3
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert all(one > other for one, other in pairwise(rates))
    k = data.draw(st.integers(0, after))
    assert rates[k] + rates[after - k] == pytest.approx(0.3)
    assert rates[k] == pytest.approx(0.3 * math.cos(math.pi * k / after / 2) ** 2)


@given(
    name=st.sampled_from(["cosine", "step", "constant"]),
    epochs=st.floats(0, 4),
    steps_per_epoch=STEPS,
)
def test_warm_up_rises_by_equal_steps_from_nothing_to_the_peak(name, epochs, steps_per_epoch):
    schedule = ScheduleConfig(name=name, warmup_epochs=epochs)
    steps = round(epochs * steps_per_epoch)
    rates = [
        rate(schedule, step, total=steps + 5, steps_per_epoch=steps_per_epoch)
        for step in range(steps + 1)
    ]
    assert rates == pytest.approx(np.linspace(0, 0.3, steps + 1) if steps else [0.3])


@given(
    epochs=st.integers(1, 8),
    steps_per_epoch=STEPS,
    milestones=st.lists(st.integers(1, 9), max_size=4).map(sorted),
    gamma=st.floats(0.01, 1),
)
def test_step_equals_torchs_multi_step_schedule_moved_once_per_epoch(
    epochs, steps_per_epoch, milestones, gamma
):
    schedule = ScheduleConfig(name="step", milestones_epochs=milestones, gamma=gamma)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            found = rate(
                schedule, step, total=epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch
            )
            assert found == pytest.approx(expected)
        optimizer.step()
        oracle.step()


@given(warmup=st.integers(0, 6), after=st.integers(1, 12), data=st.data())
def test_after_a_warm_up_cosine_is_that_of_a_shorter_run_and_the_others_as_without(
    warmup, after, data
):
    total, step = warmup + after, data.draw(st.integers(0, after - 1))
    warm = rate(ScheduleConfig(warmup_epochs=warmup), warmup + step, total=total)
    assert warm == rate(ScheduleConfig(), step, total=after)
    for name in ("step", "constant"):
        falling = {"name": name, "milestones_epochs": [3, 8]}
        warm = rate(ScheduleConfig(**falling, warmup_epochs=warmup), warmup + step, total=total)
        assert warm == rate(ScheduleConfig(**falling), warmup + step, total=total)


# The generators of others

DRAWS = {
    "python": random.random,
    "python, in pairs": lambda: random.gauss(0, 1),
    "numpy": lambda: float(np.random.random()),
    "numpy, in pairs": lambda: float(np.random.normal()),
    "torch": lambda: float(torch.rand(())),
    "torch, in pairs": lambda: float(torch.randn((), dtype=torch.float64)),
}
SOME = st.lists(st.sampled_from(sorted(DRAWS)), max_size=8)


@given(seed=st.integers(0, 2**62), before=SOME, between=SOME, after=SOME)
def test_generators_go_on_from_where_they_were_saved(seed, before, between, after):
    """Those that draw in pairs keep the second half of a pair: it is saved too."""
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed, rank=1)
        torch.manual_seed(seed)
        for name in before:
            DRAWS[name]()
        saved = safetensors.torch.save(generator_states(CPU))
        expected = [DRAWS[name]() for name in (*after, *DRAWS)]
        for name in between:
            DRAWS[name]()
        load_generator_states(safetensors.torch.load(saved), CPU)
        assert [DRAWS[name]() for name in (*after, *DRAWS)] == expected


@given(one=SOME, other=SOME)
def test_states_of_generators_are_of_one_shape_so_that_ranks_can_gather_them(one, other):
    kinds = []
    with torch.random.fork_rng(devices=[]):
        for names in (one, other):
            for name in names:
                DRAWS[name]()
            states = generator_states(CPU)
            kinds.append({name: (state.shape, state.dtype) for name, state in states.items()})
    assert kinds[0] == kinds[1]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=2, unique=True))
def test_every_seed_and_rank_starts_generators_of_its_own(starts):
    firsts = []
    for seed, rank in starts:
        seed_generators(seed, rank)
        firsts.append((random.random(), float(np.random.random())))
        seed_generators(seed, rank)
        assert firsts[-1] == (random.random(), float(np.random.random()))
    for draws in zip(*firsts, strict=True):
        assert len(set(draws)) == len(starts)


# Guards


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(step))


@given(good=st.lists(st.booleans(), max_size=12), allowed=st.integers(1, 4), data=st.data())
def test_a_guard_undoes_bad_steps_and_gives_up_after_so_many_in_a_row(good, allowed, data):
    """The statistics are those of a network that never saw the bad batches; the guard is saved and
    restored on the way."""
    module = nn.BatchNorm1d(2)
    spared = copy.deepcopy(module)
    guard = StepGuard([module], max_skipped_in_a_row=allowed)
    saved_at = data.draw(st.integers(0, len(good)))
    row = 0
    for step, passes in enumerate(good):
        if step == saved_at:
            state = json.loads(json.dumps(guard.state()))
            guard = StepGuard([module], max_skipped_in_a_row=allowed)
            guard.load_state(state)
        guard.remember()
        module(batch(step))
        row = 0 if passes else row + 1
        if passes:
            spared(batch(step))
            guard.passed()
        elif row < allowed:
            guard.skip(step, "a reason")
        else:
            with pytest.raises(DivergedError, match=rf"\A{row} .* step {step}: a reason") as raised:
                guard.skip(step, "a reason")
            assert raised.value.first_step == step - allowed + 1
        assert all(map(torch.equal, module.buffers(), spared.buffers()))
        assert (guard.skipped, guard.in_a_row) == (good[: step + 1].count(False), row)
        if row == allowed:
            break


@given(
    networks=st.integers(1, 4),
    bad=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))),
    value=NOT_FINITE,
)
def test_the_first_term_that_is_not_finite_is_named_with_its_network(networks, bad, value):
    bad = {(term, network) for term, network in bad if network < networks}
    values = torch.ones(4, networks)
    for place in bad:
        values[place] = value
    computed = MCLTerms(*values.requires_grad_().unbind())
    assert bool(terms_are_finite([], [computed])) == (not bad)
    if bad:
        term, network = min(bad)
        assert (
            term_fault([computed]) == f"{MCLTerms._fields[term]} of network {network} is not finite"
        )
    else:
        assert term_fault([computed]) is None


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    value=NOT_FINITE,
    data=st.data(),
)
def test_a_deferred_check_says_later_what_it_would_have_raised_at_once(shape, value, data):
    good, bad = torch.ones(shape), torch.ones(shape)
    network, row, column = (data.draw(st.integers(0, size - 1)) for size in shape)
    bad[network, row, column] = value
    with pytest.raises(NonFiniteError) as raised:
        require_finite("icl_hard", "query", bad)
    assert f"icl_hard of network {network} is not finite: query[{network}]" in str(raised.value)
    assert f"in 1 of {shape[1]} rows, the first is row {row}" in str(raised.value)
    with deferred_checks() as checks:
        require_finite("scl_hard", "key", good)
        require_finite("icl_hard", "query", bad)
        with pytest.raises(NonFiniteError):
            require_finite("icl_hard", "query", bad, at_once=True)
    assert first_fault(checks) == str(raised.value)
    assert not terms_are_finite(checks, [])
    assert first_fault(checks[:1]) is None
    assert terms_are_finite(checks[:1], [MCLTerms(*torch.ones(4, shape[0]))])
    with pytest.raises(NonFiniteError):
        require_finite("icl_hard", "query", bad)


@settings(max_examples=60)
@given(cohort=cohorts(), value=NOT_FINITE, data=st.data())
def test_the_first_network_with_a_gradient_that_is_not_finite_is_named(cohort, value, data):
    """A shared weight counts for the first network that has it; a frozen one counts for none."""
    parameters = list(cohort.parameters())
    some = st.sets(st.integers(0, len(parameters) - 1), max_size=3)
    poisoned = {id(parameters[i]) for i in data.draw(some)}
    frozen = data.draw(st.integers(0, len(parameters) - 1))
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 1e30)
        if id(parameter) in poisoned:
            parameter.grad.view(-1)[-1] = value
        if i == frozen:
            parameter.grad = None
            poisoned -= {id(parameter)}
    expected = None
    for m, (backbone, head) in enumerate(zip(cohort.backbones, cohort.heads, strict=True)):
        for name, part in (("backbone", backbone), ("head", head)):
            if expected is None and poisoned & {id(p) for p in part.parameters()}:
                expected = f"the gradient of network {m}'s {name} is not finite"
    assert gradient_fault(cohort) == expected


# Changes of a config

LEAVES = st.one_of(st.integers(-3, 3), st.text("ab", max_size=2), st.lists(st.integers(0, 2)))
CONFIGS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.one_of(LEAVES, inner), max_size=3),
    max_leaves=8,
)


@given(CONFIGS, CONFIGS)
def test_changes_turn_the_old_config_into_the_new_and_hold_nothing_else(old, new):
    changes = dict(config_changes(old, new))
    patched = copy.deepcopy(old)
    for key, (before, after) in changes.items():
        assert before != after
        *path, last = key.split(".")
        section = patched
        for name in path:
            section = section[name]
        assert section.get(last) == before
        if after is None:
            del section[last]
        else:
            section[last] = after
    assert patched == new


@given(CONFIGS, CONFIGS)
def test_changes_backwards_are_the_same_keys_with_their_values_swapped(old, new):
    backwards = {key: (after, before) for key, (before, after) in config_changes(old, new)}
    assert backwards == dict(config_changes(new, old))
    assert dict(config_changes(old, copy.deepcopy(old))) == {}
