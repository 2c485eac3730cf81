"""Passes through networks that torch.compile makes faster, where it can."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Graphs of one function: two for each architecture, of query and of key networks.
_MOST_GRAPHS = 64

logger = logging.getLogger(__name__)


class Compiled:
    """Functions of networks and one tensor, each compiled for every kind of call when it first comes.

    Where that cannot be done, they are called as they are from then on, and a line says so once. Nothing of a pass has
    been computed when that shows: its graph is whole, and the backward pass is compiled with it.
    """

    def __init__(self) -> None:
        # Imported here: it takes seconds, and most runs compile nothing.
        import torch._dynamo.config as graphs
        import torch._functorch.config as lowering

        # It tells users of a CPU that there is no CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        graphs.recompile_limit = _MOST_GRAPHS
        lowering.force_non_lazy_backward_lowering = True
        self._compiled: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        # Copied networks share the graphs, to which weights are arguments.
        return self

    def call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What the function returns."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._failed:
            return function(*arguments)
        try:
            return self._graph(function)(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self._failed = True
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("compile: the networks cannot be compiled and run as they are (%s)", why)
            return function(*arguments)

    def _graph(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if function not in self._compiled:
            # For these shapes alone: whether torch makes a graph for any shape depends on what it has seen before, and
            # a resumed run has seen less.
            self._compiled[function] = torch.compile(function, fullgraph=True, dynamic=False)
        return self._compiled[function]
