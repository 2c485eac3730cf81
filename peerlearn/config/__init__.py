"""Configs: frozen dataclasses, filled from a YAML file and then from the command line.

An unknown key, a key that stands twice and a value of another type are errors that name the key and its line. The
dataclass itself refuses a value out of range, by `require`. Verbs without a config read their words with
`ArgumentParser`.
"""

from peerlearn.config.door import check_complete, find_config, load_config, parse_config
from peerlearn.config.fields import (
    added,
    changeable,
    changeable_keys,
    config_keys,
    config_to_yaml,
    fixed_values,
    flat_config,
    may_change,
    require,
    with_added,
)
from peerlearn.config.files import read_yaml
from peerlearn.config.names import nearest, nearest_key
from peerlearn.config.words import ArgumentParser, positive_number, without

__all__ = [
    "ArgumentParser",
    "added",
    "changeable",
    "changeable_keys",
    "check_complete",
    "config_keys",
    "config_to_yaml",
    "find_config",
    "fixed_values",
    "flat_config",
    "load_config",
    "may_change",
    "nearest",
    "nearest_key",
    "parse_config",
    "positive_number",
    "read_yaml",
    "require",
    "with_added",
    "without",
]
