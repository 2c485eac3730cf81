"""Frozen peers: networks that teach and do not learn, in every form of training."""

import copy

import pytest
import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.compute.gradient_average import GradientAverage
from peerlearn.compute.optimizers import build_optimizer
from pretrain.cohort import Cohort, build_cohort, momentum_peers, named_state, statistics
from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from pretrain.method import build_method
from pretrain.method_config import QueueConfig, SupervisedConfig
from pretrain.rows import gradient_norms
from pretrain.terms import objective

ALONE = Ranks(torch.device("cpu"))
FROZEN = 1


def config(method: str, frozen: list[int], momentum: float = 0.5, **settings) -> PretrainConfig:
    cohort = CohortConfig(
        networks=3,
        backbones=["conv4", "resnet32", "conv4"],
        embedding_dim=8,
        share_stages=0,
        frozen=frozen,
    )
    queue = QueueConfig(size=12, momentum=momentum)
    return PretrainConfig(method=method, cohort=cohort, queue=queue, temperature=0.2, **settings)


def build(settings: PretrainConfig) -> Cohort:
    labelled = settings.method == "supervised"
    return build_cohort(
        settings.cohort, in_chans=1, image_size=16, seed=0, num_classes=3 if labelled else 0
    )


def batch(settings: PretrainConfig) -> tuple[tuple[Tensor, ...], Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(2, 6, 1, 16, 16, generator=generator))
    return (views[:1], torch.arange(6) % 3) if settings.method == "supervised" else (views, None)


def step(cohort: Cohort, settings: PretrainConfig, number: int = 0) -> Tensor:
    """One step's loss, whose gradients are made."""
    method = build_method(cohort, settings, ALONE)
    method.begin_step(number)
    loss = objective(method.terms(*batch(settings)), settings)
    loss.backward()
    return loss.detach()


FORMS = [
    ("moco", {}),
    ("moco", {"symmetric": True}),
    ("simclr", {}),
    ("supervised", {"supervised": SupervisedConfig(teaching="dml")}),
    ("supervised", {"supervised": SupervisedConfig(teaching="ensemble_teaching")}),
]


@pytest.mark.parametrize(("method", "settings"), FORMS)
def test_students_learn_as_beside_a_peer_whose_gradient_is_thrown_away(method, settings):
    """The reference: the same networks, all of them live, the teacher's batch norm alone in eval mode."""
    # Key networks that stand still are bit for bit what a frozen network is.
    frozen, plain = (config(method, each, 1.0, **settings) for each in ([FROZEN], []))
    cohort, reference = build(frozen).train(), build(plain).train()
    reference.backbones[FROZEN].eval()
    torch.testing.assert_close(step(cohort, frozen), step(reference, plain), rtol=0, atol=0)
    for m in (0, 2):
        for part, other in zip(cohort.parts(m), reference.parts(m), strict=True):
            for a, b in zip(part[1].parameters(), other[1].parameters(), strict=True):
                assert a.grad is not None
                assert torch.equal(a.grad, b.grad)
    taught = dict(reference.parts(FROZEN))["backbone"].parameters()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in taught)
    assert all(p.grad is None for _, part in cohort.parts(FROZEN) for p in part.parameters())


@pytest.mark.parametrize(("method", "settings"), FORMS)
def test_nothing_of_a_frozen_network_moves(method, settings):
    settings = config(method, [FROZEN], **settings)
    cohort = build(settings).train()
    before = {name: tensor.clone() for name, tensor in named_state(cohort).items()}
    optimizer = build_optimizer(cohort, settings.optimizer, lr=0.1)
    method = build_method(cohort, settings, ALONE)
    for number in range(2):
        method.begin_step(number)
        optimizer.zero_grad()
        objective(method.terms(*batch(settings)), settings).backward()
        optimizer.step()
        method.end_step()
    moved = {
        name
        for name, tensor in named_state(cohort).items()
        if not torch.equal(tensor, before[name])
    }
    assert not any(name.split(".")[1] == str(FROZEN) for name in moved)
    for kind in ("weight", "running_mean"):
        assert {name.split(".")[1] for name in moved if name.endswith(kind)} == {"0", "2"}


def test_a_frozen_network_has_no_optimiser_and_no_copy_and_no_share_in_what_ranks_average():
    settings = config("moco", [FROZEN])
    cohort = build(settings).train()
    peers = momentum_peers(cohort)
    assert peers.backbones[FROZEN] is cohort.backbones[FROZEN]
    assert peers.heads[FROZEN] is cohort.heads[FROZEN]
    assert peers.backbones[0] is not cohort.backbones[0]
    own = {id(p) for _, part in cohort.parts(FROZEN) for p in part.parameters()}
    optimizer = build_optimizer(cohort, settings.optimizer, lr=0.1)
    assert not own & {id(p) for group in optimizer.param_groups for p in group["params"]}
    buffers = {id(b) for b in cohort.backbones[FROZEN].buffers()}
    assert not buffers & {id(b) for b in statistics(cohort) + statistics(peers)}
    assert len(statistics(cohort)) == 2 * 2 * 4  # two conv4 of four batch norms
    GradientAverage(cohort.parameters(), ALONE).finish()


def test_a_frozen_network_stays_in_eval_mode_whoever_asks():
    cohort = build(config("moco", [FROZEN]))
    for _ in range(2):
        cohort.eval()
        assert not any(net.training for net in cohort.backbones)
        cohort.train()
        assert [net.training for net in cohort.backbones] == [True, False, True]
        assert [head.training for head in cohort.heads] == [True, False, True]
    copied = copy.deepcopy(cohort).train()
    assert [net.training for net in copied.backbones] == [True, False, True]


def test_the_row_has_no_gradient_of_a_frozen_network():
    settings = config("simclr", [FROZEN])
    cohort = build(settings).train()
    step(cohort, settings)
    assert list(gradient_norms(cohort)) == ["net/0/gradient_norm", "net/2/gradient_norm"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": [2]}, r"cohort\.frozen must hold numbers of networks, 0 to 1, got \[2\]"),
        ({"frozen": [-1]}, r"cohort\.frozen must hold numbers of networks, 0 to 1, got \[-1\]"),
        ({"frozen": [0, 1]}, r"cohort\.frozen must leave a network that learns"),
        ({"frozen": [1], "share_stages": 2}, r"cohort\.share_stages must be 0 with cohort\.frozen"),
        ({"frozen": [1], "share_stages": "all"}, r"cohort\.share_stages must be 0 with"),
    ],
)
def test_what_cannot_be_frozen_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CohortConfig(**settings)


def test_four_networks_one_of_them_frozen_share_nothing():
    assert (
        build_cohort(
            CohortConfig(networks=4, backbones="resnet32", frozen=[3]),
            in_chans=1,
            image_size=16,
            seed=0,
        ).shared_stages
        == 0
    )
