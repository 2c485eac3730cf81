"""Reading configs: what is accepted, and the one line for what is not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from peerlearn.config import config_keys, config_to_yaml, load_config, parse_config
from peerlearn.errors import UsageError


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
        (["--inner.count", "many"], "inner.count: expected int, got 'many'"),
        (["--kind", "z"], "kind: expected Literal['x', 'y'], got 'z'"),
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
        ("inner: 3\n", "'inner' is a group of keys, not a value"),
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
