"""The networks of the epoch that validation chose."""

import copy
import math

import torch
from torch import Tensor

from pretrain.cohort import Cohort, load_named_state, named_state


class BestNetworks:
    """A cohort as it was when it scored best. Of equal scores the first counts.

    Attributes:
        cohort: networks as they were; without gradients.
        step: number of optimiser steps that they had done; 0 = none was scored yet.
        score: what they scored.
    """

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = copy.deepcopy(cohort).requires_grad_(False)
        self.step = 0
        self.score = -math.inf

    @torch.no_grad()
    def offer(self, cohort: Cohort, *, step: int, score: float) -> None:
        """Remember these networks if they score higher than those before them."""
        if score > self.score:
            load_named_state(self.cohort, named_state(cohort))
            self.step, self.score = step, score

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by group and name."""
        chosen = {
            "step": torch.tensor(self.step),
            "score": torch.tensor(self.score, dtype=torch.float64),
        }
        return {"best_networks": named_state(self.cohort), "best": chosen}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        load_named_state(self.cohort, state["best_networks"])
        self.step = int(state["best"]["step"])
        self.score = float(state["best"]["score"])
