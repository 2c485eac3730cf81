"""What the networks of a cohort teach each other through their class probabilities, as pure functions of the logits.

Dimensions: M networks, B batch, C classes, P = M - 1 peers of OKDDip's leader.

    vanilla             each network's own cross-entropy (Eq. 7 of the MCL paper)
    dml                 Deep Mutual Learning (Zhang et al., CVPR 2018)
    ensemble_teaching   the best mixture of the networks teaches each (Eq. 8 and 9 of the MCL paper)
    cl_ilr              Collaborative Learning (Song and Chai, NeurIPS 2018)
    one                 On-the-fly Native Ensemble (Lan et al., NeurIPS 2018)
    okddip              Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020)

Each comes as a scalar and, ``*_by_network``, as the (M,) vector of what teaches each network, whose sum it is. Only
``vanilla`` holds the networks' own cross-entropy; the methods that add to it leave it out here.

Logits of any float type are taken as float32, or float64 where they are, also under autocast. KL(p || q) is a true
KL divergence, ``sg[x]`` a teacher that no gradient reaches, and softmax_T(z) = softmax(z / T).

All raise NonFiniteError for NaN or Inf in what they are given, naming the loss and the network, and ValueError for
shapes that do not fit, too few networks or a temperature that is not positive.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlearn.compute.device import full_float32
from pretrain.finite import require_finite
from pretrain.losses import summed, widen
from pretrain.simplex_weights import check_logits, ensemble_weights
from pretrain.soft_kl import soft_kl

__all__ = [
    "cl_ilr",
    "cl_ilr_by_network",
    "dml",
    "dml_by_network",
    "ensemble_teaching",
    "ensemble_teaching_by_network",
    "ensemble_weights",
    "okddip",
    "okddip_by_network",
    "one",
    "one_by_network",
    "ramp",
    "vanilla",
    "vanilla_by_network",
]


@summed
def vanilla(logits: Tensor, labels: Tensor) -> Tensor:
    """``sum_m mean_b CE(softmax(z_m), y)`` (Eq. 7 of the MCL paper): a scalar.

    Args:
        logits: (M, B, C) float.
        labels: (B,) int64 classes.
    """
    check_logits("vanilla", logits, labels)
    with full_float32(logits.device):
        return torch.stack([F.cross_entropy(z, labels) for z in widen(logits)])


vanilla_by_network = vanilla.by_network


@summed
def dml(logits: Tensor, *, temperature: float = 1.0, detach: bool = True) -> Tensor:
    """``sum_m 1/(M-1) sum_{l != m} T^2 mean_b KL(sg[softmax_T(z_l)] || softmax_T(z_m))``: a scalar.

    Zhang et al., in the form for any number of networks, which averages over the peers.

    Args:
        logits: (M, B, C) float, M >= 2.
        temperature: T, 1 in the paper.
        detach: False lets the gradient into the teachers.

    NOTE: all networks learn in one step, where the paper updates them in turn.
    """
    check_logits("dml", logits)
    _check_settings("dml", logits, temperature, fewest=2)
    with full_float32(logits.device):
        z = widen(logits)
        losses = [
            [_teach(z[peer], z[m], temperature, detach) for peer in range(len(z)) if peer != m]
            for m in range(len(z))
        ]
        return torch.stack([torch.stack(of_peers).mean() for of_peers in losses])


dml_by_network = dml.by_network


@summed
def ensemble_teaching(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    per_class: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """``sum_m T^2 mean_b KL(sg[softmax_T(z_e)] || softmax_T(z_m))``, ``z_e = sum_m theta_m z_m``: a scalar.

    Eq. 8 of the MCL paper, with theta from Eq. 9 (`ensemble_weights`). No gradient reaches the ensemble.

    Args:
        logits: (M, B, C) float.
        labels: (B,) int64 classes, by which theta is found.
        temperature: T, 1 in the paper.
        per_class: weigh the networks for every class apart.
        weights: theta, (M,) or (M, C), if it is known already: several processes find it once, over all their batches.
    """
    check_logits("ensemble_teaching", logits, labels)
    _check_settings("ensemble_teaching", logits, temperature, fewest=1)
    networks, _, classes = logits.shape
    if weights is None:
        weights = ensemble_weights(logits, labels, per_class=per_class)
    if weights.shape not in ((networks,), (networks, classes)):
        raise ValueError(
            f"weights must be (M,) or (M, C) with M, C of logits {tuple(logits.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    require_finite("ensemble_teaching", "weights", weights.reshape(networks, 1, -1))
    with full_float32(logits.device):
        z = widen(logits)
        theta = weights.detach().to(z).reshape(networks, 1, -1)
        ensemble = (theta * z.detach()).sum(0)
        return torch.stack([_teach(ensemble, student, temperature, detach=True) for student in z])


ensemble_teaching_by_network = ensemble_teaching.by_network


@summed
def cl_ilr(
    logits: Tensor, *, temperature: float = 3.0, weight: float = 1.0, detach: bool = True
) -> Tensor:
    """``w sum_m T^2 mean_b KL(sg[softmax_T(mean_{l != m} z_l)] || softmax_T(z_m))``: a scalar.

    Song and Chai: a head learns from the mean logits of the others.

    Args:
        logits: (M, B, C) float, M >= 2.
        temperature: T.
        weight: w, see `ramp`.
        detach: False lets the gradient into the teachers. OKDDip's implementation (train_one.py --avg) does. With it,
            and w = 1, this is also what that repository trains as "DML" by default (train_DML.py).
    """
    check_logits("cl_ilr", logits)
    _check_settings("cl_ilr", logits, temperature, fewest=2)
    with full_float32(logits.device):
        z = widen(logits)
        losses = []
        for m, student in enumerate(z):
            others = torch.cat([z[:m], z[m + 1 :]]).mean(0)
            losses.append(_teach(others, student, temperature, detach))
        return weight * torch.stack(losses)


cl_ilr_by_network = cl_ilr.by_network


@summed
def one(
    logits: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    detach: bool = True,
) -> Tensor:
    """``CE(z_e, y) + w sum_m T^2 mean_b KL(sg[softmax_T(z_e)] || softmax_T(z_m))``, ``z_e = sum_m g_m z_m``: a scalar.

    Lan et al. and their cifar_one.py. The cross-entropy of the ensemble teaches the gate and every network.

    Args:
        logits: (M, B, C) float.
        gate: (B, M), rows on the simplex: `pretrain.gates.EnsembleGate`.
        labels: (B,) int64 classes.
        temperature: T.
        weight: w, see `ramp`.
        detach: False lets the gradient of the divergences into the ensemble, hence into gate and networks, as OKDDip's
            implementation (train_one.py) does. The authors' own (loss/kl_loss.py) detaches it.
    """
    check_logits("one", logits, labels)
    _check_settings("one", logits, temperature, fewest=1)
    networks, batch, _ = logits.shape
    if gate.shape != (batch, networks):
        raise ValueError(
            f"gate must be (B, M) with B, M of logits {tuple(logits.shape)}, "
            f"got {tuple(gate.shape)}"
        )
    require_finite("one", "gate", gate.T.unsqueeze(-1))
    with full_float32(logits.device):
        z = widen(logits)
        ensemble = (gate.to(z.dtype).T.unsqueeze(-1) * z).sum(0)
        # What teaches all of them is counted in M equal parts.
        share = F.cross_entropy(ensemble, labels) / networks
        return torch.stack(
            [share + weight * _teach(ensemble, student, temperature, detach) for student in z]
        )


one_by_network = one.by_network


@summed
def okddip(
    logits: Tensor,
    attention: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    detach: bool = False,
) -> Tensor:
    """``w [sum_i T^2 mean_b KL(softmax_T(t_i) || softmax_T(z_i)) + T^2 mean_b KL(softmax_T(t) || softmax_T(z_M))]``.

    Chen et al. and their train_GL.py: peer i learns from the mixture ``t_i = sum_j a_ij z_j`` of the peers' logits, its
    own among them; the last network, their leader, from the peers' mean ``t``. A scalar.

    Args:
        logits: (M, B, C) float, M >= 2; the leader is the last.
        attention: (B, P, P), rows on the simplex: `pretrain.gates.PeerAttention`.
        temperature: T.
        weight: w, see `ramp`.
        detach: no gradient reaches the teachers. The attention then learns nothing, so the default is that of the
            authors' code (train_GL.py), where every target is live.
    """
    check_logits("okddip", logits)
    _check_settings("okddip", logits, temperature, fewest=2)
    peers, batch = len(logits) - 1, logits.shape[1]
    if attention.shape != (batch, peers, peers):
        raise ValueError(
            f"attention must be (B, M-1, M-1) with B, M of logits {tuple(logits.shape)}, "
            f"got {tuple(attention.shape)}"
        )
    require_finite("okddip", "attention", attention.transpose(0, 1))
    with full_float32(logits.device):
        z = widen(logits)
        targets = torch.einsum("bij,jbc->ibc", attention.to(z.dtype), z[:-1])
        teachers = [*targets, z[:-1].mean(0)]
        return weight * torch.stack(
            [
                _teach(teacher, student, temperature, detach)
                for teacher, student in zip(teachers, z, strict=True)
            ]
        )


okddip_by_network = okddip.by_network


def ramp(epoch: float, ramp_epochs: float = 80.0) -> float:
    """``exp(-5 (1 - t)^2)`` with ``t = min(epoch / ramp_epochs, 1)``, from e^-5 to 1: how the teaching is faded in.

    The consistency weight of Laine and Aila (ICLR 2017), as used by ONE, OKDDip and the latter's CL-ILR.

    Args:
        epoch: >= 0, counted from 0.
        ramp_epochs: > 0.
    """
    progress = min(epoch / ramp_epochs, 1.0)
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def _teach(teacher: Tensor, student: Tensor, temperature: float, detach: bool) -> Tensor:
    """``T^2 mean_b KL(softmax_T(teacher) || softmax_T(student))`` of (B, C) logits, a scalar. The gradient reaches the
    student and, without ``detach``, the teacher."""
    divergence = soft_kl(teacher, student, temperature)
    if not detach:
        with torch.no_grad():
            p = F.softmax(teacher / temperature, -1)
            difference = (teacher - student) / temperature
            # d KL / d teacher, in a form that keeps its digits where the two nearly agree.
            slope = temperature * p * (difference - (p * difference).sum(-1, keepdim=True))
        # Adds exactly 0 to the value, and the slope to the gradient.
        divergence = divergence + (slope * (teacher - teacher.detach())).sum(-1)
    return divergence.mean()


def _check_settings(term: str, logits: Tensor, temperature: float, *, fewest: int) -> None:
    if len(logits) < fewest:
        raise ValueError(f"{term} needs {fewest} or more networks, got {len(logits)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
