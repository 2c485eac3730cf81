"""The run directory: one folder that holds everything a run reads and writes.

RUN/  config.yaml  env.json  metrics.jsonl  events.jsonl  notes.jsonl  tb/  DONE | FAILED
      logs/attempt-K/{rank-R.log, standing.json}  checkpoints/  export/  results/  replay/  slurm/

Other code gets these paths from here.
"""

import contextlib
import json
import logging
import math
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.environment import now_text
from peerlearn.runs.files import (
    append_text,
    numbered_files,
    open_regular,
    read_json_lines,
    sync,
    write_text,
)
from peerlearn.runs.lock import LOCK_FILES
from peerlearn.runs.training_facts import TrainingFacts, write_env

# The folder of a run's submissions. Submissions of several runs lie in a folder of that name above the runs.
JOBS_FOLDER = "slurm"
# A folder of runs that holds this file is a study.
STUDY_FILE = "study.yaml"
# The files of what earlier versions had in place of studies.
FORMER_FILES = ("sweep.yaml", "pipeline.yaml")
_ATTEMPT = "attempt-"
# The text before and after the rank in the name of a log.
_LOG = ("rank-", ".log")

logger = logging.getLogger(__name__)


def check_owner(root: Path) -> None:
    """Make sure that this account made the study: the jobs of two accounts cannot see each other.

    Raises:
        UserError: another account made it; the message names it.
    """
    try:
        owner = (root / STUDY_FILE).stat().st_uid
    except OSError:
        return
    if owner != os.getuid():
        name = str(owner)
        with contextlib.suppress(KeyError):
            name = pwd.getpwuid(owner).pw_name
        raise UserError(
            f"{root}: the study belongs to the account {name}, which alone can go on with it: choose another --folder"
        )


