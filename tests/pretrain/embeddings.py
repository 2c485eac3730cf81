"""Unit vectors that losses are tested with, and how far float32 is from float64 with them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import queue_terms


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def vectors(kind: str, networks: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and queue in float32: random, near (peers nearly agree), duplicated, or of one direction."""
    query = unit(networks, 6, 32, seed=19, dtype=torch.float32)
    key = unit(networks, 6, 32, seed=20, dtype=torch.float32)
    queue = unit(networks, 50, 32, seed=21, dtype=torch.float32)
    if kind == "near":
        noise = 1e-4 * unit(networks, 6, 32, seed=22, dtype=torch.float32)
        query = F.normalize(query[:1] + noise, dim=-1)
        key = F.normalize(key[:1] + noise, dim=-1)
        queue = queue[:1].expand(networks, -1, -1).contiguous()
    if kind == "duplicated":
        key, queue = query.clone(), query[:, :1].expand(-1, 50, -1).contiguous()
    if kind == "one direction":
        common = unit(1, 1, 32, seed=23, dtype=torch.float32)
        query, key, queue = (F.normalize(common + 1e-5 * x, dim=-1) for x in (query, key, queue))
    return query, key, queue


def errors_against_float64(query, key, queue, backend, **settings_) -> list[tuple[float, float]]:
    """Per term: value and gradient error of float32, in units of the promised bound."""
    networks, batch, _ = query.shape
    tau = settings_["temperature"]
    results = []
    exact_query = query.double().requires_grad_()
    query = query.clone().requires_grad_()
    exact = queue_terms(exact_query, key.double(), queue.double(), backend="reference", **settings_)
    ours = queue_terms(query, key, queue, backend=backend, **settings_)
    for a, b in zip(ours, exact, strict=True):
        bound = 1e-5 * max(abs(b.item()), max(1, networks * (networks - 1)) / tau)
        ga = torch.autograd.grad(a, query, retain_graph=True)[0]
        gb = torch.autograd.grad(b, exact_query, retain_graph=True)[0]
        gradient_bound = 1e-5 * max(gb.norm().item(), networks / (tau**2 * math.sqrt(batch)))
        results.append(
            (
                abs(a.item() - b.item()) / bound,
                (ga.double() - gb).norm().item() / gradient_bound,
            )
        )
    return results
