"""`peerlearn watch`: evaluate the exports of runs as they land."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, UsageError, UserError
from peerlearn.runs.stop import Stop, stop_signals
from slurm.submit_command import read_cluster
from studies.advance import advance, end_watch
from studies.pipeline import Pipeline, is_pipeline, load_pipeline
from studies.watch import (
    Pass,
    Watched,
    evaluate_landed,
    evaluations_of,
    resolve_evaluation,
    settle,
    survey_jobs,
    training_of,
)

# Slurm is down, a quota is full: what does not work for so long will not.
_GIVE_UP_SECONDS = 86400.0
_POLL_SECONDS = 0.2


def main(argv: Sequence[str]) -> int:
    """`peerlearn watch RUN|PIPELINE [--evaluate LINE ...] [--cluster C] [--once]`. Returns the exit code."""
    words = _parser().parse_args(argv)
    target: Path = words.target
    if is_pipeline(target):
        if words.evaluate or words.cluster or words.every_epochs:
            raise UsageError(
                f"{target} is a pipeline: what it evaluates, how often and where stands in its pipeline.yaml; "
                "`peerlearn resume` with those keys changes it"
            )
        pipeline = load_pipeline(target)
        interval_seconds = words.interval_seconds or pipeline.config.interval_seconds
        return watch(watched_pipeline(pipeline), interval_seconds, once=words.once)
    watched = _watched_run(target, words.evaluate, words.cluster, words.every_epochs)

    def look(stop: Stop) -> Pass:
        ledger = evaluations_of(target)
        survey = survey_jobs([target], [ledger])
        settle(ledger, survey)
        return evaluate_landed(watched, survey, stop)

    return watch(look, words.interval_seconds or 30.0, once=words.once)


def watched_pipeline(pipeline: Pipeline) -> Callable[[Stop], Pass]:
    """One look at a pipeline, which also makes sure that a `resume` meanwhile does not rely on a watch that ends."""

    def look(stop: Stop) -> Pass:
        found = advance(pipeline, stop)
        found.finished = found.finished and end_watch(pipeline)
        return found

    return look


def watch(look: Callable[[Stop], Pass], interval_seconds: float, *, once: bool) -> int:
    """Look again and again until nothing is left to come.

    What cannot be done is said and tried again, for a day in which no job works or waits either.

    Args:
        look: one look at everything, which submits what is due.
        interval_seconds: between two.
        once: look once only.

    Returns:
        0 when all is submitted; 75 when a signal asks to stop before.

    Raises:
        UserError: something does not work, `once` or for a day.
    """
    said, since = "", time.monotonic()
    with stop_signals((signal.SIGTERM, signal.SIGUSR2), "stopping") as stop:
        while not stop.requested:
            try:
                found = look(stop)
            except UserError as error:
                found = Pass(finished=False, troubles=[error])
            if found.finished:
                return DONE
            trouble = found.troubles[0] if found.troubles else None
            if trouble is None or found.training or found.live:
                since = time.monotonic()
            if trouble and (once or time.monotonic() - since > _GIVE_UP_SECONDS):
                raise trouble
            if trouble and str(trouble) != said:
                print(f"{trouble}; it is tried again every {interval_seconds:g} s", flush=True)
            said = str(trouble or "")
            if once:
                return DONE
            _sleep(interval_seconds, stop)
    return SAVED_RUN_AGAIN


def _sleep(seconds: float, stop: Stop) -> None:
    deadline = time.monotonic() + seconds
    while not stop.requested and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_SECONDS))


def _watched_run(
    run: Path, evaluate: list[str], cluster: str | None, every_epochs: int | None
) -> Watched:
    """What is asked for, else what the run's pipeline says."""
    if training_of(run, survey_jobs([run], [])) == "none":
        raise UserError(
            f"{run} is no run that has begun or has a job, and no pipeline: there is nothing to watch"
        )
    root = run.resolve().parent.parent
    if is_pipeline(root):
        watched = load_pipeline(root).watched
    elif evaluate and cluster:
        watched = Watched(runs=[], evaluations=[], cluster=read_cluster(["--cluster", cluster])[0])
    else:
        missing = "--cluster" if evaluate else "--evaluate"
        raise UsageError(f"{missing} is missing: {run} is not of a pipeline that would tell")
    return Watched(
        runs=[run],
        evaluations=[resolve_evaluation(line) for line in evaluate] or watched.evaluations,
        cluster=read_cluster(["--cluster", cluster])[0] if cluster else watched.cluster,
        every_epochs=every_epochs or watched.every_epochs,
        throttle=watched.throttle,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="peerlearn watch",
        description="Evaluate each export of a run, or of a pipeline's runs, once, as it lands; end when all runs have "
        "ended. Whatever becomes of this process, the next one goes on where it was. "
        "Example: peerlearn watch runs/a --cluster local --evaluate 'knn --k 20' 'linear logistic_regression'",
    )
    parser.add_argument("target", type=Path, metavar="RUN|PIPELINE")
    parser.add_argument(
        "--evaluate",
        nargs="+",
        action="extend",
        default=[],
        metavar="LINE",
        help="verb and words of an evaluation, without --checkpoint (default: the pipeline's)",
    )
    parser.add_argument("--cluster", help="where they run (default: where the pipeline's do)")
    parser.add_argument(
        "--every_epochs",
        type=_positive(int),
        help="only exports of epochs divisible by this, and the last",
    )
    parser.add_argument(
        "--interval_seconds",
        type=_positive(float),
        help="between two looks (default: the pipeline's, or 30)",
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read
