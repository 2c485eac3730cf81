"""`peerlearn resume`: of a run or of a pipeline."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from peerlearn.runs.directory import PIPELINE_FILE


def main(argv: Sequence[str]) -> int:
    """`peerlearn resume RUN|PIPELINE [--key value ...]`. Returns the exit code."""
    first = argv[0] if argv else ""
    pipeline = bool(first) and (Path(first) / PIPELINE_FILE).is_file()
    module = importlib.import_module("studies.pipeline_command" if pipeline else "pretrain.command")
    return int(module.resume(argv))
