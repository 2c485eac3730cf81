"""Losses as sums over networks: what `help()` shows of them, and that the sum is that of the vectors."""

import inspect

import pytest
import torch
from torch import Tensor

from pretrain import distill, losses
from pretrain.losses import MCLTerms, summed

# Without annotations: positional arguments, then those by keyword alone.
SIGNATURES = {
    "queue_terms": "(query, key, queue, *, temperature, soft_temperature=1.0, same_sample_positive=True, "
    "filled=None, backend='auto', tile_bytes=16777216)",
    "batch_terms": "(embedding, labels, *, temperature, soft_temperature=1.0, same_sample_positive=True, "
    "num_negatives=None, generator=None)",
    "view_terms": "(views, *, temperature, soft_temperature=1.0, same_sample_positive=True, "
    "num_negatives=None, generator=None)",
    "vanilla": "(logits, labels)",
    "dml": "(logits, *, temperature=1.0, detach=True)",
    "ensemble_teaching": "(logits, labels, *, temperature=1.0, per_class=False, weights=None)",
    "cl_ilr": "(logits, *, temperature=3.0, weight=1.0, detach=True)",
    "one": "(logits, gate, labels, *, temperature=3.0, weight=1.0, detach=True)",
    "okddip": "(logits, attention, *, temperature=3.0, weight=1.0, detach=False)",
}


@pytest.mark.parametrize(("name", "expected"), SIGNATURES.items())
def test_help_shows_the_arguments_and_what_they_are(name: str, expected: str):
    module = losses if hasattr(losses, name) else distill
    total, by_network = getattr(module, name), getattr(module, f"{name}_by_network")
    for function in (total, by_network):
        signature = inspect.signature(function)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected
        assert signature.return_annotation in (MCLTerms, Tensor)
    assert total.__name__ == total.__qualname__ == name
    assert by_network.__name__ == by_network.__qualname__ == f"{name}_by_network"
    assert total.__module__ == by_network.__module__ == module.__name__
    assert "Args:" in inspect.getdoc(total)
    assert f"`{name}` before the sum" in inspect.getdoc(by_network)


def test_scalars_are_the_sums_of_the_vectors():
    @summed
    def vector(values: Tensor, *, factor: float = 1.0) -> Tensor:
        """Twice, say."""
        return factor * values

    @summed
    def vectors(values: Tensor) -> MCLTerms:
        """Four."""
        return MCLTerms(values, 2 * values, 3 * values, 4 * values)

    values = torch.tensor([1.0, 2.0, 4.0])
    assert vector(values, factor=2.0).item() == 14.0
    assert vector.by_network(values, factor=2.0).tolist() == [2.0, 4.0, 8.0]
    assert [term.item() for term in vectors(values)] == [7.0, 14.0, 21.0, 28.0]
    assert vectors.by_network(values).icl_soft.tolist() == [4.0, 8.0, 16.0]
    assert inspect.getdoc(vectors) == "Four."
