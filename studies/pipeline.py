"""A pipeline: pretraining configs x seeds, their evaluations, and a summary.

PIPELINE/  pipeline.yaml   configs/ (clusters, pretraining and evaluations, resolved when the pipeline was made)
           runs/VARIANT-seed-S/ (run directories)   slurm/ (jobs and their ledger)   summary.{csv,json,png}
"""

import contextlib
import hashlib
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from peerlearn.config import config_to_yaml, load_config
from peerlearn.errors import UsageError, UserError
from peerlearn.runs.directory import JOBS_FOLDER, PIPELINE_FILE, RunDirectory
from peerlearn.runs.files import write_text
from slurm.config import SubmitConfig
from slurm.plan import plan_tasks
from slurm.submit_command import read_cluster
from studies.ledger import PIPELINE, Ledger
from studies.pipeline_config import PipelineConfig, split_name
from studies.watch import (
    Evaluation,
    Survey,
    Watched,
    evaluations_of,
    resolve_evaluation,
    survey_jobs,
)

_LONGEST_NAME = 60
_PROFILES = ("cluster", "evaluation_cluster", "watch_cluster")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One pretraining with one seed.

    Attributes:
        variant: name of the pretraining.
        line: line of the config's `pretrain`.
        seed: seed of the run.
        folder: run directory.
    """

    variant: str
    line: str
    seed: int
    folder: Path

    @property
    def words(self) -> list[str]:
        """The words after `pretrain`."""
        return shlex.split(split_name(self.line)[1])


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline that is checked and complete.

    Attributes:
        root: folder of the pipeline.
        config: config in pipeline.yaml.
        clusters: profiles of the keys cluster, evaluation_cluster and watch_cluster.
        pretraining: resolved config of each variant, by name.
        evaluations: evaluations of each export.
    """

    root: Path
    config: PipelineConfig
    clusters: dict[str, SubmitConfig]
    pretraining: dict[str, str]
    evaluations: list[Evaluation]

    @property
    def runs(self) -> list[PlannedRun]:
        return planned_runs(self.root, self.config)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.root / PIPELINE)

    @property
    def watched(self) -> Watched:
        return Watched(
            runs=[run.folder for run in self.runs],
            evaluations=self.evaluations,
            cluster=self.clusters["evaluation_cluster"],
            every_epochs=self.config.every_epochs,
            throttle=self.config.throttle,
        )

    def ledgers(self) -> list[Ledger]:
        """The ledger of the pipeline and those of its runs."""
        return [self.ledger, *(evaluations_of(run.folder) for run in self.runs)]

    def survey(self) -> Survey:
        """Ask for the states of all jobs of the pipeline.

        Raises:
            UserError: Slurm does not answer.
        """
        return survey_jobs([run.folder for run in self.runs], self.ledgers())


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds a pipeline."""
    return (folder / PIPELINE_FILE).is_file()


def planned_runs(root: Path, config: PipelineConfig) -> list[PlannedRun]:
    """All runs, seed by seed, so that variants can be compared early."""
    return [
        PlannedRun(
            variant=name_of(line),
            line=line,
            seed=seed,
            folder=root / "runs" / f"{name_of(line)}-seed-{seed}",
        )
        for seed in config.seeds
        for line in config.pretrain
    ]


def name_of(line: str) -> str:
    """A name for a command line that can be part of a file's name: ``mcl_demo --epochs 6`` is mcl_demo-epochs-6."""
    own, words = split_name(line)
    if own:
        return own
    parts = []
    for word in shlex.split(words):
        bare = Path(word).stem if word.endswith((".yaml", ".yml")) else word.lstrip("-")
        parts.append("".join(c if c.isalnum() or c in "._-" else "-" for c in bare))
    name = "-".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(line.encode()).hexdigest()[:8]}"


def plan_pipeline(root: Path, config: PipelineConfig, made: "Pipeline | None" = None) -> Pipeline:
    """Check every line of a config and resolve the configs that it names.

    Args:
        root: folder of the pipeline.
        config: config to check.
        made: the pipeline as it was made before; lines that have not changed keep its resolved configs.

    Raises:
        UsageError: a verb, a key, a config or a profile is unknown.
        UserError: a run cannot be started in its folder.
    """
    for key, lines in (("pretrain", config.pretrain), ("evaluate", config.evaluate)):
        names = [name_of(line) for line in lines]
        if len(set(names)) < len(names):
            raise UsageError(f"{key}: two of its lines have the same name: {sorted(names)}")
    evaluations = {e.line: e for e in made.evaluations} if made else {}
    kept = made.pretraining if made else {}
    _check_same_lines(config, made)
    pretraining = {}
    for run in planned_runs(root, config):
        if run.variant in kept:
            pretraining[run.variant] = kept[run.variant]
        elif run.variant not in pretraining:
            pretraining[run.variant] = _resolve_pretraining(run)
        else:
            RunDirectory(run.folder).check_new()
    return Pipeline(
        root=root,
        config=config,
        clusters=_clusters(config, made),
        pretraining=pretraining,
        evaluations=[evaluations.get(line) or resolve_evaluation(line) for line in config.evaluate],
    )


