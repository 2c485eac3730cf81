"""Prototypical training against the published rules written out plainly, and against other libraries."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from sklearn.metrics import log_loss
from torch import Tensor, nn

from fewshot.evaluate import evaluate_features
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import NonFiniteError
from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.runs.score_names import EPISODE_TOP1, score_name
from pretrain.best_networks import BestNetworks
from pretrain.cohort import Cohort, build_cohort
from pretrain.cohort_config import CohortConfig
from pretrain.config import DataConfig, PretrainConfig
from pretrain.episode_monitor import EpisodeMonitor
from pretrain.losses import batch_terms
from pretrain.method import build_method
from pretrain.method_config import PrototypicalConfig
from pretrain.prototypical import Prototypical, episode_sampler, prototypical_loss
from pretrain.terms import objective
from pretrain.training_data import TrainingData

ALONE = Ranks(torch.device("cpu"))
WAYS, SHOTS, QUERIES = 3, 2, 4
EPISODE = PrototypicalConfig(ways=WAYS, shots=SHOTS, queries=QUERIES)
LABELS = torch.arange(WAYS).repeat(SHOTS + QUERIES)


def config(networks: int = 2, **settings) -> PretrainConfig:
    return PretrainConfig(
        **{
            "method": "prototypical",
            "temperature": 0.2,
            "cohort": CohortConfig(networks=networks, embedding_dim=5),
            "prototypical": EPISODE,
            **settings,
        }
    )


def toy_cohort(networks: int = 2, *, heads: bool = True) -> Cohort:
    """Networks without batch norm, of different widths, in float64."""
    torch.manual_seed(0)
    backbones = [
        nn.Sequential(nn.Flatten(), nn.Linear(12, 7 + m), nn.Tanh()) for m in range(networks)
    ]
    return Cohort(
        backbones, [nn.Linear(7 + m, 5) for m in range(networks)] if heads else []
    ).double()


def images(count: int = len(LABELS)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)


def features(size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(LABELS), size, generator=generator, dtype=torch.float64)


def dataset(counts: list[int], split: str = "train") -> ImageDataset:
    """Images of which the first pixel is their number."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pixels = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(len(labels), dtype=torch.uint8)
    return ImageDataset(
        name="made",
        split=split,
        images=pixels,
        labels=labels,
        class_names=tuple(f"{split}-{c}" for c in range(len(counts))),
        mean=(0.5,),
        std=(0.5,),
    )


# The loss.


def plain_loss(rows: Tensor, distance: str, temperature: float) -> Tensor:
    """Image by image, with no expansion of the square."""
    by_class = [rows[w::WAYS] for w in range(WAYS)]
    prototypes = [own[:SHOTS].mean(0) for own in by_class]
    losses = []
    for w, own in enumerate(by_class):
        for query in own[SHOTS:]:
            if distance == "cosine":
                logits = [F.cosine_similarity(query, p, dim=0) for p in prototypes]
            else:
                logits = [-((query - p) ** 2).sum() for p in prototypes]
            losses.append(-F.log_softmax(torch.stack(logits) / temperature, 0)[w])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
def test_value_and_gradient_are_those_of_the_definition(distance, temperature):
    rows = features().requires_grad_()
    ours = prototypical_loss(
        rows, ways=WAYS, shots=SHOTS, distance=distance, temperature=temperature
    )
    theirs = plain_loss(rows, distance, temperature)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, rows)[0], torch.autograd.grad(theirs, rows)[0]
    )


