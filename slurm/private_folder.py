"""The folders of what jobs run: this account alone may change them (docs/security.md)."""

import grp
import logging
import os
import pwd
import shlex
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from peerlearn.errors import UserError
from peerlearn.runs.directory import JOBS_FOLDER, STUDY_FILE, RunDirectory
from peerlearn.runs.output import warn_once

_NAME = "peerlearn_private"
PRIVATE_OR_EXIT = f"{_NAME} || exit 1"
_COMPLAINT = "peerlearn: "
# Where others cannot enter the submission's folder, they reach nothing in it, whatever its mode.
_LOOK = """\
{name}() (
    PATH=/usr/bin:/bin:$PATH me=$(id -u) modes=-true
    said=$(find {chain} -maxdepth 0 {tests}) || said=${{said:-{gone}}}
    [ -n "$(find {folder} -maxdepth 0 -perm /011)" ] || modes=-false
    [ -n "$said" ] || said=$(find {executed} {tests} 2> /dev/null)
    [ -z "$said" ] || {{ printf 'peerlearn: %s\\n' "$said" >&2; exit 1; }}
)
{again}"""

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
    found = subprocess.run(
        ["/bin/sh", "-c", private_or_exit(folder, executed)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )
    if found.returncode:
        raise UserError(found.stderr.strip().removeprefix(_COMPLAINT))


def private_or_exit(folder: Path, executed: Sequence[str]) -> str:
    """The lines of a script that end it, and say why, where `check_private` would raise.

    They need no Python, as the setup of a job may have to come before it, and define `PRIVATE_OR_EXIT`, by which the
    script looks again later. Slurm keeps a copy of a batch script, so that these lines themselves cannot be changed.
    """
    folder, root = folder.absolute(), root_of(folder)
    chain = [folder, *folder.parents[: folder.parents.index(root) + 1]][::-1]
    # A study's file names the profile of its jobs.
    study = [root / STUDY_FILE] if (root / STUDY_FILE).is_file() else []
    return _LOOK.format(
        name=_NAME,
        chain=_quoted(*chain, *study),
        folder=_quoted(folder),
        executed=_quoted(*(folder / name for name in executed)),
        gone=shlex.quote(f"{root}, where what jobs run as you lies, cannot be looked at by find"),
        tests=_tests(root),
        again=PRIVATE_OR_EXIT,
    )


def _tests(root: Path) -> str:
    """What find prints of the first file that another account could change; of modes only where $modes is -true."""
    decides = "%p, which decides what jobs run as you,"
    elsewhere = "choose a folder of your own by --run, and do not run what lies there"
    remedy = f"chmod -R go-w {shlex.quote(str(root))}".replace("\\", "\\\\").replace("%", "%%")
    link, owner, mode = (
        shlex.quote(f"{decides} {said}\\n")
        for said in (
            f"is a link: {elsewhere}",
            f"belongs to %u (mode %m): {elsewhere}",
            f"can be changed by others (mode %m): see that nobody has, then `{remedy}`",
        )
    )
    return (
        f"\\( -type l -printf {link} -o ! -uid $me ! -uid 0 -printf {owner} "
        f"-o $modes -perm /022 -printf {mode} \\) -quit"
    )


def _quoted(*paths: Path) -> str:
    return shlex.join(map(str, paths))


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
