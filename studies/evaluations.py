"""Evaluations of the exports of runs: what is due, what each is named by, and what is known of its end.

RUN/evaluations/KEY/  order.json (what to measure)   outcome.json (how it ended, its result files)
                      owner.json (the process that measures now)
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text

_OUTCOME = "outcome.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an evaluation ended.

    Attributes:
        line: command line of the evaluation, without its checkpoint.
        step: step of the export.
        kind: kind of the end.
        reason: reason of a failure, in one line.
        results: result files, relative to the run.
    """

    line: str
    step: int
    kind: Literal["done", "failed"]
    reason: str = ""
    results: list[str]

    def files(self, run: Path) -> list[Path]:
        """The paths of the result files."""
        return [run / name for name in self.results]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A score that is missing.

    Attributes:
        run: name of the run directory.
        what: the pretraining, or the line and step of an evaluation.
        why: reason in one line.
    """

    run: str
    what: str
    why: str


def read_outcomes(run: Path) -> list[Outcome]:
    """The ends of the evaluations of a run, by step. A damaged file is left out: that evaluation counts as not done."""
    folders = sorted(RunDirectory(run).evaluations.glob("*"))
    found = (read_outcome(folder) for folder in folders)
    return sorted((each for each in found if each), key=lambda each: (each.step, each.line))


def read_outcome(folder: Path) -> Outcome | None:
    """The end of an evaluation; None if it has not ended or the file is damaged."""
    try:
        return Outcome(**json.loads((folder / _OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write how an evaluation ended."""
    write_text(folder / _OUTCOME, json.dumps(asdict(outcome), indent=2) + "\n")
