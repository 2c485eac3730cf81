"""A sweep: which runs its grids and seeds make, how they are named, and how they stand.

SWEEP/  sweep.yaml (its config)   configs/NAME.yaml (as resolved)   NAME-seed-S/ (run directories)
        logs/NAME-seed-S.log (what each run printed)   sweep.{csv,json,md,png}
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peerlearn.config import config_to_yaml, load_config, nearest, parse_config
from peerlearn.errors import UsageError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import write_text
from pretrain.command import SHIPPED, lacks_results
from pretrain.config import PretrainConfig
from studies.sweep_config import SweepConfig, read_sweep

CONFIG_FILE = "sweep.yaml"
_LONGEST_NAME = 80
# What may be otherwise in a run without making it another: where and how it was run, and how often it was looked at.
_INCIDENTAL_KEYS = re.compile(
    r"run|device|rank_timeout_seconds|data\.(root|workers|fallback|max_unreadable_percent)"
    r"|monitor\.(every_epochs|log_every_steps)|checkpoint\..*"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One pretraining config of a sweep, apart from its seed and its run.

    Attributes:
        name: what its run directories begin with.
        words: after the word pretrain, of the first grid that has it.
        config: resolved.
    """

    name: str
    words: list[str]
    config: PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a grid.

    Attributes:
        grid: its name.
        labels: one for each axis; the last is the one compared along.
        variant: what is run; other cells may have the same.
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
        variant: of it.
        seed: of it.
        folder: the run directory.
        log: the file of what its process prints.
    """

    variant: Variant
    seed: int
    folder: Path
    log: Path

    @property
    def own_words(self) -> list[str]:
        """What tells it from other runs of its variant."""
        return ["--seed", str(self.seed), "--run", str(self.folder)]

    @property
    def state(self) -> str:
        """done, begun or missing; a run whose results are gone is not done."""
        run = RunDirectory(self.folder)
        if run.done and not lacks_results(self.variant.config, run):
            return "done"
        return "begun" if run.begun else "missing"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep whose configs are resolved.

    Attributes:
        config: as its file says.
        cells: of the chosen grids, in their order.
    """

    config: SweepConfig
    cells: list[Cell]

    @property
    def root(self) -> Path:
        return Path(self.config.folder)

    @property
    def grids(self) -> list[str]:
        """The names of those chosen."""
        return list(dict.fromkeys(cell.grid for cell in self.cells))

    @property
    def variants(self) -> list[Variant]:
        """Each once."""
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
        """All of them: seed by seed, so that variants can be compared early."""
        return [
            self.run_of(variant, seed) for seed in self.config.seeds for variant in self.variants
        ]


def plan_sweep(config: SweepConfig, only: Sequence[str] = ()) -> Sweep:
    """Resolve the config of every cell.

    Args:
        config: of the sweep.
        only: the names of grids; empty for all.

    Raises:
        UsageError: an unknown grid, or words that `peerlearn pretrain` refuses; the message names the label.
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
        all_words = [*common, *words]
        if tuple(all_words) not in resolved:
            try:
                resolved[tuple(all_words)] = _resolve(all_words)
            except UsageError as error:
                raise UsageError(f"grids: {grid}: {' / '.join(labels)}: {error}") from error
        found = resolved[tuple(all_words)]
        name = variant_name(found, base)
        variant = variants.setdefault(name, Variant(name=name, words=all_words, config=found))
        if variant.config != found:
            raise UsageError(
                f"grids: {grid}: {' / '.join(labels)}: it would be named {name}, as another config is: leave one out"
            )
        cells.append(Cell(grid=grid, labels=labels, variant=variant))
    return Sweep(config=config, cells=cells)


def _points(config: SweepConfig) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """Grid, labels and words of every cell."""
    for grid, axes in config.grids.items():
        for chosen in itertools.product(*(labels.items() for labels in axes.values())):
            words = [word for _, line in chosen for word in shlex.split(line)]
            yield grid, tuple(label for label, _ in chosen), words


def _base(common: list[str]) -> PretrainConfig:
    """What the names of variants tell their differences from."""
    try:
        return _resolve(common)
    except UsageError:
        # Alone the common words may lack something that every cell adds; then a wrong one shows there.
        return PretrainConfig()


def _resolve(words: list[str]) -> PretrainConfig:
    config, _ = parse_config(
        PretrainConfig, words, verb="pretrain", description="", example="", shipped=SHIPPED
    )
    return replace(config, run=None, seed=0)


def variant_name(config: PretrainConfig, base: PretrainConfig) -> str:
    """What a config has otherwise than the base, as a part of a folder's name.

    It depends on nothing else in the sweep, so that a new grid renames no run.
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


def flat_config(config: PretrainConfig) -> dict[str, Any]:
    """Values by dotted keys."""
    return dict(_flatten(asdict(config), ""))


def _flatten(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_folder(sweep: Sweep) -> None:
    """Make sure that whatever lies where the runs belong is of these configs.

    Raises:
        UserError: a run of another config has a run's name, or anything else has.
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
        ours = flat_config(replace(run.variant.config, seed=run.seed))
        theirs = flat_config(load_config(PretrainConfig, RunDirectory(run.folder).config))
        for key, value in ours.items():
            if value != theirs[key] and not _INCIDENTAL_KEYS.fullmatch(key):
                raise UserError(
                    f"{run.folder} is a run of another config: {key} is {theirs[key]!r} there and {value!r} in the "
                    "sweep: choose another --folder"
                )


def write_sweep(sweep: Sweep) -> None:
    """Write sweep.yaml, which keeps the seeds that it holds already, and the resolved configs.

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
    """Those that the folder's sweep.yaml holds, and then this sweep's."""
    file = sweep.root / CONFIG_FILE
    known = read_sweep(file).seeds if file.is_file() else []
    return sorted({*known, *sweep.config.seeds})


def is_whole(sweep: Sweep, only: Sequence[str]) -> bool:
    """Whether it has all grids, and all seeds that its folder knows of."""
    return not only and set(_all_seeds(sweep)) == set(sweep.config.seeds)


def config_file(sweep: Sweep, variant: Variant) -> Path:
    """Where a variant's config lies, resolved."""
    return sweep.root / "configs" / f"{variant.name}.yaml"


def unwritable(sweep: Sweep, error: OSError) -> UserError:
    """For a folder that does not take a file."""
    return UserError(f"{sweep.root}: cannot be written ({error.strerror}): choose another --folder")
