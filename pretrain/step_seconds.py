"""The first steps of a run, timed in a process of their own; `peerlearn study NAME --dry_run --minutes` starts it.

    python -m pretrain.step_seconds CONFIG FOLDER

CONFIG is the resolved config of a run; FOLDER is an empty folder in the place of the run's. The process prints "ready"
once images and networks are there, and begins when its input ends, so that several can be timed side by side. Then it
prints `StepSeconds` as JSON. Where the run cannot start, it prints ``{"reason": ...}`` at once. Nothing is downloaded.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peerlearn.compute.attempt import Attempt
from peerlearn.compute.device import choose_device
from peerlearn.compute.dist import Ranks
from peerlearn.compute.memory import keep_freed_memory
from peerlearn.config import load_config
from peerlearn.data.downloads import without_downloads
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.generators import seed_generators
from peerlearn.runs.stop import Stop
from pretrain.config import PretrainConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.state import Training, build
from pretrain.train import step_row, train_step

WARM_UP_STEPS, TIMED_STEPS = 2, 8


class StepSeconds(NamedTuple):
    """The duration of steps.

    Attributes:
        seconds: seconds of each timed step, with the wait for its batch.
        steps: number of steps of the whole run.
    """

    seconds: list[float]
    steps: int


def time_steps(training: Training) -> StepSeconds:
    """Train the first steps of a training and time them, but for the first two, which warm up.

    A step is what it is in `pretrain.train.train`, its batch and its row included; the monitor, saves and exports are
    left out. A training with two steps or fewer has all of them timed.
    """
    attempt = Attempt(training, 1, Stop())
    training.cohort.train()
    last = min(WARM_UP_STEPS + TIMED_STEPS, training.total_steps)
    seconds: list[float] = []
    begun = time.perf_counter()
    while training.step < last:
        epoch, start_step = divmod(training.step, training.steps_per_epoch)
        training.unreadable.begin_epoch(epoch)
        for batch in training.loader.epoch(epoch, start_step):
            done = train_step(attempt, batch)
            training.step += 1
            if training.step % training.config.monitor.log_every_steps == 0:
                step_row(training, done)
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
            if training.step == last:
                break
    return StepSeconds(seconds[WARM_UP_STEPS:] or seconds, training.total_steps)


def unwatched(config: PretrainConfig, folder: Path) -> Training:
    """The training of a run at step 0, without a monitor."""
    ranks = Ranks(choose_device(config.device))
    if ranks.device.type == "cpu":
        keep_freed_memory()
    unwatched = dataclasses.replace(config.monitor, every_epochs=0)
    # One process has all networks, as in most studies.
    alone = dataclasses.replace(config, monitor=unwatched, parallel=ParallelConfig())
    training = build(alone, RunDirectory(folder), ranks)
    seed_generators(config.seed, ranks.rank)
    training.initialise()
    return training


def main(argv: Sequence[str]) -> int:
    """As above. Returns the exit code."""
    config, folder = (Path(word) for word in argv)
    answers = sys.stdout
    try:
        # What building and training print is no answer.
        with contextlib.redirect_stdout(sys.stderr), without_downloads():
            training = unwatched(load_config(PretrainConfig, config), folder)
            print("ready", file=answers, flush=True)
            sys.stdin.read()
            answer = time_steps(training)._asdict()
    except Exception as error:
        answer = {"reason": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
