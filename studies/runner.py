"""Doing what is due of a study, here or in jobs, until everything is measured."""

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from peerlearn import HOME
from peerlearn.errors import DONE, FAILURE, SAVED_RUN_AGAIN, UsageError, UserError
from peerlearn.exchange.mirror_process import REST_SECONDS, send_now
from peerlearn.runs.directory import JOBS_FOLDER, RunDirectory
from peerlearn.runs.stop import STOP_SIGNALS, Stop, stop_signals
from slurm.client import own_jobs
from slurm.config import SubmitConfig
from slurm.submission import locked_home
from slurm.submit_command import read_cluster
from studies.cluster import advance, submit_background, submit_pretraining, submit_watch
from studies.config import StudyConfig
from studies.due import Jobs, Look, Work, ask_again, look, problems
from studies.evaluations import fixed_evaluations
from studies.here import Here
from studies.study import Study, all_seeds, config_file

# How long to try again if, say, Slurm is down or a quota is full.
_GIVE_UP_SECONDS = 86400.0
_POLL_SECONDS = 0.2
HERE = "here"


def go_on(
    study: Study, *, again: bool, watching: bool, interval_seconds: float | None = None
) -> int:
    """Start and submit what is due, wait for it where it runs here, and print the tables at the end.

    Args:
        study: study whose folder is written.
        again: whether what has failed is tried again.
        watching: whether to stay until everything is measured, where it runs in jobs.
        interval_seconds: seconds from one look at the runs to the next; None = the study's.

    Returns:
        The exit code: 1 if something is missing at the end, 75 if a signal asked to stop before.
    """
    config, work = study.config, work_of(study)
    interval_seconds = interval_seconds or config.interval_seconds
    if again:
        with locked_home(study.root / JOBS_FOLDER):
            ask_again(jobs_now(work, config))
    place = place_of(config.cluster)
    if place.executor == "local" and not watching:
        job = submit_background(study.root, _watch_words(study), place)
        return _submitted(study, [job] if job else [])
    if place.executor != "slurm":
        at_once = config.throttle or 1
        found = watch_here(
            work, study, at_once=at_once, interval_seconds=interval_seconds, again=again
        )
        if found is None:
            print(f"saved; `peerlearn resume {study.root}` goes on", flush=True)
    else:
        if again or not watching:
            _submit_runs(study, place, again=again)
            if config.watch == "job" and not again:
                return _submitted(study, [])
        evaluated_on = place_of(config.evaluated_on)
        found = watch(
            lambda: advance(work, evaluated_on, at_once=config.throttle), interval_seconds
        )
    if found is None:
        return SAVED_RUN_AGAIN
    _mirror_results(study)
    return _tables(study, work, found)


def _mirror_results(study: Study) -> None:
    """Have the results of the evaluations sent, which came after the trainings. What fails is a line."""
    for run in study.runs if study.config.mirror else ():
        if RunDirectory(run.folder).begun:
            said = send_now(run.folder, study.config.mirror or "", HOME, REST_SECONDS)
            if said:
                print(f"mirror: {said}", flush=True)


def _submit_runs(study: Study, place: SubmitConfig, *, again: bool) -> None:
    """Submit the runs that are due, and the job that watches them."""
    config = study.config
    trained_on = replace(place, mirror=config.mirror or place.mirror)
    # One process is enough to watch.
    small = replace(
        place_of(config.evaluated_on),
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=0,
        cpus_per_task=1,
        memory_gb=None,
    )
    # Whoever cancels the study meanwhile waits, and ends all of them.
    with locked_home(study.root / JOBS_FOLDER):
        for job in submit_pretraining(
            study.root, study.runs, trained_on, at_once=config.throttle, again=again
        ):
            print(f"job {job}: pretraining of {study.root}", flush=True)
        if config.watch == "job" and (own := submit_watch(study.root, _watch_words(study), small)):
            print(f"job {own}: watch {study.root}", flush=True)


def work_of(study: Study) -> Work:
    """The runs of a study and their evaluations.

    Raises:
        UserError: an evaluation's line is wrong, or the folder cannot be written.
    """
    return Work(
        root=study.root,
        runs=[run.folder for run in study.runs],
        evaluations=fixed_evaluations(study.root, study.config.evaluate),
        exports=study.config.exports,
        keep=study.config.keep,
    )


def jobs_now(work: Work, config: StudyConfig) -> Look:
    """One look at the work, with Slurm's list of jobs where the study uses Slurm and Slurm answers."""
    jobs = Jobs()
    if place_of(config.cluster).executor == "slurm":
        with contextlib.suppress(UserError):
            jobs = Jobs.of(own_jobs())
    return look(work, jobs)