class RunDirectory:
    """Paths and plain files of one run.

    Attributes:
        root: folder of the run.
        metrics_count: number of rows of metrics.jsonl, counting those that a full disk has not taken yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics_count = 0
        # File -> lines that a full disk has not taken yet.
        self._unwritten: dict[Path, list[str]] = {}

    def check_new(self) -> None:
        """Make sure that a run can be started here.

        Raises:
            UserError: the folder holds a run already, or something else.
        """
        if self.config.exists():
            raise UserError(
                f"{self.root} holds a run already: `peerlearn resume {self.root}` continues it, "
                "--run names another folder"
            )
        if self.root.exists() and (not self.root.is_dir() or self._holds_anything()):
            raise UserError(f"{self.root} is there and no run: choose another folder by --run")

    def _holds_anything(self) -> bool:
        # A start that was refused or killed early may have left its lock. A submission is there before its run.
        return any(path.name not in (*LOCK_FILES, JOBS_FOLDER) for path in self.root.iterdir())

    def create_folder(self) -> None:
        """Make the folder of a new run.

        Raises:
            UserError: the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def write_config(self, config_yaml: str) -> None:
        """Write config.yaml, which makes the folder a run.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            write_text(self.config, config_yaml)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.root}: cannot be written ({error.strerror}): choose another folder by --run"
        )

    def check_exists(self) -> None:
        """Make sure that the folder is a run.

        Raises:
            UserError: the folder has no config.yaml.
        """
        if not self.begun:
            raise UserError(f"{self.root} is not a run directory: it has no config.yaml")

    @property
    def begun(self) -> bool:
        """Whether there is a run: its config is written first."""
        return self.config.is_file()

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def event_log(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def notes(self) -> Path:
        """What people have noted of the run."""
        return self.root / "notes.jsonl"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.root / "export"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def evaluations(self) -> Path:
        """The evaluations that a study has ordered, each in a folder of its own."""
        return self.root / "evaluations"

    @property
    def replays(self) -> Path:
        """The steps that were computed again, each in a folder of its own."""
        return self.root / "replay"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def jobs(self) -> Path:
        return self.root / JOBS_FOLDER

    @property
    def attempts(self) -> Path:
        return self.root / "logs"

    @property
    def done_mark(self) -> Path:
        return self.root / "DONE"

    @property
    def failed_mark(self) -> Path:
        return self.root / "FAILED"

    def check_there(self) -> None:
        """Make sure that the run directory has not been moved or removed while it is in use.

        Raises:
            UserError: config.yaml is gone.
        """
        if not self.begun:
            raise UserError(
                f"{self.root} is gone: moved or removed while training; `peerlearn resume` goes on where it is now"
            )

    @property
    def done(self) -> bool:
        return self.done_mark.exists()

    def failure(self) -> str | None:
        """The reason in FAILED: its last line that is not empty; None where the run has not failed."""
        try:
            with open_regular(self.failed_mark, follows_links=False) as file:
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return None
        last = next((line for line in reversed(lines) if line.strip()), "it does not say why")
        return last.strip()

    def start_attempt(self, verb: str, facts: TrainingFacts | None) -> int:
        """Number this start of the program, make its log folder, write env.json, clear an earlier DONE or FAILED.

        Args:
            verb: verb of the command that trains, by which `peerlearn resume` knows what to continue.
            facts: facts about the training that evaluators need, for env.json; None if it makes no exports for them.

        Returns:
            The number of this start, counted from 1.

        Raises:
            UserError: the folder cannot be written.
        """
        attempt = self.newest_attempt() + 1
        try:
            self.logs(attempt).mkdir(parents=True)
            write_env(self.env, verb, facts)
        except OSError as error:
            raise self._unwritable(error) from error
        for mark in (self.done_mark, self.failed_mark):
            mark.unlink(missing_ok=True)
        return attempt

    def attempt_numbers(self) -> list[int]:
        """The numbers of the starts of the program, oldest first."""
        return sorted(numbered_files(self.attempts, _ATTEMPT))

    def newest_attempt(self) -> int:
        """The number of the latest start of the program; 0 before the first."""
        return max(self.attempt_numbers(), default=0)

    def logs(self, attempt: int) -> Path:
        """The folder of an attempt's logs and heartbeats; each rank has one of both."""
        return self.attempts / f"{_ATTEMPT}{attempt}"

    def log(self, attempt: int, rank: int) -> Path:
        """The log of a rank in an attempt."""
        return self.logs(attempt) / f"{_LOG[0]}{rank}{_LOG[1]}"

    def rank_logs(self, attempt: int) -> dict[int, Path]:
        """The logs there are of an attempt, by rank."""
        return numbered_files(self.logs(attempt), *_LOG)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one logged step to metrics.jsonl. NaN and Inf, which JSON does not know, become null."""
        self.metrics_count += 1
        self._append_line(self.metrics, {key: json_number(value) for key, value in row.items()})

    def metric_rows(self) -> Iterator[dict[str, Any]]:
        """The logged steps. A last line that a crash cut short is left out.

        Raises:
            UserError: another line is damaged.
        """
        lines = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = dict(json.loads(line))
                if not isinstance(row.get("step"), int):
                    raise ValueError("it has no step")
                yield row
            except (ValueError, TypeError, RecursionError) as error:
                if number == len(lines):
                    return
                raise UserError(
                    f"{self.metrics}: line {number} is damaged: mend or remove it"
                ) from error

    def cut_metrics(self, step: int, most: int | None = None) -> int:
        """Drop the rows that training from ``step`` on writes anew: the rows after it, and at step 0 all rows.

        Args:
            step: number of steps done.
            most: largest number of rows to keep; None = all up to the step.

        Returns:
            How many rows are left.
        """
        rows = [json.dumps(row) + "\n" for row in self.metric_rows() if 0 < step >= row["step"]]
        kept = rows[:most]
        write_text(self.metrics, "".join(kept))
        self.metrics_count = len(kept)
        return len(kept)

    def sync_metrics(self) -> None:
        """Wait until the rows so far are on the disk, so that no save counts rows that could be lost."""
        if self.metrics.exists():
            sync(self.metrics)

    def event(self, name: str, **fields: Any) -> None:
        """Add one line to events.jsonl: the time, the name of the event, and its facts."""
        self._append_line(self.event_log, {"time": now_text(), "event": name, **fields})

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """The events so far, all or those of some names. Lines that cannot be read are left out."""
        rows = read_json_lines(self.event_log, naming=names)
        return (row for row in rows if (row.get("event") in names if names else "event" in row))

    def _append_line(self, path: Path, row: Mapping[str, Any]) -> None:
        """Add a line. If a full disk does not take it, it is kept and written with the next one."""
        lines = [*self._unwritten.pop(path, []), json.dumps(row) + "\n"]
        try:
            append_text(path, "".join(lines))
        except OSError as error:
            self._unwritten[path] = lines
            if len(lines) == 1:
                logger.warning("%s cannot be written (%s): keeping its lines", path, error.strerror)

    def mark_done(self) -> None:
        """Write DONE: the run has finished, and its last step is saved and exported."""
        write_text(self.done_mark, "")
        self.failed_mark.unlink(missing_ok=True)

    def mark_failed(self, reason: str) -> None:
        """Write FAILED with the reason."""
        write_text(self.failed_mark, reason + "\n")


def default_run(argv: Sequence[str], verb: str = "pretrain") -> Path:
    """The run directory where `--run` is missing: runs/ and the config's name.

    Args:
        argv: words after the verb.
        verb: name of a run without a config.
    """
    named = argv and not argv[0].startswith("-")
    return Path("runs") / (Path(argv[0]).stem if named else verb)


def json_number(value: Any) -> Any:
    """A value as metrics.jsonl has it: null for NaN and Inf, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
