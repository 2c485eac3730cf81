"""A verb that trains: `peerlearn VERB [CONFIG] ...` starts a run, `peerlearn resume RUN` goes on with it.

Nothing here waits for torch before the words are read.
"""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.config import (
    changeable_keys,
    check_complete,
    config_to_yaml,
    load_config,
    parse_config,
)
from peerlearn.errors import DONE, SAVED_RUN_AGAIN, USAGE, UsageError
from peerlearn.runs.directory import RunDirectory, default_run
from peerlearn.runs.stop import STOP_SIGNALS, StoppedError, stop_signals
from peerlearn.runs.terminal import say

if TYPE_CHECKING:
    from peerlearn.compute.program import Program

AUTO_RESUME, _ALLOW_ELASTIC = "--auto_resume", "--allow_elastic"


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a training verb consists of.

    Attributes:
        verb: name of the verb.
        config_class: config of its runs: a frozen dataclass with the keys run, seed, device and rank_timeout_seconds.
        description: description for --help.
        example: command line for --help.
        program: gives what trains, imported as late as this is called.
        essential: keys that --help explains; the others are for --help all.
        preview: gives the lines that --dry_run ends with, and refuses what the start of the run would refuse.
        shipped: folder of its shipped configs; None without.
        lacks_results: whether a run that is done lacks what its end writes, so that it is resumed all the same.
    """

    verb: str
    config_class: Any
    description: str
    example: str
    program: Callable[[], "Program[Any]"]
    essential: Sequence[str] = ()
    preview: Callable[[Any], Sequence[str]] = lambda config: ()
    shipped: Path | None = None
    lacks_results: Callable[[Any, RunDirectory], bool] = lambda config, run: False


def start(trainer: Trainer, argv: Sequence[str]) -> int:
    """`peerlearn VERB [CONFIG] [--key value ...] [--auto_resume] [--dry_run]`. Returns the exit code."""
    words = [word for word in argv if word != AUTO_RESUME]
    auto_resume = len(words) < len(argv)
    config, dry_run = parse_config(
        trainer.config_class,
        words,
        verb=trainer.verb,
        description=f"{trainer.description} --auto_resume: go on with the run that is there already, if there is one.",
        example=trainer.example,
        essential=trainer.essential,
        shipped=trainer.shipped,
    )
    if dry_run:
        return _show(trainer, config)
    run = RunDirectory(Path(config.run) if config.run else default_run(words, trainer.verb))
    if not auto_resume:
        run.check_new()
    return _train(trainer, config, run, may_resume=auto_resume)


def resume(trainer: Trainer, argv: Sequence[str]) -> int:
    """`peerlearn resume RUN [--allow_elastic] [--key value ...]`. Returns the exit code."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        keys = ", ".join(changeable_keys(trainer.config_class))
        print(
            _RESUME_HELP
            + textwrap.fill(keys, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
        )
        return DONE if words else USAGE
    if words[0].startswith("-"):
        raise UsageError(f"RUN comes before {words[0]}: peerlearn resume RUN {' '.join(words)}")
    run = RunDirectory(Path(words.pop(0)))
    run.check_exists()
    check_stays(words)
    check_complete(trainer.config_class, run.config)
    allow_elastic = _ALLOW_ELASTIC in words
    config, dry_run = parse_config(
        trainer.config_class,
        [str(run.config), *(word for word in words if word != _ALLOW_ELASTIC)],
        verb="resume",
        description="Continue a run.",
        example="peerlearn resume runs/demo",
    )
    if dry_run:
        return _show(trainer, config)
    if _is_over(trainer, config, run):
        if int(os.environ.get("RANK", "0")) == 0:
            _say_over(run)
        return DONE
    return _train(trainer, config, run, may_resume=True, allow_elastic=allow_elastic)


def _is_over(trainer: Trainer, config: Any, run: RunDirectory) -> bool:
    """Whether there is nothing left to do for a run of this config."""
    unchanged = run.done and config == load_config(trainer.config_class, run.config)
    return unchanged and not trainer.lacks_results(config, run)


def _say_over(run: RunDirectory) -> None:
    print(f"{run.root} is done already; more epochs: --epochs N")


def check_stays(words: Sequence[str]) -> None:
    """Refuse to resume a run in another folder.

    Raises:
        UsageError: the words name one.
    """
    if any(word.split("=")[0] == "--run" for word in words):
        raise UsageError(
            "--run: a run goes on where it lies; for a run of its own copy the folder, then resume the copy"
        )


def _show(trainer: Trainer, config: Any) -> int:
    """Print the config as YAML, and the preview as comments below it. Returns the exit code."""
    print(config_to_yaml(config), end="")
    for line in trainer.preview(config):
        print(f"# {line}")
    return DONE


_RESUME_HELP = """\
usage: peerlearn resume RUN [--allow_elastic] [--key value ...]

Continue a run from its newest whole checkpoint, as if it had never stopped.
Example: peerlearn resume runs/demo

  --allow_elastic  go on with another number of processes: valid, but not bit for bit the same run
  --key value      a key that may change; any other change is refused. They are:
"""
_INDENT = " " * 19


def _train(
    trainer: Trainer,
    config: Any,
    run: RunDirectory,
    *,
    may_resume: bool,
    allow_elastic: bool = False,
) -> int:
    """Train, on from a save where ``may_resume`` and the run is there already."""
    try:
        with stop_signals(STOP_SIGNALS, "saving after this step") as stop:
            with stop.at_once():
                from peerlearn.compute.dist import joined_ranks
                from peerlearn.compute.program import run_training

                program = trainer.program()
            with joined_ranks(config.device, timeout_seconds=config.rank_timeout_seconds) as ranks:
                # Asked by the main rank alone: it may have begun to write the run before another asks.
                resumes = may_resume and ranks.from_main(run.config.exists)
                # Another process may have come to the end of the run since this one began.
                if resumes and ranks.from_main(lambda: _is_over(trainer, config, run)):
                    if ranks.main:
                        _say_over(run)
                    return DONE
                training = run_training(
                    program,
                    verb=trainer.verb,
                    config=config,
                    run=run,
                    ranks=ranks,
                    stop=stop,
                    resumes=resumes,
                    allow_elastic=allow_elastic,
                )
                if ranks.main and training is not None:
                    program.summarise(training)
                elif ranks.main:
                    say(f"saved; `peerlearn resume {run.root}` continues")
    except StoppedError as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            again = f"`peerlearn resume {run.root}`" if run.config.exists() else "the same command"
            say(f"{stopped} before there was anything to save; {again} starts again")
        return SAVED_RUN_AGAIN
    return SAVED_RUN_AGAIN if training is None else DONE
