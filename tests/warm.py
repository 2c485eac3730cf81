"""Processes of the command that need not import torch and timm first: forked by one that has, and else like any other.

`Process` and `run` are `subprocess.Popen` and `subprocess.run` for `[sys.executable, "-m", MODULE, ...]`,
`[sys.executable, SCRIPT, ...]`, and the words by which the program starts itself: what such a process starts so is
forked too. The process has a process id, an exit code and signals of its own. What it lacks is a start: tests of what
happens in one, of what is imported, or of sitecustomize take those of subprocess.
"""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from peerlearn.runs.launcher import module_words

POPEN = subprocess.Popen
SERVER = Path(__file__).parent / "warm_server.py"
# Before the folder of the program and the name of a module.
LAUNCH = module_words(Path(), "")[:-2]
# Only this copy of the program has been imported already.
COPY = str(Path(__file__).parents[1])


class Process(subprocess.Popen):
    """Our own child in all but name: its parent is the server, which tells how it ended."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others: Any
    ) -> None:  # fmt: skip
        """Of `others` come first two of Windows and `shell`, then the pipes: ours and theirs, in turns. The
        last but one is `start_new_session`."""
        assert args[0] == sys.executable
        environment = dict(os.environ if env is None else env)
        assert environment.get("OMP_NUM_THREADS") == "1", "the server has one thread"
        stdin, _, _, stdout, _, stderr = others[3:9]
        self._status, theirs = socket.socketpair()
        with theirs:
            request = {
                "words": args[1:],
                "environment": environment,
                "directory": os.fspath(cwd or os.getcwd()),
                "new_session": others[-2],
            }
            given = (stdin, stdout, stderr)
            files = [file if file != -1 else number for number, file in enumerate(given)]
            message = json.dumps(request).encode()
            socket.send_fds(requests(), [message], [*files, theirs.fileno()])
        self.pid = int.from_bytes(self._status.recv(4), "little")
        assert self.pid, "the server of processes has ended"
        self._child_created = True
        self._close_pipe_fds(*others[3:9])

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._status.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = self._status.recv(4)
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, int.from_bytes(status, "little")


def run(
    words: list[str], *, capture_output: bool = False, timeout: float | None = None,
    check: bool = False, **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`subprocess.run` of a warm process."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Process(words, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(words, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class ProgramsPopen(subprocess.Popen):
    """`subprocess.Popen` within a forked process: what runs a module of this copy of the program is forked too. A job
    runs the copy of its submission, as any other process."""

    def __new__(cls, args, *others: Any, **options: Any) -> Any:
        is_own = isinstance(args, list) and args[: len(LAUNCH) + 1] == [*LAUNCH, COPY]
        return (Process if is_own else POPEN)(args, *others, **options)


@functools.cache
def requests() -> socket.socket:
    """The socket of the server, which is started by the first that asks, and ends when this process does and the socket
    closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, str(SERVER), str(theirs.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours
