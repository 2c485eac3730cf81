"""Configs: frozen dataclasses, filled from a YAML file and then from the command line.

An unknown key is an error that names the nearest one. The dataclass itself refuses a value out of range.
Verbs without a config read their words with `ArgumentParser`.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from peerlearn.errors import UsageError, UserError

Config = TypeVar("Config")

# Key in a field's metadata.
_CHANGEABLE = "changeable"


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a wrong word as one line, like all errors here, instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        """Report a wrong word.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message} (`{self.prog} --help` explains)")


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    verb: str,
    description: str,
    example: str,
    shipped: Path | None = None,
    usage: str = "[CONFIG] [--key value ...] [--dry_run]",
) -> tuple[Config, bool]:
    """Read ``[CONFIG] [--key value ...] [--dry_run]`` into ``config_class``.

    Args:
        config_class: a frozen dataclass; nested dataclasses become dotted keys.
        argv: words after the verb. CONFIG is a path, or the name of a file in ``shipped``. Several words after a
            key are a list: ``--checkpoint runs/a runs/b``.
        verb: name of the verb, for ``--help`` and for error messages.
        description: one sentence about the verb, for ``--help``.
        example: a command that uses the verb, for ``--help``.
        shipped: folder of the verb's shipped configs; None = the verb has none.
        usage: pattern of the words after the verb, for ``--help``.

    Returns:
        The config, and whether ``--dry_run`` was given.

    Raises:
        UsageError: a key or a file is unknown, or a value has the wrong type or is out of range.
        SystemExit: the words ask for ``--help``.
    """
    words = list(argv)
    sources = []
    if words and not words[0].startswith("-"):
        path = find_config(words.pop(0), shipped)
        _check_file_keys(path, config_class)
        sources = ["--config", str(path)]
    dry_run = "--dry_run" in words
    words = [word for word in words if word != "--dry_run"]
    _check_word_keys(words, config_class, verb)
    words = _join_lists(words, config_class)
    parser = _build_parser(config_class, verb, description, example, usage)
    return _parse(parser, config_class, [*sources, *words]), dry_run


