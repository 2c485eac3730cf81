"""Shipped configs: each opens with its facts, parses, builds its networks and is what its source says."""

import pytest

from peerlearn.commands.configs_command import HEADER_FIELDS, config_folders, main, read_header
from peerlearn.compute.optimizers import OptimizerConfig
from peerlearn.compute.schedules import ScheduleConfig
from peerlearn.config import config_to_yaml, load_config
from pretrain.cohort import build_cohort
from pretrain.command import SHIPPED
from pretrain.config import (
    CheckpointConfig,
    CohortConfig,
    DataConfig,
    MonitorConfig,
    PretrainConfig,
)
from pretrain.method_config import QueueConfig, SupervisedConfig

CONFIGS = sorted(SHIPPED.glob("*.yaml"))
IMAGES = {
    "imagenet": (3, 224),
    "cifar10": (3, 32),
    "cifar100": (3, 32),
    "fashion_mnist": (1, 28),
    "fashion_mnist_classes": (1, 28),
    "characters": (1, 32),
    "miniimagenet": (3, 84),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses_and_builds_its_networks(path):
    config = load_config(PretrainConfig, path)
    channels, size = IMAGES[config.data.name]
    cohort = build_cohort(config.cohort, in_chans=channels, image_size=size, seed=0)
    assert len(cohort.backbones) == config.cohort.networks
    expected = f"x{config.cohort.networks}" if config.cohort.networks > 1 else "moco"
    if config.method == "prototypical":
        assert "prototypical_" in path.stem
        return
    if config.method == "supervised":
        assert path.stem == f"supervised_{config.data.name}"
    elif path.stem != "mcl_fashion_mnist_demo":
        assert expected in path.stem
    if config.cohort.networks == 1:
        assert (config.alpha, config.beta) == (1.0, 0.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_its_facts_and_a_command_that_names_it(path):
    header = read_header(path)
    assert set(header) == set(HEADER_FIELDS)
    assert all(header.values())
    assert header["command"].startswith(f"peerlearn pretrain {path.stem} ")


def shipped(name: str) -> PretrainConfig:
    return load_config(PretrainConfig, SHIPPED / f"{name}.yaml")


def test_the_papers_supervised_settings():
    """Section 4.1 of the MCL paper."""
    cifar, imagenet = shipped("supervised_cifar100"), shipped("supervised_imagenet")
    for config in (cifar, imagenet):
        assert (config.lr, config.optimizer.name, config.optimizer.momentum) == (0.1, "sgd", 0.9)
        assert not config.optimizer.nesterov
        assert (config.alpha, config.beta, config.cohort.embedding_dim) == (0.5, 0.1, 128)
        assert config.cohort.projection == "mlp"
        assert (config.soft_temperature, config.same_sample_positive) == (1.0, True)
        assert config.supervised.images_per_class == 2
        assert config.supervised.teaching == "ensemble_teaching"
        assert config.supervised.weights_per_class
    assert (cifar.epochs, cifar.batch_size, cifar.temperature) == (300, 128, 0.1)
    assert (cifar.optimizer.weight_decay, cifar.schedule.name) == (5e-4, "cosine")
    assert cifar.data.augmentation == "supervised_cifar"
    assert cifar.supervised.num_negatives is None
    assert (imagenet.epochs, imagenet.batch_size, imagenet.temperature) == (90, 256, 0.07)
    assert imagenet.optimizer.weight_decay == 1e-4
    assert (imagenet.schedule.name, imagenet.schedule.milestones_epochs) == ("step", [30, 60, 90])
    assert imagenet.data.augmentation == "supervised_imagenet"
    assert imagenet.supervised.num_negatives == 126


def test_the_published_few_shot_settings():
    """yinboc/prototypical-network-pytorch, train.py and mini_imagenet.py; Snell et al. 2017, section 3.2."""
    plain, snell, mcl = (
        shipped(name)
        for name in (
            "prototypical_miniimagenet",
            "prototypical_miniimagenet_snell",
            "mcl_x2_prototypical_miniimagenet",
        )
    )
    for config in (plain, snell, mcl):
        episode = config.prototypical
        assert (episode.ways, episode.shots, episode.queries) == (30, 1, 15)
        assert config.epochs * episode.steps_per_epoch == 20_000
        assert (episode.validation_ways, episode.validation_episodes) == (5, 400)
        assert episode.distance == "sqeuclidean"
        assert (config.lr, config.optimizer.name, config.optimizer.weight_decay) == (
            *(0.001, "adamw", 0.0),
        )
        halved = config.schedule
        assert (halved.name, halved.gamma) == ("step", 0.5)
        assert halved.milestones_epochs == list(range(20, 200, 20))
        assert config.data.augmentation == "none"
        assert (config.cohort.backbones, config.data.image_size) == ("conv4", 84)
    assert plain.cohort.batch_norm_init == mcl.cohort.batch_norm_init == "uniform"
    assert snell.cohort.batch_norm_init == "ones"
    for config in (plain, snell):
        assert (config.alpha, config.beta, config.cohort.networks) == (0, 0, 1)
    assert (mcl.alpha, mcl.beta, mcl.cohort.networks) == (0.5, 0.1, 2)


def test_the_published_settings():
    v1, v2 = shipped("moco_v1_imagenet_resnet50"), shipped("moco_v2_imagenet_resnet50")
    for config in (v1, v2):
        assert (config.batch_size, config.lr, config.epochs) == (256, 0.03, 200)
        assert (config.queue.size, config.queue.momentum) == (65536, 0.999)
        assert config.optimizer.weight_decay == 1e-4
        assert config.optimizer.decay_norm_and_bias
    assert (v1.temperature, v1.schedule.milestones_epochs) == (0.07, [120, 160])
    assert (v1.cohort.projection, v1.data.augmentation) == ("linear", "moco_v1")
    assert (v2.temperature, v2.schedule.name) == (0.2, "cosine")
    assert (v2.cohort.projection, v2.data.augmentation) == ("mlp", "moco_v2")
    cifar = shipped("moco_cifar10_resnet18")
    assert (cifar.batch_size, cifar.lr, cifar.optimizer.weight_decay) == (512, 0.06, 5e-4)
    assert (cifar.queue.size, cifar.queue.momentum, cifar.temperature) == (4096, 0.99, 0.1)
    assert (cifar.cohort.small_images, cifar.cohort.batch_norm_splits) == (True, 8)
    assert (cifar.monitor.k, cifar.monitor.temperature) == (200, 0.1)


def test_defaults_are_the_papers():
    config = PretrainConfig()
    assert (config.alpha, config.beta, config.soft_temperature) == (0.5, 0.1, 1.0)
    assert config.same_sample_positive
    assert config.cohort.embedding_dim == 128


def test_lr_is_scaled_and_base_lr_left_as_written():
    config = PretrainConfig(base_lr=0.03, batch_size=1024)
    assert (config.base_lr, config.lr) == (0.03, pytest.approx(0.12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"batch_size": 10, "accumulation_steps": 3}, "batch_size 10 must divide"),
        ({"method": "simclr", "accumulation_steps": 2}, "accumulation_steps must be 1"),
        ({"method": "simclr", "symmetric": True}, "symmetric must be false"),
        ({"terms": []}, "terms must name"),
        ({"alpha": 0.0, "beta": 0.0}, "leave nothing to train"),
        ({"alpha": 0.0, "terms": ["scl_hard"]}, "leave nothing to train"),
        ({"terms": ["icl_hard"], "cohort": CohortConfig(networks=1)}, "terms must hold scl_hard"),
        ({"temperature": 0.0}, "temperature must be positive"),
        (
            {"supervised": SupervisedConfig(teaching="dml")},
            "supervised.teaching is for method supervised, and method is moco",
        ),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_values_that_make_no_sense_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**settings)


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (CohortConfig, {"networks": 0}, "cohort.networks must be at least 1"),
        (CohortConfig, {"networks": 3, "backbones": ["a", "b"]}, "cohort.backbones must be"),
        (CohortConfig, {"share_stages": -1}, "cohort.share_stages"),
        (QueueConfig, {"size": 0}, "queue.size must be at least 1"),
        (QueueConfig, {"momentum": 1.5}, "queue.momentum must be within"),
        (DataConfig, {"limit": 0}, "data.limit must be at least 1"),
        (DataConfig, {"crop_scale": [0.9, 0.2]}, "data.crop_scale must be two rising"),
        (DataConfig, {"crop_scale": [0.0, 1.0]}, "data.crop_scale must be two rising"),
        (OptimizerConfig, {"momentum": 1.0}, "optimizer.momentum"),
        (ScheduleConfig, {"milestones_epochs": [3, 2]}, "schedule.milestones_epochs must rise"),
        (ScheduleConfig, {"milestones_epochs": [0]}, "schedule.milestones_epochs must be at least"),
        (ScheduleConfig, {"gamma": 0.0}, "schedule.gamma must be positive"),
        (CheckpointConfig, {"keep_last": 1}, "checkpoint.keep_last must be at least 2"),
        (MonitorConfig, {"k": 0}, "monitor.k must be at least 1"),
    ],
)
def test_values_of_a_group_name_their_whole_key(group, settings, message):
    with pytest.raises(ValueError, match=message):
        group(**settings)


def test_configs_verb_lists_all_and_prints_one(capsys):
    assert main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    folders = config_folders()
    assert set(folders) == {"pretrain", "linear", "detect", "submit", "study"}
    shipped = [path for folder in folders.values() for path in folder.glob("*.yaml")]
    assert sorted(listed) == sorted(path.stem for path in shipped)
    assert main(["moco_cifar10_resnet18"]) == 0
    assert capsys.readouterr().out == (SHIPPED / "moco_cifar10_resnet18.yaml").read_text()


def test_yaml_of_a_config_reads_back_equal(tmp_path):
    config = load_config(PretrainConfig, SHIPPED / "mcl_x4_imagenet_resnet50.yaml")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config
