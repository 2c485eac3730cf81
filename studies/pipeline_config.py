"""The config of a pipeline. Every key of FILE.yaml and of the command line is a field here."""

import math
import re
import shlex
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import require


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Pretraining with several seeds, and the evaluations of each checkpoint.

    Attributes:
        folder: folder of the pipeline, for its runs, jobs and summary.
        cluster: profile of the pretraining jobs: local, debug, slurm, or a YAML file.
        evaluation_cluster: profile of the evaluation jobs; null = that of the pretraining.
        watch_cluster: profile of the small job that watches, and of the summary's job; null = that of the evaluations,
            with one process and no GPU.
        seeds: seeds of each pretraining.
        pretrain: words after `pretrain`, one line per variant, without --seed and --run; `NAME = ` before the words
            names the variant, else the line is its name.
        evaluate: command lines of the evaluations, verb first, without --checkpoint.
        every_epochs: interval of the evaluated exports in epochs; the last export is always evaluated; null = all are.
        throttle: largest number of pretrainings, and of evaluations, that wait or run at once; null = no limit.
        watch: place of the watch: job, or here in the foreground for clusters whose nodes may not submit.
        interval_seconds: seconds from one look at the runs to the next.
    """

    folder: str
    cluster: str = "local"
    evaluation_cluster: str | None = None
    watch_cluster: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    pretrain: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    every_epochs: int | None = None
    throttle: int | None = None
    watch: Literal["job", "here"] = "job"
    interval_seconds: float = 30.0

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must name the pipeline's folder")
        for key in ("seeds", "pretrain", "evaluate"):
            values = getattr(self, key)
            require(bool(values), f"{key} must hold at least one entry")
            require(len(set(values)) == len(values), f"{key} holds an entry twice: {values}")
        for key in ("pretrain", "evaluate"):
            for line in getattr(self, key):
                _check_line(key, line)
        for key in ("every_epochs", "throttle"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key} must be at least 1, got {value}")
        require(
            0 < self.interval_seconds < math.inf,
            f"interval_seconds must be positive and finite, got {self.interval_seconds}",
        )


def split_name(line: str) -> tuple[str | None, str]:
    """The name of a variant, or None, and its words: ``mcl = mcl_demo --epochs 6``."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+) = (.*)", line, re.DOTALL)
    return (match[1], match[2]) if match else (None, line)


def _check_line(key: str, line: str) -> None:
    try:
        words = shlex.split(split_name(line)[1])
    except ValueError as error:
        raise ValueError(f"{key}: {line!r} cannot be split into words: {error}") from error
    require(bool(words), f"{key} holds an empty line")
    own = {"pretrain": ("--seed", "--run"), "evaluate": ("--checkpoint",)}[key]
    for word in words:
        name = word.split("=")[0]
        require(name not in own, f"{key}: {line!r}: {name} is set by the pipeline: leave it out")
        require(
            name not in ("--help", "-h", "--dry_run"), f"{key}: {line!r}: {name} has no place here"
        )
