"""What the training spine asks of a training: all that a save must hold, and how to put it back."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import StepGuard
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.save_config import SaveConfig


class Resumable(Protocol):
    """A training that goes on after any stop as if it had never stopped.

    Attributes:
        config: frozen dataclass that config.yaml holds; `peerlearn.config.changeable` marks the fields that may change
            between a save and its resumption.
        run: directory of the run.
        ranks: processes that train together.
        guard: guard of the networks' buffers, which counts skipped steps.
        step: number of optimiser steps done.
    """

    config: Any
    run: RunDirectory
    ranks: Ranks
    guard: StepGuard
    step: int

    @property
    def saves(self) -> SaveConfig:
        """When to save."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""

    @property
    def fingerprint(self) -> str:
        """What changes when the data do: a run that was saved on other data is not resumed."""

    @property
    def dataset_name(self) -> str:
        """The data, by a name for people."""

    def headline(self) -> str:
        """What is trained on what, for people."""

    def trained(self) -> nn.Module:
        """What learns, of which nothing is saved that holds NaN or Inf."""

    def bytes_to_come(self) -> int:
        """What a later save holds beyond `tensors` of now: the optimiser's state, before its first step."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that steps change, by group and name; each group becomes a file."""

    def state(self) -> dict[str, Any]:
        """Every other value that steps change, as JSON knows it."""

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `state` gave.

        Raises:
            KeyError, TypeError, AttributeError: it is no such save.
            ValueError: a tensor does not fit.
        """
