"""Supervised steps against the algorithms written out plainly, and what a supervised cohort is made of."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.errors import UserError
from pretrain.cohort import Cohort, build_cohort
from pretrain.cohort_config import CohortConfig
from pretrain.config import PretrainConfig
from pretrain.gates import EnsembleGate, PeerAttention
from pretrain.losses import batch_terms
from pretrain.method import build_method
from pretrain.method_config import SupervisedConfig
from pretrain.supervised import Supervised
from pretrain.terms import SupervisedTerms, objective

ALONE = Ranks(torch.device("cpu"))
CLASSES = 4
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def config(networks: int = 2, **settings) -> PretrainConfig:
    supervised = SupervisedConfig(**settings.pop("supervised", {}))
    cohort = CohortConfig(networks=networks, embedding_dim=5)
    return PretrainConfig(
        **{
            "method": "supervised",
            "batch_size": 8,
            "temperature": 0.2,
            "cohort": cohort,
            "supervised": supervised,
            **settings,
        }
    )


def toy_cohort(networks: int = 2, *, heads: bool = True, seed: int = 0) -> Cohort:
    """Networks without batch norm and shared stages, in float64."""
    torch.manual_seed(seed)
    backbones = [nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh()) for _ in range(networks)]
    return Cohort(
        backbones,
        [nn.Linear(8, 5) for _ in range(networks)] if heads else [],
        classifiers=[nn.Linear(8, CLASSES) for _ in range(networks)],
    ).double()


def images(step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(LABELS), 3, 2, 2, generator=generator, dtype=torch.float64)


def supervised(cohort: Cohort, settings: PretrainConfig, steps_per_epoch: int = 1) -> Supervised:
    method = build_method(cohort, settings, ALONE, steps_per_epoch=steps_per_epoch)
    assert isinstance(method, Supervised)
    return method


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    )


def features_and_logits(cohort: Cohort, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    features = [backbone(x) for backbone in cohort.backbones]
    logits = [c(f) for c, f in zip(cohort.classifiers, features, strict=True)]
    return features, logits


def kl(teacher: Tensor, student: Tensor, t: float) -> Tensor:
    log_p, log_q = (F.log_softmax(z / t, 1) for z in (teacher, student))
    return t * t * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def assert_same_gradients(ours: Tensor, theirs: Tensor, cohort: Cohort) -> None:
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(gradients(ours, cohort), gradients(theirs, cohort), strict=True):
        if expected is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, expected)


def test_mcl_with_cross_entropy_is_eq_10_without_teaching():
    cohort, settings = toy_cohort(3), config(3)
    method = supervised(cohort, settings)
    method.begin_step(0)
    ours = objective(method.terms((images(),), LABELS), settings)
    features, logits = features_and_logits(cohort, images())
    embedding = torch.stack(
        [F.normalize(h(f), dim=1) for h, f in zip(cohort.heads, features, strict=True)]
    )
    mcl = batch_terms(embedding, LABELS, temperature=0.2)
    theirs = sum(F.cross_entropy(z, LABELS) for z in logits)
    theirs = theirs + 0.5 * (mcl.scl_hard + mcl.scl_soft) + 0.1 * (mcl.icl_hard + mcl.icl_soft)
    assert_same_gradients(ours, theirs, cohort)


@pytest.mark.parametrize("teaching", ["none", "dml", "ensemble_teaching"])
def test_vanilla_networks_side_by_side_learn_as_each_would_alone(teaching):
    """Only the teaching couples them: without it the gradients are those of one network."""
    cohort = toy_cohort(2, heads=False)
    settings = config(2, alpha=0.0, beta=0.0, supervised={"teaching": teaching})
    method = supervised(cohort, settings)
    method.begin_step(0)
    terms = method.terms((images(),), LABELS)
    assert [len(term) for term in terms] == [0, 0, 0, 0, 2, 0 if teaching == "none" else 2]
    _, logits = features_and_logits(cohort, images())
    alone = F.cross_entropy(logits[1], LABELS)
    ours = gradients(objective(terms, settings), cohort.backbones[1])
    theirs = gradients(alone, cohort.backbones[1])
    same = all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same == (teaching == "none")


@pytest.mark.parametrize(("temperature", "used"), [(None, 1.0), (3.0, 3.0)])
@pytest.mark.parametrize("detach", [None, False])
def test_dml_as_its_paper_and_as_okddips_repository(temperature, used, detach):
    cohort = toy_cohort(3, heads=False)
    settings = config(
        3,
        alpha=0.0,
        beta=0.0,
        supervised={
            "teaching": "dml",
            "teaching_temperature": temperature,
            "detach_teacher": detach,
        },
    )
    method = supervised(cohort, settings)
    method.begin_step(0)
    ours = objective(method.terms((images(),), LABELS), settings)
    _, logits = features_and_logits(cohort, images())
    theirs = sum(F.cross_entropy(z, LABELS) for z in logits)
    for m in range(3):
        for peer in range(3):
            if peer != m:
                teacher = logits[peer] if detach is False else logits[peer].detach()
                theirs = theirs + kl(teacher, logits[m], used) / 2
    assert_same_gradients(ours, theirs, cohort)


def test_ensemble_teaching_with_mcl_is_eq_10():
    """Two networks leave one free weight: the best of a fine grid stands in for the solver."""
    cohort, settings = toy_cohort(2), config(2, supervised={"teaching": "ensemble_teaching"})
    method = supervised(cohort, settings)
    method.begin_step(0)
    ours = objective(method.terms((images(),), LABELS), settings)
    features, logits = features_and_logits(cohort, images())
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)
    with torch.no_grad():
        mixed = grid[:, None, None] * logits[0] + (1 - grid[:, None, None]) * logits[1]
        losses = F.cross_entropy(
            mixed.flatten(0, 1), LABELS.repeat(len(grid)), reduction="none"
        ).view(len(grid), -1)
        best = grid[losses.mean(1).argmin()]
        teacher = best * logits[0] + (1 - best) * logits[1]
    embedding = torch.stack(
        [F.normalize(h(f), dim=1) for h, f in zip(cohort.heads, features, strict=True)]
    )
    theirs = batch_terms(embedding, LABELS, temperature=0.2).total(0.5, 0.1)
    for z in logits:
        theirs = theirs + F.cross_entropy(z, LABELS) + kl(teacher, z, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, expected in zip(gradients(ours, cohort), gradients(theirs, cohort), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def shared_cohort(networks: int, teaching: str) -> Cohort:
    settings = CohortConfig(networks=networks, backbones="resnet32", embedding_dim=5)
    return build_cohort(
        settings,
        in_chans=3,
        image_size=8,
        seed=0,
        projects=False,
        num_classes=CLASSES,
        teaching=teaching,
    ).double()


@pytest.mark.parametrize(("epoch", "weight"), [(0, math.exp(-5)), (40, math.exp(-1.25)), (95, 1.0)])
@pytest.mark.parametrize("teaching", ["cl_ilr", "one", "okddip"])
def test_the_rivals_on_a_shared_trunk(teaching, epoch, weight):
    """Their losses and gradients through trunk, own stages, classifiers and gates, at three points of the ramp."""
    cohort = shared_cohort(3, teaching).eval()
    assert cohort.shared_stages == 2
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = config(3, alpha=0.0, beta=0.0, supervised={"teaching": teaching})
    method = supervised(cohort, settings, steps_per_epoch=7)
    method.begin_step(epoch * 7 + 3)
    assert method.metrics()["teaching_weight"] == pytest.approx(weight)
    ours = objective(method.terms((x,), LABELS), settings)

    features, logits = features_and_logits(cohort, x)
    theirs = sum(F.cross_entropy(z, LABELS) for z in logits)
    if teaching == "cl_ilr":
        for m in range(3):
            others = (sum(logits) - logits[m]) / 2
            theirs = theirs + weight * kl(others.detach(), logits[m], 3.0)
        torch.testing.assert_close(ours, theirs)
        own, trunk = gradients_of_parts(ours, cohort), gradients_of_parts(theirs, cohort)
        for (name, mine), (_, expected) in zip(own, trunk, strict=True):
            low = name.startswith(("stem", "layer1", "layer2"))
            torch.testing.assert_close(mine, expected / 3 if low else expected, msg=name)
        return
    if teaching == "one":
        assert isinstance(cohort.gate, EnsembleGate)
        gate = cohort.gate(cohort.trunk(x))
        mixed = sum(gate[:, m : m + 1] * logits[m] for m in range(3))
        theirs = theirs + F.cross_entropy(mixed, LABELS)
        for z in logits:
            theirs = theirs + weight * kl(mixed.detach(), z, 3.0)
    else:
        assert isinstance(cohort.gate, PeerAttention)
        attention = cohort.gate(torch.stack(features[:2]))
        for i in range(2):
            target = sum(attention[:, i, j : j + 1] * logits[j] for j in range(2))
            theirs = theirs + weight * kl(target, logits[i], 3.0)
        theirs = theirs + weight * kl((logits[0] + logits[1]) / 2, logits[2], 3.0)
    assert_same_gradients(ours, theirs, cohort)


def gradients_of_parts(loss: Tensor, cohort: Cohort) -> list[tuple[str, Tensor]]:
    """The gradients of the first network's backbone by name."""
    names, parameters = zip(*cohort.backbones[0].named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return list(zip(names, found, strict=True))


def test_negatives_are_drawn_by_the_step_alone():
    cohort, settings = toy_cohort(), config(supervised={"num_negatives": 3})

    def at(step: int) -> float:
        method = supervised(copy.deepcopy(cohort), settings)
        method.begin_step(step)
        return method.terms((images(),), LABELS).scl_hard.sum().item()

    assert at(5) == at(5)
    assert at(5) != at(6)
    all_of_them = supervised(cohort, config())
    all_of_them.begin_step(5)
    # Fewer in the denominator.
    assert at(5) < all_of_them.terms((images(),), LABELS).scl_hard.sum().item()


def test_the_reported_weights_are_a_moving_average_of_every_tenth_batch():
    """Network 1 knows nothing, so that all weight belongs to network 0."""
    cohort = toy_cohort(2, heads=False)
    with torch.no_grad():
        cohort.classifiers[1].weight.zero_()
        cohort.classifiers[1].bias.zero_()
        for backbone in cohort.backbones:
            backbone.requires_grad_(False)
    x = torch.zeros(8, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        cohort.classifiers[0].weight.zero_()
        cohort.classifiers[0].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    settings = config(alpha=0.0, beta=0.0)
    method = supervised(cohort, settings)
    zeros = torch.zeros(8, dtype=torch.int64)
    assert method.ensemble_weights.tolist() == [0.5, 0.5]
    for step in range(21):
        method.begin_step(step)
        method.terms((x,), zeros)
        method.end_step()
    expected = 1 - 0.5 * 0.9**3
    assert method.ensemble_weights[0].item() == pytest.approx(expected, abs=1e-5)
    assert method.metrics()["net/1/ensemble_weight"] == pytest.approx(1 - expected, abs=1e-5)
    state = {k: {n: t.clone() for n, t in v.items()} for k, v in method.state_tensors().items()}
    method.begin_step(30)
    method.terms((x,), zeros)
    method.drop_step()
    assert torch.equal(method.ensemble_weights, state["ensemble"]["weights"])
    other = supervised(cohort, settings)
    other.load_state_tensors(state)
    assert torch.equal(other.ensemble_weights, method.ensemble_weights)


def test_the_objective_by_hand():
    pair = torch.tensor
    terms = SupervisedTerms(
        pair([1.0, 2.0]), pair([10.0, 20.0]), pair([100.0, 200.0]), pair([1e3, 2e3]),
        pair([0.25, 0.5]), pair([0.125, 0.0]),
    )  # fmt: skip
    found = objective(terms, config(alpha=2.0, beta=0.5, terms=["scl_hard", "icl_soft"]))
    assert float(found) == 2 * 3 + 0.5 * 3000 + 0.75 + 0.125


@pytest.mark.parametrize(
    ("backbone", "size", "shared"),
    [
        ("resnet32", 32, ("stem", "layer1", "layer2")),
        ("wrn_16_2", 32, ("stem", "layer1", "layer2")),
        ("densenet_bc_40_12", 32, ("stem", "layer1", "layer2")),
        ("resnet18", 64, ("conv1", "bn1", "layer1", "layer2")),
    ],
)
@pytest.mark.parametrize("networks", [1, 2, 4])
def test_which_tensors_are_the_same_objects(networks, backbone, size, shared):
    """Section 3.1 and 4.1: none among two networks; beyond, all but the last stage (CIFAR) or the last two."""
    cohort = build_cohort(
        CohortConfig(networks=networks, backbones=backbone, embedding_dim=8),
        in_chans=3,
        image_size=size,
        seed=0,
        num_classes=10,
    )
    first = dict(cohort.backbones[0].named_parameters())
    for other in cohort.backbones[1:]:
        for name, parameter in other.named_parameters():
            expected = networks > 2 and name.startswith(shared)
            assert (parameter is first[name]) == expected, name
    for modules in (cohort.heads, cohort.classifiers):
        apart = {id(p) for module in modules for p in module.parameters()}
        assert len(apart) == networks * len(list(modules[0].parameters()))
    total = sum(p.numel() for p in cohort.parameters())
    own = sum(
        p.numel() for m in range(networks) for _, part in cohort.parts(m) for p in part.parameters()
    )
    twice = sum(p.numel() for n, p in first.items() if n.startswith(shared))
    assert own - total == (networks - 1) * twice * (networks > 2)


def test_a_network_without_contrastive_terms_has_no_head():
    settings = config(1, alpha=0.0, beta=0.0)
    assert not settings.contrastive
    cohort = build_cohort(
        settings.cohort, in_chans=3, image_size=32, seed=0, projects=False, num_classes=10
    )
    assert [name for name, _ in cohort.parts(0)] == ["backbone", "classifier"]
    with_head = build_cohort(settings.cohort, in_chans=3, image_size=32, seed=0, num_classes=10)
    for (name, a), b in zip(
        cohort.backbones.named_parameters(), with_head.backbones.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": 1, "supervised": {"teaching": "dml"}}, "needs cohort.networks of at least 2"),
        ({"supervised": {"teaching": "okddip"}}, "needs cohort.networks of at least 3"),
        ({"batch_size": 9}, "must be a multiple of supervised.images_per_class 2"),
        ({"accumulation_steps": 2}, "accumulation_steps must be 1 with method supervised"),
        ({"symmetric": True}, "symmetric must be false with method supervised"),
        ({"networks": 1, "terms": ["scl_soft"]}, "terms must hold scl_hard"),
        ({"supervised": {"ramp_epochs": 0.0}}, "supervised.ramp_epochs must be positive"),
        ({"supervised": {"num_negatives": 0}}, "supervised.num_negatives must be at least 1"),
        (
            {"supervised": {"teaching": "ensemble_teaching", "detach_teacher": False}},
            "supervised.detach_teacher must be null or true",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("teaching", ["cl_ilr", "one"])
def test_methods_on_a_trunk_need_one(teaching):
    with pytest.raises(UserError, match=r"set cohort.share_stages to 1 or more"):
        build_cohort(
            CohortConfig(networks=2, backbones="resnet32"),
            in_chans=3,
            image_size=32,
            seed=0,
            num_classes=10,
            teaching=teaching,
        )
