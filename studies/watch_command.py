"""`peerlearn watch`: evaluate the exports of runs once they are there."""

from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, positive_number
from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN, UsageError, UserError
from peerlearn.runs.directory import check_owner
from slurm.config import SubmitConfig
from studies.cluster import advance
from studies.due import Jobs, Work, problems, training_of
from studies.evaluations import resolve_evaluation, study_of
from studies.formats import problem_text
from studies.runner import HERE, go_on, place_of, watch, watch_here, work_of
from studies.study import is_study, load_study
from studies.study_file import read_exports


def main(argv: Sequence[str]) -> int:
    """`peerlearn watch RUN|STUDY [--evaluate LINE ...] [--cluster C] [--once]`.

    Returns:
        The exit code.
    """
    words = _parser().parse_args(argv)
    target: Path = words.target
    check_owner(target)
    if is_study(target):
        if words.evaluate or words.cluster or words.exports:
            raise UsageError(
                f"{target} is a study: what it evaluates and where stands in its study.yaml; "
                "`peerlearn resume` with those keys changes it"
            )
        study = load_study(target, seeds=words.seeds, only=words.only)
        return go_on(study, again=False, watching=True, interval_seconds=words.interval_seconds)
    if words.seeds or words.only:
        raise UsageError(f"{target} is no study: --seeds and --only name parts of one")
    work, place, at_once = _watched_run(target, words.evaluate, words.cluster, words.exports)
    interval_seconds = words.interval_seconds or 30.0
    if place.executor == "slurm":
        found = watch(
            lambda: advance(work, place, at_once=at_once), interval_seconds, once=words.once
        )
    else:
        found = watch_here(work, None, at_once=at_once or 1, interval_seconds=interval_seconds)
    if found is None or words.once:
        return SAVED_RUN_AGAIN if found is None else DONE
    missing = problems(work, found)
    for each in missing:
        print(f"missing: {problem_text(each)}")
    return FAILURE if missing else DONE


def _watched_run(
    run: Path, evaluate: list[str], cluster: str | None, exports: str | None
) -> tuple[Work, SubmitConfig, int | None]:
    """The run with the evaluations that the user asked for, or else those of its study.

    Returns:
        The work, the place of its evaluations, and the largest number of them at once.
    """
    if training_of(run, Jobs()) == "none":
        raise UserError(
            f"{run} is no run that has begun or has a job, and no study: there is nothing to watch"
        )
    root = study_of(run)
    study = load_study(root) if root else None
    if study is None and not evaluate:
        raise UsageError(f"--evaluate is missing: {run} is not of a study that would tell")
    evaluations = [resolve_evaluation(line) for line in evaluate]
    if study is not None and not evaluations:
        evaluations = work_of(study).evaluations
    wanted = study.config.exports if study else "all"
    if exports is not None:
        wanted = read_exports(exports)
    work = Work(root=run, runs=[run], evaluations=evaluations, exports=wanted)
    place = place_of(cluster or (study.config.evaluated_on if study else HERE))
    return work, place, study.config.throttle if study else None


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="peerlearn watch",
        description="Evaluate each export of a run, or what a study evaluates, once it is there, and end when "
        "everything is measured. If this process is killed, the same command continues its work. "
        "Example: peerlearn watch runs/a --evaluate 'knn --k 20' 'linear logistic_regression'",
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN|STUDY", help="folder of a run or of a study"
    )
    parser.add_argument(
        "--evaluate",
        nargs="+",
        action="extend",
        default=[],
        metavar="LINE",
        help="verb and words of an evaluation, without --checkpoint (default: the study's)",
    )
    parser.add_argument(
        "--cluster",
        help="place of the evaluations: here, or a profile (default: the study's, or here)",
    )
    parser.add_argument(
        "--exports", help="exports to evaluate: last, all, or an interval in epochs (default: all)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GRID", help="grids of a study (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of a study (default: all)")
    parser.add_argument(
        "--interval_seconds",
        type=positive_number,
        help="seconds from one look to the next (default: the study's, or 30)",
    )
    parser.add_argument(
        "--once", action="store_true", help="look once at a run with a cluster, and end"
    )
    return parser
