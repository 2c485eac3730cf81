"""Counter-based random numbers: a draw is a pure function of integer words, and nothing keeps state.

Each word (stream, seed, epoch, sample index, ...) is folded into a 64-bit state with the mixing
function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; constants: Stafford's variant 13).
A draw can therefore be repeated alone, in any order, on any worker, rank or device.
The arithmetic is integer operations and one exact scaling, so results are equal bit for bit everywhere.

The first word is one of the streams below, so that draws for different purposes never coincide.
"""

import torch
from torch import Tensor

# A stream keeps its number for ever: another number would change every run.
VIEWS = 1
PERMUTATION = 2
SHUFFLE_BN = 4
NUM_NEGATIVES = 5
INITIAL_WEIGHTS = 7
MODULE_NOISE = 8
SUBSTITUTE = 9
SUBSET = 10
HELD_OUT = 11
CLASS_DECK = 12
CLASS_ROUND = 13
CLASS_WALK = 14
EPISODE_CLASSES = 15
EPISODE_IMAGES = 16
TRAINING_EPISODES = 17
DETECTION_ORDER = 18
DETECTION_VIEWS = 19
MINI_VOC = 20
DETECTION_ANCHORS = 21
DETECTION_REGIONS = 22
SHOWN_IMAGES = 23

_MASK = 2**64 - 1
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 with the bit pattern of ``value`` modulo 2**64."""
    return ((value + 2**63) & _MASK) - 2**63


def _mix_int(state: int) -> int:
    state = ((state ^ (state >> 30)) * _MULTIPLIERS[0]) & _MASK
    state = ((state ^ (state >> 27)) * _MULTIPLIERS[1]) & _MASK
    return state ^ (state >> 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically. The mask removes the copies of the sign bit.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * _signed(_MULTIPLIERS[0])
    state = (state ^ _shift_right(state, 27)) * _signed(_MULTIPLIERS[1])
    return state ^ _shift_right(state, 31)


def _checked(word: int | Tensor) -> int | Tensor:
    if isinstance(word, Tensor):
        if word.is_floating_point() or word.is_complex() or word.dtype == torch.uint64:
            raise ValueError(f"a word must hold integers that fit int64, not {word.dtype}")
        return word.to(torch.int64)
    if not -(2**63) <= word < 2**63:
        raise ValueError(f"a word must fit int64, got {word}")
    return word


def random_bits(*words: int | Tensor) -> Tensor:
    """64 random bits for each tuple of words.

    Args:
        words: at least one integer or integer tensor. Tensors lie on one device and broadcast together. A word may be
            negative. The order and the number of the words matter.

    Returns:
        int64 of the broadcast shape, a scalar for integers alone. All 2**64 patterns occur.

    Raises:
        ValueError: there are no words, a word lies outside int64, or a tensor is not of integers.
    """
    if not words:
        raise ValueError("random_bits needs at least one word")
    state: int | Tensor = len(words)
    for word in map(_checked, words):
        # Most words of a call are integers. No tensor is made before the first tensor comes.
        if isinstance(state, int) and isinstance(word, int):
            state = _mix_int(((state + _INCREMENT) & _MASK) ^ (word & _MASK))
        else:
            known = torch.tensor(_signed(state)) if isinstance(state, int) else state
            state = _mix_tensor((known + _signed(_INCREMENT)) ^ word)
    # On the CPU, also where another device is the default: networks may be made where nothing has content.
    return torch.tensor(_signed(state), device="cpu") if isinstance(state, int) else state


def uniform(*words: int | Tensor) -> Tensor:
    """Uniform float64 in [0, 1) on the grid of 2**-53.

    Args:
        words: as in `random_bits`.

    Raises:
        ValueError: as in `random_bits`.
    """
    return _shift_right(random_bits(*words), 11).to(torch.float64) * 2.0**-53


def permutation(length: int, *words: int) -> Tensor:
    """A random permutation of 0 .. length - 1: int64 (length,).

    Args:
        length: how many numbers are permuted.
        words: as in `random_bits`.

    Raises:
        ValueError: as in `random_bits`.
    """
    return random_bits(*words, torch.arange(length)).argsort(stable=True)
