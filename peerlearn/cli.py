"""The one command. A verb's module is imported when the verb is used, so that `--help` answers at once."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peerlearn import HOME, PACKAGES
from peerlearn.config import nearest
from peerlearn.errors import DONE, FAILURE, USAGE, SaidByMainError, UsageError, UserError


class Verb(NamedTuple):
    """Where a verb lives: a function from the words after the verb to an exit code.

    Attributes:
        dry_run: whether it knows --dry_run, by which it prints its resolved config.
    """

    module: str
    function: str
    help: str
    dry_run: bool = False


VERBS = {
    "pretrain": Verb("pretrain.command", "main", "pretrain a cohort of networks", True),
    "resume": Verb(
        "peerlearn.commands.resume_command",
        "main",
        "continue a run, or a pipeline, where it was",
        True,
    ),
    "knn": Verb(
        "peerlearn.evaluation.knn_command", "main", "score exported networks by weighted kNN", True
    ),
    "linear": Verb(
        "linear_eval.command", "main", "train linear classifiers on exported networks", True
    ),
    "submit": Verb(
        "slurm.submit_command", "main", "run any of these as a job, on a cluster or here"
    ),
    "pipeline": Verb(
        "studies.pipeline_command",
        "main",
        "pretrain with several seeds and evaluate as it goes",
        True,
    ),
    "sweep": Verb(
        "studies.sweep_command",
        "main",
        "pretrain a grid of configs with several seeds, compare",
        True,
    ),
    "watch": Verb("studies.watch_command", "main", "evaluate a run's exports as they land"),
    "summary": Verb("studies.summary_command", "main", "sum up a pipeline's scores over its seeds"),
    "status": Verb("slurm.status_command", "main", "show how runs and their jobs stand"),
    "cancel": Verb("slurm.cancel_command", "main", "end the jobs of runs"),
    "logs": Verb("slurm.logs_command", "main", "print what a run has logged, and follow it"),
    "export": Verb(
        "pretrain.export_command", "main", "write networks for timm, torchvision or Detectron2"
    ),
    "import": Verb(
        "peerlearn.exchange.import_command", "main", "read another program's checkpoint"
    ),
    "configs": Verb("peerlearn.commands.configs_command", "main", "list the shipped configs"),
    "doctor": Verb(
        "peerlearn.commands.doctor", "main", "check what is installed and what is missing"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failure (one line on stderr), 2 usage, 75 saved and to be run again.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(words)
    except UsageError as error:
        # Every process of a job reads the same words: one complaint is enough.
        return _complain(error, USAGE) if os.environ.get("RANK", "0") == "0" else USAGE
    except SaidByMainError:
        return FAILURE
    except UserError as error:
        return _complain(error, FAILURE)
    except KeyboardInterrupt:
        return _complain("interrupted", FAILURE)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nobody is left to be told.
        sys.stderr.close()
        return DONE
    except Exception as error:
        if os.environ.get("PEERLEARN_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())
        return _complain(
            f"{type(error).__name__}: {reason} (PEERLEARN_TRACEBACK=1 shows where)", FAILURE
        )


def dispatch(words: list[str]) -> int:
    """Run one verb; returns its exit code.

    Raises:
        UserError: as the verb does; `main` makes one line of it.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return DONE if words else USAGE
    if words[0] == "--version":
        from peerlearn import __version__

        print(f"peerlearn {__version__}")
        return DONE
    name = words[0]
    if name not in VERBS:
        raise UsageError(
            f"unknown verb {name!r}{nearest(name, VERBS)}; `peerlearn --help` lists them"
        )
    check_siblings()
    verb = VERBS[name]
    function = getattr(importlib.import_module(verb.module), verb.function)
    try:
        return int(function(words[1:]))
    except SystemExit as stop:
        # argparse's own way to end after --help (0) or a wrong word (2).
        return int(stop.code or 0)


def check_siblings() -> None:
    """Make sure that generic package names mean this project's folders.

    Under ``python -m`` the working directory comes first, and a stray ``pretrain.py`` there would win.

    Raises:
        UserError: one does not; the message names the file in the way.
    """
    for name in PACKAGES[1:]:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != HOME / name / "__init__.py":
            raise UserError(
                f"`import {name}` finds {origin or 'nothing'} instead of {HOME / name}: "
                "rename that file or run from another folder"
            )


def _help() -> str:
    lines = [
        "usage: peerlearn VERB ...",
        "",
        "Pretrain a cohort of networks that teach each other, and see what the features are worth.",
        "",
    ]
    lines += [f"  {name:<10} {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "",
        "`peerlearn VERB --help` explains a verb. Example:",
        "  peerlearn pretrain mcl_fashion_mnist_demo --run runs/demo",
    ]
    return "\n".join(lines)


def _complain(message: object, code: int) -> int:
    print(f"peerlearn: {message}", file=sys.stderr)
    return code
