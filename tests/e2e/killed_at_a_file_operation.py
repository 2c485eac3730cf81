"""Runs the command, and kills itself (SIGKILL) at the n-th file operation of the save of a step:

    python THIS n CHECKPOINTS STEP words...

A save's operations are those below the folder CHECKPOINTS from the making of its temporary folder to the making of the
next save's. At the end their number is printed. File operations are what Python's audit events tell of: opening for
writing, renaming, making and removing folders and files; and fsync, which has no event.
"""

import os
import signal
import sys

from peerlearn.cli import main

number, folder, step, words = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
seen = 0
saving = False


def count() -> None:
    global seen
    if not saving:
        return
    seen += 1
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event: str, arguments: tuple) -> None:
    global saving
    if event == "os.mkdir" and ".tmp-step-" in str(arguments[0]):
        saving = str(arguments[0]).endswith(f"{step:08d}")
    if event not in EVENTS or not str(arguments[0]).startswith(folder):
        return
    if event == "open" and arguments[1] in (None, "r", "rb"):
        return
    count()


plain_fsync = os.fsync


def fsync(descriptor: int) -> None:
    if os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder):
        count()
    plain_fsync(descriptor)


os.fsync = fsync
sys.addaudithook(watch)
code = main(words)
print(f"file operations: {seen}")
sys.exit(code)
