"""Config classes: frozen dataclasses, whose nested dataclasses are groups of keys."""

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

# Keys in a field's metadata.
_CHANGEABLE = "changeable"
_VOIDED_BY = "voided_by"
_ADDED = "added"


class Key(NamedTuple):
    """A dotted key of a config class.

    Attributes:
        name: its dotted name.
        hint: its type; of a group, the class of the group.
        is_group: whether it is a group of further keys.
        default: its default; `dataclasses.MISSING` where it must be given.
        explained: what the docstring of its class says of it.
        voided_by: the dotted keys which, given later than this one, make it null.
        is_added: whether runs of earlier versions lack it.
    """

    name: str
    hint: Any
    is_group: bool
    default: Any
    explained: str
    voided_by: tuple[str, ...]
    is_added: bool = False

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING


def keys_of(config_class: Any, prefix: str = "", made: Any = None) -> Iterator[Key]:
    """Every key of a config class, in order; a group comes before its keys.

    Args:
        config_class: a frozen dataclass.
        prefix: what its dotted keys begin with.
        made: an instance of it that holds the defaults; None = those of the class.
    """
    hints, explained = field_types(config_class), _explained(config_class)
    for field in dataclasses.fields(config_class):
        hint, default = hints[field.name], field.default
        if made is not None:
            default = getattr(made, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        key = Key(
            name=prefix + field.name,
            hint=hint,
            is_group=dataclasses.is_dataclass(hint),
            default=default,
            explained=explained.get(field.name, ""),
            voided_by=tuple(prefix + other for other in field.metadata.get(_VOIDED_BY, ())),
            is_added=field.metadata.get(_ADDED, False),
        )
        yield key
        if key.is_group:
            group_default = None if key.required else default
            for inner in keys_of(hint, f"{key.name}.", group_default):
                yield inner._replace(is_added=inner.is_added or key.is_added)


@functools.cache
def field_types(config_class: Any) -> dict[str, Any]:
    """The types of a class's fields. Python evaluates every annotation anew each time it is asked."""
    return typing.get_type_hints(config_class)


@functools.cache
def _explained(config_class: Any) -> dict[str, str]:
    """The sentences of ``Attributes:`` in the docstrings of a class and of those it is made from."""
    sentences: dict[str, str] = {}
    for each in reversed(config_class.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE)
        sentences |= {name: " ".join(text.split()) for name, text in found}
    return sentences


def config_keys(config_class: Any) -> dict[str, bool]:
    """Every dotted key of a config class, in order. True marks a key that is a group of further keys."""
    return dict(_names(config_class))


@functools.cache
def _names(config_class: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((key.name, key.is_group) for key in keys_of(config_class))


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML, in the order of its fields; `load_config` reads it back equal."""
    plain = _plain(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def changeable(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    to_more: bool = False,
    voided_by: Sequence[str] = (),
    is_added: bool = False,
) -> Any:
    """A field of a config that may change between a save and its resumption without making it another run.

    Args:
        default: as in `dataclasses.field`.
        default_factory: as in `dataclasses.field`; if the field is a group of keys, every key may change.
        to_more: whether the value may only grow.
        voided_by: fields of the same group: one that is given on the command line makes this one null, unless it is
            given there too.
        is_added: whether the field is `added` too.
    """
    metadata = {
        _CHANGEABLE: "more" if to_more else "free",
        _VOIDED_BY: voided_by,
        _ADDED: is_added,
    }
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def added(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field of a config that the saved runs of earlier versions lack: its default does what they did.

    Args:
        default: as in `dataclasses.field`.
        default_factory: as in `dataclasses.field`; if the field is a group of keys, they lack all of them.
    """
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata={_ADDED: True})
    return dataclasses.field(default=default, metadata={_ADDED: True})


def with_added(config_class: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a saved config, and the defaults of the `added` keys that it lacks."""
    whole = dict(saved)
    for key in keys_of(config_class):
        *groups, name = key.name.split(".")
        if key.is_added and not key.is_group:
            inner = whole
            for group in groups:
                inner[group] = dict(inner.get(group, {}))
                inner = inner[group]
            inner.setdefault(name, _plain(key.default))
    return whole


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
    return {
        key.name: _value_of(config, key.name) for key in keys_of(type(config)) if not key.is_group
    }


def fixed_values(config: Any) -> dict[str, Any]:
    """The values that make a run the run it is, by dotted keys: all but those that `changeable` marks as free."""
    return {
        key: value
        for key, value in flat_config(config).items()
        if not may_change(type(config), key, value, value)
    }


def require(condition: bool, message: str) -> None:
    """Refuse a config value that makes no sense; for ``__post_init__``.

    Raises:
        ValueError: the condition does not hold. The message begins with the key.
    """
    if not condition:
        raise ValueError(message)


def _changeable(config_class: Any, prefix: str) -> Iterator[tuple[str, str]]:
    hints = field_types(config_class)
    for field in dataclasses.fields(config_class):
        key, is_group = prefix + field.name, dataclasses.is_dataclass(hints[field.name])
        mark = field.metadata.get(_CHANGEABLE)
        if mark:
            yield key, key + (".*" if is_group else " (more)" if mark == "more" else "")
        elif is_group:
            yield from _changeable(hints[field.name], key + ".")


def _value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
