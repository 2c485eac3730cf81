"""The command `peerlearn`. A verb's module is imported when the verb is used, so that `--help` answers at once."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from peerlearn import HOME
from peerlearn.commands.verbs import FORMER_VERBS, VERBS
from peerlearn.config import nearest
from peerlearn.errors import (
    DONE,
    FAILURE,
    SAVED_RUN_AGAIN,
    USAGE,
    CrashError,
    SaidByMainError,
    SavedError,
    UsageError,
    UserError,
)
from peerlearn.runs.files import changed_by_owner_alone
from peerlearn.runs.launcher import FAULT_FILE, MACHINES, USERS
from peerlearn.runs.output import with_lossy_output
from peerlearn.runs.stop import StoppedError, interrupted_by_signals
from peerlearn.runs.terminal import say, wrapped
from peerlearn.runs.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failure (one line on stderr), 2 usage, 75 saved and to be run again.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with changed_by_owner_alone():
            return dispatch(words)
    except UsageError as error:
        _note_fault(USERS)
        # Every process of a job reads the same words, so one complaint is enough.
        return _complain(error, USAGE) if os.environ.get("RANK", "0") == "0" else USAGE
    except SavedError as error:
        if os.environ.get("RANK", "0") == "0":
            say(str(error))
        return SAVED_RUN_AGAIN
    except SaidByMainError:
        _note_fault(USERS)
        return FAILURE
    except UserError as error:
        _note_fault(MACHINES if isinstance(error, CrashError) else USERS)
        return _complain(error, FAILURE)
    except StoppedError as stopped:
        return _complain(f"{stopped}: nothing is saved, the same command starts again", FAILURE)
    except KeyboardInterrupt:
        return _complain("interrupted", FAILURE)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`), so nobody would read a message.
        sys.stderr.close()
        return DONE
    except Exception as error:
        _note_fault(MACHINES)
        if os.environ.get("PEERLEARN_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())
        return _complain(
            f"{type(error).__name__}: {reason} (PEERLEARN_TRACEBACK=1 shows where)", FAILURE
        )


def dispatch(words: list[str]) -> int:
    """Run one verb.

    Returns:
        The verb's exit code.

    Raises:
        UserError: the verb raised it; `main` prints it as one line.
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
        instead = FORMER_VERBS.get(name)
        hint = f"; write {instead}" if instead else nearest(name, VERBS)
        raise UsageError(f"unknown verb {name!r}{hint}; `peerlearn --help` lists them")
    check_siblings()
    verb = VERBS[name]
    function = getattr(importlib.import_module(verb.module), verb.function)
    function = with_lossy_output(function, read=verb.read)
    try:
        # What trains takes the signals itself, and saves.
        with interrupted_by_signals():
            return int(function(words[1:]))
    except SystemExit as stop:
        # argparse's own way to end after --help (0) or a wrong word (2).
        return int(stop.code or 0)


def check_siblings() -> None:
    """Make sure that generic package names mean this project's folders.

    Under ``python -m`` the working directory comes first on the path, and a stray ``pretrain.py`` there would win.

    Raises:
        UserError: a name means another file; the message gives that file.
    """
    from peerlearn import PACKAGES

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
        "Pretrain a cohort of networks that teach each other, and measure how good their features are.",
        "",
    ]
    lines += [f"  {name:<10} {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "",
        "`peerlearn VERB --help` explains a verb. Example:",
        "  peerlearn pretrain mcl_fashion_mnist_demo --run runs/demo",
    ]
    return "\n".join(lines)


def _note_fault(whose: str) -> None:
    """Tell a supervisor, if there is one, whether another start of the command could go well."""
    if file := os.environ.get(FAULT_FILE):
        with contextlib.suppress(OSError):
            Path(file).write_text(whose)


def _complain(message: object, code: int) -> int:
    # A name in it may hold line breaks; and where nothing can be written, the exit code tells.
    line = f"peerlearn: {printable(str(message))}"
    with contextlib.suppress(OSError, ValueError):
        print(wrapped(line, sys.stderr), file=sys.stderr, flush=True)
    return code
