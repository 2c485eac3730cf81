"""Losses by Triton kernels and by the readable computation in float64: prints the errors of each case as JSON.

Triton decides at its import whether kernels are compiled or interpreted, so this is a program of its own.
"""

import itertools
import json

import torch

from pretrain.losses import queue_terms_by_network
from pretrain.triton_passes import padded_size
from tests.pretrain.embeddings import unit

# M, B, K, D, tau, T, same-sample positive, number format of the queue.
CASES = {
    "one network": (1, 5, 33, 7, 0.07, 3.0, True, "float32"),
    "two networks": (2, 33, 70, 16, 0.1, 1.0, True, "float32"),
    "four networks, fp16": (4, 35, 97, 32, 0.07, 3.0, False, "float16"),
    "large soft temperature, bf16": (3, 6, 100, 20, 0.07, 5.0, True, "bfloat16"),
    "small soft temperature": (2, 6, 40, 20, 0.1, 0.5, True, "float32"),
    "fewer rows than a block": (2, 40, 3, 20, 0.1, 2.0, True, "float32"),
    "an empty queue": (2, 4, 0, 20, 0.1, 1.0, True, "float32"),
    "eight networks": (8, 3, 35, 16, 0.2, 1.0, True, "float32"),
}


def compute(case, backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    networks, batch, rows, dim, tau, soft_temperature, same, stored = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key = (
        unit(networks, batch, dim, seed=n, dtype=torch.float32).to(device, dtype) for n in (1, 2)
    )
    # One more row than is filled: the rows that are read are not contiguous.
    queue = unit(networks, rows + 1, dim, seed=3).to(getattr(torch, stored)).to(device)
    query.requires_grad_()
    terms = queue_terms_by_network(
        query,
        key,
        queue if backend == "triton" else queue.to(dtype),
        temperature=tau,
        soft_temperature=soft_temperature,
        same_sample_positive=same,
        filled=rows,
        backend=backend,
    )
    values = torch.stack(tuple(terms))
    weights = torch.rand(4, networks, generator=torch.Generator().manual_seed(0)).to(device)
    (gradient,) = torch.autograd.grad((values * weights).sum(), query)
    return values.detach().double().cpu(), gradient.double().cpu()


def main() -> None:
    found = {}
    for name, case in CASES.items():
        values, gradient = compute(case, "triton", torch.float32)
        again = compute(case, "triton", torch.float32)
        exact_values, exact_gradient = compute(case, "reference", torch.float64)
        found[name] = {
            "values": ((values - exact_values).abs().max() / exact_values.abs().max()).item(),
            "gradient": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
            "repeats": all(map(torch.equal, (values, gradient), again)),
        }
    sizes = list(itertools.starmap(padded_size, [(7,), (16,), (100,), (128,)]))
    print(json.dumps({"cases": found, "padded": sizes}))


if __name__ == "__main__":
    main()
