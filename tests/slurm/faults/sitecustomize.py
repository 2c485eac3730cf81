"""Python imports this first where PYTHONPATH names its folder: a training process then dies at given steps.

CRASH_STEPS: the steps, by commas. CRASH_ONCE: a folder in which each crash leaves a mark, and then does not recur.
EXIT_FILE: at the start of a step before which this file came, rank 0 removes it and exits with 0, as if it were done.
HANG_STEPS: from the start of that step on, the first fsync takes longer than anybody waits; once, with CRASH_ONCE.
STEP_SECONDS: no fault, but so long a rest at the start of each step.
HOLD_STEP, HOLD_UNTIL: no fault, but no way past the start of that step before that file is there; -1 is the start of
the process, which it tells by a file of that name with .held behind.
SUBMIT_TOGETHER: a folder. The locks of submitters do not hold, as over some network file systems, and a submitter that
has seen which jobs there are waits until another one has seen the same, or until the file `go` is there.
DOUBLE_PRECISION: no crash, but float64 throughout.
"""

import contextlib
import os
import signal
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt


def _steps(variable: str) -> set[int]:
    return {int(word) for word in os.environ.get(variable, "").split(",") if word}


_CRASH_STEPS, _HANG_STEPS = _steps("CRASH_STEPS"), _steps("HANG_STEPS")
_MARKS = os.environ.get("CRASH_ONCE")


def _recurs(step: int) -> bool:
    """Whether this fault has been here before, where it is to come once."""
    if not _MARKS:
        return False
    try:
        Path(_MARKS, str(step)).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _hold(step: int) -> None:
    if os.environ.get("HOLD_STEP") != str(step):
        return
    file = Path(os.environ["HOLD_UNTIL"])
    file.with_suffix(".held").touch()
    while not file.exists():
        time.sleep(0.02)


def _exit_if_told(rank: int) -> None:
    file = Path(os.environ.get("EXIT_FILE", "/nowhere"))
    if rank == 0 and file.exists():
        file.unlink()
        os._exit(0)


def _hang(descriptor: int) -> None:
    time.sleep(3600)


def _no_lock(home: Path) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


@wrapt.when_imported("studies.runner")
def _submit_unlocked(runner: ModuleType) -> None:
    together = os.environ.get("SUBMIT_TOGETHER")
    if together and not Path(together, "locked").exists() and "SLURM_JOB_ID" not in os.environ:
        runner.locked_home = _no_lock


@wrapt.when_imported("studies.cluster")
def _submit_together(cluster: ModuleType) -> None:
    if "SUBMIT_TOGETHER" not in os.environ or "SLURM_JOB_ID" in os.environ:
        return
    together = Path(os.environ["SUBMIT_TOGETHER"])
    own_jobs = cluster.own_jobs
    if not (together / "locked").exists():
        cluster.locked_home = _no_lock

    def seen_by_both(**words: Any) -> Any:
        jobs = own_jobs(**words)
        (together / f"seen-by-{os.getpid()}").touch()
        for _ in range(1500):
            if (together / "go").exists() or len(list(together.glob("seen-by-*"))) > 1:
                break
            time.sleep(0.02)
        return jobs

    cluster.own_jobs = seen_by_both


@wrapt.when_imported("pretrain.command")
def _use_double_precision(command: ModuleType) -> None:
    if os.environ.get("DOUBLE_PRECISION"):
        from tests.e2e.double_precision import use_double_precision

        use_double_precision()


@wrapt.when_imported("peerlearn.compute.attempt")
def _wrap(spine: ModuleType) -> None:
    # The last thing but one that begins a step: the step is in its file by then.
    seed_modules = spine.seed_modules

    def crashing(seed: int, step: int, rank: int) -> None:
        if step in _CRASH_STEPS and rank == 0 and not _recurs(step):
            os.kill(os.getpid(), signal.SIGSEGV)
        _exit_if_told(rank)
        if step in _HANG_STEPS and rank == 0 and not _recurs(step):
            os.fsync = _hang
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        _hold(step)
        seed_modules(seed, step, rank)

    spine.seed_modules = crashing


class _Compiler(ModuleType):
    """Instead of torch's compiler, which nothing here compiles with, and whose import is half of a start: any name
    in it is such a one again, and as a decorator leaves functions as they are."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Compiler(name)

    def __call__(self, function: Any = None, *_: Any, **__: Any) -> Any:
        return function or (lambda given: given)


class _CompilerFinder(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        is_compiler = name == "torch._dynamo" or name.startswith("torch._dynamo.")
        return ModuleSpec(name, self, is_package=True) if is_compiler else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Compiler(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is whole as it was made."""


if "peerlearn" in sys.orig_argv:
    sys.meta_path.insert(0, _CompilerFinder())
    _hold(-1)
