"""A sweep: the runs of its grids and seeds, their names, and their states.

SWEEP/  sweep.yaml (its config)   configs/NAME.yaml (as resolved)   NAME-seed-S/ (run directories)
        logs/NAME-seed-S.log (what each run printed)   sweep.{csv,json,md,png}
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
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from pretrain.command import SHIPPED, lacks_results
from pretrain.config import PretrainConfig
from studies.sweep_config import SweepConfig, read_sweep

CONFIG_FILE = "sweep.yaml"
_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One pretraining config of a sweep, apart from its seed and its run.

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
        labels: label on each axis; scores are compared along the last axis.
        variant: config that is run; other cells may have the same.
    """

    grid: str
    labels: tuple[str, ...]
    variant: Variant

    @property
    def title(self) -> str:
        return f"{self.grid}: {' / '.join(self.labels)}"


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A variant with one seed.

    Attributes:
        variant: config of the run.
        seed: seed of the run.
        folder: run directory.
        log: file with the output of its process.
    """

    variant: Variant
    seed: int
    folder: Path
    log: Path

    @property
    def own_words(self) -> list[str]:
        """The words that differ between the runs of a variant."""
        return ["--seed", str(self.seed), "--run", str(self.folder)]

    @property
    def state(self) -> str:
        """The state of the run: done, begun or missing. A run without its results is not done."""
        run = RunDirectory(self.folder)
        if run.done and not lacks_results(self.variant.config, run):
            return "done"
        return "begun" if run.begun else "missing"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep whose configs are resolved.

    Attributes:
        config: config in its file.
        cells: cells of the chosen grids, in order.
    """

    config: SweepConfig
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

    def run_of(self, variant: Variant, seed: int) -> SweptRun:
        """The run of a variant with a seed."""
        name = f"{variant.name}-seed-{seed}"
        return SweptRun(
            variant=variant,
            seed=seed,
            folder=self.root / name,
            log=self.root / "logs" / f"{name}.log",
        )

    @property
    def runs(self) -> list[SweptRun]:
        """All runs, seed by seed, so that variants can be compared early."""
        return [
            self.run_of(variant, seed) for seed in self.config.seeds for variant in self.variants
        ]


def plan_sweep(config: SweepConfig, only: Sequence[str] = ()) -> Sweep:
    """Resolve the config of every cell.

    Args:
        config: config of the sweep.
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
                raise UsageError(f"grids: {grid}: {' / '.join(labels)}: {error}") from error
        chosen = resolved[tuple(all_words)]
        name = variant_name(chosen, base)
        variant = variants.setdefault(name, Variant(name=name, words=all_words, config=chosen))
        if variant.config != chosen:
            raise UsageError(
                f"grids: {grid}: {' / '.join(labels)}: it would be named {name}, as another config is: leave one out"
            )
        cells.append(Cell(grid=grid, labels=labels, variant=variant))
    return Sweep(config=config, cells=cells)


def _points(config: SweepConfig) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
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

    The name depends on nothing else in the sweep, so that a new grid renames no run.
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


def check_folder(sweep: Sweep) -> None:
    """Make sure that existing folders with the names of runs are runs of these configs.

    Raises:
        UserError: a folder is a run of another config, or no run.
    """
    for run in sweep.runs:
        if run.state == "missing":
            try:
                RunDirectory(run.folder).check_new()
            except UserError as error:
                raise UserError(
                    f"{run.folder} is there and no run: choose another --folder"
                ) from error
            continue
        ours = fixed_values(replace(run.variant.config, seed=run.seed))
        theirs = fixed_values(load_config(PretrainConfig, RunDirectory(run.folder).config))
        for key, value in ours.items():
            if value != theirs[key]:
                raise UserError(
                    f"{run.folder} is a run of another config: {key} is {theirs[key]!r} there and {value!r} in the "
                    "sweep: choose another --folder"
                )


def check_variants(sweep: Sweep) -> dict[str, list[str]]:
    """Make sure that the runs which are still to start will find their images and networks.

    Returns:
        What a run of each such variant needs, by the variant's name.

    Raises:
        UserError: they will not; the message names the cell.
    """
    # Imported here: --table does not wait for torch.
    from pretrain.preview import preview

    missing = {run.variant.name for run in sweep.runs if run.state == "missing"}
    needs: dict[str, list[str]] = {}
    for cell in sweep.cells:
        if cell.variant.name in missing - needs.keys():
            try:
                needs[cell.variant.name] = preview(cell.variant.config)
            except UserError as error:
                raise UserError(f"grids: {cell.title}: {error}") from error
    return needs


def write_sweep(sweep: Sweep) -> None:
    """Write the resolved configs, and sweep.yaml, which keeps the seeds that it already has.

    Raises:
        UserError: the folder cannot be written.
    """
    whole = replace(sweep.config, seeds=_all_seeds(sweep))
    try:
        for name in ("configs", "logs"):
            (sweep.root / name).mkdir(parents=True, exist_ok=True)
        write_text(sweep.root / CONFIG_FILE, config_to_yaml(whole))
        for variant in sweep.variants:
            write_text(config_file(sweep, variant), config_to_yaml(variant.config))
    except OSError as error:
        raise unwritable(sweep, error) from error


def _all_seeds(sweep: Sweep) -> list[int]:
    """The seeds in the folder's sweep.yaml, followed by those of this sweep."""
    file = sweep.root / CONFIG_FILE
    known = read_sweep(file).seeds if file.is_file() else []
    return sorted({*known, *sweep.config.seeds})


def is_whole(sweep: Sweep, only: Sequence[str]) -> bool:
    """Whether the sweep has all its grids, and all seeds that its folder knows."""
    return not only and set(_all_seeds(sweep)) == set(sweep.config.seeds)


def config_file(sweep: Sweep, variant: Variant) -> Path:
    """The file with the resolved config of a variant."""
    return sweep.root / "configs" / f"{variant.name}.yaml"


def unwritable(sweep: Sweep, error: OSError) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(f"{sweep.root}: cannot be written ({error.strerror}): choose another --folder")
