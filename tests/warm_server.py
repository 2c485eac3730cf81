"""Forks processes that have imported already what the command needs: torch, timm and the rest take seconds each time.

Started by `tests.warm` with one end of a socket. A request is what Popen takes, with the three standard files and one
more, on which the process id goes back at once and the wait status at the end. Ends with the socket. Each forked
process has such a socket too, for what it starts itself.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import threading
import traceback
from typing import Any

import warm

# What verbs import late.
for name in (
    *("torch._dynamo", "torch.utils.tensorboard", "timm", "matplotlib.pyplot", "scipy.stats"),
    *("sklearn.datasets", "pretrain.command", "pretrain.train", "linear_eval.command"),
    *("detection.command", "detection.evaluate"),
    *(
        "linear_eval.evaluate",
        "linear_eval.finetune",
        "peerlearn.commands.resume_command",
        "peerlearn.evaluation.knn_command",
    ),
):
    importlib.import_module(name)

# How the program starts itself.
OWN = warm.LAUNCH[1:]
FAULTS = os.path.join(os.path.dirname(__file__), "slurm", "faults", "sitecustomize.py")


def serve(requests: socket.socket) -> dict[str, Any]:
    """Returns in each forked process: what it is to do."""
    children: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fd in children:
                    pid, reply = children.pop(key.fd)
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(pid, 0)
                    tell(reply, status)
                    reply.close()
                    continue
                asking = key.fileobj
                assert isinstance(asking, socket.socket)
                request, descriptors, _, _ = socket.recv_fds(asking, 2**20, 4)
                if not request and asking is requests:
                    # A process that is still running is whoever started it's to end.
                    os._exit(0)
                if not request:
                    ready.unregister(asking)
                    asking.close()
                    continue
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                pid = os.fork()
                if not pid:
                    for other in [each.fileobj for each in ready.get_map().values()]:
                        os.close(other) if isinstance(other, int) else other.close()
                    for _, reply in children.values():
                        reply.close()
                    ours.close()
                    return json.loads(request) | {"files": descriptors, "requests": theirs}
                theirs.close()
                ready.register(ours, selectors.EVENT_READ)
                for descriptor in descriptors[:3]:
                    os.close(descriptor)
                reply = socket.socket(fileno=descriptors[3])
                tell(reply, pid)
                watched = os.pidfd_open(pid)
                children[watched] = (pid, reply)
                ready.register(watched, selectors.EVENT_READ)


def tell(reply: socket.socket, number: int) -> None:
    """Whoever asked may have been killed since."""
    with contextlib.suppress(OSError):
        reply.send(number.to_bytes(4, "little"))


def become(request: dict[str, Any]) -> None:
    """As `python WORDS` in a process of its own."""
    *standard, reply = request["files"]
    os.close(reply)
    warm.requests = lambda: request["requests"]
    subprocess.Popen = warm.ProgramsPopen  # type: ignore[misc]
    if request["new_session"]:
        os.setsid()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    if "STEP_SECONDS" in os.environ:
        runpy.run_path(FAULTS)
    option, *words = request["words"]
    is_own = [option, *words[: len(OWN) - 1]] == OWN
    if option == "-m" or is_own:
        home, module, *words = words[len(OWN) - 1 :] if is_own else [request["directory"], *words]
        sys.stdout.reconfigure(write_through=is_own)
        sys.path[0] = home
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(option))
        sys.argv = [option, *words]
        runpy.run_path(option, run_name="__main__")


def leave(code: int) -> None:
    """As an interpreter does, but for taking all modules apart, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# What is here now is no garbage: collecting it would copy every page of it into each process.
gc.collect()
gc.freeze()
try:
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
except SystemExit as stop:
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
except BaseException:
    traceback.print_exc()
    leave(1)
leave(0)
