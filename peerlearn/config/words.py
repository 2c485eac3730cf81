"""The words of a command line: ``--key value``, ``--key=value``, and lists as several words."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from peerlearn.config.fields import keys_of
from peerlearn.config.files import Entry, written_text
from peerlearn.config.names import nearest_key
from peerlearn.config.values import Scalar, Written, admits_null, expected, list_item, members
from peerlearn.errors import UsageError


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a wrong word as one line, like all errors here, instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        """Report a wrong word.

        Raises:
            UsageError: always.
        """
        # argparse names the function that reads a value.
        message = re.sub(
            r"^argument (\S+): invalid (positive )?(int|float) value: (.*)",
            lambda match: (
                f"{match[1]}: expected a {match[2] or ''}{_NUMBERS[match[3]]}, got {match[4]}"
            ),
            message,
        )
        unknown = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        known = [option.strip("-") for option in self._option_string_actions]
        hint = nearest_key(unknown[1], known) if unknown else ""
        raise UsageError(f"{message}{hint} (`{self.prog} --help` explains)")


_NUMBERS = {"int": "whole number", "float": "number"}


def positive_number(text: str) -> float:
    """The type of an argument that is a positive number, for `ArgumentParser`.

    Raises:
        ValueError: it is none, or infinite.
    """
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


positive_number.__name__ = "positive float"


def read_words(
    words: Sequence[str], config_class: Any, verb: str
) -> tuple[dict[str, Entry], list[str]]:
    """The values of a command line by dotted keys, and a line for each key that stands twice with other values.

    Words are often put after others, to override them, so it is no error here. The lines are comments to what --dry_run
    prints.

    Raises:
        UsageError: a key is unknown or has no value, or has several where it takes one.
    """
    hints = {key.name: key.hint for key in keys_of(config_class) if not key.is_group}
    entries: dict[str, Entry] = {}
    said: list[str] = []
    for key, values in _by_key(words, hints, verb):
        value = _written(key, values, hints[key])
        if entries.get(key, Entry(value, "")).value != value:
            said.append(f"# --{key} stands twice: {' '.join(values)} counts")
        entries[key] = Entry(value, "")
    return entries, said


def without(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words without the keys, and their values, that others give too."""
    given = {word.split("=")[0] for word in others if word.startswith("--")}
    kept: list[str] = []
    keeps = True
    for word in words:
        if word.startswith("--"):
            keeps = word.split("=")[0] not in given
        if keeps:
            kept.append(word)
    return kept


def _by_key(words: Sequence[str], hints: dict[str, Any], verb: str) -> list[tuple[str, list[str]]]:
    """Every key with the words that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, has_value, value = word[2:].partition("=")
            if key not in hints:
                raise UsageError(
                    f"unknown key --{key}{nearest_key(key, hints)} (`peerlearn {verb} --help all` lists them all)"
                )
            found.append((key, [value] if has_value else []))
        elif re.match(r"-[A-Za-z]", word) and not (found and _takes_text(*found[-1], hints)):
            raise UsageError(f"{word}: keys have two dashes{nearest_key(word, hints)}")
        elif found:
            found[-1][1].append(word)
        else:
            raise UsageError(f"{word!r} stands alone: CONFIG comes first, then --key value")
    return found


def _takes_text(key: str, values: list[str], hints: dict[str, Any]) -> bool:
    """Whether the next word may be text that begins with a dash."""
    return not values and (str in members(hints[key]) or list_item(hints[key]) is str)


def _written(key: str, values: list[str], hint: Any) -> Written:
    item = list_item(hint)
    if not values:
        raise UsageError(f"--{key}: its value is missing: {expected(hint)}")
    if len(values) > 1 and item is None:
        raise UsageError(
            f"--{key}: expected {expected(hint)}, got {' '.join(map(repr, values))} (CONFIG comes before the --keys)"
        )
    if item is None:
        return _single(values[0], hint)
    if len(values) > 1:
        return [_single(value, item) for value in values]
    only = written_text(values[0])
    # Where nothing but a list will do, one word is a list of one.
    return [only] if isinstance(only, Scalar) and only.text and len(members(hint)) == 1 else only


def _single(text: str, hint: Any) -> Scalar:
    return Scalar(None) if text == "null" and admits_null(hint) else Scalar(text)
