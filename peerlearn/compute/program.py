"""How a training begins and ends on its run directory: lock, build, resume, train, DONE or FAILED."""

import contextlib
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.dist import LostRankError, Ranks
from peerlearn.compute.guards import DivergedError
from peerlearn.compute.memory import keep_freed_memory
from peerlearn.compute.resumable import Resumable
from peerlearn.compute.resume import RefusedResumeError, resume_latest, roll_back
from peerlearn.compute.saves import check_room
from peerlearn.config import config_to_yaml, load_config
from peerlearn.errors import CrashError, SaidByMainError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.generators import seed_generators
from peerlearn.runs.lock import run_lock
from peerlearn.runs.logs import log_to, log_to_terminal
from peerlearn.runs.stop import Stop, StoppedError
from peerlearn.runs.terminal import say
from peerlearn.runs.training_facts import TrainingFacts

T = TypeVar("T", bound=Resumable)

logger = logging.getLogger(__name__)


def _nothing(training: Any) -> None:
    """For functions that a program leaves out."""


@dataclass(frozen=True, kw_only=True)
class Program(Generic[T]):
    """The functions of a training.

    Attributes:
        build: function that loads the data and creates the networks of a config, at step 0.
        train: function that trains from ``training.step`` on; it returns True at the end of training, and False if it
            was asked to stop and has saved.
        facts: facts about the training that evaluators need, for env.json.
        finish: function that the main rank calls at the end of training, before DONE is written.
        summarise: function that prints what was learned, on the main rank.
    """

    build: Callable[[Any, RunDirectory, Ranks], T]
    train: Callable[[Attempt[T]], bool]
    facts: Callable[[T], TrainingFacts | None] = _nothing
    finish: Callable[[T], None] = _nothing
    summarise: Callable[[T], None] = _nothing


def run_training(
    program: Program[T],
    *,
    verb: str,
    config: Any,
    run: RunDirectory,
    ranks: Ranks,
    stop: Stop,
    resumes: bool,
    allow_elastic: bool = False,
) -> T | None:
    """Take the run directory, build the training, resume it, train it. All ranks call it together.

    If training diverges, it goes back to the save before, once.

    Args:
        program: functions that train.
        verb: verb of the command, by which `peerlearn resume` knows what to continue.
        config: config of the run.
        run: directory of the run.
        ranks: processes that train together.
        stop: whether a signal asks to stop.
        resumes: whether the run is there already and is continued.
        allow_elastic: whether another number of processes may continue the run.

    Returns:
        The training at its end; None if it was asked to stop, and saved.

    Raises:
        StoppedError: it was asked to stop before there was anything to save.
        UserError: the training failed. The message names the reason in one line, as do FAILED and the log of the rank.
    """
    log_to_terminal(main=ranks.main)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as held:
        taken_from: str | None = None
        with stop.at_once():
            if resumes:
                taken_from = ranks.from_main(lambda: held.enter_context(run_lock(run.root)))
            # Before a new run is written: if the data cannot be loaded, nothing is left behind.
            training = program.build(config, run, ranks)
            # Taken now, as it may take long: what a signal asks for must not wait for it in a save.
            training.fingerprint  # noqa: B018
        seed_generators(config.seed, ranks.rank)
        ranks.from_main(lambda: check_room(training))
        number = None
        try:
            if resumes:
                resume_latest(training, allow_elastic=allow_elastic)
            if training.step == 0:
                training.initialise()
            number = ranks.from_main(
                lambda: _start(
                    training, verb, program.facts(training), held, taken_from, resumes=resumes
                )
            )
            logs = run.logs(number)
            stacks = log_to(run.log(number, ranks.rank))
            ranks.start_heartbeat(logs, stacks)
            finished = _train(Attempt(training, number, stop), program)
            if ranks.main:
                run.event("done" if finished else "stopped", attempt=number, step=training.step)
                if finished:
                    run.mark_done()
            if not finished:
                # They may be in the middle of a batch that nobody will see.
                for worker in multiprocessing.active_children():
                    worker.terminate()
            if not finished and not training.step:
                raise StoppedError(f"stopped by {stop.name or 'another process'}")
            return training if finished else None
        except (SaidByMainError, RefusedResumeError):
            raise
        except Exception as error:
            _note_failure(error, run, ranks, number)
            if isinstance(error, UserError):
                raise
            where = f" (traceback in {run.log(number, ranks.rank)})" if number else ""
            raise CrashError(f"{type(error).__name__}: {error}{where}") from error


def _start(
    training: Resumable,
    verb: str,
    facts: TrainingFacts | None,
    held: contextlib.ExitStack,
    taken_from: str | None,
    *,
    resumes: bool,
) -> int:
    """Write the files of this start of the run, and return the number of its attempt."""
    run, config = training.run, training.config
    if not resumes:
        run.check_new()
        run.create_folder()
        taken_from = held.enter_context(run_lock(run.root))
        # Another start may have been faster than this one's lock.
        run.check_new()
    if not resumes or config != load_config(type(config), run.config):
        run.write_config(config_to_yaml(config))
    attempt = run.start_attempt(verb, facts)
    if taken_from:
        run.event("lock_taken_over", attempt=attempt, owner=taken_from)
    run.event(
        "started",
        attempt=attempt,
        step=training.step,
        total_steps=training.total_steps,
        processes=training.ranks.world_size,
        layout=training.layout,
    )
    processes = f"{training.ranks.world_size} x " if training.ranks.world_size > 1 else ""
    say(
        f"{run.root}: {training.headline()}, {processes}{training.ranks.device}, "
        f"steps {training.step} to {training.total_steps}"
    )
    if attempt > 1 and training.step == 0:
        say("nothing had been saved yet: training starts over at step 0")
    return attempt


def _train(attempt: Attempt[T], program: Program[T]) -> bool:
    """Train and finish: whether both came to their end; if not, all that there is to save is saved."""
    try:
        if not _train_steps(attempt, program.train):
            return False
        attempt.watch(lambda: program.finish(attempt.training))
    except StoppedError:
        # Between two steps: what was interrupted changes nothing.
        attempt.save_unless_saved()
        return False
    return True


def _train_steps(attempt: Attempt[T], train: Callable[[Attempt[T]], bool]) -> bool:
    """Train. After a divergence train once more, from the save before it."""
    try:
        with attempt.logging():
            return train(attempt)
    except DivergedError as error:
        # Once, for a fault that was the machine's: what the data or the learning rate did comes back.
        logger.warning("%s: going back to the save before them", error)
        roll_back(attempt.training, before_step=error.first_step, reason=str(error))
    try:
        with attempt.logging():
            return train(attempt)
    except DivergedError as again:
        raise UserError(
            f"{again}, again after going back to a save: lower base_lr, and look at the images of the "
            f"step_skipped events in {attempt.training.run.event_log}"
        ) from again


def _note_failure(error: Exception, run: RunDirectory, ranks: Ranks, attempt: int | None) -> None:
    logger.exception("the run failed")
    if not run.config.exists():
        return
    # A full disk may be what failed; then these fail too, and must not hide it.
    with contextlib.suppress(OSError):
        run.event(
            "failed",
            attempt=attempt,
            rank=ranks.rank,
            reason=str(error),
            kind=_failure_kind(error),
        )
        run.mark_failed(str(error))


def _failure_kind(error: Exception) -> str:
    """The kind of a failure, for a supervisor: only a fault that the user must mend returns after another start."""
    if isinstance(error, LostRankError):
        return "lost_rank"
    mendable = isinstance(error, UserError) and not isinstance(error, CrashError)
    return "user" if mendable else "crash"
