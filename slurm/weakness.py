"""Whether another account could change what a job runs: by the owners and modes of the folders that it lies in.

    python -I -c TEXT_OF_THIS_FILE ROOT FOLDER STUDY_FILE NAME ...

The text goes into batch scripts, of which Slurm keeps a copy of its own, and runs before anything that lies in the run.
So it imports nothing of this program.
"""

import os
import pwd
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def weakness(root: str, folder: str, study_file: str, names: Sequence[str]) -> str | None:
    """What another account could change, and the remedy, in one line.

    Args:
        root: folder of the run or the study.
        folder: folder of the submission, in it.
        study_file: file that names the profile of a study's jobs; it need not be there.
        names: files and folders in the folder that are run, or that decide what is run.

    Returns:
        The line; None if this account alone (and root) can change all of it.
    """
    decides = [study_file] if os.path.lexists(study_file) else []
    for path in (*_chain(root, folder), *decides):
        if said := _said(path, root, others_write=_OTHERS_WRITE):
            return said
    # Where others cannot enter, they reach nothing, whatever its mode.
    closed = not os.lstat(folder).st_mode & _OTHERS_ENTER
    for path in _within(folder, names):
        if said := _said(path, root, others_write=0 if closed else _OTHERS_WRITE):
            return said
    return None


def _chain(root: str, folder: str) -> list[str]:
    """The root, the folder, and all between them, from the top."""
    chain = [folder]
    while chain[-1] not in (root, os.path.dirname(chain[-1])):
        chain.append(os.path.dirname(chain[-1]))
    return chain[::-1]


def _within(folder: str, names: Sequence[str]) -> Iterator[str]:
    for top in (os.path.join(folder, name) for name in names):
        if os.path.lexists(top):
            yield top
        for place, folders, files in os.walk(top):
            yield from (os.path.join(place, name) for name in (*folders, *files))


def _said(path: str, root: str, *, others_write: int) -> str | None:
    try:
        found = os.lstat(path)
    except OSError as error:
        return f"{path}, which decides what jobs run as you, cannot be looked at ({error.strerror})"
    mode = f"mode {stat.S_IMODE(found.st_mode):o}"
    if stat.S_ISLNK(found.st_mode):
        return f"{path}, which decides what jobs run as you, is a link: {_ELSEWHERE}"
    if found.st_uid not in (os.geteuid(), 0):
        return (
            f"{path}, which decides what jobs run as you, belongs to {_name(found.st_uid)} ({mode}): "
            f"{_ELSEWHERE}"
        )
    if found.st_mode & others_write:
        return (
            f"{path}, which decides what jobs run as you, can be changed by others ({mode}): "
            f"see that nobody has, then `chmod -R go-w {shlex.quote(root)}`"
        )
    return None


_ELSEWHERE = "choose a folder of your own by --run, and do not run what lies there"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"account {uid}"


if __name__ == "__main__":
    if weak := weakness(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]):
        sys.exit(f"peerlearn: {weak}")
