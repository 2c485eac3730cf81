"""The text of `peerlearn VERB --help`, from the fields of a config class and its docstring."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from peerlearn.config.fields import Key, keys_of
from peerlearn.config.values import expected

_KEY_COLUMNS = 28
_NARROWEST, _WIDEST = 60, 100


def help_text(
    config_class: Any,
    command: str,
    description: str,
    example: str,
    usage: str,
    essential: Sequence[str] = (),
) -> str:
    """What the verb does, a command to run, and its keys: the essential ones, or all where none are named."""
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    keys = [key for key in keys_of(config_class) if not key.is_group]
    shown = [key for key in keys if key.name in essential] or keys
    lines = [f"usage: {command} {usage}", "", *textwrap.wrap(description, width), ""]
    lines += [f"example: {example}", ""]
    if len(shown) < len(keys):
        lines += textwrap.wrap(
            f"The essential keys; `{command} --help all` explains all {len(keys)}:", width
        )
    else:
        lines += ["All keys:"]
    for key in shown:
        lines += _rows(key, width)
    if "[CONFIG]" in usage:
        lines += [
            "",
            *textwrap.wrap(
                "CONFIG is a YAML file with these keys, or a shipped one (`peerlearn configs` lists them); it comes "
                "before the keys. --dry_run prints the resolved config and starts nothing.",
                width,
            ),
        ]
    return "\n".join(lines)


def _rows(key: Key, width: int) -> list[str]:
    name = f"  --{key.name}"
    default = "required" if key.required else f"default: {default_text(key.default)}"
    text = f"{key.explained} [{expected(key.hint)}; {default}]"
    rows = textwrap.wrap(text, width - _KEY_COLUMNS, break_long_words=False, break_on_hyphens=False)
    if len(name) + 2 > _KEY_COLUMNS:
        return [name, *(" " * _KEY_COLUMNS + row for row in rows)]
    return [name.ljust(_KEY_COLUMNS) + rows[0], *(" " * _KEY_COLUMNS + row for row in rows[1:])]


def default_text(value: Any) -> str:
    """A default as it is written in a help text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
