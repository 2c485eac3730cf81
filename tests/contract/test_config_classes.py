"""Every config class behind the one door: each key, in a file and on the command line, is checked alike."""

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from detection.config import DetectConfig
from fewshot.config import FewShotConfig
from linear_eval.command import LINEAR
from linear_eval.config import LinearConfig
from peerlearn.cli import main
from peerlearn.config import config_keys, config_to_yaml, load_config, parse_config
from peerlearn.config.fields import Key, keys_of
from peerlearn.config.files import Entry, read_file
from peerlearn.config.values import Scalar, admits_null, expected, list_item, members, read_value
from peerlearn.errors import UsageError
from peerlearn.evaluation.knn_command import KNN, KNNConfig
from pretrain.command import _TRAINER
from pretrain.config import PretrainConfig
from slurm.config import SubmitConfig

CLASSES = (
    *(PretrainConfig, LinearConfig, KNNConfig, FewShotConfig, DetectConfig),
    SubmitConfig,
)
PYTHON_TYPES = re.compile(
    r"\b(int|float|str|bool|dict|None|NoneType|Literal|Union)\b|list\[|<class|typing"
)
SETTABLE = [
    pytest.param(config_class, key, id=f"{config_class.__name__}-{key.name}")
    for config_class in CLASSES
    for key in keys_of(config_class)
    if not key.is_group
]
GROUPS = [
    pytest.param(config_class, key, id=f"{config_class.__name__}-{key}")
    for config_class in CLASSES
    for key, is_group in config_keys(config_class).items()
    if is_group
]


def in_file(key: str, value: str) -> str:
    """A file that gives the key alone, in its groups."""
    parts = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(lines) + f" {value}\n"


