import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peerlearn import counter_random
from peerlearn.counter_random import permutation, random_bits, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def reference_bits(*words: int) -> int:
    """The same chain in Python's unbounded integers."""
    state = len(words)
    for word in words:
        state = ((state + 0x9E3779B97F4A7C15) ^ word) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_values_are_pinned_so_that_no_refactoring_changes_runs():
    assert random_bits(1, 0, 0).item() == 8375938640524739345
    assert random_bits(2, 7, -1).item() == -7517226633360436300
    assert random_bits(1, torch.tensor([0, 1, 2]), 5).tolist() == [
        6432681727787773879,
        -7084668778793839662,
        -7910722401686177729,
    ]
    assert permutation(10, 2, 0, 3).tolist() == [0, 5, 7, 4, 2, 3, 6, 1, 8, 9]
    assert uniform(1, 2, 3).item() == 0.1469934921192193


def test_mixing_is_that_of_splitmix64():
    # This word sets the state to the generator's increment, its state at the first draw from
    # seed 0, for which this value is published.
    word = (1 + 0x9E3779B97F4A7C15) ^ 0x9E3779B97F4A7C15
    assert random_bits(word).item() % 2**64 == 0xE220A8397B1DCDAF


@given(st.lists(INT64, min_size=1, max_size=6), st.data())
def test_integers_and_tensors_give_the_same_bits(words, data):
    as_tensor = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    mixed = [torch.tensor(w) if t else w for w, t in zip(words, as_tensor, strict=True)]
    bits = random_bits(*mixed)
    assert bits.dtype == torch.int64
    assert bits.shape == ()
    assert bits.item() == reference_bits(*words)


@pytest.mark.parametrize("batch", [1, 3, 7, 64, 1000])
def test_bits_do_not_depend_on_the_batch(batch):
    index = torch.arange(batch) * 37 - 5
    together = random_bits(1, 4, index, torch.arange(3)[:, None])
    assert together.shape == (3, batch)
    for row in range(3):
        for column in (0, batch // 2, batch - 1):
            assert together[row, column] == reference_bits(1, 4, int(index[column]), row)


def test_narrow_integer_tensors_are_words():
    expected = random_bits(1, torch.tensor([0, 1]))
    assert torch.equal(random_bits(1, torch.tensor([0, 1], dtype=torch.int32)), expected)
    assert torch.equal(random_bits(1, torch.tensor([False, True])), expected)


@pytest.mark.parametrize(
    "words",
    [(), (2**63,), (-(2**63) - 1,), (1, torch.tensor(0.5)), (torch.tensor(1, dtype=torch.uint64),)],
)
def test_words_outside_int64_are_refused(words):
    with pytest.raises(ValueError, match="word"):
        random_bits(*words)


@given(st.lists(INT64, min_size=2, max_size=5), st.data())
def test_order_and_number_of_words_matter(words, data):
    other = data.draw(st.permutations(words))
    if other != words:
        assert random_bits(*words) != random_bits(*other)
    assert random_bits(*words) != random_bits(*words, 0)
    assert random_bits(*words) != random_bits(0, *words)


def test_streams_differ():
    constants = [v for k, v in vars(counter_random).items() if k.isupper() and k[0] != "_"]
    assert len(set(constants)) == len(constants) >= 5
    streams = uniform(torch.tensor(constants)[:, None], 0, torch.arange(10_000))
    correlations = torch.corrcoef(streams) - torch.eye(len(constants))
    assert correlations.abs().max() < 5 / math.sqrt(10_000)


def test_bits_of_distinct_counters_are_distinct():
    grid = random_bits(1, torch.arange(-300, 300)[:, None], torch.arange(-300, 300))
    assert grid.unique().numel() == 360_000


@pytest.mark.parametrize("position", [0, 1, 2])
def test_counters_give_uniform_draws(position):
    words = [1, 0, 0]
    words[position] = torch.arange(-50_000, 50_000)
    draws = uniform(*words)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
    counts = torch.histc(draws, bins=1000, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_uniform_uses_53_bits():
    integers = (uniform(1, torch.arange(100_000)) * 2**53).to(torch.int64)
    for bit in range(53):
        ones = int((integers >> bit & 1).sum())
        assert abs(ones - 50_000) < 5 * math.sqrt(100_000) / 2


@pytest.mark.parametrize("lag", [1, 2, 3, 16])
def test_neighbouring_counters_are_independent(lag):
    draws = uniform(1, 5, torch.arange(100_000 + lag))
    first, second = draws[:-lag], draws[lag:]
    assert abs(stats.pearsonr(first, second).statistic) < 5 / math.sqrt(100_000)
    cells = (first * 16).long() * 16 + (second * 16).long()
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-3


def test_one_changed_bit_of_any_word_changes_each_bit_with_probability_one_half():
    samples = 4096
    base = [torch.arange(samples) * 3, torch.arange(samples) % 97, torch.arange(samples)]
    before = random_bits(*base)
    out_bits = torch.arange(64)
    for position in range(3):
        for in_bit in range(64):
            words = list(base)
            words[position] = words[position] ^ (1 << in_bit if in_bit < 63 else -(2**63))
            changed = (before ^ random_bits(*words))[:, None] >> out_bits & 1
            deviation = changed.double().mean(dim=0) - 0.5
            # 12288 such frequencies: six standard deviations.
            assert deviation.abs().max() < 6 * 0.5 / math.sqrt(samples)


@given(st.integers(0, 300), INT64, INT64)
def test_permutation_holds_every_index_once(length, seed, epoch):
    order = permutation(length, counter_random.PERMUTATION, seed, epoch)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(length))


def test_permutations_are_uniform_and_differ_between_epochs():
    orders = [permutation(4, 2, 0, epoch) for epoch in range(4800)]
    codes = torch.stack(orders) @ torch.tensor([64, 16, 4, 1])
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert not torch.equal(permutation(1000, 2, 0, 0), permutation(1000, 2, 0, 1))
    assert not torch.equal(permutation(1000, 2, 0, 0), permutation(1000, 2, 1, 0))