def test_scipy_and_scikit_learn_agree():
    rows = features()
    prototypes = torch.stack([rows[w::WAYS][:SHOTS].mean(0) for w in range(WAYS)])
    logits = -cdist(rows[WAYS * SHOTS :].numpy(), prototypes.numpy(), "sqeuclidean")
    probabilities = torch.softmax(torch.from_numpy(logits), 1).numpy()
    expected = log_loss(LABELS[WAYS * SHOTS :].numpy(), probabilities, labels=list(range(WAYS)))
    ours = prototypical_loss(rows, ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", ["sqeuclidean", "cosine"])
def test_easyfsls_prototypical_networks_agree(distance):
    """Its squared Euclidean head scores by -|q - p|, so that its scores are squared here."""
    from easyfsl.methods import PrototypicalNetworks

    rows, support = features().float(), WAYS * SHOTS
    network = PrototypicalNetworks(nn.Identity())
    if distance == "cosine":
        network.l2_distance_to_prototypes = network.cosine_distance_to_prototypes
    network.process_support_set(rows[:support], LABELS[:support])
    scores = network(rows[support:])
    logits = scores if distance == "cosine" else -scores.square()
    expected = F.cross_entropy(logits, LABELS[support:])
    ours = prototypical_loss(rows, ways=WAYS, shots=SHOTS, distance=distance)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_closed_form():
    """Three classes in the corners of a triangle of side 1: a query at its own prototype, two at distance 1."""
    corners = torch.eye(3)[LABELS] / math.sqrt(2)
    loss = prototypical_loss(corners, ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), rel=1e-6)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_of_all_features_changes_nothing(offset):
    """In float32 the square of the offset would take all digits of the distances."""
    rows = features().float() + offset
    exact = prototypical_loss(rows.double(), ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    ours = prototypical_loss(rows, ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_features_of_16_bits_are_compared_in_float32():
    rows = features().bfloat16()
    ours = prototypical_loss(rows, ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    exact = prototypical_loss(rows.double(), ways=WAYS, shots=SHOTS, distance="sqeuclidean")
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)


def test_nan_names_the_term():
    rows = features()
    rows[3, 0] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"prototypical .* in 1 of 18 rows, the first is row 3"
    ):
        prototypical_loss(rows, ways=WAYS, shots=SHOTS, distance="sqeuclidean")


# The method.


def method_of(cohort: Cohort, settings: PretrainConfig) -> Prototypical:
    method = build_method(cohort, settings, ALONE)
    assert isinstance(method, Prototypical)
    return method


def features_of(cohort: Cohort) -> list[Tensor]:
    return [backbone(images()) for backbone in cohort.backbones]


def embedding_of(cohort: Cohort) -> Tensor:
    pairs = zip(cohort.heads, features_of(cohort), strict=True)
    return torch.stack([F.normalize(head(f), dim=1) for head, f in pairs])


def assert_same_gradients(ours: Tensor, theirs: Tensor, cohort: Cohort) -> None:
    torch.testing.assert_close(ours, theirs)
    parameters = list(cohort.parameters())
    for mine, expected in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_two_networks_learn_from_prototypes_and_from_each_other():
    cohort, settings = toy_cohort(), config(alpha=0.4, beta=0.3)
    terms = method_of(cohort, settings).terms((images(),), LABELS)
    mcl = batch_terms(embedding_of(cohort), LABELS, temperature=0.2)
    theirs = sum(plain_loss(f, "sqeuclidean", 1.0) for f in features_of(cohort))
    theirs = theirs + 0.4 * (mcl.scl_hard + mcl.scl_soft) + 0.3 * (mcl.icl_hard + mcl.icl_soft)
    assert_same_gradients(objective(terms, settings), theirs, cohort)


def test_without_alpha_and_beta_each_learns_alone():
    cohort, settings = toy_cohort(heads=False), config(alpha=0.0, beta=0.0)
    terms = method_of(cohort, settings).terms((images(),), LABELS)
    assert [len(term) for term in terms] == [0, 0, 0, 0, 2]
    theirs = torch.stack([plain_loss(f, "sqeuclidean", 1.0) for f in features_of(cohort)])
    torch.testing.assert_close(terms.prototypical, theirs)
    assert_same_gradients(objective(terms, settings), theirs.sum(), cohort)


def test_plain_batches_of_one_network_find_images_of_the_own_class():
    """NCA's softmax over all other images, image by image; the mean log-share of those of the own class."""
    settings = config(
        networks=1,
        alpha=1.0,
        batch_size=18,
        prototypical=PrototypicalConfig(batches="images_per_class", images_per_class=6),
    )
    cohort = toy_cohort(1)
    terms = method_of(cohort, settings).terms((images(),), LABELS)
    assert [len(term) for term in terms] == [1, 1, 1, 1, 0]
    (rows,) = embedding_of(cohort)
    losses = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        log_share = F.log_softmax(rows[others] @ rows[i] / 0.2, 0)
        own = [place for place, j in enumerate(others) if LABELS[j] == LABELS[i]]
        losses.append(-log_share[own].mean())
    assert_same_gradients(objective(terms, settings), torch.stack(losses).mean(), cohort)


def test_a_projection_of_none_compares_the_features_themselves():
    settings = CohortConfig(
        networks=2, backbones="conv4", embedding_dim=64, projection="none", share_stages=0
    )
    cohort = build_cohort(settings, in_chans=1, image_size=16, seed=0).eval()
    x = torch.randn(4, 1, 16, 16)
    expected = torch.stack([F.normalize(backbone(x), dim=1) for backbone in cohort.backbones])
    assert torch.equal(cohort(x), expected)
    assert all(name.startswith("backbones.") for name, _ in cohort.named_parameters())
    with pytest.raises(UserError, match=r"set cohort\.embedding_dim to 64, got 128"):
        build_cohort(replace(settings, embedding_dim=128), in_chans=1, image_size=16, seed=0)


def test_scales_of_batch_norm_are_drawn_if_asked_for():
    def scales(kind: str, seed: int) -> Tensor:
        settings = CohortConfig(networks=1, backbones="conv4", batch_norm_init=kind)
        cohort = build_cohort(settings, in_chans=1, image_size=16, seed=seed)
        norms = [m for m in cohort.modules() if isinstance(m, nn.BatchNorm2d)]
        return torch.cat([norm.weight for norm in norms])

    assert torch.equal(scales("ones", 0), torch.ones(256))
    drawn = scales("uniform", 0)
    assert 0 <= drawn.min() < 0.05 < 0.95 < drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 256))
    assert torch.equal(drawn, scales("uniform", 0))
    assert not torch.equal(drawn, scales("uniform", 1))


