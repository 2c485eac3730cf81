"""The states of the random generators that belong to others: Python's, NumPy's, torch's.

All randomness of this project comes from counters. Code of other libraries (dropout, stochastic depth) may draw from
these; they are seeded when a run starts, torch's again at every step, and saved all the same.
"""

import random
from typing import Any

import numpy as np

# It draws from Python's generator while it is imported: that is done before the generator is seeded or restored.
import rich.console  # noqa: F401
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """Start Python's and NumPy's generators at a state of (seed, rank)."""
    random.seed(f"{seed} {rank}")
    np.random.seed([seed % 2**32, rank])


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Every generator's state of this process as a tensor."""
    version, words, gauss = random.getstate()
    assert version == 3
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy_state
    assert name == "MT19937"
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.append(keys.astype(np.int64), position)),
        "numpy_gauss": _optional(cached if has_gauss else None),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore `generator_states`.

    Raises:
        KeyError: a generator's state is missing.
    """
    gauss = _value(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), gauss))
    numpy_words = states["numpy"].numpy()
    cached = _value(states["numpy_gauss"])
    np.random.set_state(
        (
            "MT19937",
            numpy_words[:-1].astype(np.uint32),
            int(numpy_words[-1]),
            int(cached is not None),
            cached or 0.0,
        )
    )
    torch.set_rng_state(states["torch"])
    # A save made on another device has none; torch's generators are seeded anew at every step anyway.
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _optional(value: float | None) -> Tensor:
    """NaN stands for None: these states are never NaN, and every rank's tensors must be of one shape."""
    return torch.tensor(float("nan") if value is None else value, dtype=torch.float64)


def _value(tensor: Tensor) -> float | None:
    return None if bool(tensor.isnan()) else float(tensor)
