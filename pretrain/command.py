"""`peerlearn pretrain` and `peerlearn resume`."""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from peerlearn.config import check_complete, config_to_yaml, load_config, parse_config
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, USAGE, SaidByMainError, UsageError, UserError
from peerlearn.runs.directory import RunDirectory, default_run
from peerlearn.runs.lock import run_lock
from peerlearn.runs.stop import Stop, stop_signals
from peerlearn.runs.training_facts import TrainingFacts
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks
    from peerlearn.evaluation.classification import ClassificationScores
    from pretrain.state import Training

SHIPPED = Path(__file__).parent / "configs"
# SIGUSR2 is SLURM's, near the time limit, where a job asks for it.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_AUTO_RESUME = "--auto_resume"


def main(argv: Sequence[str]) -> int:
    """`peerlearn pretrain [CONFIG] [--key value ...] [--auto_resume] [--dry_run]`. Returns the exit code."""
    words = [word for word in argv if word != _AUTO_RESUME]
    auto_resume = len(words) < len(argv)
    config, dry_run = parse_config(
        PretrainConfig,
        words,
        verb="pretrain",
        description="Pretrain a cohort of networks that teach each other. --auto_resume: go on with the run that is "
        "there already, if there is one.",
        example="peerlearn pretrain mcl_fashion_mnist_demo --epochs 2 --run runs/try",
        shipped=SHIPPED,
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    run = RunDirectory(Path(config.run) if config.run else default_run(words))
    if not auto_resume:
        run.check_new()
    return _run(config, run, resumes=None if auto_resume else False)


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN [--allow_elastic] [--key value ...]`. Returns the exit code."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print(_RESUME_HELP)
        return DONE if words else USAGE
    if words[0].startswith("-"):
        raise UsageError(f"RUN comes before {words[0]}: peerlearn resume RUN {' '.join(words)}")
    run = RunDirectory(Path(words.pop(0)))
    run.check_exists()
    if any(word.split("=")[0] == "--run" for word in words):
        raise UsageError(
            "--run: a run goes on where it lies; for a run of its own copy the folder, then resume the copy"
        )
    check_complete(PretrainConfig, run.config)
    allow_elastic = "--allow_elastic" in words
    words = [word for word in words if word != "--allow_elastic"]
    config, dry_run = parse_config(
        PretrainConfig,
        [str(run.config), *words],
        verb="resume",
        description="Continue a run.",
        example="peerlearn resume runs/demo",
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    unchanged = config == load_config(PretrainConfig, run.config)
    if run.done and unchanged and not lacks_results(config, run):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{run.root} is done already; more epochs: --epochs N")
        return 0
    return _run(config, run, resumes=True, allow_elastic=allow_elastic)


def lacks_results(config: PretrainConfig, run: RunDirectory) -> bool:
    """Whether a run's accuracies, which only supervised ones have, are not there (any more)."""
    supervised = config.method == "supervised"
    return supervised and not any(run.results.glob("classification-*.json"))


_RESUME_HELP = """\
usage: peerlearn resume RUN [--allow_elastic] [--key value ...]

Continue a run from its newest whole checkpoint, as if it had never stopped.
Example: peerlearn resume runs/demo

  --allow_elastic  go on with another number of processes: valid, but not bit for bit the same run
  --key value      a key that may change: more --epochs, --monitor.every_epochs, --checkpoint.*,
                   --data.root, --data.workers, --device; any other change is refused"""


def _run(
    config: PretrainConfig, run: RunDirectory, *, resumes: bool | None, allow_elastic: bool = False
) -> int:
    """Train, from the start or on from a save; None: on, if the run is there already."""
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.compute.dist import start_ranks

    with stop_signals(_STOP_SIGNALS, "saving after this step") as stop:
        ranks = start_ranks(config.device, timeout_seconds=config.rank_timeout_seconds)
        failed: str | None = "it was interrupted"
        try:
            with contextlib.ExitStack() as held:
                finished = _train_locked(
                    config, run, ranks, stop, held, resumes=resumes, allow_elastic=allow_elastic
                )
            failed = None
        except Exception as error:
            failed = " ".join(str(error).split())
            raise
        finally:
            ranks.close(failed)
    if not finished:
        if ranks.main:
            print(f"saved; `peerlearn resume {run.root}` continues")
        return SAVED_RUN_AGAIN
    return 0


def _train_locked(
    config: PretrainConfig,
    run: RunDirectory,
    ranks: "Ranks",
    stop: "Stop",
    held: contextlib.ExitStack,
    *,
    resumes: bool | None,
    allow_elastic: bool,
) -> bool:
    """Take the run directory, build, train. True if training came to its end, False if a signal stopped it."""
    from pretrain.restore import RefusedResumeError, resume_latest
    from pretrain.state import build, check_room

    log_to_terminal(ranks)
    taken_from: str | None = None
    if resumes is None:
        # Asked by the main rank alone: it may have begun to write the run before another asks.
        resumes = ranks.from_main(run.config.exists)
    if resumes:
        taken_from = ranks.from_main(lambda: held.enter_context(run_lock(run.root)))
    # Before a new run is written: what cannot be had leaves nothing behind.
    training = build(config, run, ranks)
    ranks.from_main(lambda: check_room(training))
    attempt = None
    try:
        if resumes:
            resume_latest(training, allow_elastic=allow_elastic)
        attempt = ranks.from_main(lambda: _start(training, held, taken_from, resumes=resumes))
        logs = run.logs(attempt)
        stacks = log_to(run.log(attempt, ranks.rank))
        ranks.start_heartbeat(logs, stacks)
        return _train(training, attempt, stop)
    except (SaidByMainError, RefusedResumeError):
        raise
    except Exception as error:
        _note_failure(error, run, ranks, attempt)
        if isinstance(error, UserError):
            raise
        where = f" (traceback in {run.log(attempt, ranks.rank)})" if attempt else ""
        raise UserError(f"{type(error).__name__}: {error}{where}") from error


def _start(
    training: "Training", held: contextlib.ExitStack, taken_from: str | None, *, resumes: bool
) -> int:
    """Write what belongs to this start of the run; returns its attempt's number."""
    run, config = training.run, training.config
    if not resumes:
        run.check_new()
        run.create_folder()
        taken_from = held.enter_context(run_lock(run.root))
        # Another start may have been faster than this one's lock.
        run.check_new()
    if not resumes or config != load_config(PretrainConfig, run.config):
        run.write_config(config_to_yaml(config))
    attempt = run.start_attempt(_facts(training))
    if taken_from:
        run.event("lock_taken_over", attempt=attempt, owner=taken_from)
    return attempt


def _note_failure(error: Exception, run: RunDirectory, ranks: "Ranks", attempt: int | None) -> None:
    logging.getLogger(__name__).exception("the run failed")
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
    """What a supervisor needs to know: only what the user must mend comes back when the run is started again."""
    from peerlearn.compute.dist import LostRankError

    if isinstance(error, LostRankError):
        return "lost_rank"
    return "user" if isinstance(error, UserError) else "crash"


def _facts(training: "Training") -> TrainingFacts:
    """What evaluators need to know of the training."""
    return TrainingFacts(
        dataset=training.dataset.name,
        data_root=training.data.root,
        images=len(training.dataset),
        seed=training.config.seed,
        lr=training.config.lr,
        processes=training.ranks.world_size,
    )


def _train(training: "Training", attempt: int, stop: "Stop") -> bool:
    from pretrain.guards import DivergedError
    from pretrain.restore import roll_back
    from pretrain.summary import print_summary

    run, ranks = training.run, training.ranks
    if ranks.main:
        _announce(training, attempt)
    try:
        finished = _train_on(training, attempt, stop)
    except DivergedError as error:
        # Once, for a fault that was the machine's: what the data or the learning rate did comes back.
        logging.getLogger(__name__).warning("%s: going back to the save before them", error)
        roll_back(training, before_step=error.first_step, reason=str(error))
        try:
            finished = _train_on(training, attempt, stop)
        except DivergedError as again:
            raise UserError(
                f"{again}, again after going back to a save: lower base_lr, and look at the images of the "
                f"step_skipped events in {run.event_log}"
            ) from again
    if ranks.main:
        scores = _final_accuracy(training) if finished else {}
        run.event("done" if finished else "stopped", attempt=attempt, step=training.step)
        if finished:
            run.mark_done()
            print_summary(run, training.dataset.name, scores)
    return finished


def _final_accuracy(training: "Training") -> "dict[str, ClassificationScores]":
    """Of a supervised run, also left in its result files; nothing of others."""
    from pretrain.final_accuracy import write_final_accuracy
    from pretrain.supervised import Supervised

    method = training.method
    if not isinstance(method, Supervised):
        return {}
    return write_final_accuracy(training, method.ensemble_weights)


def _announce(training: "Training", attempt: int) -> None:
    config, run, ranks = training.config, training.run, training.ranks
    run.event(
        "started",
        attempt=attempt,
        step=training.step,
        total_steps=training.total_steps,
        processes=ranks.world_size,
    )
    processes = f"{ranks.world_size} x " if ranks.world_size > 1 else ""
    print(
        f"{run.root}: {config.method}, {config.cohort.networks} x {config.cohort.backbones} on "
        f"{len(training.dataset):,} images of {training.dataset.name}, {processes}{training.device}, "
        f"steps {training.step} to {training.total_steps}",
        flush=True,
    )
    if attempt > 1 and training.step == 0:
        print("nothing had been saved yet: training starts over at step 0", flush=True)


def _train_on(training: "Training", attempt: int, stop: "Stop") -> bool:
    from peerlearn.runs.progress import progress
    from pretrain.metrics import MetricsLog
    from pretrain.train import measure_untrained, train

    log = MetricsLog(training, attempt=attempt)
    quiet = not training.ranks.main
    with progress(training.total_steps, "step", done=training.step, quiet=quiet) as report:
        if training.step == 0:
            measure_untrained(training, log, report)
        finished = train(training, log, report, stop)
    log.close()
    return finished


def log_to_terminal(ranks: "Ranks") -> None:
    """Show warnings on the main rank's terminal, where no traceback belongs."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler() if ranks.main else logging.NullHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(lambda record: not record.exc_info)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.handlers = [terminal]
    logging.captureWarnings(True)


def log_to(file: Path) -> TextIO:
    """Send every log record to the rank's file too, and the stacks of a crash in a library's own code.

    Returns the open file, for stacks at a standstill.
    """
    to_file = _LogFile(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(to_file)
    assert to_file.stream is not None
    faulthandler.enable(to_file.stream)
    threading.excepthook = _log_thread_failure
    return to_file.stream


class _LogFile(logging.FileHandler):
    """A log whose disk is full loses lines, and says nothing of it: the run itself goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        return


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """A thread of a library died (TensorBoard's, on a full disk): its traceback belongs to the log."""
    if failure.exc_value is not None:
        logging.getLogger(__name__).error("a thread failed", exc_info=failure.exc_value)
