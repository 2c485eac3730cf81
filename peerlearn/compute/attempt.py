"""One start of a training on its run directory: its beginning, its end, and what its steps need to survive."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from peerlearn.compute.dist import LostRankError, Ranks
from peerlearn.compute.guards import DivergedError
from peerlearn.compute.resumable import Resumable
from peerlearn.compute.resume import RefusedResumeError, resume_latest, roll_back
from peerlearn.compute.saves import check_room, save
from peerlearn.config import config_to_yaml, load_config
from peerlearn.counter_random import MODULE_NOISE, random_bits
from peerlearn.errors import SaidByMainError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.generators import seed_generators
from peerlearn.runs.lock import run_lock
from peerlearn.runs.logs import log_to, log_to_terminal
from peerlearn.runs.metrics import MetricsLog
from peerlearn.runs.progress import Reporter, progress
from peerlearn.runs.stop import Stop
from peerlearn.runs.training_facts import TrainingFacts

T = TypeVar("T", bound=Resumable)

logger = logging.getLogger(__name__)


class Attempt(Generic[T]):
    """The part of the spine that a training loop calls, step by step.

    Attributes:
        training: the training.
        number: number of this start of the run, counted from 1.
        log: rows of metrics.jsonl.
        report: progress bar.
        stopping: whether a signal has asked any rank to stop, as of the last `agree`.
    """

    log: MetricsLog
    report: Reporter

    def __init__(self, training: T, number: int, stop: Stop) -> None:
        self.training = training
        self.number = number
        self.stopping = False
        self._stop = stop
        self._missed_saves = 0

    def begin_step(self) -> None:
        """Begin a step: give a sign of life, seed torch's own generators, copy the buffers.

        Dropout and stochastic depth draw from those generators. Seeded by the step, they continue exactly too.
        """
        training = self.training
        training.ranks.at_step(training.step)
        seed_modules(training.config.seed, training.step, training.ranks.rank)
        training.guard.remember()

    def agree(self, faults: Tensor, *flags: bool) -> list[bool]:
        """Whether any rank has each fault, and then whether any rank has each flag. All ranks get the same answer.

        The wish to stop travels along. This is the only place of a step where the host waits for the device.

        Args:
            faults: faults of this rank, bool (n,), on the device.
            flags: further conditions of this rank, on the host.
        """
        ranks = self.training.ranks
        own = torch.tensor([self._stop.requested, *flags], dtype=torch.float32)
        # The host does not wait for this copy: the device reads it when it comes to it.
        on_device = own.to(ranks.device, non_blocking=True)
        together = torch.cat([on_device, faults.to(torch.float32)])
        stop, *agreed = (value > 0 for value in ranks.add_up(together).tolist())
        self.stopping = stop
        return [*agreed[len(flags) :], *agreed[: len(flags)]]

    def skip(self, fault: str | None, **facts: Sequence[Any]) -> None:
        """Skip this step, which has a fault on some rank: undo its forward passes, and write an event.

        Args:
            fault: fault of this rank in words; None if it has none.
            facts: facts about the ranks with a fault for the event, such as the images of their batches.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        training, ranks = self.training, self.training.ranks
        found = ranks.collect(fault and {"reason": fault, **facts})
        faults = {rank: item for rank, item in enumerate(found) if item}
        reason = "; ".join(f"rank {rank}: {item['reason']}" for rank, item in faults.items())
        epoch, batch = divmod(training.step, training.steps_per_epoch)
        if ranks.main:
            logger.warning("step %d is skipped: %s", training.step, reason)
            training.run.event(
                "step_skipped",
                step=training.step,
                epoch=epoch,
                batch=batch,
                reason=reason,
                **{
                    name: [each for item in faults.values() for each in item[name]]
                    for name in facts
                },
            )
        training.guard.skip(training.step, reason)

    def save_if_due(self) -> bool:
        """Save after a step if the config asks for it, at the end, and if a signal asks to stop.

        Nothing is saved after skipped steps: such saves would push out the last good one.

        Returns:
            Whether to stop now, before the end.

        Raises:
            NonFiniteError: a network holds NaN or Inf. Nothing is saved.
            UserError: too many saves in a row have failed, or the last save of the run has.
        """
        training = self.training
        if training.ranks.world_size == 1:
            self.stopping = self._stop.requested
        ended = training.step == training.total_steps
        every_steps = training.saves.every_steps or training.steps_per_epoch
        due = training.step % every_steps == 0 and not training.guard.in_a_row
        if due or self.stopping or ended:
            self.save(must=self.stopping or ended)
        return self.stopping and not ended

    def save(self, *, must: bool) -> None:
        """Save. If the disk does not take the save, only this save is lost, and a line and an event say so.

        Args:
            must: whether this is the last save.

        Raises:
            NonFiniteError: a network holds NaN or Inf. Nothing is saved.
            UserError: too many saves in a row have failed, or the last save of the run has.
        """
        training = self.training
        run, ranks = training.run, training.ranks
        reason = save(training, attempt=self.number)
        if reason is None:
            self._missed_saves = 0
            return
        self._missed_saves += 1
        message = f"{run.checkpoints}: step {training.step} could not be saved ({reason})"
        if must or self._missed_saves >= training.saves.max_missed:
            raise ranks.told_once(
                UserError(
                    f"{message}, miss number {self._missed_saves} in a row: make room, then "
                    f"`peerlearn resume {run.root}` goes on from the save before it"
                )
            )
        if ranks.main:
            logger.warning("%s: training goes on, the older saves stand", message)
            run.event("save_missed", step=training.step, reason=reason)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Open the metrics log and the progress bar for as long as the block lasts."""
        training = self.training
        quiet = not training.ranks.main
        self.log = MetricsLog(
            training.run,
            attempt=self.number,
            step=training.step,
            steps_per_epoch=training.steps_per_epoch,
            writes=training.ranks.main,
        )
        with progress(training.total_steps, "step", done=training.step, quiet=quiet) as self.report:
            yield
        self.log.close()


def seed_modules(seed: int, step: int, rank: int) -> None:
    """Seed torch's own generators, which dropout and stochastic depth draw from, by the step."""
    torch.manual_seed(int(random_bits(MODULE_NOISE, seed, step, rank)))


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
        UserError: the training failed. The message names the reason in one line, as do FAILED and the log of the rank.
    """
    log_to_terminal(main=ranks.main)
    with contextlib.ExitStack() as held:
        taken_from: str | None = None
        if resumes:
            taken_from = ranks.from_main(lambda: held.enter_context(run_lock(run.root)))
        # Before a new run is written: if the data cannot be loaded, nothing is left behind.
        training = program.build(config, run, ranks)
        seed_generators(config.seed, ranks.rank)
        ranks.from_main(lambda: check_room(training))
        number = None
        try:
            if resumes:
                resume_latest(training, allow_elastic=allow_elastic)
            number = ranks.from_main(
                lambda: _start(
                    training, verb, program.facts(training), held, taken_from, resumes=resumes
                )
            )
            logs = run.logs(number)
            stacks = log_to(run.log(number, ranks.rank))
            ranks.start_heartbeat(logs, stacks)
            finished = _train(Attempt(training, number, stop), program.train)
            if ranks.main:
                if finished:
                    program.finish(training)
                run.event("done" if finished else "stopped", attempt=number, step=training.step)
                if finished:
                    run.mark_done()
            return training if finished else None
        except (SaidByMainError, RefusedResumeError):
            raise
        except Exception as error:
            _note_failure(error, run, ranks, number)
            if isinstance(error, UserError):
                raise
            where = f" (traceback in {run.log(number, ranks.rank)})" if number else ""
            raise UserError(f"{type(error).__name__}: {error}{where}") from error


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
    )
    processes = f"{training.ranks.world_size} x " if training.ranks.world_size > 1 else ""
    print(
        f"{run.root}: {training.headline()}, {processes}{training.ranks.device}, "
        f"steps {training.step} to {training.total_steps}",
        flush=True,
    )
    if attempt > 1 and training.step == 0:
        print("nothing had been saved yet: training starts over at step 0", flush=True)
    return attempt


def _train(attempt: Attempt[T], train: Callable[[Attempt[T]], bool]) -> bool:
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
    return "user" if isinstance(error, UserError) else "crash"
