"""`peerlearn configs`: the shipped configs and what their headers say."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, nearest
from peerlearn.errors import DONE, UsageError

# verb -> the package and folder that hold its shipped configs
CONFIG_FOLDERS = {
    "pretrain": ("pretrain", "configs"),
    "linear": ("linear_eval", "configs"),
    "sweep": ("studies", "sweeps"),
    "pipeline": ("studies", "pipelines"),
    "submit": ("slurm", "clusters"),
}
HEADER_FIELDS = ("source", "command", "hardware", "hours", "expected metric")
# The one field of those that are no recipes: a cluster's profile.
PURPOSE = "purpose"


def main(argv: Sequence[str]) -> int:
    """List the configs of every verb, one line each, or print one whole. Returns the exit code."""
    parser = ArgumentParser(
        prog="peerlearn configs",
        description="List the shipped configs, or print one. Example: peerlearn configs mcl_fashion_mnist_demo",
    )
    parser.add_argument("name", nargs="?", help="print this config instead of the list")
    name = parser.parse_args(argv).name
    if name is not None:
        print(_find(Path(name).stem).read_text(), end="")
        return DONE
    for verb, place in CONFIG_FOLDERS.items():
        for path in sorted(config_folder(*place).glob("*.yaml")):
            print(f"{verb:<8}  {path.stem:<32} {_summary(read_header(path))}")
    return DONE


def _summary(header: dict[str, str]) -> str:
    if PURPOSE in header:
        return header[PURPOSE]
    return f"{header['source']}; expected: {header['expected metric']}"


def _find(name: str) -> Path:
    """The shipped config of that name, whichever verb's it is."""
    folders = [config_folder(*place) for place in CONFIG_FOLDERS.values()]
    shipped = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    if name not in shipped:
        raise UsageError(
            f"no shipped config is named {name!r}{nearest(name, shipped)}; `peerlearn configs` lists them"
        )
    return shipped[name]


def config_folder(package: str, folder: str) -> Path:
    """A folder of an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / folder


def read_header(path: Path) -> dict[str, str]:
    """The ``# field: text`` comment lines a config opens with; a line without a field continues the one above."""
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
