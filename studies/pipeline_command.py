"""`peerlearn pipeline`, and `peerlearn resume` of one."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import config_to_yaml, parse_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.directory import PIPELINE_FILE
from peerlearn.runs.stop import Stop
from studies.advance import advance, ask_again, submit_watch
from studies.pipeline import (
    Pipeline,
    is_pipeline,
    load_pipeline,
    plan_pipeline,
    remove_pipeline,
    write_pipeline,
)
from studies.pipeline_config import PipelineConfig
from studies.watch import Pass
from studies.watch_command import watch, watched_pipeline

SHIPPED = Path(__file__).parent / "pipelines"


def main(argv: Sequence[str]) -> int:
    """`peerlearn pipeline FILE.yaml [--key value ...] [--dry_run]`.

    Returns:
        The exit code.
    """
    config, dry_run = parse_config(
        PipelineConfig,
        argv,
        verb="pipeline",
        description="Pretrain with several seeds, evaluate every export once it is there, and sum up.",
        example="peerlearn pipeline fashion_mnist --seeds 0 1 --folder runs/try",
        shipped=SHIPPED,
    )
    root = Path(config.folder)
    if is_pipeline(root):
        raise UserError(
            f"{root} holds a pipeline already: `peerlearn resume {root}` continues it, --folder names another folder"
        )
    pipeline = plan_pipeline(root, config)
    if dry_run:
        _print_plan(pipeline)
        return DONE
    write_pipeline(pipeline)
    result = advance(pipeline, Stop())
    if result.troubles and not _anything_submitted(pipeline):
        remove_pipeline(pipeline)
        raise result.troubles[0]
    return _go_on(pipeline, result)


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume PIPELINE [--key value ...] [--dry_run]`.

    Returns:
        The exit code.
    """
    root = Path(argv[0])
    made = load_pipeline(root)
    config, dry_run = parse_config(
        PipelineConfig,
        [str(root / PIPELINE_FILE), *argv[1:]],
        verb="resume",
        description="Submit the missing jobs of a pipeline. Changed keys count from now on.",
        example="peerlearn resume runs/fashion_mnist --seeds 0 1 2 3",
    )
    if config.folder != made.config.folder:
        raise UsageError("--folder: a pipeline goes on where it lies; move the folder instead")
    pipeline = plan_pipeline(root, config, made)
    if dry_run:
        _print_plan(pipeline)
        return DONE
    write_pipeline(pipeline)
    ask_again(pipeline)
    return _go_on(pipeline, advance(pipeline, Stop()))


def _go_on(pipeline: Pipeline, result: Pass) -> int:
    """Print what could not be submitted, and start the watch."""
    for trouble in result.troubles:
        print(f"{trouble}; it is tried again by the watch", flush=True)
    if result.finished:
        print(f"pipeline: {pipeline.root}: all is submitted", flush=True)
        return DONE
    here = pipeline.clusters["watch_cluster"].executor == "debug"
    if pipeline.config.watch == "here" or here:
        print(f"pipeline: {pipeline.root}: watching here", flush=True)
        return watch(watched_pipeline(pipeline), pipeline.config.interval_seconds, once=False)
    if said := submit_watch(pipeline):
        print(f"{said}: watch {pipeline.root}")
    print(f"pipeline: {pipeline.root}", flush=True)
    return DONE


def _anything_submitted(pipeline: Pipeline) -> bool:
    return any(entry.job for entry in pipeline.ledger.entries().values())


def _print_plan(pipeline: Pipeline) -> None:
    print(config_to_yaml(pipeline.config), end="")
    for run in pipeline.runs:
        print(f"# peerlearn pretrain {shlex.join(run.words)} --seed {run.seed} --run {run.folder}")
    for name, text in pipeline.pretraining.items():
        needs = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        print(f"# {name}: {'; '.join(needs)}")
    exports = pipeline.root / "runs" / "RUN" / "export" / "step-N"
    for evaluation in pipeline.evaluations:
        print(f"# peerlearn {evaluation.line} --checkpoint {exports}")
