"""A pipeline: seeds x pretraining, their evaluations, a summary; what it has to do next, and whether it is done.

PIPELINE/  pipeline.yaml   configs/ (clusters, pretraining and evaluations, resolved when the pipeline was made)
           runs/VARIANT-seed-S/ (run directories)   slurm/ (jobs and their ledger)   summary.{csv,json,png}
"""

import contextlib
import hashlib
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from peerlearn.config import config_to_yaml, load_config
from peerlearn.errors import UsageError, UserError
from peerlearn.results import JOB_VARIABLE
from peerlearn.run_dir import RunDirectory, write_text
from peerlearn.stop import Stop
from slurm.command import read_cluster
from slurm.config import SubmitConfig
from slurm.ledger import PIPELINE, Entry, Ledger, Order, hand_over
from slurm.pipeline_config import PipelineConfig, split_name
from slurm.plan import plan_tasks
from slurm.running import job_key
from slurm.submission import Task
from slurm.watch import (
    Evaluation,
    Pass,
    Survey,
    Watched,
    evaluate_landed,
    evaluations_of,
    is_open,
    missing_results,
    resolve_evaluation,
    settle,
    survey_jobs,
    training_of,
    wanted,
)

CONFIG_FILE = "pipeline.yaml"
_LONGEST_NAME = 60
_PROFILES = ("cluster", "evaluation_cluster", "watch_cluster")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One pretraining with one seed.

    Attributes:
        variant: the name of its pretraining.
        line: of the config's `pretrain`.
        seed: of it.
        folder: the run directory.
    """

    variant: str
    line: str
    seed: int
    folder: Path

    @property
    def words(self) -> list[str]:
        """What stands after the word pretrain."""
        return shlex.split(split_name(self.line)[1])


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline that is checked and complete.

    Attributes:
        root: its folder.
        config: as pipeline.yaml holds it.
        clusters: the profiles of cluster, evaluation_cluster and watch_cluster.
        pretraining: the resolved config of each variant, by name.
        evaluations: of each export.
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
        """Its own and those of its runs."""
        return [self.ledger, *(evaluations_of(run.folder) for run in self.runs)]

    def survey(self) -> Survey:
        """Ask after all its jobs.

        Raises:
            UserError: Slurm does not answer.
        """
        return survey_jobs([run.folder for run in self.runs], self.ledgers())


def is_pipeline(folder: Path) -> bool:
    """Whether a pipeline was made there."""
    return (folder / CONFIG_FILE).is_file()


def planned_runs(root: Path, config: PipelineConfig) -> list[PlannedRun]:
    """All of them: seed by seed, so that variants can be compared early."""
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
    """A command line as a part of a file's name: its own, or ``mcl_demo --epochs 6`` is mcl_demo-epochs-6."""
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
    """Check every line of a config and resolve what it names.

    Args:
        root: the pipeline's folder.
        config: to be checked.
        made: the pipeline as it was made, whose resolved configs stay for the lines that are the same.

    Raises:
        UsageError: an unknown verb, key, config or profile.
        UserError: a run cannot be started there.
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
    """A name that has runs already may not come to mean something else."""
    earlier = {name_of(line): line for line in made.config.pretrain} if made else {}
    for line in config.pretrain:
        if earlier.get(name_of(line), line) != line:
            raise UsageError(
                f"pretrain: {name_of(line)} stands for {earlier[name_of(line)]!r} already: name {line!r} otherwise"
            )


def _resolve_pretraining(run: PlannedRun) -> str:
    words = ["pretrain", *run.words, *_own_words(run)]
    try:
        _, tasks = plan_tasks(words, [])
    except UsageError as error:
        raise UsageError(f"pretrain: {run.line!r}: {error}") from error
    config = yaml.safe_load(tasks[0].config_yaml or "")
    del config["seed"], config["run"]
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _own_words(run: PlannedRun) -> list[str]:
    return ["--seed", str(run.seed), "--run", str(run.folder)]


def _clusters(config: PipelineConfig, made: Pipeline | None) -> dict[str, SubmitConfig]:
    """The profiles, without what is only meant for a single submission."""
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
    """Write pipeline.yaml, and before it what it names, so that later changes elsewhere do not change it.

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
        write_text(pipeline.root / CONFIG_FILE, config_to_yaml(pipeline.config))
    except OSError as error:
        raise UserError(
            f"{pipeline.root}: cannot be written ({error.strerror}): choose another --folder"
        ) from error


