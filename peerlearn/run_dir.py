"""The run directory: one folder that holds everything a run reads and writes.

RUN/  config.yaml  env.json  metrics.jsonl  events.jsonl  tb/  logs/attempt-K/rank-R.log  DONE | FAILED
      checkpoints/  export/  results/
"""

import datetime
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError

_LIBRARIES = ("peerlearn", "torch", "torchvision", "timm", "numpy", "faiss-gpu")


class RunDirectory:
    """Paths and plain files of one run.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def check_new(self) -> None:
        """Make sure that a run can be started here.

        Raises:
            UserError: the folder holds a run already, or anything else.
        """
        if (self.root / "config.yaml").exists():
            raise UserError(
                f"{self.root} holds a run already: `peerlearn resume {self.root}` continues it, "
                "--run names another folder"
            )
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UserError(f"{self.root} is there and no run: choose another folder by --run")

    def create(self, config_yaml: str) -> None:
        """Start a new run: the folder and its config.yaml.

        Raises:
            UserError: as `check_new`, or the folder cannot be written.
        """
        self.check_new()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(self.config, config_yaml)
        except OSError as error:
            raise UserError(
                f"{self.root}: cannot be written ({error.strerror}): choose another folder by --run"
            ) from error

    def check_exists(self) -> None:
        """Make sure that this is a run.

        Raises:
            UserError: it is not.
        """
        if not self.config.is_file():
            raise UserError(f"{self.root} is not a run directory: it has no config.yaml")

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.root / "export"

    @property
    def done(self) -> bool:
        return (self.root / "DONE").exists()

    def start_attempt(self, facts: Mapping[str, Any], rank: int = 0) -> tuple[int, Path]:
        """Number this start of the program, counted from 1, and make its log file's folder.

        Also writes env.json and clears an earlier FAILED.

        Args:
            facts: what evaluators need to know of the training; goes into env.json.

        Returns:
            The attempt's number and the path of this rank's log.
        """
        logs = self.root / "logs"
        names = (folder.name.removeprefix("attempt-") for folder in logs.glob("attempt-*"))
        attempt = max((int(name) for name in names if name.isdigit()), default=0) + 1
        folder = logs / f"attempt-{attempt}"
        folder.mkdir(parents=True)
        env = {**environment(), "training": facts}
        write_text(self.root / "env.json", json.dumps(env, indent=2) + "\n")
        (self.root / "FAILED").unlink(missing_ok=True)
        return attempt, folder / f"rank-{rank}.log"

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one logged step to metrics.jsonl; NaN and Inf, which JSON does not know, become null."""
        _append_line(self.metrics, {key: _json_number(value) for key, value in row.items()})

    def metric_rows(self) -> Iterator[dict[str, Any]]:
        """The logged steps; a last line cut short by a crash is left out.

        Raises:
            UserError: another line is damaged.
        """
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    return
                raise UserError(
                    f"{self.metrics}: line {number} is damaged: mend or remove it"
                ) from error

    def cut_metrics(self, step: int) -> None:
        """Drop the rows that training from ``step`` on writes anew: those after it, at step 0 all of them."""
        kept = [json.dumps(row) + "\n" for row in self.metric_rows() if 0 < step >= row["step"]]
        write_text(self.metrics, "".join(kept))

    def event(self, name: str, **fields: Any) -> None:
        """Add one line to events.jsonl: what happened, when, and its facts."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _append_line(self.root / "events.jsonl", {"time": now, "event": name, **fields})

    def mark_done(self) -> None:
        """Leave DONE: the run has finished and its last step is saved and exported."""
        write_text(self.root / "DONE", "")

    def mark_failed(self, reason: str) -> None:
        """Leave FAILED with the reason."""
        write_text(self.root / "FAILED", reason + "\n")


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and every result."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
    }


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole: it is either the old or the new text, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Make a finished temporary folder appear as ``final`` at once, durably; an older ``final`` goes."""
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append_line(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
