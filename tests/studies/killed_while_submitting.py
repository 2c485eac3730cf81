"""Runs the command, and kills itself (SIGKILL) at the n-th thing it does to hand over its first job:

    python THIS n FOLDER words...

or, for n "started", once the program that starts the job has done so. Those things are all file operations below
FOLDER, and all programs that are started, from the ledger's intent on to its line with the job. At the end their number
is printed. Python's audit events tell of them; and fsync, which has no event.
"""

import os
import signal
import sys

from peerlearn.cli import main

number = 0 if sys.argv[1] == "started" else int(sys.argv[1])
folder, words = sys.argv[2], sys.argv[3:]
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.symlink"}
LEDGERS = ("evaluations.jsonl", "pipeline.jsonl")
seen = started = 0
handing_over = ended = False


def count() -> None:
    global seen
    seen += 1
    if seen == number or (started and sys.argv[1] == "started"):
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event: str, arguments: tuple) -> None:
    global handing_over, started
    if ended or event not in {*EVENTS, "subprocess.Popen"}:
        return
    place = str(arguments[0])
    if event == "open":
        if arguments[1] in (None, "r", "rb") or place.endswith(".lock"):
            return
        if place.endswith(LEDGERS):
            handing_over = True
    if handing_over and (event == "subprocess.Popen" or os.path.abspath(place).startswith(folder)):
        count()
        started += event == "subprocess.Popen"


plain_fsync = os.fsync
ledger_lines = 0


def fsync(descriptor: int) -> None:
    global ended, ledger_lines
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if handing_over and not ended and name.startswith(folder):
        count()
        ledger_lines += name.endswith(LEDGERS)
        ended = ledger_lines == 2
    plain_fsync(descriptor)


os.fsync = fsync
sys.addaudithook(watch)
code = main(words)
print(f"things done: {seen}")
sys.exit(code)