def remove_pipeline(pipeline: Pipeline) -> None:
    """Take away what `write_pipeline` wrote; nothing else may have come of it."""
    (pipeline.root / CONFIG_FILE).unlink(missing_ok=True)
    for name in ("configs", "slurm"):
        shutil.rmtree(pipeline.root / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        pipeline.root.rmdir()  # Unless it holds anything else.


def load_pipeline(root: Path) -> Pipeline:
    """What `write_pipeline` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = load_config(PipelineConfig, root / CONFIG_FILE)
    folder = root / "configs"
    try:
        return Pipeline(
            root=root,
            config=config,
            clusters={key: load_config(SubmitConfig, folder / f"{key}.yaml") for key in _PROFILES},
            pretraining={
                name: (folder / f"pretrain-{name}.yaml").read_text()
                for name in map(name_of, config.pretrain)
            },
            evaluations=[
                Evaluation(
                    line=line,
                    config=yaml.safe_load((folder / f"evaluate-{name_of(line)}.yaml").read_text()),
                )
                for line in config.evaluate
            ],
        )
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: lacks a config that pipeline.yaml needs: {error}") from error


def advance(pipeline: Pipeline, stop: Stop) -> Pass:
    """Look at everything once, and submit what is due: pretraining, evaluations, at last the summary.

    Raises:
        UserError: Slurm does not answer, or a ledger cannot be written.
    """
    survey = pipeline.survey()
    for ledger in pipeline.ledgers():
        settle(ledger, survey)
    troubles, all_begun = _pretrain(pipeline, survey, stop)
    found = evaluate_landed(pipeline.watched, survey, stop)
    found.troubles = troubles + found.troubles
    found.finished = found.finished and all_begun and not stop.requested
    if not found.finished:
        return found
    executors = {key: profile.executor for key, profile in pipeline.clusters.items()}
    if found.live and executors["evaluation_cluster"] != "slurm":
        found.finished = False
        return found
    if executors["watch_cluster"] != "slurm":
        found.finished = not found.live
        if found.finished:
            _summarise_here(pipeline)
        return found
    try:
        found.finished = _submit_summary(pipeline, found.live)
    except UserError as error:
        found.finished = False
        found.troubles.append(error)
    return found


def _pretrain(pipeline: Pipeline, survey: Survey, stop: Stop) -> tuple[list[UserError], bool]:
    """Submit the pretraining that is due; what could not be, and whether none is left."""
    troubles: list[UserError] = []
    ledger, throttle = pipeline.ledger, pipeline.config.throttle
    running = sum(training_of(run.folder, survey) == "live" for run in pipeline.runs)
    for run in pipeline.runs:
        entry = ledger.entries().get(_key(run))
        if not is_open(entry):
            continue
        if stop.requested or (throttle is not None and running >= throttle):
            return troubles, False
        try:
            said = hand_over(ledger, _order(pipeline, run))
        except UserError as error:
            troubles.append(error)
            continue
        if said:
            print(f"{said}: {run.folder}", flush=True)
            running += 1
    entries = ledger.entries()
    return troubles, not any(is_open(entries.get(_key(run))) for run in pipeline.runs)


def _key(run: PlannedRun) -> str:
    return f"pretrain {run.folder.name}"


def _order(pipeline: Pipeline, run: PlannedRun) -> Order:
    return Order(
        key=_key(run),
        task=lambda: _pretraining_task(pipeline, run),
        home=run.folder / "slurm",
        config=pipeline.clusters["cluster"],
        prefix=f"pretrain-{run.folder.name}",
        facts={"variant": run.variant, "seed": run.seed},
    )


def _pretraining_task(pipeline: Pipeline, run: PlannedRun) -> Task:
    """Begin it, or go on with it."""
    if (run.folder / "config.yaml").is_file():
        return plan_tasks(["resume", str(run.folder)], [])[1][0]
    resolved = pipeline.root / "configs" / f"pretrain-{run.variant}.yaml"
    return plan_tasks(["pretrain", str(resolved), *_own_words(run)], [])[1][0]


def submit_watch(pipeline: Pipeline) -> str | None:
    """Have the pipeline watched by a job, unless one does; the job as `slurm.ledger.hand_over` names it.

    Raises:
        UserError: it is refused, or Slurm does not answer.
    """
    survey = pipeline.survey()
    order = Order(
        key="watch",
        task=lambda: Task(words=["watch", str(pipeline.root)]),
        home=pipeline.root / "slurm",
        config=pipeline.clusters["watch_cluster"],
        prefix="watch",
    )

    def has_ended(entry: Entry) -> bool:
        return entry.job is None or entry.kind is not None or not survey.live(job_key(entry.job))

    return hand_over(pipeline.ledger, order, due=has_ended)


def end_watch(pipeline: Pipeline) -> bool:
    """Let the watch end, unless more has been asked for since it looked; the next `submit_watch` starts another.

    Raises:
        UserError: Slurm does not answer, or the ledger cannot be written.
    """
    with pipeline.ledger.locked():
        survey = pipeline.survey()
        own_entries = pipeline.ledger.entries()
        for run in pipeline.runs:
            if is_open(own_entries.get(_key(run))) or training_of(run.folder, survey) == "live":
                return False
            entries = evaluations_of(run.folder).entries()
            if any(
                is_open(entries.get(key)) for key in wanted(run.folder, pipeline.watched, survey)
            ):
                return False
        own = own_entries.get("watch")
        if own and own.kind is None and own.name == os.environ.get(JOB_VARIABLE):
            facts = {"kind": "done", "reason": "done", "results": []}
            pipeline.ledger.add("ended", "watch", attempt=own.attempt, **facts)
    return True


def _submit_summary(pipeline: Pipeline, live: Sequence[str]) -> bool:
    """Submit the job that comes after all evaluations. Whether it is submitted."""
    evaluated = "".join(
        entry.name
        for run in pipeline.runs
        for entry in evaluations_of(run.folder).entries().values()
    )
    key = f"summary {hashlib.sha256(evaluated.encode()).hexdigest()[:12]}"
    order = Order(
        key=key,
        task=lambda: Task(words=["summary", str(pipeline.root)]),
        home=pipeline.root / "slurm",
        config=replace(
            pipeline.clusters["watch_cluster"],
            dependency=f"afterany:{':'.join(live)}" if live else None,
        ),
        prefix="summary",
    )

    def is_lost(entry: Entry) -> bool:
        return entry.kind is not None and not (pipeline.root / "summary.json").is_file()

    said = hand_over(pipeline.ledger, order, due=is_lost)
    if said:
        print(f"{said}: summary of {pipeline.root}", flush=True)
    entry = pipeline.ledger.entries().get(key)
    return entry is not None and entry.job is not None


def _summarise_here(pipeline: Pipeline) -> None:
    from slurm.summary_command import summarise

    summarise(pipeline)


def ask_again(pipeline: Pipeline) -> None:
    """Mark what has failed or is missing to be done again; what is done, waits or runs is left alone.

    Raises:
        UserError: Slurm does not answer, or a ledger cannot be written.
    """
    survey = pipeline.survey()
    for ledger in pipeline.ledgers():
        settle(ledger, survey)
    ledger = pipeline.ledger
    with ledger.locked():
        entries = ledger.entries()
        for run in pipeline.runs:
            ended = training_of(run.folder, survey) in ("none", "dead")
            if ended and not is_open(entries.get(_key(run))):
                ledger.add("again", _key(run))
    for run in pipeline.runs:
        keys = wanted(run.folder, pipeline.watched, survey)
        _ask_evaluations_again(evaluations_of(run.folder), keys)


def _ask_evaluations_again(ledger: Ledger, keys: Iterable[str]) -> None:
    if not any(map(_is_lost, ledger.entries().values())):
        return
    with ledger.locked():
        entries = ledger.entries()
        for key in keys:
            if key in entries and _is_lost(entries[key]):
                ledger.add("again", key)


def _is_lost(entry: Entry) -> bool:
    if entry.kind is None or entry.again:
        return False
    return entry.kind != "done" or bool(missing_results(entry))
