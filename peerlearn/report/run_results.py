"""The result files of a run, and the pictures that lie beside them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlearn.evaluation.results import read_result
from peerlearn.report.metric_kinds import network_text
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.text import printable

_PICTURES = (".png", ".svg")
_LONGEST_PROTOCOL = 2_000


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A result file.

    Attributes:
        content: what the file holds.
        pictures: pictures that were drawn of it.
    """

    content: dict[str, Any]
    pictures: tuple[Path, ...]

    @property
    def score(self) -> str:
        """What was measured, on what."""
        return printable(f"{self.content['task']} on {self.content['dataset']}")

    @property
    def network(self) -> str:
        """The network, and what tells its scores apart."""
        parts = (network_text(self.content["network"]), self.content["variant"])
        return printable(", ".join(str(part) for part in parts if part))

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        return protocol_text(self.content["protocol"])


def read_results(run: RunDirectory) -> tuple[tuple[RunResult, ...], tuple[str, ...]]:
    """The results of a run by the names of their files, and what cannot be read, in words."""
    try:
        names = sorted(os.listdir(run.results))
    except (FileNotFoundError, NotADirectoryError):
        return (), ()
    except OSError as error:
        return (), (f"{run.results.name} cannot be read ({error.strerror})",)
    found, problems = [], []
    for name in names:
        if not name.endswith(".json") or name.startswith("."):
            continue
        try:
            content = read_result(run.results / name)
        except OSError as error:
            problems.append(f"{run.results.name}/{name} cannot be read ({error.strerror})")
            continue
        except ValueError as error:
            if _is_other(run.results / name):
                continue
            problems.append(f"{run.results.name}/{name} is damaged, or no result ({error})")
            continue
        stem = name.removesuffix(".json")
        pictures = [
            run.results / other
            for other in names
            if other.endswith(_PICTURES) and (other[: len(stem)] == stem)
        ]
        found.append(RunResult(content=content, pictures=tuple(pictures)))
    return tuple(found), tuple(map(printable, problems))


def _is_other(file: Path) -> bool:
    """Whether the file is a whole one of something else than a result."""
    try:
        return "task" not in read_json_object(file)
    except (OSError, ValueError):
        return False


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """A protocol in words: its plain values. What a hash tells of images is not for reading."""
    words = [
        f"{key} {value}"
        for key, value in _flat(protocol)
        if isinstance(value, str | int | float) and not key.endswith(("_fingerprint", "sha256"))
    ]
    return printable(", ".join(words), _LONGEST_PROTOCOL)


def _flat(group: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
