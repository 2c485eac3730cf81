"""What one optimiser step computes, noted from outside while the loop's own code runs.

Dimensions: M networks, B batch, D embedding size, C classes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.runs.export_folders import KEY_PREFIX
from peerlearn.runs.score_names import score_name
from pretrain.method import Method
from pretrain.terms import Terms


class StepRecord:
    """The outputs of the networks and the terms of one step on this rank, call by call.

    Attributes:
        terms: terms of each micro-batch, (M,) vectors without gradient.
        outputs: outputs of every call of a network in the step, by name: ``net/0/features`` (B, F),
            ``net/0/embedding`` (B, D), ``net/0/logits`` (B, C), and of a momentum network ``net/key-0/embedding``. A
            call sees a micro-batch, and of each micro-batch one view, or as many as the method passes at once.
    """

    def __init__(self) -> None:
        self.terms: list[Terms] = []
        self.outputs: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def noting(self, method: Method) -> Iterator[None]:
        """Note what the method and its networks compute within the block."""
        cohort = method.cohort
        with contextlib.ExitStack() as held:
            for function, figure in (
                ("branches", "features"),
                ("embed", "embedding"),
                ("classify", "logits"),
            ):
                held.enter_context(_passed_on(cohort, function, self._outputs(figure)))
            held.enter_context(
                _passed_on(method, "terms", lambda terms: self._terms(terms, method))
            )
            yield

    def _outputs(self, figure: str) -> Callable[[Sequence[Tensor]], None]:
        return lambda outputs: self._note(figure, "", outputs)

    def _terms(self, terms: Terms, method: Method) -> None:
        self.terms.append(type(terms)(*(term.detach() for term in terms)))
        # In the order of the batch, which batch norm in parts shuffles.
        for keys in filter(None, method.fresh_keys):
            self._note("embedding", KEY_PREFIX, keys[-1][:, method.exchange.team.rank])

    def _note(self, figure: str, prefix: str, outputs: Sequence[Tensor] | Tensor) -> None:
        for m, output in enumerate(outputs):
            name = score_name(f"{prefix}{m}", figure)
            self.outputs.setdefault(name, []).append(output.detach().clone())

    def gathered_outputs(self, ranks: Ranks) -> dict[str, Tensor]:
        """The outputs of all ranks by name: (ranks, calls, B, ...). All ranks call it together."""
        return {
            name: ranks.gather(torch.stack(calls)[None]) for name, calls in self.outputs.items()
        }

    def gathered_terms(self, ranks: Ranks) -> dict[str, Tensor]:
        """The terms of all ranks by name, without those that the config leaves out: (ranks, micro-batches, M)."""
        named: dict[str, list[Tensor]] = {}
        for terms in self.terms:
            for name, term in terms._asdict().items():
                named.setdefault(name, []).append(term)
        return {
            name: ranks.gather(torch.stack(parts)[None])
            for name, parts in named.items()
            if len(parts[0])
        }


def first_not_finite(*groups: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or Inf; None if all are finite."""
    return next(
        (
            name
            for group in groups
            for name, tensor in group.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ),
        None,
    )


@contextlib.contextmanager
def _passed_on(owner: Any, name: str, note: Callable[[Any], None]) -> Iterator[None]:
    """Pass what a method of an object returns on to ``note`` too."""
    plain = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        result = plain(*arguments, **named)
        note(result)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)
