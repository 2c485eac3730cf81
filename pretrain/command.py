"""`peerlearn pretrain` and `peerlearn resume`."""

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peerlearn.config import (
    changeable_keys,
    check_complete,
    config_to_yaml,
    load_config,
    parse_config,
)
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, USAGE, UsageError
from peerlearn.runs.directory import RunDirectory, default_run
from peerlearn.runs.stop import stop_signals
from peerlearn.runs.training_facts import TrainingFacts
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from pretrain.state import Training

SHIPPED = Path(__file__).parent / "configs"
# SIGUSR2 is SLURM's, near the time limit, where a job asks for it.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_AUTO_RESUME, _ALLOW_ELASTIC = "--auto_resume", "--allow_elastic"


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
        return DONE
    run = RunDirectory(Path(config.run) if config.run else default_run(words))
    if not auto_resume:
        run.check_new()
    return _train(config, run, may_resume=auto_resume)


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN [--allow_elastic] [--key value ...]`. Returns the exit code."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print(_RESUME_HELP.format(keys=", ".join(changeable_keys(PretrainConfig))))
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
    allow_elastic = _ALLOW_ELASTIC in words
    config, dry_run = parse_config(
        PretrainConfig,
        [str(run.config), *(word for word in words if word != _ALLOW_ELASTIC)],
        verb="resume",
        description="Continue a run.",
        example="peerlearn resume runs/demo",
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return DONE
    unchanged = config == load_config(PretrainConfig, run.config)
    if run.done and unchanged and not lacks_results(config, run):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{run.root} is done already; more epochs: --epochs N")
        return DONE
    return _train(config, run, may_resume=True, allow_elastic=allow_elastic)


_RESUME_HELP = """\
usage: peerlearn resume RUN [--allow_elastic] [--key value ...]

Continue a run from its newest whole checkpoint, as if it had never stopped.
Example: peerlearn resume runs/demo

  --allow_elastic  go on with another number of processes: valid, but not bit for bit the same run
  --key value      a key that may change; any other change is refused. They are:
                   {keys}"""


def lacks_results(config: PretrainConfig, run: RunDirectory) -> bool:
    """Whether the results that the run's method writes at the end are not there (any more)."""
    from pretrain.method import method_class

    return method_class(config.method).lacks_results(run)


def _train(
    config: PretrainConfig, run: RunDirectory, *, may_resume: bool, allow_elastic: bool = False
) -> int:
    """Train, on from a save where ``may_resume`` and the run is there already."""
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.compute.attempt import run_training
    from peerlearn.compute.dist import joined_ranks
    from pretrain.state import build
    from pretrain.summary import print_summary
    from pretrain.train import train

    summary: list[Callable[[], None]] = []

    def finish(training: "Training") -> None:
        scores = training.method.results(training)
        summary.append(partial(print_summary, run, training.dataset.name, scores))

    with (
        stop_signals(_STOP_SIGNALS, "saving after this step") as stop,
        joined_ranks(config.device, timeout_seconds=config.rank_timeout_seconds) as ranks,
    ):
        finished = run_training(
            partial(build, config, run, ranks),
            train,
            verb="pretrain",
            config=config,
            run=run,
            ranks=ranks,
            stop=stop,
            # Asked by the main rank alone: it may have begun to write the run before another asks.
            resumes=may_resume and ranks.from_main(run.config.exists),
            allow_elastic=allow_elastic,
            facts=_facts,
            finish=finish,
        )
        for print_it in summary:
            print_it()
        if ranks.main and not finished:
            print(f"saved; `peerlearn resume {run.root}` continues")
    return DONE if finished else SAVED_RUN_AGAIN


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
