"""Weights & Biases: one run for its server or, offline, folders that `wandb sync` uploads, all of the run's id.

Online the server tells how far it is. Offline the folders do, RUN/mirror/wandb/offline-run-*: each start makes one.
"""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.exchange.mirror import Destination
from peerlearn.exchange.run_news import News, Position, Subject
from peerlearn.exchange.wandb_files import is_open, steps_of

_WRITER_SECONDS = 30.0
_POLL_SECONDS = 0.05


def connect(subject: Subject, destination: Destination) -> "Wandb":
    """Open the run.

    Raises:
        UserError: wandb is switched off, or still writes for a mirror that was killed.
    """
    import wandb

    sent = _last_offline_step(subject.folder / "wandb")
    settings = wandb.Settings(
        # The mirror's own machine and output are not the run's.
        console="off",
        silent=True,
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    if destination.uri:
        settings.base_url = destination.uri
    run = wandb.init(
        id=subject.id,
        project=destination.project,
        name=subject.name,
        group=subject.group,
        dir=subject.folder,
        resume="allow",
        config={**subject.config, "folder": str(subject.root)},
        settings=settings,
    )
    if run.disabled:
        raise UserError("wandb is switched off by WANDB_MODE: set it to online or offline")
    return Wandb(run, sent, subject)


class Wandb:
    """A run of wandb."""

    # Its own process writes and uploads, and may be killed before it has.
    lasting = False

    def __init__(self, run: Any, offline_step: int, subject: Subject) -> None:
        self._run = run
        self._offline_step = offline_step
        self._subject = subject

    def position(self, noted: Position) -> Position:
        """The server's step or, offline, that of the folders, or what was noted of folders that are gone."""
        step = max(self._offline_step, self._run.starting_step - 1)
        if self._run.offline:
            step = max(step, noted.step)
        return Position(step=step, events=noted.events, results=noted.results)

    def send(self, news: News) -> None:
        """Send rows as history, results and the number of events of each kind as summary, all events as a file."""
        for row in news.rows:
            self._run.log({**row.values, "_timestamp": row.time_ms / 1000}, step=row.step)
        summary: dict[str, Any] = {}
        for result in news.results:
            summary |= {
                f"results/{result.name}/{key}": each for key, each in result.metrics.items()
            }
            summary[f"results/{result.name}/protocol"] = result.protocol
        if news.new_events:
            counts = Counter(event["event"] for event in news.events)
            summary |= {f"events/{name}": count for name, count in counts.items()}
            # A copy: wandb would link to a file that goes on changing, and say so.
            copy = shutil.copy(self._subject.events, self._run.dir)
            self._run.save(copy, base_path=self._run.dir, policy="end")
        if summary:
            self._run.summary.update(summary)

    def close(self, failed: bool | None) -> None:
        """Wait until wandb has written or uploaded all.

        Raises:
            UserError: the file of an offline run stays open.
        """
        self._run.finish(exit_code=1 if failed else 0)
        if self._run.offline:
            # Its process may write the last records after `finish` has returned.
            _wait_for_writer(Path(self._run.settings.sync_file))


def _last_offline_step(folder: Path) -> int:
    """The last step in the folders of offline runs; -1 = there is none.

    Raises:
        UserError: wandb's process still writes there.
    """
    files = sorted(folder.glob("offline-run-*/run-*.wandb"))
    for file in files[-1:]:
        _wait_for_writer(file)
    return max((step for file in files for step in steps_of(file)), default=-1)


def _wait_for_writer(file: Path) -> None:
    """Wait until no process has the file open.

    Raises:
        UserError: one still has.
    """
    deadline = time.monotonic() + _WRITER_SECONDS
    while is_open(file):
        if time.monotonic() > deadline:
            raise UserError(
                f"{file}: a process, most likely wandb's, has it open for {_WRITER_SECONDS:.0f} s: "
                "mirror again once it has ended; each step is sent once"
            )
        time.sleep(_POLL_SECONDS)
