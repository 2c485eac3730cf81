"""A study: the runs of its grids and seeds, and their names.

STUDY/  study.yaml (its config)   configs/ (of its runs and evaluations, resolved)   NAME-seed-S/ (run directories)
        logs/ (what runs and evaluations printed)   slurm/ (jobs)   table.{csv,json,md,tex,png}
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peerlearn.config import (
    config_to_yaml,
    fixed_values,
    flat_config,
    load_config,
    nearest,
    parse_config,
    without,
)
from peerlearn.errors import UsageError, UserError
from peerlearn.runs.directory import STUDY_FILE, RunDirectory, check_owner
from peerlearn.runs.files import write_text
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig
from studies.config import StudyConfig
from studies.evaluations import Evaluation, keep_evaluations
from studies.study_file import read_study

_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One pretraining config of a study, apart from its seed and its run.

    Attributes:
        name: beginning of the names of its run directories.
        words: words after `pretrain`, from the first grid that has this config.
        config: resolved config.
    """

    name: str
    words: list[str]
    config: PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a grid.

    Attributes:
        grid: name of the grid.
        labels: label on each axis.
        variant: config that is run; other cells may have the same.
    """

    grid: str
    labels: tuple[str, ...]
    variant: Variant

    @property
    def title(self) -> str:
        return f"{self.grid}: {' / '.join(self.labels)}"


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A variant with one seed.

    Attributes:
        variant: config of the run.
        seed: seed of the run.
        folder: run directory.
        log: file with the output of its process, where this machine runs it.
    """

    variant: Variant
    seed: int
    folder: Path
    log: Path

    @property
    def own_words(self) -> list[str]:
        """The words that differ between the runs of a variant."""
        return ["--seed", str(self.seed), "--run", str(self.folder)]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study whose pretraining configs are resolved.

    Attributes:
        config: config in its file.
        cells: cells of the chosen grids, in order.
    """

    config: StudyConfig
    cells: list[Cell]

    @property
    def root(self) -> Path:
        return Path(self.config.folder)

    @property
    def grids(self) -> list[str]:
        """The names of the chosen grids."""
        return list(dict.fromkeys(cell.grid for cell in self.cells))

    @property
    def variants(self) -> list[Variant]:
        """The different configs of the cells."""
        return list({cell.variant.name: cell.variant for cell in self.cells}.values())

    @property
    def runs(self) -> list[StudyRun]:
        """All runs, seed by seed, so that variants can be compared early."""
        return [
            self.run_of(variant, seed) for seed in self.config.seeds for variant in self.variants
        ]

    def run_of(self, variant: Variant, seed: int) -> StudyRun:
        """The run of a variant with a seed."""
        name = f"{variant.name}-seed-{seed}"
        return StudyRun(
            variant=variant,
            seed=seed,
            folder=self.root / name,
            log=self.root / "logs" / f"{name}.log",
        )

    def row_of(self, cell: Cell) -> str:
        """The labels of a cell on all axes but the compared one, joined by " / "."""
        compared = list(self.config.grids[cell.grid]).index(self.config.compared_axis(cell.grid))
        return " / ".join(label for axis, label in enumerate(cell.labels) if axis != compared)

    def compared_label(self, cell: Cell) -> str:
        """The label of a cell on the compared axis."""
        return cell.labels[
            list(self.config.grids[cell.grid]).index(self.config.compared_axis(cell.grid))
        ]


def is_study(folder: Path) -> bool:
    """Whether the folder holds a study."""
    return (folder / STUDY_FILE).is_file()


def load_study(
    root: Path, *, seeds: Sequence[int] | None = None, only: Sequence[str] = ()
) -> Study:
    """The study in a folder, which may have been moved.

    Args:
        root: folder of the study.
        seeds: seeds of its runs; None = all.
        only: names of the grids; empty = all.

    Raises:
        UserError: the folder holds none, or a file is damaged.
    """
    if not is_study(root):
        raise UserError(f"{root} holds no study: it has no {STUDY_FILE}")
    return plan_study(read_study(root / STUDY_FILE, folder=str(root), seeds=seeds), only)


def plan_study(config: StudyConfig, only: Sequence[str] = ()) -> Study:
    """Resolve the config of every cell.

    Args:
        config: config of the study.
        only: names of the grids to plan; empty = all.

    Raises:
        UsageError: a grid is unknown, or `peerlearn pretrain` refuses the words of a label, which the message names.
    """
    for grid in only:
        if grid not in config.grids:
            raise UsageError(f"--only: no grid is named {grid!r}{nearest(grid, config.grids)}")
    common = shlex.split(config.pretrain)
    base = _base(common)
    resolved: dict[tuple[str, ...], PretrainConfig] = {}
    variants: dict[str, Variant] = {}
    cells = []
    for grid, labels, words in _points(config):
        if only and grid not in only:
            continue
        all_words = [*without(common, words), *words]
        if tuple(all_words) not in resolved:
            try:
                resolved[tuple(all_words)] = _resolve(all_words)
            except UsageError as error:
                raise UsageError(
                    f"grids: {grid}: {_named(config, grid, labels)}: {error}"
                ) from error
        chosen = resolved[tuple(all_words)]
        name = variant_name(chosen, base)
        variant = variants.setdefault(name, Variant(name=name, words=all_words, config=chosen))
        if variant.config != chosen:
            raise UsageError(
                f"grids: {grid}: {' / '.join(labels)}: it would be named {name}, as another config is: leave one out"
            )
        cells.append(Cell(grid=grid, labels=labels, variant=variant))
    return Study(config=config, cells=cells)


def _named(config: StudyConfig, grid: str, labels: Sequence[str]) -> str:
    """The labels of a cell with their axes: ``network ResNet-32, method vanilla``."""
    return ", ".join(
        f"{axis} {label}" for axis, label in zip(config.grids[grid], labels, strict=True)
    )


def _points(config: StudyConfig) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """The grid, the labels and the words of every cell."""
    for grid, axes in config.grids.items():
        for chosen in itertools.product(*(labels.items() for labels in axes.values())):
            words: list[str] = []
            for _, line in chosen:
                words = [*without(words, shlex.split(line)), *shlex.split(line)]
            yield grid, tuple(label for label, _ in chosen), words


def _base(common: list[str]) -> PretrainConfig:
    """The config that the names of variants are relative to."""
    try:
        return _resolve(common)
    except UsageError:
        # The common words alone may be incomplete, if every cell adds something. A wrong word then shows in the cells.
        return PretrainConfig()


def _resolve(words: list[str]) -> PretrainConfig:
    config, _ = parse_config(
        PretrainConfig,
        words,
        verb="pretrain",
        description="",
        example="",
        shipped=SHIPPED,
        tells=False,
    )
    return replace(config, run=None, seed=0)


def variant_name(config: PretrainConfig, base: PretrainConfig) -> str:
    """The differences of a config from the base, as a part of a folder's name.

    The name depends on nothing else in the study, so that a new grid renames no run.
    """
    theirs = flat_config(base)
    differing = {key: value for key, value in flat_config(config).items() if value != theirs[key]}
    parts = [f"{key}-{_text(value)}" for key, value in differing.items()]
    exact = "_".join(parts) or "base"
    name = re.sub(r"[^A-Za-z0-9._+-]", "-", exact)
    if name == exact and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def check_folder(study: Study) -> None:
    """Make sure that the folder is this account's, and that its runs are runs of these configs.

    Raises:
        UserError: another account made the study; or a folder is a run of another config, or no run.
    """
    check_owner(study.root)
    for run in study.runs:
        directory = RunDirectory(run.folder)
        if not directory.begun:
            try:
                directory.check_new()
            except UserError as error:
                raise UserError(
                    f"{run.folder} is there and no run: choose another --folder"
                ) from error
            continue
        ours = fixed_values(replace(run.variant.config, seed=run.seed))
        theirs = fixed_values(load_config(PretrainConfig, directory.config))
        for key, value in ours.items():
            if value != theirs[key]:
                raise UserError(
                    f"{run.folder} is a run of another config: {key} is {theirs[key]!r} there and {value!r} in the "
                    "study: choose another --folder"
                )


def write_study(study: Study, evaluations: list[Evaluation]) -> None:
    """Write the resolved configs, and study.yaml, which keeps the seeds that it already has.

    Raises:
        UserError: the folder cannot be written.
    """
    whole = replace(study.config, seeds=all_seeds(study))
    try:
        for name in ("configs", "logs"):
            (study.root / name).mkdir(parents=True, exist_ok=True)
        for variant in study.variants:
            write_text(config_file(study, variant), config_to_yaml(variant.config))
        keep_evaluations(study.root, evaluations)
        write_text(study.root / STUDY_FILE, config_to_yaml(whole))
    except OSError as error:
        raise unwritable(study.root, error) from error


def all_seeds(study: Study) -> list[int]:
    """The seeds in the folder's study.yaml, and those of this study."""
    file = study.root / STUDY_FILE
    known = read_study(file).seeds if file.is_file() else []
    return sorted({*known, *study.config.seeds})


def config_file(study: Study, variant: Variant) -> Path:
    """The file with the resolved config of a variant."""
    return study.root / "configs" / f"{variant.name}.yaml"


def unwritable(root: Path, error: OSError) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(f"{root}: cannot be written ({error.strerror}): choose another --folder")
