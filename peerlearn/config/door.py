"""The one way in: whatever a config comes from, each of its values passes the same checks."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peerlearn.config.fields import Key, config_keys, field_types, keys_of
from peerlearn.config.files import Entry, read_file
from peerlearn.config.help import help_text
from peerlearn.config.names import nearest
from peerlearn.config.values import WrongTypeError, expected, read_value
from peerlearn.config.words import read_words
from peerlearn.errors import UsageError, UserError

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    verb: str,
    description: str,
    example: str,
    essential: Sequence[str] = (),
    shipped: Path | None = None,
    usage: str = "[CONFIG] [--key value ...] [--dry_run]",
    tells: bool = True,
) -> tuple[Config, bool]:
    """Read ``[CONFIG] [--key value ...] [--dry_run]`` into ``config_class``.

    Args:
        config_class: a frozen dataclass; nested dataclasses become dotted keys.
        argv: words after the verb. CONFIG is a path, or the name of a file in ``shipped``. Several words after a
            key are a list: ``--checkpoint runs/a runs/b``.
        verb: name of the verb, for ``--help`` and for error messages.
        description: one sentence about the verb, for ``--help``.
        example: a command that uses the verb, for ``--help``.
        essential: keys that ``--help`` explains; the others are for ``--help all``. Empty = all are explained.
        shipped: folder of the verb's shipped configs; None = the verb has none.
        usage: pattern of the words after the verb, for ``--help``.
        tells: whether a key that stands twice is told; False where words are put together from several places.

    Returns:
        The config, and whether ``--dry_run`` was given.

    Raises:
        UsageError: a key or a file is unknown, a key stands twice, or a value has the wrong type or is out of range.
        SystemExit: the words ask for ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        chosen = () if "all" in argv else essential
        print(help_text(config_class, f"peerlearn {verb}", description, example, usage, chosen))
        raise SystemExit(0)
    words = [word for word in argv if word != "--dry_run"]
    layers: list[Mapping[str, Entry]] = []
    if words and not words[0].startswith("-"):
        path = find_config(words.pop(0), shipped)
        layers.append(read_file(path, config_keys(config_class)))
    given, said = read_words(words, config_class, verb)
    config = _build(config_class, [*layers, given])
    if tells and said and os.environ.get("RANK", "0") == "0":
        print("\n".join(said))
    return config, "--dry_run" in argv


def load_config(config_class: type[Config], path: Path) -> Config:
    """Read a whole config file, as strictly as `parse_config`.

    Raises:
        UsageError: the file is missing, a key is unknown, or a value has the wrong type or is out of range.
    """
    _require_file(path)
    return _build(config_class, [read_file(path, config_keys(config_class))])


def check_complete(config_class: Any, path: Path) -> None:
    """Make sure that a file which `config_to_yaml` wrote still holds every key that it was written with.

    Raises:
        UserError: the file was cut short, or emptied.
    """
    present = read_file(path, config_keys(config_class))
    missing = [
        key.name
        for key in keys_of(config_class)
        if not (key.is_group or key.is_added or key.name in present)
    ]
    if missing:
        raise UserError(
            f"{path}: lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more keys" if len(missing) > 1 else "")
            + ": the file was cut short; restore it"
        )


def find_config(name: str, shipped: Path | None) -> Path:
    """The path of a config, which is named by its path or as a shipped config.

    Raises:
        UsageError: the name is neither a file nor a shipped config; the message gives the nearest name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        _require_file(path)
        return path
    names = {file.stem: file for file in shipped.glob("*.yaml")} if shipped else {}
    if name in names:
        return names[name]
    raise UsageError(
        f"{name!r} is neither a file nor a shipped config{nearest(name, names)}; "
        "`peerlearn configs` lists them"
    )


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the config file in it")
    if not path.is_file():
        raise UsageError(f"{path}: no such config file")


def _build(config_class: type[Config], layers: Sequence[Mapping[str, Entry]]) -> Config:
    """The config of several layers, of which a later one wins."""
    every = list(keys_of(config_class))
    keys = {key.name: key for key in every if not key.is_group}
    entries = {key: entry for layer in layers for key, entry in layer.items()}
    voided = _voided(every, layers)
    values = {name: key.default for name, key in keys.items()}
    for key, entry in entries.items():
        try:
            values[key] = None if key in voided else read_value(entry.value, keys[key].hint)
        except WrongTypeError as error:
            raise UsageError(f"{entry.place}{key}: {error}") from error
    for each in keys.values():
        if values[each.name] is dataclasses.MISSING:
            raise UsageError(f"{each.name} is missing: give --{each.name}, {expected(each.hint)}")
    try:
        made: Config = _made(config_class, values)
        return made
    except ValueError as error:
        message = " ".join(str(error).split())
        raise UsageError(f"{_place_of(message, entries)}{message}") from error


def _voided(keys: Sequence[Key], layers: Sequence[Mapping[str, Entry]]) -> set[str]:
    """The keys that another key, given in a later layer, makes null."""
    given_last = {key: number for number, layer in enumerate(layers) for key in layer}
    return {
        key.name
        for key in keys
        for other in key.voided_by
        if given_last.get(other, -1) > given_last.get(key.name, -1)
    }


def _made(config_class: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The config, and within it those of its groups, of the values of every dotted key."""
    hints = field_types(config_class)
    chosen = {}
    for field in dataclasses.fields(config_class):
        key, hint = prefix + field.name, hints[field.name]
        is_group = dataclasses.is_dataclass(hint)
        chosen[field.name] = _made(hint, values, f"{key}.") if is_group else values[key]
    return config_class(**chosen)


def _place_of(message: str, entries: Mapping[str, Entry]) -> str:
    """Where the first key of a message stands that was given at all."""
    mentioned = re.findall(r"[A-Za-z_]+(?:\.[A-Za-z_]+)*", message)
    return next((entries[key].place for key in mentioned if key in entries), "")
