"""What evaluators have in common. An evaluator is its config, its `score` function and its columns.

    words -> config -> exported networks -> score(config, networks, ranks) -> result.json, pictures -> table, means

`peerlearn.evaluation.knn_command` is one to start from. A new one needs a line among the verbs of `peerlearn.cli`.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peerlearn.compute.device_names import require_device
from peerlearn.config import changeable, config_to_yaml, parse_config, require
from peerlearn.evaluation.data import EvaluationDataConfig
from peerlearn.evaluation.plots import PictureFormat
from peerlearn.evaluation.preview import preview
from peerlearn.evaluation.results import Averaging, Score, mean_over_runs, read_result, write_score
from peerlearn.evaluation.score_table import Column, report_scores
from peerlearn.evaluation.selection import (
    Selection,
    check_network,
    differences,
    results_folder,
    run_setting,
    select_runs,
)
from peerlearn.runs.export_folders import refuse_detector

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """The keys that every evaluator has.

    Attributes:
        checkpoint: a run (its latest exports, or those that its validation chose), RUN/export/step-N, or one export;
            several, say one per seed: their scores are averaged.
        network: the networks to score: 0, 1, ..., key-0, ..., all, or ensemble.
        device: the device to compute on: auto (a GPU where there is one), cpu, cuda, ...
        results: folder of the result files; null = the run's results/, or results/ here for a lone export.
        pictures: format of the pictures beside the result files: png, svg or pdf.
    """

    checkpoint: str | list[str] = changeable()
    network: str = changeable("all")
    device: str = changeable("auto")
    results: str | None = changeable(None)
    pictures: PictureFormat = changeable("png", is_added=True)

    def __post_init__(self) -> None:
        require(
            all(self.checkpoints()) and bool(self.checkpoints()),
            "checkpoint must name at least one run or export",
        )
        require_device(self.device)

    def checkpoints(self) -> list[str]:
        """The checkpoints, of which there may be one."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint


Config = TypeVar("Config", bound=EvaluatorConfig)


@dataclass(frozen=True, kw_only=True)
class Evaluator(Generic[Config]):
    """A verb that scores exported networks.

    Attributes:
        verb: word of the command line, and task of the result files.
        config: class of its config.
        score: function that yields the scores of one checkpoint's networks. All ranks call it together; scores of
            other ranks than the main one are dropped. It imports torch itself, so that `--help` need not wait.
        columns: columns of the printed table.
        title: title of the table.
        description: sentence for `--help`.
        example: command line for `--help`.
        essential: keys that `--help` explains; the others are for `--help all`.
        shipped: folder of its shipped configs.
        ensembles: whether it can score several networks together.
        detectors: whether it can score detectors too.
        average: function from the metrics of several runs to those of their mean.
        preview: function that gives further lines of --dry_run.
        details: function that prints more of a result, which follows the table where it has a single row of one run.
    """

    verb: str
    config: type[Config]
    score: Callable[[Config, Selection, "Ranks"], Iterable[Score]]
    columns: Sequence[Column]
    title: Callable[[Config], str]
    description: str
    example: str
    essential: Sequence[str] = ()
    shipped: Path | None = None
    ensembles: bool = True
    detectors: bool = False
    average: Averaging = mean_over_runs
    preview: Callable[[Config], Sequence[str]] = lambda config: ()
    details: Callable[[Mapping[str, Any]], None] | None = None


def run(evaluator: Evaluator[Config], argv: Sequence[str]) -> int:
    """`peerlearn VERB [CONFIG] --checkpoint RUN ... [--key value ...]`. Returns the exit code.

    Raises:
        UserError: whatever `score` raises, a wrong key or value, or a folder that cannot be written.
    """
    config, dry_run = parse_config(
        evaluator.config,
        argv,
        verb=evaluator.verb,
        description=evaluator.description,
        example=evaluator.example,
        essential=evaluator.essential,
        shipped=evaluator.shipped,
    )
    check_network(config.network, ensembles=evaluator.ensembles)
    if dry_run:
        print(config_to_yaml(config), end="")
        data: Any = getattr(config, "data", None)
        lines = preview(
            config.checkpoints(),
            config.network,
            data if isinstance(data, EvaluationDataConfig) else None,
            ensembles=evaluator.ensembles,
        )
        for line in (*lines, *evaluator.preview(config)):
            print(f"# {line}")
        return 0
    selections = select_runs(config.checkpoints(), config.network, ensembles=evaluator.ensembles)
    if not evaluator.detectors:
        for folder in (each for chosen in selections for each in chosen.folders.values()):
            refuse_detector(folder)
    if unlike := differences(selections):
        logger.warning(
            "the %d checkpoints are averaged though they differ in more than their seeds: %s",
            len(selections),
            "; ".join(unlike),
        )
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.compute.dist import joined_ranks

    with joined_ranks(config.device) as ranks:
        for chosen in selections if ranks.main else []:
            if chosen.chosen_by_validation:
                print(f"{chosen.run}: networks of step {chosen.step}, which validation chose")
        files = [_evaluate(evaluator, config, selection, ranks) for selection in selections]
        if ranks.main:
            report_scores(
                files,
                evaluator.columns,
                title=evaluator.title(config),
                folder=Path(config.results or "results"),
                average=evaluator.average,
            )
            single = len(files) == 1 and len(files[0]) == 1
            if evaluator.details and single:
                evaluator.details(read_result(*files[0].values()))
    return 0


def _evaluate(
    evaluator: Evaluator[Config], config: Config, selection: Selection, ranks: "Ranks"
) -> dict[str, Path]:
    """Score one checkpoint's networks: the result files by their rows, none on other ranks than the main one."""
    from peerlearn.export import export_hash

    start = time.monotonic()
    folders = selection.folders.items()
    hashes = ranks.from_main(lambda: {name: export_hash(folder) for name, folder in folders})
    files: dict[str, Path] = {}
    for score in evaluator.score(config, selection, ranks):
        if not ranks.main:
            continue
        if score.row in files:
            raise ValueError(f"two scores are called {score.row!r}: variant must tell them apart")
        files[score.row] = write_score(
            score,
            results_folder(config.results, selection),
            task=evaluator.verb,
            step=selection.step,
            hashes=hashes,
            seed=run_setting(selection.run, "seed", None),
            seconds=time.monotonic() - start,
            pictures=config.pictures,
        )
    return files