def _check_same_lines(config: PipelineConfig, made: Pipeline | None) -> None:
    """Make sure that a name which already has runs keeps its meaning."""
    earlier = {name_of(line): line for line in made.config.pretrain} if made else {}
    for line in config.pretrain:
        if earlier.get(name_of(line), line) != line:
            raise UsageError(
                f"pretrain: {name_of(line)} stands for {earlier[name_of(line)]!r} already: name {line!r} otherwise"
            )


def _resolve_pretraining(run: PlannedRun) -> str:
    words = ["pretrain", *run.words, *own_words(run)]
    try:
        _, tasks = plan_tasks(words, [])
    except UsageError as error:
        raise UsageError(f"pretrain: {run.line!r}: {error}") from error
    config = yaml.safe_load(tasks[0].config_yaml or "")
    del config["seed"], config["run"]
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def own_words(run: PlannedRun) -> list[str]:
    """The words that differ between the runs of a variant."""
    return ["--seed", str(run.seed), "--run", str(run.folder)]


def _clusters(config: PipelineConfig, made: Pipeline | None) -> dict[str, SubmitConfig]:
    """The profiles, without the keys that are only for a single submission."""
    if made and all(getattr(config, key) == getattr(made.config, key) for key in _PROFILES):
        return made.clusters
    training = _profile("cluster", config.cluster)
    evaluation = training
    if config.evaluation_cluster:
        evaluation = _profile("evaluation_cluster", config.evaluation_cluster)
    watch = evaluation
    if config.watch_cluster:
        watch = _profile("watch_cluster", config.watch_cluster)
    watch = replace(
        watch, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=1, memory_gb=None
    )
    return dict(zip(_PROFILES, (training, evaluation, watch), strict=True))


def _profile(key: str, name: str) -> SubmitConfig:
    try:
        profile, _ = read_cluster(["--cluster", name])
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from error
    return replace(profile, wait=False, sweep=[], throttle=None, name=None, dependency=None)


def write_pipeline(pipeline: Pipeline) -> None:
    """Write the resolved configs and then pipeline.yaml. Later changes of shipped configs do not change the pipeline.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = pipeline.root / "configs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, profile in pipeline.clusters.items():
            write_text(folder / f"{key}.yaml", config_to_yaml(profile))
        for name, text in pipeline.pretraining.items():
            write_text(folder / f"pretrain-{name}.yaml", text)
        for each in pipeline.evaluations:
            text = yaml.safe_dump(each.config, sort_keys=False, allow_unicode=True)
            write_text(folder / f"evaluate-{name_of(each.line)}.yaml", text)
        write_text(pipeline.root / PIPELINE_FILE, config_to_yaml(pipeline.config))
    except OSError as error:
        raise UserError(
            f"{pipeline.root}: cannot be written ({error.strerror}): choose another --folder"
        ) from error


def remove_pipeline(pipeline: Pipeline) -> None:
    """Remove what `write_pipeline` wrote. No job may have been submitted."""
    (pipeline.root / PIPELINE_FILE).unlink(missing_ok=True)
    for name in ("configs", JOBS_FOLDER):
        shutil.rmtree(pipeline.root / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        pipeline.root.rmdir()  # Unless it holds anything else.


def load_pipeline(root: Path) -> Pipeline:
    """The pipeline that `write_pipeline` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = load_config(PipelineConfig, root / PIPELINE_FILE)
    folder = root / "configs"
    try:
        return Pipeline(
            root=root,
            config=config,
            clusters={key: load_config(SubmitConfig, folder / f"{key}.yaml") for key in _PROFILES},
            pretraining={
                name: (folder / f"pretrain-{name}.yaml").read_text(encoding="utf-8")
                for name in map(name_of, config.pretrain)
            },
            evaluations=[
                Evaluation(
                    line=line,
                    config=yaml.safe_load(
                        (folder / f"evaluate-{name_of(line)}.yaml").read_text(encoding="utf-8")
                    ),
                )
                for line in config.evaluate
            ],
        )
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: lacks a config that pipeline.yaml needs: {error}") from error
