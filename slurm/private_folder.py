"""The folders of what jobs run: this account alone may change them (docs/security.md)."""

import grp
import logging
import os
import pwd
import shlex
import stat
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import slurm.weakness
from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, STUDY_FILE, RunDirectory
from peerlearn.runs.output import warn_once

_LOOK = "peerlearn_private"
PRIVATE_OR_EXIT = f"{_LOOK} || exit 1"

logger = logging.getLogger(__name__)


def root_of(folder: Path) -> Path:
    """The folder of the run or the study that a submission's folder lies in: RUN/slurm/X, RUN/evaluations/KEY/X."""
    home = folder.absolute().parent
    run = home.parent
    if home.name != JOBS_FOLDER and RunDirectory(run.parent).evaluations == run:
        run = run.parent
    return run.parent if (run.parent / STUDY_FILE).is_file() else run


def check_private(folder: Path, executed: Sequence[str]) -> None:
    """Make sure that no other account can change what the jobs of a submission run.

    Args:
        folder: folder of the submission, by a path without links.
        executed: files and folders in it that are run, or that decide what is run.

    Raises:
        UserError: another can; the message names the file or folder, its mode or owner, and the remedy.
    """
    if said := slurm.weakness.weakness(*_words(folder, executed)):
        raise UserError(said)


def private_or_exit(folder: Path, executed: Sequence[str]) -> str:
    """The lines of a batch script that end it, and say why, where `check_private` would raise.

    They define `PRIVATE_OR_EXIT`, by which it looks again later.
    """
    *places, names = _words(folder, executed)
    text = Path(slurm.weakness.__file__).read_text(encoding="utf-8")
    look = shlex.join([sys.executable, "-I", "-c", text, *places, *names])
    return f"{_LOOK}() {{ {look}; }}\n{PRIVATE_OR_EXIT}"


def _words(folder: Path, executed: Sequence[str]) -> tuple[str, str, str, Sequence[str]]:
    root = root_of(folder)
    return str(root), str(folder.absolute()), str(root / STUDY_FILE), executed


def warn_of_parents(root: Path) -> None:
    """Warn of a folder above a run in which others may rename: they could put another run in its place."""
    for parent in root.parents:
        if (who := _who_may_write(parent)) and not parent.stat().st_mode & stat.S_ISVTX:
            warn_once(
                logger,
                parent,
                "%s can be changed by %s, who could put another folder in the place of %s, with programs that run as "
                "you: `chmod +t %s`, or choose another --run (docs/security.md)",
                parent,
                who,
                root,
                shlex.quote(str(parent)),
            )
            return


def warn_of_python() -> None:
    """Warn if others may change the packages that jobs import beside the copy of this program."""
    packages = Path(sysconfig.get_path("purelib"))
    if who := _who_may_write(packages):
        warn_once(
            logger,
            packages,
            "%s can be changed by %s, whose programs would run as you: `chmod -R go-w %s` (docs/security.md)",
            packages,
            who,
            shlex.quote(sys.prefix),
        )


def warn_of_profile(file: Path) -> None:
    """Warn if others may change a profile, whose lines are run."""
    if who := _who_may_write(file):
        warn_once(
            logger,
            file,
            "%s can be changed by %s, and its setup lines run as you: `chmod go-w %s` (docs/security.md)",
            file,
            who,
            shlex.quote(str(file)),
        )


def _who_may_write(path: Path) -> str | None:
    """Who may change a file or folder beside its owner, in words; None if nobody, or if it cannot be told."""
    try:
        found = path.stat()
    except OSError:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "every account"
    if not found.st_mode & stat.S_IWGRP or _is_of_one(found.st_gid):
        return None
    try:
        return f"the group {grp.getgrgid(found.st_gid).gr_name}"
    except KeyError:
        return f"the group {found.st_gid}"


def _is_of_one(gid: int) -> bool:
    """Whether the group is this account's own, as many systems make one for each."""
    try:
        group, name = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}
