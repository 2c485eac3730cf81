"""All networks of a split cohort on the main rank, for as long as it measures or exports them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.cohort import Cohort, load_named_state, named_state
from pretrain.exchange import Exchange


@contextmanager
def whole_on_main(
    cohorts: Sequence[Cohort], others: Sequence[nn.Module], exchange: Exchange
) -> Iterator[None]:
    """In the block the main rank has the networks of all processes. All ranks enter it together.

    Its own networks stay the ones that train. Where the cohort is not split, nothing is done.

    Args:
        cohorts: cohorts to complete.
        others: further modules with a part for each network.
        exchange: which networks are where.
    """
    if not exchange.is_split:
        yield
        return
    modules = [*cohorts, *others]
    ranks = exchange.ranks
    own = {
        f"{number}/{name}": tensor
        for number, module in enumerate(modules)
        for name, tensor in named_state(module).items()
        if exchange.team.main and not tensor.is_meta
    }
    found = ranks.to_main(own)
    if not ranks.main:
        yield
        return
    here = [cohort.here for cohort in cohorts]
    completed = [
        _complete(module, f"{number}/", found, ranks.device)
        for number, module in enumerate(modules)
    ]
    del found
    for cohort in cohorts:
        cohort.here = range(len(cohort.backbones))
    try:
        yield
    finally:
        for cohort, networks in zip(cohorts, here, strict=True):
            cohort.here = networks
        for part in (part for parts in completed for part in parts):
            part.to("meta")


@torch.no_grad()
def _complete(
    module: nn.Module, prefix: str, found: dict[str, Tensor], device: torch.device
) -> list[nn.Module]:
    """Give memory and values to the parts that have none. Returns them."""
    parts = [part for part in module.modules() if any(t.is_meta for t in _own_tensors(part))]
    for part in parts:
        part.to_empty(device=device, recurse=False)
    load_named_state(module, {name: found[prefix + name] for name in named_state(module)})
    return parts


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