# Which images.


def test_a_batch_is_an_episode_row_by_row():
    train = dataset([9, 6, 11, 7, 8])
    assert train.labels is not None
    sampler = episode_sampler(train, replace(EPISODE, steps_per_epoch=7), seed=3)
    assert (sampler.batch_size, sampler.steps) == (18, 7)
    index, draw = sampler.order(0)
    assert index.shape == draw.shape == (7, 18)
    for batch in index:
        rows = train.labels[batch].view(SHOTS + QUERIES, WAYS)
        # Every row has the same classes, in the same order, and no image stands twice.
        assert (rows == rows[0]).all()
        assert len(set(rows[0].tolist())) == WAYS
        assert len(set(batch.tolist())) == 18
    assert torch.equal(index, sampler.order(0).index)
    assert not torch.equal(index, sampler.order(1).index)
    assert len({tuple(batch.tolist()) for batch in index}) == 7


def test_an_image_that_comes_again_is_told_apart_by_its_draw_number():
    sampler = episode_sampler(dataset([6, 6, 6]), replace(EPISODE, steps_per_epoch=3), seed=0)
    index, draw = sampler.order(2)
    for image in range(18):
        assert draw[index == image].tolist() == [0, 1, 2]


def test_all_classes_are_drawn_alike():
    train = dataset([6] * 12)
    assert train.labels is not None
    sampler = episode_sampler(train, replace(EPISODE, steps_per_epoch=2000), seed=0)
    counts = train.labels[sampler.order(0).index[:, :WAYS]].flatten().bincount()
    expected = 2000 * WAYS / 12
    # A class is in an episode or not: binomial with p = W / C.
    deviation = math.sqrt(2000 * (WAYS / 12) * (1 - WAYS / 12))
    assert (counts - expected).abs().max() < 4.5 * deviation


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([9, 9], "made train: episodes of 3 ways need as many classes, and there are 2"),
        ([9, 5, 9, 9], "takes 2 shots and 4 queries of a class, and class train-1 has 5 images"),
        ([9, 9, 9, 1], "made train: .* class train-3 has 1 image: lower shots or queries"),
    ],
)
def test_too_few_classes_or_images_are_refused_at_once(counts, message):
    with pytest.raises(UserError, match=message):
        episode_sampler(dataset(counts), EPISODE, seed=0)


# What is watched, and chosen.