def refused(config_class: Any, path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(config_class, path)
    message = str(caught.value)
    assert "\n" not in message
    assert not PYTHON_TYPES.search(message.removeprefix(str(path))), message
    return message


def parse(config_class: Any, *words: str) -> Any:
    return parse_config(config_class, words, verb="try", description="", example="")[0]


@pytest.mark.parametrize(("config_class", "key"), SETTABLE)
def test_a_key_with_nothing_after_it_is_null_and_refused_where_null_is_no_value(
    config_class, key: Key, tmp_path
):
    path = tmp_path / "c.yaml"
    if admits_null(key.hint):
        assert read_value(Scalar(None), key.hint) is None
        return
    depth = key.name.count(".") + 1
    message = refused(config_class, path, in_file(key.name, ""))
    assert message == (f"{path}, line {depth}: {key.name}: expected {expected(key.hint)}, got null")


@pytest.mark.parametrize(("config_class", "key"), SETTABLE)
def test_a_key_that_stands_twice_is_named_with_both_lines(config_class, key: Key, tmp_path):
    path = tmp_path / "c.yaml"
    text = in_file(key.name, "1")
    last = text.splitlines()[-1]
    depth = len(text.splitlines())
    message = refused(config_class, path, f"{text}{last}\n")
    assert message == f"{path}: {key.name} stands twice (lines {depth} and {depth + 1})"


@pytest.mark.parametrize(("config_class", "group"), GROUPS)
def test_a_group_that_stands_twice_is_named_with_both_lines(config_class, group, tmp_path):
    path = tmp_path / "c.yaml"
    inner = next(key for key in config_keys(config_class) if key.startswith(f"{group}."))
    text = in_file(inner, "1")
    lines = len(text.splitlines())
    # Of a group within a group the outer one is found first.
    assert refused(config_class, path, text * 2) == (
        f"{path}: {group.split('.')[0]} stands twice (lines 1 and {lines + 1})"
    )
    assert f"line 1: {group}: expected a group of keys, got null" in refused(
        config_class, path, f"{group}:\n"
    )
    dotted = f"{inner}: 1\n{text}"
    assert refused(config_class, path, dotted) == (
        f"{path}: {inner} stands twice (lines 1 and {lines + 1})"
    )


@pytest.mark.parametrize(("config_class", "key"), SETTABLE)
def test_a_value_of_another_type_is_refused_in_words(config_class, key: Key, tmp_path):
    path, words = tmp_path / "c.yaml", expected(key.hint)
    for value, got in (("{a: 1}", "a group of keys"), ("[[1]]", "a list")):
        message = refused(config_class, path, in_file(key.name, value))
        assert f"{key.name}: expected {words}, got {got}" in message
    if str in members(key.hint) or list_item(key.hint) is str:
        return
    message = refused(config_class, path, in_file(key.name, "'?'"))
    assert f"{key.name}: expected {words}, got '?'" in message
    with pytest.raises(UsageError) as caught:
        parse(config_class, f"--{key.name}", "?")
    assert f"{key.name}: expected {words}, got '?'" in str(caught.value)


@pytest.mark.parametrize(("config_class", "key"), SETTABLE)
def test_numbers_that_no_machine_holds_are_refused(config_class, key: Key, tmp_path):
    numbers = {float, int} & {*members(key.hint), *members(list_item(key.hint))}
    too_large = "9" * (30 if numbers == {int} else 400)
    for value in ("1e999", "-1e999", ".inf", ".nan", too_large) if numbers else ():
        with pytest.raises(UsageError, match=f"^{key.name}"):
            parse(config_class, f"--{key.name}", value)
        assert key.name in refused(config_class, tmp_path / "c.yaml", in_file(key.name, value))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return st.one_of(map(values_of, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return st.lists(values_of(*typing.get_args(hint)), min_size=1, max_size=3)
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1),
        type(None): st.none(),
    }[hint]


@settings(max_examples=300)
@given(data=st.data())
def test_what_is_written_as_yaml_reads_back_equal(data: st.DataObject, tmp_path_factory):
    config_class = data.draw(st.sampled_from(CLASSES))
    own = [each.values[1] for each in SETTABLE if each.values[0] is config_class]
    key = data.draw(st.sampled_from(own))
    value = data.draw(values_of(key.hint))
    content: Any = value
    for part in reversed(key.name.split(".")):
        content = {part: content}
    path = tmp_path_factory.getbasetemp() / "drawn.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    entry: Entry = read_file(path, config_keys(config_class))[key.name]
    again = read_value(entry.value, key.hint)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(("config_class", "key"), SETTABLE)
def test_every_key_is_explained(config_class, key: Key):
    assert key.explained


@pytest.mark.parametrize(
    "text", ["null", "~", "[a, b]", "{a: 1}", "1e3", "true", "a: b", "-x", "a\nb"]
)
def test_text_that_looks_like_something_else_reads_back_equal(text, tmp_path):
    path = tmp_path / "c.yaml"
    for checkpoint in (text, [text, "b"]):
        config = LinearConfig(checkpoint=checkpoint, results=text)
        path.write_text(config_to_yaml(config))
        assert load_config(LinearConfig, path) == config


def test_a_group_that_is_given_in_part_keeps_the_defaults_of_its_class(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("checkpoint: a\nschedule:\n  gamma: 0.5\n")
    schedule = load_config(LinearConfig, path).schedule
    # Of LinearConfig, not of ScheduleConfig.
    assert (schedule.name, schedule.milestones_epochs, schedule.gamma) == ("step", [60, 80], 0.5)


@pytest.mark.parametrize("verb", ["pretrain", "linear", "knn", "submit"])
def test_help_explains_the_essential_keys_with_their_values_and_a_command(verb, capsys):
    assert main([verb, "--help"]) == 0
    few = capsys.readouterr().out
    assert main([verb, "--help", "all"]) == 0
    every = capsys.readouterr().out
    rows = re.compile(r"^  --([\w.]+)", re.MULTILINE)
    assert set(rows.findall(few)) < set(rows.findall(every))
    assert f"example: peerlearn {verb} " in few
    assert not PYTHON_TYPES.search(every)
    if verb != "submit":
        assert {"data.name", "data.root", "data.limit"} <= set(rows.findall(few))
        assert "digits, fashion_mnist" in " ".join(few.split())
        assert f"`peerlearn {verb} --help all` explains all {len(rows.findall(every))}" in few


def test_every_essential_key_is_a_key():
    for verb in (_TRAINER, KNN, LINEAR):
        keys = config_keys(verb.config_class if verb is _TRAINER else verb.config)
        assert not [key for key in verb.essential if keys.get(key, True)]
