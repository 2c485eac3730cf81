"""The config of a submission: a cluster's profile, and the wishes of one submission beyond it."""

import re
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import require
from peerlearn.runs.trackers import TrackerName

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_OPTION = re.compile(r"[a-z][a-z0-9-]*(=.*)?")
# Options that a submission itself gives to sbatch and relies on.
_OWN_OPTIONS = frozenset(
    {"array", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "wrap"}
)
# YAML reads 24:00:00 as a number in base 60. A limit above thirty days is taken for such a mistake.
_LONGEST_MINUTES = 30 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Where and how a command runs as a job.

    Attributes:
        executor: place of the job: slurm; local = processes of this machine, in the background; debug = this
            machine, in the foreground.
        partition: partition of the cluster; null = the cluster's default.
        account: account that pays for the job; null = the cluster's default.
        qos: quality of service of the job; null = the cluster's default.
        constraint: features that the nodes must have; null = none.
        nodes: number of machines of one job.
        tasks_per_node: number of processes on each machine, one per GPU where there are GPUs.
        gpus_per_node: number of GPUs of each machine.
        cpus_per_task: number of cores of each process; also the number of its threads, unless OMP_NUM_THREADS is set.
        memory_gb: memory of each machine in GB; null = the cluster's default.
        time_minutes: time limit of one start in minutes; a job that needs more is requeued, as often as necessary.
        signal_seconds: seconds before the time limit at which the job is told to save; longer than a step, an
            evaluation and a save together.
        max_crashes: largest number of crashes after which the job is started again.
        setup: shell lines that prepare each start (`module load ...`).
        environment: variables of the processes, as NAME=value; secrets among them only in a file of mode 0600, as
            command lines can be seen by others.
        sbatch: further options for sbatch, as name=value without dashes: exclusive, mail-type=FAIL, ...
        srun: further options for srun, as name=value without dashes.
        name: name of the job; null = made from the verb and the run.
        dependency: condition for the start of the job, in sbatch's form: afterok:123, ...
        wait: whether to stay until the job has ended, and exit with its exit code.
        mirror: tracker that a training is mirrored to while it runs, as by `peerlearn mirror`; null = none.
    """

    executor: Literal["slurm", "local", "debug"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    memory_gb: float | None = None
    time_minutes: int = 60
    signal_seconds: int = 120
    max_crashes: int = 5
    setup: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    name: str | None = None
    dependency: str | None = None
    wait: bool = False
    mirror: TrackerName | None = None

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks_per_node", "cpus_per_task", "time_minutes"):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("gpus_per_node", "signal_seconds", "max_crashes"):
            require(getattr(self, key) >= 0, f"{key} must be at least 0, got {getattr(self, key)}")
        require(
            self.memory_gb is None or self.memory_gb > 0,
            f"memory_gb must be positive, got {self.memory_gb}",
        )
        require(
            self.signal_seconds < 60 * self.time_minutes,
            f"signal_seconds {self.signal_seconds} must be less than time_minutes {self.time_minutes}",
        )
        require(
            self.name is None or _NAME.fullmatch(self.name) is not None,
            f"name may hold letters, digits, dots, dashes and underscores, got {self.name!r}",
        )
        for key, pattern, example in (
            ("environment", _VARIABLE, "NAME=value"),
            ("sbatch", _OPTION, "name=value, without dashes before it"),
            ("srun", _OPTION, "name=value, without dashes before it"),
        ):
            for number, word in enumerate(getattr(self, key), start=1):
                # A variable may be a password, which no message shows.
                got = f"entry {number} is not" if key == "environment" else f"got {word!r}"
                require(pattern.fullmatch(word) is not None, f"{key}: expected {example}, {got}")
        for key in ("setup", "environment", "sbatch", "srun"):
            for number, line in enumerate(getattr(self, key), start=1):
                require("\n" not in line, f"{key} takes single lines, and entry {number} has more")
        require(
            self.executor == "slurm" or self.nodes == 1,
            f"nodes must be 1 with executor {self.executor}: it is this machine alone",
        )
        require(
            self.executor != "debug" or self.tasks_per_node == 1,
            f"tasks_per_node must be 1 with executor debug, got {self.tasks_per_node}",
        )
        require(
            self.executor != "slurm" or self.time_minutes < _LONGEST_MINUTES,
            f"time_minutes {self.time_minutes} is {self.time_minutes / 1440:.0f} days: give minutes, not hours:minutes",
        )
        for word in self.sbatch:
            option = word.partition("=")[0]
            require(
                option not in _OWN_OPTIONS,
                f"sbatch: {option} is set by the submission itself: leave it out",
            )

    def variables(self) -> dict[str, str]:
        """`environment` as a mapping."""
        return {
            name: value for name, _, value in (word.partition("=") for word in self.environment)
        }