def test_validation_is_the_evaluators_accuracy():
    """Though only those images are encoded that an episode takes."""
    torch.manual_seed(0)
    validation = dataset([30, 40, 50], "validation")
    validation = replace(
        validation, images=torch.randint(0, 256, (120, 1, 2, 2), dtype=torch.uint8)
    )
    assert validation.labels is not None
    settings = config(
        seed=5,
        data=DataConfig(workers=0),
        prototypical=replace(
            EPISODE, validation_ways=2, validation_queries=5, validation_episodes=8
        ),
    )
    cohort = Cohort([nn.Sequential(nn.Flatten(), nn.Linear(4, 3 + m)) for m in range(2)], [])
    data = TrainingData(dataset([9, 9, 9]), None, "memory", 2, validation)
    monitor = EpisodeMonitor(settings, data, image_size=2, device=torch.device("cpu"))
    row = monitor.measure(cohort)
    with torch.no_grad():
        pixels = (validation.images.float() / 255 - 0.5) / 0.5
        encoded = [backbone(pixels) for backbone in cohort.backbones]
    encoded.append(torch.cat([F.normalize(each, dim=1) for each in encoded], dim=1))
    for network, each in zip((0, 1, "ensemble"), encoded, strict=True):
        expected = evaluate_features(
            each, validation.labels, ways=2, shots=SHOTS, queries=5, episodes=8, seed=5
        )
        assert row[score_name(network, EPISODE_TOP1)] == pytest.approx(expected.mean, abs=1e-9)
    protocol = {key: value for key, value in row.items() if key.startswith("episode/")}
    assert protocol == {
        "episode/ways": 2,
        "episode/shots": SHOTS,
        "episode/queries": 5,
        "episode/episodes": 8,
    }


def test_the_best_epoch_is_that_of_the_best_mean_and_the_first_of_equals():
    cohort, settings = toy_cohort(), config()
    method = method_of(cohort, settings)

    def measured(step: int, first: float, second: float) -> None:
        with torch.no_grad():
            cohort.backbones[0][1].bias.fill_(step)  # type: ignore[index,operator]
        row = {score_name(0, EPISODE_TOP1): first, score_name(1, EPISODE_TOP1): second}
        method.measured(step, row)

    for step, first, second in ((10, 50, 60), (20, 70, 50), (30, 90, 20), (40, 55, 65), (50, 1, 2)):
        measured(step, first, second)
    assert (method.best.step, method.best.score) == (20, 60)
    assert (method.best.cohort.backbones[0][1].bias == 20).all()  # type: ignore[index]
    assert (cohort.backbones[0][1].bias == 50).all()  # type: ignore[index]


def test_the_best_networks_come_back_from_a_checkpoint():
    best = BestNetworks(toy_cohort())
    other = toy_cohort()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    best.offer(other, step=7, score=12.5)
    # As a save has it: copies.
    state = {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in best.state_tensors().items()
    }
    fresh = BestNetworks(toy_cohort())
    fresh.load_state_tensors(state)
    assert (fresh.step, fresh.score) == (7, 12.5)
    for ours, theirs in zip(fresh.cohort.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in fresh.cohort.parameters())


# Configs.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64}, "batch_size must stay 256 where a step is an episode"),
        ({"base_lr_batch_size": 64}, "base_lr_batch_size must stay 256"),
        ({"data": DataConfig(split="test")}, "data.split must be train with method prototypical"),
        ({"accumulation_steps": 2}, "accumulation_steps must be 1 with method prototypical"),
        (
            {"cohort": CohortConfig(batch_norm_splits=4)},
            r"prototypical.ways x \(shots \+ queries\) = 18 images of an episode must divide into",
        ),
        (
            {"prototypical": PrototypicalConfig(batches="images_per_class", images_per_class=7)},
            "batch_size 256 must be a multiple of prototypical.images_per_class 7",
        ),
        (
            {
                "prototypical": PrototypicalConfig(batches="images_per_class"),
                "alpha": 0.0,
                "beta": 0.0,
            },
            "leave nothing to train",
        ),
        (
            {"method": "simclr"},
            "prototypical.ways is for method prototypical, and method is simclr",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        config(**settings)


def test_an_episodes_learning_rate_is_not_scaled_and_its_images_are_counted():
    settings = config(base_lr=0.001)
    assert (settings.lr, settings.images_per_step, settings.steps_per_epoch(10**6)) == (
        *(0.001, 18, 100),
    )
    plain = config(
        base_lr=0.001,
        batch_size=64,
        prototypical=PrototypicalConfig(batches="images_per_class"),
    )
    assert (plain.lr, plain.images_per_step) == (0.00025, 64)
    assert [plain.steps_per_epoch(n) for n in (1000, 10**6)] == [15, 100]
