"""The protocol of a training for the training spine: everything that a save must hold, and how to restore it."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import StepGuard
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.save_config import SaveConfig


class Resumable(Protocol):
    """A training that continues after any stop as if it had never stopped.

    A class that inherits from it needs to define only what has no default here.

    Attributes:
        config: frozen dataclass in config.yaml; `peerlearn.config.changeable` marks the fields that may change
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
        """The settings of the saves: ``config.checkpoint``."""
        saves: SaveConfig = self.config.checkpoint
        return saves

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of one pass over the data. Without epochs: all steps."""
        return self.total_steps

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """The number of steps of the whole training."""

    @property
    def fingerprint(self) -> str:
        """A text that changes with the data. A run that was saved on other data is not resumed."""
        return ""

    @property
    def dataset_name(self) -> str:
        """The name of the data, for people."""
        return "the data"

    def measurings_left(self, step: int) -> int:
        """The number of times that the networks are still measured, once that many steps are done."""
        return 0

    def headline(self) -> str:
        """The networks and the data in one line, for people."""
        return type(self).__name__

    def initialise(self) -> None:
        """Set what a training begins with beyond what `build` makes; not called where a save is restored.

        Raises:
            UserError: it cannot be had.
        """
        return

    def how_to_look(self, step: int) -> str:
        """What shows the fault of a step, counted from 0, in words; "" where nothing does."""
        return ""

    @abstractmethod
    def trained(self) -> nn.Module:
        """The module that learns. Nothing of it is saved if it holds NaN or Inf."""

    @property
    def layout(self) -> str:
        """What each process has of the training, in words; "" where all have the same. A save may be of another one."""
        return ""

    def whole(self) -> AbstractContextManager[None]:
        """A block in which the main rank holds all that is trained. All ranks enter it together."""
        return nullcontext()

    def whole_tensors(self) -> dict[str, dict[str, Tensor]]:
        """On the main rank `tensors` of all processes together. All ranks call it together."""
        return self.tensors()

    def bytes_to_come(self) -> int:
        """The bytes of later saves beyond today's `tensors`: the optimiser's state, before its first step."""
        return 0

    @abstractmethod
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that steps change, by group and name. Each group becomes a file."""

    def state(self) -> dict[str, Any]:
        """Every other value that steps change, in a form that JSON can hold."""
        return {}

    @abstractmethod
    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `state` returned.

        Raises:
            KeyError, TypeError, AttributeError: the save is not one of this training.
            ValueError: a tensor does not fit.
        """
