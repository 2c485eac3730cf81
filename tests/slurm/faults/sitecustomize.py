"""Python imports this first where PYTHONPATH names its folder: a training process then dies at given steps.

CRASH_STEPS: the steps, by commas. CRASH_ONCE: a folder in which each crash leaves a mark, and then does not recur.
DOUBLE_PRECISION: no crash, but float64 throughout.
"""

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

_STEPS = {int(word) for word in os.environ.get("CRASH_STEPS", "").split(",") if word}
_MARKS = os.environ.get("CRASH_ONCE")


def _crash(step: int) -> None:
    if _MARKS:
        try:
            Path(_MARKS, str(step)).touch(exist_ok=False)
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGSEGV)


@wrapt.when_imported("pretrain.command")
def _use_double_precision(command: ModuleType) -> None:
    if os.environ.get("DOUBLE_PRECISION"):
        from tests.e2e.double_precision import use_double_precision

        use_double_precision()


@wrapt.when_imported("pretrain.train")
def _wrap(train: ModuleType) -> None:
    seed_modules = train._seed_modules

    def crashing(training: Any) -> None:
        if training.step in _STEPS and training.ranks.main:
            _crash(training.step)
        seed_modules(training)

    train._seed_modules = crashing
