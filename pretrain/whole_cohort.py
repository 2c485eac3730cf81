"""All networks of a split cohort on the main rank, for as long as it measures or exports them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    elsewhere = [
        part
        for module in modules
        for part in module.modules()
        if any(tensor.is_meta for tensor in _own_tensors(part))
    ]
    try:
        for part in elsewhere:
            part.to_empty(device=ranks.device, recurse=False)
        for number, module in enumerate(modules):
            names = named_state(module)
            load_named_state(module, {name: found[f"{number}/{name}"] for name in names})
        del found
        for cohort in cohorts:
            cohort.here = range(len(cohort.backbones))
        yield
    finally:
        for cohort, networks in zip(cohorts, here, strict=True):
            cohort.here = networks
        for part in elsewhere:
            part.to("meta")


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
