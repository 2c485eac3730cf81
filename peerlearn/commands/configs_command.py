"""`peerlearn configs`: the shipped configs and their headers."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peerlearn import HOME
from peerlearn.commands.verbs import VERBS
from peerlearn.config import ArgumentParser, nearest
from peerlearn.data.published import PUBLISHED
from peerlearn.errors import DONE, UsageError

HEADER_FIELDS = ("source", "command", "hardware", "hours", "expected metric")
# The only header field of a cluster's profile, which is no recipe.
PURPOSE = "purpose"
# What a header says of a figure that nobody has measured.
UNMEASURED = "unmeasured"


# Order of the table.
_TASKS = {
    "pretrain": "pretraining without labels",
    "supervised": "training with labels",
    "prototypical": "few-shot training",
    "linear": "evaluating features",
    "detect": "training detectors",
    "study": "studies: grids x seeds, evaluations, tables",
    "submit": "cluster profiles (for --cluster)",
}


class Recipe(NamedTuple):
    """A shipped config, as its file and its header tell it.

    Attributes:
        name: name of the config.
        task: key of the table's tasks.
        data: name of the data set; empty where the run's is taken.
        images: number of training images; 0 where that is not known.
        header: header of the file.
    """

    name: str
    task: str
    data: str
    images: int
    header: dict[str, str]

    @property
    def place(self) -> str:
        """Hours and hardware, as far as they were measured."""
        hours, comma, how = self.header.get("hours", UNMEASURED).partition(",")
        return (
            hours if hours == UNMEASURED else f"{hours} h on {self.header['hardware']}{comma}{how}"
        )


def main(argv: Sequence[str]) -> int:
    """List the configs of every verb by task, size of the data and hours, or print one config.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(
        prog="peerlearn configs",
        description="List the shipped configs of all verbs by task, number of images and hours, or print one of them "
        "with its source and expected metric. Example: peerlearn configs mcl_fashion_mnist_demo",
    )
    parser.add_argument("name", nargs="?", help="name of the config to print (default: list all)")
    name = parser.parse_args(argv).name
    if name is not None:
        print(_find(Path(name).stem).read_text(), end="")
        return DONE
    everything = recipes()
    for task, title in _TASKS.items():
        print(f"{title}:")
        _print_rows([each for each in everything if each.task == task])
        print()
    print("hours are measured ones, or unmeasured; `peerlearn configs NAME` prints a config")
    return DONE


def print_recipes(verb: str) -> None:
    """Print the configs of a verb by task, size of the data and hours, and how to start one."""
    example = min((each for each in recipes() if each.task == verb), key=_order)
    print(
        f"peerlearn {verb} CONFIG: choose a recipe by the size of the data and the time there is\n"
    )
    for task in (verb, "supervised", "prototypical"):
        print(f"{_TASKS[task]}:")
        _print_rows([each for each in recipes() if each.task == task])
        print()
    print(f"to start:         {example.header['command']}")
    print(f"own images:       peerlearn {verb} CONFIG --data.name folder --data.root FOLDER")
    print(f"what a run needs: peerlearn {verb} CONFIG --dry_run")
    print(f"all keys:         peerlearn {verb} --help all")


def recipes() -> list[Recipe]:
    """Every shipped config, by task, size of the data and hours."""
    found = [
        _recipe(verb, path)
        for verb, folder in config_folders().items()
        for path in folder.glob("*.yaml")
    ]
    return sorted(found, key=_order)


def _order(recipe: Recipe) -> tuple[int, int, bool, str]:
    tasks = list(_TASKS)
    unmeasured = recipe.header.get("hours", UNMEASURED) == UNMEASURED
    return tasks.index(recipe.task), recipe.images, unmeasured, recipe.name


def _recipe(verb: str, path: Path) -> Recipe:
    content = yaml.safe_load(path.read_text())
    pretraining = _pretraining(verb, content)
    method = pretraining.get("method") if verb == "pretrain" else None
    data = pretraining.get("data", {})
    return Recipe(
        name=path.stem,
        task=method if method in _TASKS else verb,
        data=data.get("name", ""),
        images=_count(data),
        header=read_header(path),
    )


def _pretraining(verb: str, content: dict[str, Any]) -> dict[str, Any]:
    """The config that names the data: the file itself, or what the first run of a study trains."""
    if verb != "study":
        return content
    axes = next(iter(content["grids"].values())).values()
    firsts = [next(iter(labels.values())) for labels in axes if isinstance(labels, dict)]
    words = " ".join(filter(None, [content.get("pretrain", ""), *firsts])).split()
    config = dict(yaml.safe_load(_find(words[0]).read_text())) if words[0][0] != "-" else {}
    named = {key.removeprefix("--data."): value for key, value in pairwise(words)}
    given = {key: yaml.safe_load(named[key]) for key in ("name", "limit", "shots") if key in named}
    return config | {"data": config.get("data", {}) | given}


def _count(data: dict[str, Any]) -> int:
    """How many images the keys of `data` choose."""
    published = PUBLISHED.get(data.get("name", ""))
    if published is None:
        return 0
    images = published.images[data.get("split", "train")]
    if data.get("shots"):
        images = min(images, data["shots"] * published.classes)
    return int(min(images, data.get("limit") or images))


def _print_rows(rows: Sequence[Recipe]) -> None:
    for row in rows:
        if PURPOSE in row.header:
            print(f"  {row.name:<34} {row.header[PURPOSE].partition('. ')[0].rstrip('.')}")
        else:
            images = f"{row.images:>9,} images of {row.data}" if row.images else row.data
            images = images or "the run's images"
            print(f"  {row.name:<34} {images:<39} {row.place}")


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
