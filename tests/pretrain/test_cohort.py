"""Cohorts: independent weights, shared stages, momentum peers."""

import pytest
import torch
from torch import nn

from peerlearn.errors import UserError
from pretrain.cohort import (
    Cohort,
    build_cohort,
    load_named_state,
    momentum_peers,
    named_state,
    statistics,
    update_momentum,
)
from pretrain.cohort_config import CohortConfig


def build(seed: int = 0, **settings) -> Cohort:
    config = CohortConfig(**{"backbones": "resnet32", "embedding_dim": 16, **settings})
    return build_cohort(config, in_chans=1, image_size=16, seed=seed)


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_unit_vectors_of_every_network():
    embedding = build(networks=2)(images())
    assert embedding.shape == (2, 4, 16)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2, 4))


def test_every_network_has_initial_weights_of_its_own_that_the_seed_fixes():
    cohort, again, other = build(networks=2), build(networks=2), build(networks=2, seed=1)
    weights = [dict(net.named_parameters()) for net in cohort.backbones]
    assert not torch.equal(*(w["layer3.0.conv1.weight"] for w in weights))
    assert not torch.equal(cohort.heads[0].weight, cohort.heads[1].weight)
    for (name, a), b in zip(cohort.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(cohort.heads[0].weight, other.heads[0].weight)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(networks=2)
    assert torch.equal(torch.rand(1), expected)


def test_networks_of_unlike_architecture():
    cohort = build(networks=2, backbones=["resnet32", "wrn_16_2"])
    assert [net.num_features for net in cohort.backbones] == [64, 128]
    assert cohort(images()).shape == (2, 4, 16)


@pytest.mark.parametrize(("networks", "expected"), [(1, 0), (2, 0), (3, 2), (4, 2)])
def test_the_papers_rule_shares_low_stages_only_beyond_two_networks(networks, expected):
    assert build(networks=networks).shared_stages == expected
    assert build(networks=networks, share_stages=0).shared_stages == 0


def test_shared_stages_are_the_same_objects_and_run_once():
    cohort = build(networks=3)
    low = [net.layer2[0].conv1.weight for net in cohort.backbones]
    own = [net.layer3[0].conv1.weight for net in cohort.backbones]
    assert low[0] is low[1] is low[2]
    assert len({id(weight) for weight in own}) == 3
    alone = build(networks=1)
    shared_count = sum(p.numel() for p in alone.parameters()) * 3 - sum(
        p.numel() for p in cohort.parameters()
    )
    stem_and_two_stages = sum(
        p.numel()
        for name, p in alone.backbones[0].named_parameters()
        if not name.startswith(("layer3", "fc"))
    )
    assert shared_count == 2 * stem_and_two_stages
    cohort(images())
    counts = {
        name: int(buffer)
        for name, buffer in cohort.named_buffers(remove_duplicate=True)
        if name.endswith("num_batches_tracked")
    }
    assert set(counts.values()) == {1}


def test_the_gradient_of_a_shared_weight_is_the_sum_over_the_networks():
    cohort = build(networks=3).double()
    weight = cohort.backbones[0].layer1[0].conv1.weight
    embedding = cohort(images().double())
    parts = [
        torch.autograd.grad(
            embedding[m].square().sum(1).sin().sum() + embedding[m, 0, 0], weight, retain_graph=True
        )[0]
        for m in range(3)
    ]
    (embedding.square().sum(2).sin().sum() + embedding[:, 0, 0].sum()).backward()
    torch.testing.assert_close(weight.grad, sum(parts))


@pytest.mark.parametrize("backbone", ["resnet32", "conv4", "vit_tiny_patch16_224"])
def test_heads_alone_cost_one_backbone_with_named_stages_or_without(backbone):
    cohort, alone = (
        build(networks=networks, backbones=backbone, share_stages=shared)
        for networks, shared in ((3, "all"), (1, 0))
    )
    assert cohort.backbones[0] is cohort.backbones[1] is cohort.backbones[2]
    one, head = (sum(p.numel() for p in part.parameters()) for _, part in alone.parts(0))
    assert sum(p.numel() for p in cohort.parameters()) == one + 3 * head
    # The same seed's first network, and heads of their own.
    for a, b in zip(cohort.backbones[1].parameters(), alone.backbones[0].parameters(), strict=True):
        assert torch.equal(a, b)
    calls: list[int] = []
    cohort.backbones[0].register_forward_hook(lambda *_: calls.append(1))
    embedding = cohort.eval()(images())
    assert len(calls) == 1
    features = alone.eval().backbones[0](images())
    for m, head in enumerate(cohort.heads):
        expected = nn.functional.normalize(head(features), dim=-1)
        torch.testing.assert_close(embedding[m], expected, msg=str(m))
    assert not torch.allclose(embedding[0], embedding[1])


def test_heads_alone_have_momentum_heads_on_one_momentum_backbone():
    cohort = build(networks=3, share_stages="all")
    peers = momentum_peers(cohort)
    assert peers.backbones[0] is peers.backbones[2]
    assert peers.backbones[0] is not cohort.backbones[0]
    assert len({id(head) for head in peers.heads}) == 3
    names = named_state(cohort)
    assert {name.split(".")[1] for name in names if name.startswith("backbones")} == {"0"}
    assert {name.split(".")[1] for name in names if name.startswith("heads")} == {"0", "1", "2"}


def test_the_gradient_of_the_backbone_below_heads_alone_is_the_sum_over_them():
    cohort = build(networks=3, share_stages="all").double()
    weight = cohort.backbones[0].layer1[0].conv1.weight
    embedding = cohort(images().double())
    parts = [
        torch.autograd.grad(embedding[m, :, 0].sin().sum(), weight, retain_graph=True)[0]
        for m in range(3)
    ]
    embedding[:, :, 0].sin().sum().backward()
    torch.testing.assert_close(weight.grad, sum(parts))


def test_heads_alone_need_one_architecture():
    with pytest.raises(ValueError, match=r"cohort\.share_stages all .* cohort\.backbones"):
        CohortConfig(networks=2, backbones=["resnet32", "resnet56"], share_stages="all")


@pytest.mark.parametrize("networks", [2, 3])
def test_momentum_moves_every_parameter_once_and_no_buffer(networks):
    cohort = build(networks=networks)
    peers = momentum_peers(cohort)
    before = {name: tensor.clone() for name, tensor in named_state(peers).items()}
    with torch.no_grad():
        for parameter in cohort.parameters():
            parameter.add_(1.0)
        for buffer in cohort.buffers():
            buffer.add_(1)
    addresses = [p.data_ptr() for p in peers.parameters()]
    update_momentum(peers, cohort, 0.75)
    parameters = dict(peers.named_parameters())
    for name, tensor in named_state(peers).items():
        expected = 0.75 * before[name] + 0.25 * (before[name] + 1)
        if name not in parameters:
            expected = before[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert [p.data_ptr() for p in peers.parameters()] == addresses


def test_momentum_peers_start_equal_share_alike_and_take_no_gradient():
    cohort = build(networks=3)
    peers = momentum_peers(cohort)
    assert peers.backbones[0].layer1 is peers.backbones[2].layer1
    assert peers.backbones[0].layer1 is not cohort.backbones[0].layer1
    assert not any(p.requires_grad for p in peers.parameters())
    for a, b in zip(cohort.parameters(), peers.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_shared_tensor_is_saved_once_and_restored_everywhere():
    cohort, other = build(networks=3), build(networks=3, seed=9)
    state = named_state(cohort)
    assert sum("layer1.0.conv1.weight" in name for name in state) == 1
    assert sum("layer3.0.conv1.weight" in name for name in state) == 3
    load_named_state(other, {name: tensor.clone() for name, tensor in state.items()})
    assert torch.equal(other.eval()(images()), cohort.eval()(images()))


def test_a_state_of_other_networks_is_refused():
    cohort = build(networks=2)
    with pytest.raises(ValueError, match="do not match the networks"):
        load_named_state(cohort, named_state(build(networks=1)))
    with pytest.raises(ValueError, match=r"heads.0.weight.* \(8, 64\), is \(16, 64\)"):
        load_named_state(cohort, named_state(build(networks=2, embedding_dim=8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": 3, "share_stages": 3}, "share_stages"),
        ({"networks": 2, "backbones": ["resnet32", "resnet56"], "share_stages": 1}, "share_stages"),
        ({"networks": 1, "backbones": "resnet33"}, "resnet32"),
        (
            {"networks": 1, "backbones": "convnext_atto"},
            r"'convnext_atto' cannot take images of 16 pixels \(.*\): change data.image_size",
        ),
    ],
)
def test_what_cannot_be_built_names_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)


@pytest.mark.parametrize(("image_size", "warned"), [(28, True), (16, False), (32, False)])
def test_a_vit_that_sees_a_part_of_the_image_says_so(image_size, warned, caplog):
    config = CohortConfig(networks=2, backbones="vit_tiny_patch16_224")
    cohort = build_cohort(config, in_chans=1, image_size=image_size, seed=0)
    expected = (
        "network vit_tiny_patch16_224 cuts images into patches, and of 28 x 28 pixels it sees the first 16 x 16: "
        "make data.image_size a multiple of 16"
    )
    assert [record.getMessage() for record in caplog.records] == [expected] * warned
    first, *_ = features = cohort.branches(torch.rand(2, 1, image_size, image_size))
    assert first.shape == (2, 192)
    assert all(feature.std() > 0 for feature in features)


def test_only_running_means_and_variances_are_statistics():
    """The blur kernels of this network would drift if ranks took the mean of them at every step."""
    cohort = build_cohort(
        CohortConfig(networks=1, backbones="resnetblur18"), in_chans=1, image_size=32, seed=0
    )
    floating = {name for name, buffer in cohort.named_buffers() if buffer.is_floating_point()}
    kernels = {name for name in floating if name.endswith(".filt")}
    assert len(kernels) == 4
    buffers = dict(cohort.named_buffers())
    assert set(map(id, statistics(cohort))) == {id(buffers[name]) for name in floating - kernels}


def test_the_mlp_head_is_two_layers_with_a_relu_between():
    head = build(networks=1, projection="mlp").heads[0]
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(head[i].weight.shape) for i in (0, 2)] == [(64, 64), (16, 64)]


def test_split_batch_norm_reaches_every_network():
    cohort = build(networks=2, batch_norm_splits=2)
    kinds = {type(m).__name__ for m in cohort.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {"SplitBatchNorm2d"}
