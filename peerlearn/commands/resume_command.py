"""`peerlearn resume`: of a run, by the verb that trains it, or of a study."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from peerlearn.commands.verbs import VERBS
from peerlearn.errors import UserError
from peerlearn.runs.directory import FORMER_FILES, STUDY_FILE, RunDirectory
from peerlearn.runs.training_facts import training_verb


def main(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN|STUDY [--key value ...]`. Returns the exit code.

    Raises:
        UserError: no verb of this version trains the run.
    """
    folder = Path(argv[0] if argv else "")
    if any((folder / name).is_file() for name in (STUDY_FILE, *FORMER_FILES)):
        return int(importlib.import_module("studies.study_command").resume(argv))
    env = RunDirectory(folder).env
    verb = training_verb(env)
    module = importlib.import_module(VERBS[verb].module) if verb in VERBS else None
    resume = getattr(module, "resume", None)
    if resume is None:
        raise UserError(f"{env}: verb {verb!r} has no runs that could be resumed")
    return int(resume(argv))
