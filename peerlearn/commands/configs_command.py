"""`peerlearn configs`: the shipped configs and their headers."""

from collections.abc import Sequence
from pathlib import Path

from peerlearn import HOME
from peerlearn.commands.verbs import VERBS
from peerlearn.config import ArgumentParser, nearest
from peerlearn.errors import DONE, UsageError

HEADER_FIELDS = ("source", "command", "hardware", "hours", "expected metric")
# The only header field of a cluster's profile, which is no recipe.
PURPOSE = "purpose"


def main(argv: Sequence[str]) -> int:
    """List the configs of every verb, one line each, or print one config.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn configs",
        description="List the shipped configs of all verbs with source and expected metric, or print one of them. "
        "Example: peerlearn configs mcl_fashion_mnist_demo",
    )
    parser.add_argument("name", nargs="?", help="name of the config to print (default: list all)")
    name = parser.parse_args(argv).name
    if name is not None:
        print(_find(Path(name).stem).read_text(), end="")
        return DONE
    for verb, folder in config_folders().items():
        for path in sorted(folder.glob("*.yaml")):
            print(f"{verb:<8}  {path.stem:<32} {_summary(read_header(path))}")
    return DONE


def _summary(header: dict[str, str]) -> str:
    if PURPOSE in header:
        return header[PURPOSE]
    return f"{header['source']}; expected: {header['expected metric']}"


def _find(name: str) -> Path:
    """The shipped config of that name, of any verb.

    Raises:
        UsageError: there is none; the message gives the nearest name.
    """
    folders = config_folders().values()
    shipped = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    if name not in shipped:
        raise UsageError(
            f"no shipped config is named {name!r}{nearest(name, shipped)}; `peerlearn configs` lists them"
        )
    return shipped[name]


def config_folders() -> dict[str, Path]:
    """The folder of shipped configs of every verb that has some."""
    return {
        name: HOME / verb.module.partition(".")[0] / verb.configs
        for name, verb in VERBS.items()
        if verb.configs
    }


def read_header(path: Path) -> dict[str, str]:
    """The ``# field: text`` comments at the top of a config. A line without a field continues the one above."""
    header: dict[str, str] = {}
    field = ""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        name, colon, rest = text.partition(":")
        if colon and name in (*HEADER_FIELDS, PURPOSE):
            field = name
            header[field] = rest.strip()
        elif field:
            header[field] += " " + text
    return header