def load_config(config_class: type[Config], path: Path) -> Config:
    """Read a whole config file, as strictly as `parse_config`.

    Raises:
        UsageError: the file is missing, a key is unknown, or a value has the wrong type or is out of range.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such config file")
    _check_file_keys(path, config_class)
    parser = _build_parser(config_class, path.name)
    return _parse(parser, config_class, ["--config", str(path)])


def check_complete(config_class: Any, path: Path) -> None:
    """Make sure that a file which `config_to_yaml` wrote still holds every key.

    Raises:
        UserError: the file was cut short, or emptied.
    """
    _check_file_keys(path, config_class)
    present = dict(_flatten(yaml.safe_load(path.read_text()), ""))
    missing = [key for key in config_keys(config_class) if key not in present]
    if missing:
        raise UserError(
            f"{path}: lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more keys" if len(missing) > 1 else "")
            + ": the file was cut short; restore it"
        )


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML, in the order of its fields; `load_config` reads it back equal."""
    plain = _plain(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def find_config(name: str, shipped: Path | None) -> Path:
    """The path of a config, which is named by its path or as a shipped config.

    Raises:
        UsageError: the name is neither a file nor a shipped config; the message gives the nearest name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UsageError(f"{name}: no such config file")
        return path
    names = {file.stem: file for file in shipped.glob("*.yaml")} if shipped else {}
    if name in names:
        return names[name]
    raise UsageError(
        f"{name!r} is neither a file nor a shipped config{nearest(name, names)}; "
        "`peerlearn configs` lists them"
    )


def changeable(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    to_more: bool = False,
) -> Any:
    """A field of a config that may change between a save and its resumption without making it another run.

    Args:
        default: as in `dataclasses.field`.
        default_factory: as in `dataclasses.field`; if the field is a group of keys, every key may change.
        to_more: whether the value may only grow.
    """
    metadata = {_CHANGEABLE: "more" if to_more else "free"}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def changeable_keys(config_class: Any) -> list[str]:
    """The dotted keys that `changeable` marks, in order, in a form for people: ``epochs (more)``, ``checkpoint.*``."""
    return [text for _, text in _changeable(config_class, "")]


def may_change(config_class: Any, key: str, before: Any, after: Any) -> bool:
    """Whether a dotted key of a saved run may take another value when it is resumed."""
    for name, text in _changeable(config_class, ""):
        if key == name or (text.endswith(".*") and key.startswith(f"{name}.")):
            return not text.endswith(" (more)") or bool(after > before)
    return False


def flat_config(config: Any) -> dict[str, Any]:
    """The values of a config by dotted keys."""
    groups = config_keys(type(config))
    content = dict(_flatten(dataclasses.asdict(config), ""))
    return {key: value for key, value in content.items() if not groups[key]}


def fixed_values(config: Any) -> dict[str, Any]:
    """The values that make a run the run it is, by dotted keys: all but those that `changeable` marks as free."""
    return {
        key: value
        for key, value in flat_config(config).items()
        if not may_change(type(config), key, value, value)
    }


def _changeable(config_class: Any, prefix: str) -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        key, is_group = prefix + field.name, dataclasses.is_dataclass(hints[field.name])
        mark = field.metadata.get(_CHANGEABLE)
        if mark:
            yield key, key + (".*" if is_group else " (more)" if mark == "more" else "")
        elif is_group:
            yield from _changeable(hints[field.name], key + ".")


def require(condition: bool, message: str) -> None:
    """Refuse a config value that makes no sense; for ``__post_init__``.

    Raises:
        ValueError: the condition does not hold. The message begins with the key.
    """
    if not condition:
        raise ValueError(message)


def nearest(name: str, known: Any) -> str:
    """``"; did you mean 'a'?"`` for the known name closest to ``name``; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def config_keys(config_class: Any) -> dict[str, bool]:
    """Every dotted key of a config class, in order. True marks a key that is a group of further keys."""
    return dict(_walk(config_class, ""))


def _walk(config_class: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        key = prefix + field.name
        is_group = dataclasses.is_dataclass(hints[field.name])
        yield key, is_group
        if is_group:
            yield from _walk(hints[field.name], key + ".")


def _check_file_keys(path: Path, config_class: Any) -> None:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if content is None:
        raise UsageError(f"{path}: holds no keys")
    if not isinstance(content, Mapping):
        raise UsageError(f"{path}: a config file holds `key: value` lines")
    keys = config_keys(config_class)
    for key, value in _flatten(content, ""):
        if key not in keys:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(key, keys)}")
        if keys[key] and not isinstance(value, Mapping):
            raise UsageError(f"{path}: {key!r} is a group of keys, not a value")


def _flatten(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _check_word_keys(words: Sequence[str], config_class: Any, verb: str) -> None:
    keys = config_keys(config_class)
    for word in words:
        if not word.startswith("--"):
            continue
        key = word[2:].split("=", 1)[0].rstrip("+")
        if key != "help" and not (key in keys and not keys[key]):
            raise UsageError(
                f"unknown key --{key}{nearest(key, keys)} (`peerlearn {verb} --help` lists them all)"
            )


def _join_lists(words: Sequence[str], config_class: Any) -> list[str]:
    """Write ``--key a b`` as ``--key [a, b]``. Where the key's type is a list, one word becomes a list too."""
    hints = dict(_hints(config_class, ""))
    joined: list[str] = []
    key, values = "", []
    for word in [*words, "--"]:
        # A word with one dash, such as -1, is a value.
        if not word.startswith("--"):
            values.append(word)
            continue
        joined += _joined(values, hints.get(key))
        key, values = word.removeprefix("--"), []
        joined.append(word)
    return joined[:-1]


def _joined(values: list[str], hint: Any) -> list[str]:
    lists = [each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is list]
    always = typing.get_origin(hint) is list
    bracketed = values[:1] and values[0].startswith(("[", "null"))
    if len(values) < 2 and (not always or not values or bracketed):
        return values
    holds_text = bool(lists) and typing.get_args(lists[0]) == (str,)
    return [f"[{', '.join(map(json.dumps, values) if holds_text else values)}]"]


def _hints(config_class: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The type of every dotted key."""
    for name, hint in typing.get_type_hints(config_class).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{name}.")


def _build_parser(
    config_class: Any, verb: str, description: str = "", example: str = "", usage: str = ""
) -> Any:
    # Imported here: a verb that takes no config should not wait for jsonargparse.
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"peerlearn {verb}",
        description=f"{description} Example: {example}",
        usage=f"peerlearn {verb} {usage}",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", action="config", help=jsonargparse.SUPPRESS)
    parser.add_class_arguments(config_class)
    return parser


def _parse(parser: Any, config_class: type[Config], words: Sequence[str]) -> Config:
    try:
        values = parser.instantiate(parser.parse_args(words))
        fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
        config = config_class(**{field.name: values[field.name] for field in fields})
        _check_text(config)
        return config
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UsageError(_readable(error)) from error


def _check_text(config: Any) -> None:
    """Refuse names in bytes that are no UTF-8, which config.yaml could not hold: such a run could not be resumed."""
    for key, value in flat_config(config).items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not any("\ud800" <= sign <= "\udfff" for sign in text):
                continue
            try:
                os.fsencode(text).decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError(
                    f"{key}: {text} has bytes that are no UTF-8 text: rename it, or give a link to it (ln -s)"
                ) from None
            raise ValueError(
                f"{key}: {text} is text that Python does not read in this locale: set PYTHONUTF8=1"
            )


def _readable(error: Exception) -> str:
    """jsonargparse's type errors as ``key: expected int, got 'a'``.

    It tells of them in prose alone, which pyproject.toml therefore pins by its minor version.
    """
    text = _one_line(error)
    match = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', text)
    if text.lower().startswith("unrecognized arguments"):
        return f"{text} (CONFIG comes before the --keys)"
    if match:
        key, expected, value = match.groups()
        return f"{key}: expected {_type_names(expected)}, got {value!r}"
    match = re.fullmatch(
        r'Parser key "([^"]+)": Does not validate against any of the Union subtypes '
        r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)",
        text,
    )
    if match:
        key, expected, value = match.groups()
        return f"{key}: expected {_type_names(expected).replace(', ', ' or ')}, got {value!r}"
    return text


def _type_names(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "")
    return text.replace("NoneType", "null")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
