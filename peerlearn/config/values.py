"""Values as they are written, in a file or on the command line, and what they are to a key of some type.

A value is read by the type of its key: ``1e-3`` is a number to a number's key and text to a text's key.
"""

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union

from peerlearn.config.names import nearest

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][+-]?[0-9]+)?")
_TRUE_FALSE = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "text"}


class Scalar(NamedTuple):
    """A single value. ``text`` is None for null; ``quoted`` text is text, whatever it looks like."""

    text: str | None
    quoted: bool = False


# A value as it is written: single, a list, or a group of keys, whose own values lie elsewhere.
Written = Scalar | list[Any] | Mapping[str, Any]


class WrongTypeError(ValueError):
    """The value is not of the key's type. The message says what was expected and what stands there."""


def members(hint: Any) -> tuple[Any, ...]:
    """The types of which a value may be one."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def list_item(hint: Any) -> Any:
    """The type of the items where the value may be a list; None where it may not."""
    lists = [each for each in members(hint) if typing.get_origin(each) is list]
    return typing.get_args(lists[0])[0] if lists else None


def admits_null(hint: Any) -> bool:
    """Whether the value may be null."""
    return type(None) in members(hint)


def expected(hint: Any) -> str:
    """A type in words: ``a whole number or null``."""
    # null comes last, whatever the order in the code.
    ordered = sorted(members(hint), key=lambda each: each is type(None))
    return " or ".join(map(_expected, ordered))


def _expected(member: Any) -> str:
    if member is type(None):
        return "null"
    if typing.get_origin(member) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(member)))}"
    if typing.get_origin(member) is list:
        item = expected(typing.get_args(member)[0])
        return f"a list of {_PLURALS.get(item, item.removeprefix('one of '))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[member]


def shown(value: Written) -> str:
    """A value as it is written, for a message."""
    if isinstance(value, Scalar):
        if value.text is None:
            return "null"
        is_word = not (_NUMBER.fullmatch(value.text) or value.text.lower() in _TRUE_FALSE)
        return repr(value.text) if value.quoted or is_word else value.text
    return "a list" if isinstance(value, list) else "a group of keys"


def read_value(value: Written, hint: Any) -> Any:
    """What a written value is to a key of this type.

    Raises:
        WrongTypeError: it is of another type, empty, infinite, or too large.
    """
    for member in sorted(members(hint), key=lambda each: each is str):
        try:
            return _read(value, member)
        except _NotThisError:
            continue
    wrong = next(_wrong_items(value, hint), None)
    there = shown(value) if wrong is None else f"{shown(wrong)} in it"
    raise WrongTypeError(f"expected {expected(hint)}, got {there}{_fix(value, hint)}")


class _NotThisError(Exception):
    """The value is not of this member of a union."""


def _read(value: Written, member: Any) -> Any:
    if isinstance(value, list) and typing.get_origin(member) is list:
        (item,) = typing.get_args(member)
        return [_read(each, _only(item)) for each in value]
    if not isinstance(value, Scalar):
        raise _NotThisError
    if value.text is None:
        if member is type(None):
            return None
        raise _NotThisError
    if typing.get_origin(member) is Literal and value.text in typing.get_args(member):
        return value.text
    # Empty text where text is asked for is a variable of a shell that was not set.
    if member is str and value.text:
        _check_text(value.text)
        return value.text
    if not value.quoted:
        return _read_plain(value.text, member)
    raise _NotThisError


def _check_text(text: str) -> None:
    """Refuse bytes that are no UTF-8, which config.yaml could not hold: such a run could not be resumed."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise WrongTypeError(
            f"{text!r} has bytes that are no UTF-8 text: rename it, or give a link to it (ln -s)"
        )


def _only(item: Any) -> Any:
    (member,) = members(item)
    return member


def _read_plain(text: str, member: Any) -> Any:
    if member is bool and text.lower() in _TRUE_FALSE:
        return _TRUE_FALSE[text.lower()]
    if member is int and _WHOLE_NUMBER.fullmatch(text):
        number = int(text)
        if -(2**63) <= number < 2**63:
            return number
        raise WrongTypeError(f"expected a whole number that fits 64 bits, got {text}")
    if member is float and _NUMBER.fullmatch(text):
        if math.isfinite(float(text)):
            return float(text)
        raise WrongTypeError(f"expected a number that fits 64 bits, got {text}")
    raise _NotThisError


def _wrong_items(value: Written, hint: Any) -> Any:
    """The items of a list that keep it from being one of the type."""
    item = list_item(hint)
    for each in value if isinstance(value, list) and item is not None else ():
        try:
            _read(each, _only(item))
        except _NotThisError:
            yield each


def _fix(value: Written, hint: Any) -> str:
    """What could have been meant: a list of the one value, or the nearest choice."""
    takes_list = list_item(hint) is not None and not [*_wrong_items([value], hint)]
    if takes_list and isinstance(value, Scalar) and value.text:
        return f": write [{value.text}]"
    return _near_choice(value, hint)


def _near_choice(value: Written, hint: Any) -> str:
    choices = [
        choice
        for each in (*members(hint), *members(list_item(hint)))
        if typing.get_origin(each) is Literal
        for choice in typing.get_args(each)
    ]
    wrong = next(_wrong_items(value, hint), value)
    return nearest(wrong.text, choices) if isinstance(wrong, Scalar) and wrong.text else ""
