"""Where in a step NaN and Inf arise first: by which operation, in which module of which network, in which line."""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlearn import HOME
from peerlearn.runs.export_folders import KEY_PREFIX
from pretrain.cohort import Cohort

# In what autograd keeps for each node of its graph: our own entry, and torch's, the lines that made the node.
_MODULE, _LINES = "peerlearn_module", "traceback_"
NAN, INF = "NaN", "Inf"


class Origin(NamedTuple):
    """The first operation that made Inf out of finite numbers, or NaN out of others.

    Attributes:
        kind: NaN or Inf.
        operation: name of the operation: exp, native_batch_norm, ... or, in the backward pass, MulBackward0, ...
        in_backward: whether the operation belongs to the backward pass.
        network: network of the operation: "0", "key-0", ..., or "all" in stages that networks share; None outside.
        module: path of the innermost module in that network: backbone.layer1.0.conv1, ...; None outside.
        line: line of this project's code that called the operation or, in the backward pass, its forward operation:
            FILE:LINE.
    """

    kind: str
    operation: str
    in_backward: bool
    network: str | None
    module: str | None
    line: str | None

    def in_words(self) -> str:
        """The origin in one line."""
        owner = "the shared stages" if self.network == "all" else f"network {self.network}"
        where = f"in {self.module} of {owner}" if self.network else "outside of the networks"
        when = " in the backward pass" if self.in_backward else ""
        line = f" ({self.line})" if self.line else ""
        return f"{self.kind} arose{when} {where}, by {self.operation}{line}"


class FaultOrigin(TorchDispatchMode):
    """Looks at every operation, of the optimiser too, for the first that makes Inf and the first that makes NaN.

    An Inf may do no harm: what is divided by it is 0. So a later NaN is noted beside it.

    Attributes:
        origins: the first of each kind, in the order of the step; none where a kernel of our own hides them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.origins: list[Origin] = []
        # The modules that run, the innermost last.
        self._running: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # What is new and not filled yet holds anything.
        if re.match(r"(new_)?empty", name):
            return func(*args, **kwargs)
        read = _kinds(_read_by(name, args, kwargs))
        result = func(*args, **kwargs)
        # Some operations change what they are given, such as running statistics.
        made = _kinds(tree_leaves((result, args)))
        known = {origin.kind for origin in self.origins}
        if NAN in made and NAN not in read and NAN not in known:
            self.origins.append(self._here(NAN, name))
        elif INF in made and not read and not known:
            self.origins.append(self._here(INF, name))
        return result

    @contextlib.contextmanager
    def watching(self, cohorts: Sequence[Cohort]) -> Iterator[None]:
        """Look at every operation of the block.

        Args:
            cohorts: networks, and their momentum networks where there are any.
        """
        places: dict[nn.Module, tuple[str, str]] = {}
        for prefix, cohort in zip(("", KEY_PREFIX), cohorts, strict=False):
            # Frozen networks are their own momentum networks.
            places = _places(cohort, prefix) | places
        with contextlib.ExitStack() as held:
            for module, place in places.items():
                held.callback(module.register_forward_pre_hook(self._enter(place)).remove)
                held.callback(module.register_forward_hook(self._leave).remove)
            # For the lines that made a node. Its own look for NaN would end the step on one rank alone.
            held.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            held.enter_context(self)
            yield

    def _enter(self, place: tuple[str, str]) -> Any:
        return lambda module, arguments: self._running.append(place)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        place = self._running.pop()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                # A module within this one has come before.
                _metadata(tensor.grad_fn).setdefault(_MODULE, place)

    def _here(self, kind: str, operation: str) -> Origin:
        node = torch._C._current_autograd_node()
        if node is None:
            place = self._running[-1] if self._running else (None, None)
            return Origin(
                kind=kind,
                operation=operation,
                in_backward=False,
                network=place[0],
                module=place[1],
                line=_calling_line(),
            )
        network, module = _metadata(node).get(_MODULE, (None, None))
        return Origin(
            kind=kind,
            operation=node.name().rpartition("::")[2],
            in_backward=True,
            network=network,
            module=module,
            line=_last_own_line("".join(_metadata(node).get(_LINES, ()))),
        )


def _metadata(node: Any) -> dict[str, Any]:
    """What autograd keeps for a node of its graph."""
    entries: dict[str, Any] = node.metadata
    return entries


def _places(cohort: Cohort, prefix: str) -> dict[nn.Module, tuple[str, str]]:
    """The network of every module, and its path there."""
    places: dict[nn.Module, tuple[str, str]] = {}
    for m in range(len(cohort.backbones)):
        for part, whole in cohort.parts(m):
            for path, module in whole.named_modules(prefix=part):
                shared = module in places
                places[module] = ("all" if shared else f"{prefix}{m}", path)
    return places


def _read_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What an operation reads: not the tensors that it overwrites."""
    read = args[1:] if name == "copy_" else args
    return tree_leaves((read, {key: value for key, value in kwargs.items() if key != "out"}))


def _kinds(leaves: Sequence[Any]) -> set[str]:
    """Which of NaN and Inf the tensors hold."""
    kinds = set()
    for tensor in leaves:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if bool(torch.isnan(tensor).any()):
                kinds.add(NAN)
            if bool(torch.isinf(tensor).any()):
                kinds.add(INF)
    return kinds


def _calling_line() -> str | None:
    """The innermost line of this project that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__ and (file := _own_file(frame.f_code.co_filename)):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _last_own_line(stack: str) -> str | None:
    """The innermost line of this project in a stack as `traceback` prints it."""
    found = re.findall(r'File "(.+)", line (\d+), in ', stack)
    own = [
        f"{file}:{line}" for path, line in found if path != __file__ and (file := _own_file(path))
    ]
    return own[-1] if own else None


def _own_file(path: str) -> str | None:
    """A file of this project below its home; None for others."""
    from peerlearn import PACKAGES

    try:
        inside = Path(path).relative_to(HOME)
    except ValueError:
        return None
    return inside.as_posix() if inside.parts[0] in PACKAGES else None
