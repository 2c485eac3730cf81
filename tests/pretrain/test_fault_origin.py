"""Which operation is named when NaN or Inf arises in it."""

import torch

from pretrain.cohort import build_cohort, momentum_peers
from pretrain.cohort_config import CohortConfig
from pretrain.fault_origin import FaultOrigin, Origin

IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def a_cohort(*, networks: int = 2, backbone: str = "conv4", share_stages: int = 0):
    config = CohortConfig(
        networks=networks, backbones=[backbone], embedding_dim=8, share_stages=share_stages
    )
    return build_cohort(config, in_chans=1, image_size=16, seed=0).train()


def origins(cohort, compute=None, peers=()) -> list[Origin]:
    look = FaultOrigin()
    with look.watching([cohort, *peers]):
        (compute or (lambda: cohort(IMAGES).sum().backward()))()
    return look.origins


def test_a_sound_step_has_none():
    cohort = a_cohort()
    assert origins(cohort) == []
    # Nothing of the look stays.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cohort.modules())


def test_a_layer_that_overflows_is_named_with_its_network():
    cohort = a_cohort()
    with torch.no_grad():
        cohort.heads[1].weight.fill_(3e38)
    first = origins(cohort)[0]
    assert (first.kind, first.network, first.module) == ("Inf", "1", "head")
    assert (first.operation, first.in_backward) == ("addmm", False)
    assert first.in_words().startswith(
        "Inf arose in head of network 1, by addmm (pretrain/cohort.py:"
    )


def test_a_momentum_network_is_named():
    cohort = a_cohort()
    peers = momentum_peers(cohort)
    with torch.no_grad():
        peers.backbones[0].layer3[0].weight.fill_(3e38)
    first = origins(cohort, lambda: peers(IMAGES), [peers])[0]
    assert (first.network, first.module) == ("key-0", "backbone.layer3.0")


def test_a_stage_that_networks_share_is_of_all():
    cohort = a_cohort(networks=3, backbone="resnet32", share_stages=2)
    with torch.no_grad():
        next(cohort.backbones[0].layer1.parameters()).fill_(3e38)
    first = origins(cohort)[0]
    assert first.network == "all"
    assert first.module.startswith("backbone.layer1.0.")
    assert "of the shared stages, by convolution" in first.in_words()


def test_an_overflow_in_the_backward_pass_is_named_by_its_layer():
    cohort = a_cohort()

    def compute() -> None:
        features = cohort.branches(IMAGES)[1]
        features.backward(torch.full_like(features, 3e38))

    first = origins(cohort, compute)[0]
    assert (first.in_backward, first.network) == (True, "1")
    assert first.module.startswith("backbone.layer4.")
    assert "BatchNorm" in first.operation


def test_nan_outside_of_the_networks_is_named_by_its_line():
    def compute() -> None:
        from pretrain.losses import queue_terms

        keys = torch.nn.functional.normalize(torch.ones(2, 4, 8), dim=-1)
        queue_terms(keys, keys, keys, temperature=1e-40)

    first, second = origins(a_cohort(), compute)
    assert (first.kind, first.operation, first.network) == ("Inf", "div", None)
    assert first.line.startswith("pretrain/losses.py:")
    assert second.kind == "NaN"


def test_inf_that_was_given_is_not_taken_for_its_origin():
    def compute() -> None:
        (torch.tensor([1.0, float("inf")]) * 2).sum().exp()

    assert origins(a_cohort(), compute) == []
    assert origins(a_cohort(), lambda: torch.tensor([1.0, float("inf")]).mul(0))[0].kind == "NaN"


def test_what_an_operation_changes_in_place_is_looked_at():
    norm = torch.nn.BatchNorm1d(2)
    first = origins(a_cohort(), lambda: norm(torch.tensor([[0.0, -1e25], [0.0, 1e25]])))[0]
    assert first.kind == "Inf"
    assert first.operation == "native_batch_norm"
