"""Reading configs: what is accepted, and the one line for what is not."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from linear_eval.config import LinearConfig
from peerlearn.config import (
    ArgumentParser,
    config_keys,
    config_to_yaml,
    load_config,
    nearest,
    parse_config,
    without,
)
from peerlearn.config.names import _ELSEWHERE
from peerlearn.errors import UsageError
from peerlearn.evaluation.knn_command import KNNConfig
from pretrain.config import PretrainConfig
from slurm.config import SubmitConfig
from studies.config import StudyConfig

CLASSES = (PretrainConfig, LinearConfig, KNNConfig, SubmitConfig)


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner.

    Attributes:
        count: how many.
        names: one or several.
    """

    count: int = 2
    names: str | list[str] = "a"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"inner.count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer.

    Attributes:
        rate: a number.
        kind: which.
        inner: nested.
    """

    rate: float = 0.1
    kind: Literal["x", "y"] = "x"
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


def parse(*argv: str, shipped: Path | None = None) -> Outer:
    config, _ = parse_config(
        Outer, argv, verb="try", description="Try.", example="peerlearn try", shipped=shipped
    )
    return config


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 1e-3\nlimit: 5\ninner:\n  count: 3\n")
    config = parse(str(file), "--inner.count", "4", "--inner.names", "[b, c]")
    assert config == Outer(rate=0.001, limit=5, inner=Inner(count=4, names=["b", "c"]))


def test_a_shipped_config_goes_by_its_name(tmp_path):
    (tmp_path / "quick.yaml").write_text("kind: y\n")
    assert parse("quick", shipped=tmp_path).kind == "y"
    with pytest.raises(UsageError, match=r"'quik' is neither a file .* did you mean 'quick'"):
        parse("quik", shipped=tmp_path)


def test_yaml_round_trip_is_exact(tmp_path):
    config = Outer(rate=1e-7, limit=3, inner=Inner(names=["p", "q"]))
    file = tmp_path / "c.yaml"
    file.write_text(config_to_yaml(config))
    assert load_config(Outer, file) == config


def test_dry_run_is_no_key():
    config, dry_run = parse_config(
        Outer, ["--dry_run", "--rate", "2"], verb="try", description="", example=""
    )
    assert (config.rate, dry_run) == (2.0, True)


def test_every_key_with_its_groups():
    assert config_keys(Outer) == {
        "rate": False,
        "kind": False,
        "limit": False,
        "inner": True,
        "inner.count": False,
        "inner.names": False,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "1"], "unknown key --rat; did you mean 'rate'?"),
        (["--inner.cuont=1"], "unknown key --inner.cuont; did you mean 'inner.count'?"),
        (["--inner", "1"], "unknown key --inner"),
        (["--inner.count", "many"], "inner.count: expected a whole number, got 'many'"),
        (["--kind", "z"], "kind: expected one of x, y, got 'z'"),
        (["--inner.count", "0"], "inner.count must be at least 1, got 0"),
        (["none.yaml"], "none.yaml: no such config file"),
        (["--rate", "1", "stray"], "stray"),
    ],
)
def test_one_line_for_a_wrong_command_line(argv, message):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rte: 1\n", "unknown key 'rte'; did you mean 'rate'?"),
        ("inner:\n  coun: 1\n", "unknown key 'inner.coun'; did you mean 'inner.count'?"),
        ("inner: 3\n", "line 1: inner: expected a group of keys, got a value"),
        ("- 1\n", "a config file holds `key: value` lines"),
        ("a: [1\n", "not a readable YAML file"),
        ("!!python/object/apply:os.system ['true']\n", "not a readable YAML file"),
    ],
)
def test_one_line_for_a_wrong_file_that_names_it(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(str(file))
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_on_the_command_line_says_which_counts(capsys):
    assert parse("--rate", "1", "--kind", "y", "--rate=2").rate == 2.0
    assert capsys.readouterr().out == "# --rate stands twice: 2 counts\n"
    assert parse("--rate", "1", "--rate", "1").rate == 1.0
    assert capsys.readouterr().out == ""


def test_words_without_those_that_others_give():
    words = ["demo", "--a", "1", "2", "--b=3", "--c"]
    assert without(words, ["--a=9", "--c", "x"]) == ["demo", "--b=3"]


def test_a_name_may_be_empty():
    """As the row of a table that has one row only."""
    assert nearest("", ["", "row"]) == ""


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("lr", "here it is called 'base_lr'"),
        ("data.<<", "merge keys are not read: write the keys out"),
        ("learning-rate", "here it is called 'base_lr'"),
        ("bs", "here it is called 'batch_size'"),
        ("batch-size", "did you mean 'batch_size'?"),
        ("arch", "here it is called 'cohort.backbones'"),
        ("gpus", "here it is called 'device'"),
        ("output_dir", "here it is called 'run'"),
        ("workers", "did you mean 'data.workers'?"),
        ("num-workers", "here it is called 'data.workers'"),
        ("networks", "did you mean 'cohort.networks'?"),
        ("name", "did you mean 'data.name' or 'optimizer.name' or 'schedule.name'?"),
        ("momentum", "did you mean 'queue.momentum' or 'optimizer.momentum'?"),
        ("bath_size", "did you mean 'batch_size'?"),
        ("data.rot", "did you mean 'data.root'?"),
        ("bananas", ""),
        ("arxh", ""),
        ("config", "CONFIG comes first, without a key"),
        ("dry-run", "did you mean '--dry_run'?"),
        ("resume", "`peerlearn resume RUN` continues a run"),
        ("x", ""),
    ],
)
def test_names_of_other_programs_and_near_ones_lead_to_ours(name, ours, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"epochs: 3\n{name}: 1\n")
    for words, named in (([f"--{name}", "1"], f"--{name}"), ([str(file)], repr(name))):
        with pytest.raises(UsageError) as caught:
            parse_config(PretrainConfig, words, verb="pretrain", description="", example="")
        assert f"unknown key {named}{'; ' if ours else ''}{ours}" in str(caught.value)
        if not ours:
            assert "did you mean" not in str(caught.value)


def test_every_name_of_our_own_in_the_list_of_other_programs_names_is_a_key():
    keys = {key for each in CLASSES for key in config_keys(each)}
    assert {*_ELSEWHERE} <= keys | {field.name for field in fields(StudyConfig)}


def test_a_range_error_names_the_line_of_its_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 1\n\ninner:\n  names: b\n  count: 0\n")
    with pytest.raises(UsageError) as caught:
        parse(str(file))
    assert str(caught.value) == f"{file}, line 5: inner.count must be at least 1, got 0"
    assert parse(str(file), "--inner.count", "1").inner.count == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate"], "--rate: its value is missing: a number"),
        (["--rate="], "rate: expected a number, got ''"),
        (["--limit", "none"], "limit: expected a whole number or null, got 'none'"),
        (["--inner.names", ""], "inner.names: expected text or a list of text, got ''"),
        (["--inner.names", "[a, [b]]"], "inner.names: expected text or a list of text, got a list"),
        (["-b", "3"], "-b: keys have two dashes"),
        (["--rate", "1", "2"], "--rate: expected a number, got '1' '2'"),
        (["--kind", "xx"], "kind: expected one of x, y, got 'xx'"),
        (["--inner.counts", "1"], "did you mean 'inner.count'?"),
    ],
)
def test_the_message_for_a_value_speaks_of_what_is_expected(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*words)


def test_a_file_is_read_as_utf8_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "c.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes("inner:\n  names: Äpfel\n".encode(encoding))
        assert parse(str(file)).inner.names == "Äpfel"
    file.write_bytes("inner:\n  names: Äpfel\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not a readable YAML file"):
        parse(str(file))


@pytest.mark.parametrize("text", ["inner: &a\n  names: *a\n", "a: &a [*a]\n", "[" * 3000])
def test_a_file_that_holds_itself_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError):
        parse(str(file))


def test_help_explains_the_essential_keys_and_all_of_them_on_request(capsys):
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit):
            parse_config(
                Outer,
                ["--help", *words],
                verb="try",
                description="Try.",
                example="peerlearn try --rate 2",
                essential=("kind", "inner.count"),
            )
        return capsys.readouterr().out

    few, every = shown(), shown("all")
    assert "`peerlearn try --help all` explains all 5" in few
    assert "--kind" in few
    assert "--rate " not in few.replace("example: peerlearn try --rate 2", "")
    assert [key for key in config_keys(Outer) if f"  --{key} " in every] == [
        *("rate", "kind", "limit", "inner.count", "inner.names")
    ]
    assert "which. [one of x, y; default: x]" in every
    assert "[a whole number or null; default: null]" in every
    assert "example: peerlearn try --rate 2" in every


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "a"], "--seeds: expected a whole number, got 'a'"),
        (["--rate", "a"], "--rate: expected a number, got 'a'"),
        (["--seed", "1"], "unrecognized arguments: --seed 1; here it is called 'seeds'"),
        (["--raet", "1"], "unrecognized arguments: --raet 1; did you mean 'rate'?"),
        (["--bananas"], "unrecognized arguments: --bananas (`try --help` explains)"),
    ],
)
def test_verbs_without_a_config_speak_alike(words, message):
    parser = ArgumentParser(prog="try", allow_abbrev=False)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rate", type=float)
    with pytest.raises(UsageError, match=re.escape(message)):
        parser.parse_args(words)


def test_a_single_value_in_place_of_a_list_and_a_damaged_file_are_told_with_the_fix(tmp_path):
    file = tmp_path / "c.yaml"
    for text, message in (
        ("epochs: 3\nterms: scl_hard\n", "line 2: terms: expected a list of scl_hard, "),
        ("terms: scl_hard\n", "got 'scl_hard': write [scl_hard]"),
        ("data: {name: cifra10}\n", "got 'cifra10'; did you mean 'cifar10'?"),
        ("terms: [scl_hrad]\n", "got 'scl_hrad' in it; did you mean 'scl_hard'?"),
        ("cohort:\n\tnetworks: 2\n", ", line 2: not a readable YAML file: found character"),
        ("epochs: 3\n---\nepochs: 4\n", ", line 2: not a readable YAML file: but found another"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=re.escape(message)):
            load_config(PretrainConfig, file)


def test_a_folder_is_no_config(tmp_path):
    folder = tmp_path / "configs.yaml"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"configs\.yaml is a folder: name the config file in it"):
        parse(str(folder))
    with pytest.raises(UsageError, match="is a folder"):
        load_config(Outer, folder)
