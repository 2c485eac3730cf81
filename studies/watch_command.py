"""`peerlearn watch`: evaluate each export of runs once it is there."""

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

# How long to try again if, say, Slurm is down or a quota is full.
_GIVE_UP_SECONDS = 86400.0
_POLL_SECONDS = 0.2


def main(argv: Sequence[str]) -> int:
    """`peerlearn watch RUN|PIPELINE [--evaluate LINE ...] [--cluster C] [--once]`.

    Returns:
        The exit code.
    """
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
    """One look at a pipeline. It also makes sure that a simultaneous `resume` does not rely on a watch that ends."""

    def look(stop: Stop) -> Pass:
        result = advance(pipeline, stop)
        result.finished = result.finished and end_watch(pipeline)
        return result

    return look


def watch(look: Callable[[Stop], Pass], interval_seconds: float, *, once: bool) -> int:
    """Look again and again until no export is to come and everything is submitted.

    An error is printed, and the work is tried again. After a day of errors without any live job the watch gives up.

    Args:
        look: function that looks at everything once and submits what is due.
        interval_seconds: seconds from one look to the next.
        once: whether to look only once.

    Returns:
        0 if everything is submitted; 75 if a signal asked to stop before.

    Raises:
        UserError: an error in the only look of `once`, or one that lasted for a day.
    """
    said, since = "", time.monotonic()
    with stop_signals((signal.SIGTERM, signal.SIGUSR2), "stopping") as stop:
        while not stop.requested:
            try:
                result = look(stop)
            except UserError as error:
                result = Pass(finished=False, troubles=[error])
            if result.finished:
                return DONE
            trouble = result.troubles[0] if result.troubles else None
            if trouble is None or result.training or result.live:
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
    """The run with the evaluations that the user asked for, or else those of the run's pipeline."""
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
        description="Evaluate each export of a run, or of a pipeline's runs, once it is there, and end when all runs "
        "have ended. If this process is killed, the same command continues its work. "
        "Example: peerlearn watch runs/a --cluster local --evaluate 'knn --k 20' 'linear logistic_regression'",
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN|PIPELINE", help="folder of a run or of a pipeline"
    )
    parser.add_argument(
        "--evaluate",
        nargs="+",
        action="extend",
        default=[],
        metavar="LINE",
        help="verb and words of an evaluation, without --checkpoint (default: the pipeline's)",
    )
    parser.add_argument(
        "--cluster", help="profile of the evaluation jobs (default: the pipeline's)"
    )
    parser.add_argument(
        "--every_epochs",
        type=_positive(int),
        help="evaluate only the exports of epochs divisible by this, and the last",
    )
    parser.add_argument(
        "--interval_seconds",
        type=_positive(float),
        help="seconds from one look to the next (default: the pipeline's, or 30)",
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