def place_of(name: str, key: str = "cluster") -> SubmitConfig:
    """The profile of a place: a cluster (executor slurm), this machine in the background (local), or here (debug).

    It is without the keys that are for a single submission: a study names and orders its jobs itself.

    Raises:
        UsageError: the profile is unknown or wrong; the message names the key.
    """
    if name == HERE:
        return SubmitConfig(executor="debug")
    try:
        profile, _ = read_cluster(["--cluster", name])
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from error
    return replace(profile, wait=False, name=None, dependency=None)


def check_places(config: StudyConfig) -> None:
    """Make sure that runs and evaluations are both processes of this machine, or both jobs of a cluster.

    Raises:
        UsageError: they are not, or a profile is unknown or wrong.
    """
    runs = place_of(config.cluster)
    evaluations = place_of(config.evaluated_on, "evaluation_cluster")
    if (runs.executor == "slurm") != (evaluations.executor == "slurm"):
        raise UsageError(
            f"evaluation_cluster: {config.evaluation_cluster}: runs ({config.cluster}) and evaluations are both "
            "on this machine, or both jobs of a cluster"
        )


def _watch_words(study: Study) -> list[str]:
    words = ["watch", str(study.root), "--seeds", *map(str, study.config.seeds)]
    if study.grids != list(study.config.grids):
        words += ["--only", *study.grids]
    return words


def _submitted(study: Study, jobs: Sequence[str]) -> int:
    for job in jobs:
        print(f"job {job}: {study.root}")
    root = shlex.quote(str(study.root))
    print(f"peerlearn status {root} --follow    # how its runs stand")
    print(f"peerlearn table {root}              # the tables, at any time")
    print(
        f"peerlearn resume {root}             # tries again what failed, and stays until all is measured"
    )
    return DONE


def _tables(study: Study, work: Work, found: Look) -> int:
    """Print the tables and what is missing. Returns the exit code: 1 if anything is."""
    from studies.report import report

    whole = set(all_seeds(study)) == set(study.config.seeds)
    whole = whole and study.grids == list(study.config.grids)
    return FAILURE if report(study, problems(work, found), write=whole) else DONE


def watch_here(
    work: Work,
    study: Study | None,
    *,
    at_once: int,
    interval_seconds: float,
    again: bool = False,
) -> Look | None:
    """Do the work by processes of this machine, until nothing is left to do or a signal stops it.

    Args:
        work: runs and their evaluations.
        study: study whose runs are trained too; None = the runs are only watched.
        at_once: largest number of processes.
        interval_seconds: seconds from one look at the runs to the next.
        again: whether runs that have failed are tried again.

    Returns:
        What is found when nothing is left to do; None if a signal stopped the work before.
    """
    here = Here(
        work,
        study.runs if study else [],
        lambda run: config_file(study, run.variant) if study else run.folder,
        at_once=at_once,
        again=again,
        interval_seconds=interval_seconds,
        mirror=study.config.mirror if study else None,
    )
    with stop_signals(STOP_SIGNALS, "what runs saves, then all stops") as stop:
        found = here.run(stop)
    return found if here.whole else None


def watch(
    advance_once: Callable[[], Look], interval_seconds: float, *, once: bool = False
) -> Look | None:
    """Look again and again until everything is measured or has failed.

    An error is printed, and the work is tried again. After a day of errors the watch gives up.

    Args:
        advance_once: function that looks at everything once and submits what is due.
        interval_seconds: seconds from one look to the next.
        once: whether to look only once.

    Returns:
        What the last look has found; None if a signal asked to stop before.

    Raises:
        UserError: an error in the only look of `once`, or one that lasted for a day.
    """
    said, since = "", time.monotonic()
    with stop_signals(STOP_SIGNALS, "stopping") as stop:
        while not stop.requested:
            try:
                found = advance_once()
            except UserError as trouble:
                if once or time.monotonic() - since > _GIVE_UP_SECONDS:
                    raise
                if str(trouble) != said:
                    print(f"{trouble}; it is tried again every {interval_seconds:g} s", flush=True)
                said = str(trouble)
            else:
                said, since = "", time.monotonic()
                if found.finished or once:
                    return found
            _sleep(interval_seconds, stop)
    return None


def _sleep(seconds: float, stop: Stop) -> None:
    deadline = time.monotonic() + seconds
    while not stop.requested and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_SECONDS))
