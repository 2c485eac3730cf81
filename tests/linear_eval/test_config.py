"""The shipped protocols, and values that make no sense."""

from pathlib import Path

import pytest

from linear_eval.command import SHIPPED
from linear_eval.config import LinearConfig
from peerlearn.cli import main
from peerlearn.commands.configs_command import HEADER_FIELDS, read_header
from peerlearn.compute.schedules import ScheduleConfig
from peerlearn.config import load_config

CONFIGS = sorted(SHIPPED.glob("*.yaml"))


@pytest.fixture
def with_checkpoint(tmp_path):
    def load(path: Path) -> LinearConfig:
        copy = tmp_path / path.name
        copy.write_text(path.read_text() + "checkpoint: x\n")
        return load_config(LinearConfig, copy)

    return load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_says_where_it_comes_from(path, with_checkpoint):
    assert set(read_header(path)) == set(HEADER_FIELDS)
    with_checkpoint(path)


def test_moco_protocol_is_the_published_one_and_the_default(with_checkpoint):
    config = with_checkpoint(SHIPPED / "moco_linear.yaml")
    assert config == LinearConfig(checkpoint="x")
    assert (config.method, config.epochs, config.batch_size) == ("sgd", 100, 256)
    assert (config.base_lrs, config.base_lr_batch_size, config.weight_decay) == ([30.0], 256, 0.0)
    assert (config.momentum, config.nesterov) == (0.9, False)
    assert config.schedule == ScheduleConfig(name="step", milestones_epochs=[60, 80], gamma=0.1)
    assert (config.augmentation, config.crop_scale) == ("crop_flip", [0.08, 1.0])


def test_simclr_protocol_is_the_published_one(with_checkpoint):
    config = with_checkpoint(SHIPPED / "simclr_linear.yaml")
    assert (config.epochs, config.base_lrs, config.weight_decay) == (90, [0.1], 0.0)
    assert config.schedule.name == "cosine"


def test_the_sweep_has_thirteen_learning_rates(with_checkpoint):
    config = with_checkpoint(SHIPPED / "lr_sweep.yaml")
    assert len(config.base_lrs) == 13
    assert config.base_lrs[0] == 1e-5
    assert config.base_lrs[-1] == 0.1
    assert config.candidates == 26


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base_lr", "[]"], "base_lr must hold at least one number"),
        (["--base_lr", "0.1", "0.1"], "base_lr holds a number twice"),
        (["--base_lr", "0.1", "-1"], "base_lr must be positive"),
        (["--inputs", "row"], "inputs"),
        (["--inputs", "raw", "raw"], "inputs must name each kind once"),
        (["--method", "svm"], "method: expected"),
        (["--method", "finetune", "--base_lr", "0.1", "0.2"], "finetune takes one learning rate"),
        (["--method", "logistic_regression", "--penalties_c", "0"], "penalties_c must be positive"),
        (["--held_out_percent", "100"], "held_out_percent must be within"),
        (["--data.shots", "0"], "data.shots must be at least 1"),
        (["--data.train_percent", "0"], "data.train_percent must be within"),
        (["--data.shots", "1", "--data.train_percent", "1"], "exclude each other"),
        (["--momentum", "0", "--nesterov", "true"], "nesterov needs a momentum"),
        (["--base_lrs", "0.1"], "did you mean 'base_lr'?"),
        (["--data.train_percnt", "1"], "did you mean 'data.train_percent'?"),
    ],
)
def test_bad_values_name_their_key(words, message, capsys):
    assert main(["linear", *words, "--checkpoint", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_several_words_after_a_key_are_a_list(capsys):
    words = ["--checkpoint", "runs/a", "runs/b, c", "7", "--base_lr", "1", "0.5", "--epochs", "2"]
    assert main(["linear", "simclr_linear", *words, "--dry_run"]) == 1
    printed, error = capsys.readouterr()
    assert error == "peerlearn: --checkpoint runs/a is not there\n"
    assert "checkpoint:\n- runs/a\n- runs/b, c\n- '7'\n" in printed
    assert "base_lr:\n- 1.0\n- 0.5\n" in printed


def test_configs_verb_shows_those_of_every_verb(capsys):
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    assert all(path.stem in listed for path in CONFIGS)
    for name in ("moco_linear", "moco_cifar10_resnet18"):
        assert main(["configs", name]) == 0
        assert capsys.readouterr().out.startswith("# source:")
    assert main(["configs", "moco_liner"]) == 2
    assert "did you mean 'moco_linear'?" in capsys.readouterr().err


def test_no_two_verbs_have_a_config_of_one_name():
    from pretrain.command import SHIPPED as OF_PRETRAIN

    assert not {path.stem for path in CONFIGS} & {path.stem for path in OF_PRETRAIN.glob("*.yaml")}
