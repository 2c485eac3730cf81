"""The states of the global random generators: Python's, NumPy's, torch's.

All randomness of this project comes from counters. Code of other libraries (dropout, stochastic depth) may draw from
the global generators. They are seeded when a run starts, torch's again at every step, and saved with each checkpoint.
"""

import random
from typing import Any

import numpy as np

# It draws from Python's generator while it is imported: that is done before the generator is seeded or restored.
import rich.console  # noqa: F401
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python's and NumPy's generators by (seed, rank)."""
    random.seed(f"{seed} {rank}")
    np.random.seed([seed % 2**32, rank])


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator of this process as a tensor, by name."""
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
    """Restore the states that `generator_states` returned.

    Raises:
        KeyError: the state of a generator is missing.
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
    # A save from another device has no CUDA state. That is harmless: torch's generators are seeded anew at every step.
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _optional(value: float | None) -> Tensor:
    """A tensor where NaN stands for None. The states are never NaN, and every rank's tensors must have one shape."""
    return torch.tensor(float("nan") if value is None else value, dtype=torch.float64)


def _value(tensor: Tensor) -> float | None:
    return None if bool(tensor.isnan()) else float(tensor)
