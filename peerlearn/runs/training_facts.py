"""env.json: the environment and the verb of a training, and facts for those who use its networks later."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from peerlearn.errors import UserError
from peerlearn.runs.environment import environment
from peerlearn.runs.files import write_text
from peerlearn.runs.json_files import read_json_object

_PART, _VERB = "training", "verb"


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Facts about a training that its config alone does not tell.

    Attributes:
        dataset: name of the dataset.
        data_root: folder of the dataset; None = the usual places.
        images: number of training images.
        seed: seed of the run.
        lr: learning rate, scaled from the config's base_lr.
        processes: number of processes that train together.
        steps_per_epoch: number of optimiser steps in an epoch; None in files that do not tell it.
        initial_weights: facts about the weights that networks started from, one entry for each network that did not
            start from random ones; None in files that do not tell it.
    """

    dataset: str
    data_root: str | None
    images: int
    seed: int
    lr: float
    processes: int
    steps_per_epoch: int | None = None
    initial_weights: list | None = None  # type: ignore[type-arg]

    @classmethod
    def read(cls, file: Path) -> "TrainingFacts":
        """The facts that `write_env` wrote.

        Raises:
            UserError: the file lacks a fact, or cannot be read.
        """
        names = [field.name for field in fields(cls)]
        try:
            content = dict(read_json_object(file)[_PART])
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{file} does not tell the run's {', '.join(names)}") from error
        hints = get_type_hints(cls) | {"lr": int | float}
        missing = [
            field.name
            for field in fields(cls)
            if not isinstance(content.get(field.name, field.default), hints[field.name])
        ]
        if missing:
            raise UserError(f"{file} does not tell the run's {', '.join(missing)}")
        return cls(**{name: content[name] for name in names if name in content})


def write_env(file: Path, verb: str, facts: TrainingFacts | None) -> None:
    """Write env.json: versions and hardware of this process, the verb that trains, and the facts.

    Raises:
        OSError: the disk does not take the file.
    """
    content = {**environment(), _VERB: verb, _PART: asdict(facts) if facts else {}}
    write_text(file, json.dumps(content, indent=2) + "\n")


def training_verb(file: Path) -> str:
    """The verb that trains a run, from its env.json; `pretrain` if that does not tell it."""
    try:
        return str(read_json_object(file)[_VERB])
    except (OSError, ValueError, LookupError):
        return "pretrain"
