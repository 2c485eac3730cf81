"""A real SLURM on this machine for the tests: a controller with accounting and two nodes of two
CPUs, all of it in one scratch folder, on ports and with a munge of its own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "srun")
# The daemons are in folders that the search path of a plain user leaves out.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
START_SECONDS = 120


class Cluster:
    """What runs, how to talk to it, and how to break it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {name: reserve_port() for name in ("db", "dbd", "ctld", *NODES)}
        inherited = {key: text for key, text in os.environ.items() if not key.startswith("SLURM")}
        self.environment = {
            **inherited,
            "PATH": SEARCH_PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.settings = self.default_settings()

    def port(self, name: str) -> str:
        return str(self.ports[name].getsockname()[1])

    def default_settings(self) -> dict[str, str]:
        folder = self.folder
        return {
            "ClusterName": "t",
            "SlurmctldHost": f"{host()}(127.0.0.1)",
            "AuthType": "auth/munge",
            # A requeued job starts no earlier than its credential expires: by default 120 s.
            "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "ReturnToService": "2",
            "SlurmUser": user(),
            "SlurmdUser": user(),
            "SlurmctldPidFile": f"{folder}/ctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmctldPort": self.port("ctld"),
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdLogFile": f"{folder}/slurmd-%n.log",
            # The nodes have what is written here, whatever the machine has.
            "SlurmdParameters": "config_overrides",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,sched_min_interval=100000,"
            "batch_sched_delay=0",
            "SlurmctldParameters": "preempt_send_user_signal",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "JobRequeue": "1",
            # Also what a job has to save in, on a busy machine.
            "KillWait": "10",
            # As shipped: jobs ask for it themselves.
            "KillOnBadExit": "0",
            "SlurmdTimeout": "15",
            # What a busy machine answers late is sent again, and may end the next start of a job.
            "MessageTimeout": "30",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "JobAcctGatherType": "jobacct_gather/linux",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": self.port("dbd"),
            # No password: where the daemon of accounting is authenticated.
            "AccountingStoragePass": f"{folder}/munge.sock",
        }

    def write_configuration(self) -> None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // 3
        nodes = [
            f"NodeName={name} NodeHostname={host()} NodeAddr=127.0.0.1 Port={self.port(name)} "
            f"CPUs=2 RealMemory={memory} State=UNKNOWN"
            for name in NODES
        ]
        partition = f"Nodes={','.join(NODES)} MaxTime=INFINITE State=UP"
        lines = [
            *(f"{key}={text}" for key, text in self.settings.items() if text),
            *nodes,
            f"PartitionName=main {partition} Default=YES PriorityTier=1 PreemptMode=REQUEUE "
            "GraceTime=20",
            f"PartitionName=urgent {partition} PriorityTier=10 PreemptMode=OFF",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def call(self, *words: str) -> str:
        """What a command prints; an error with what it says on stderr if it fails."""
        result = self.attempt(*words)
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}\n{self.log_tails()}")
        return result.stdout

    def attempt(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ...: as the controller has it, else as accounting has."""
        for words in (
            ("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"),
            ("sacct", "--noheader", "--allocations", "--format=State%30", f"--jobs={job}"),
        ):
            found = self.attempt(*words).stdout.split()
            if found:
                return found[0]
        return self.job_field(job, "JobState")

    def restarts(self, job: str) -> int:
        return int(self.job_field(job, "Restarts"))

    def job_field(self, job: str, name: str) -> str:
        fields = self.call("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in fields if word.startswith(f"{name}="))

    def wait_for_state(self, job: str, *states: str, timeout_seconds: float = 300) -> str:
        """The state of these that the job is in first."""
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.state(job)
            return seen in states

        self.wait(reached, f"job {job} {' or '.join(states)}", timeout_seconds)
        return seen

    def wait(self, condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                queue = self.attempt("squeue", "--states=all").stdout
                raise TimeoutError(
                    f"no {what} in {timeout_seconds} s\n{queue}{self.node_states()}\n"
                    f"{self.log_tails()}"
                )
            time.sleep(0.2)

    def log_tails(self) -> str:
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            for log in sorted(self.folder.glob("*.log"))
        )

    def configure(self, **keys: str) -> None:
        """Other values of keys in the configuration; an empty one leaves the key out."""
        self.settings.update(keys)
        self.write_configuration()
        self.call("scontrol", "reconfigure")

    def restore_configuration(self) -> None:
        if self.settings != self.default_settings():
            self.settings = self.default_settings()
            self.configure()

    def node_states(self) -> dict[str, str]:
        """idle, allocated, down ...; with a star behind if the node does not answer."""
        words = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        lines = self.attempt(*words).stdout.splitlines()
        return dict(line.split() for line in lines)

    def kill_node(self, name: str) -> None:
        """As if the machine lost power: the daemon, the steps and all that they started. The
        controller sees it within 30 s or so; a node that is back before is not missed, and a job
        that had only a task there runs on without it."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        kill_all(lambda: self.node_processes(name))

    def node_processes(self, name: str) -> set[int]:
        """The daemon and its steps hold the log of the node open; with all that descends of them,
        and what left its parents but still has the environment of a step."""
        log = str(self.folder / f"slurmd-{name}.log")
        step = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={name}".encode()}
        processes = living_processes()
        found = {pid for pid in processes if log in open_files(pid) or step <= environment_of(pid)}
        return with_descendants(found, processes)

    def start_node(self, name: str) -> None:
        """Returns when the controller has it back."""
        begun = int(time.time())
        self.start("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", name, node=name)
        self.wait(lambda: self.node_is_back(name, begun), f"node {name}", START_SECONDS)

    def node_is_back(self, name: str, begun: int) -> bool:
        """Known by its new start: what the controller says of a dead node is old for a while."""
        fields = self.attempt("scontrol", "show", "node", name).stdout.split()
        start = next((word for word in fields if word.startswith("SlurmdStartTime=")), "=None")
        started = start.split("=")[1]
        if started == "None" or datetime.fromisoformat(started).timestamp() < begun:
            return False
        state = self.node_states()[name]
        return "down" not in state and not state.endswith("*")

    def cancel_all(self) -> None:
        """Nothing queued, and both nodes there and idle."""
        for name in NODES:
            if name not in self.daemons or self.daemons[name].poll() is not None:
                self.start_node(name)
        self.wait(self.emptied, "empty cluster", 180)

    def emptied(self) -> bool:
        """Asked again and again, as a job may requeue itself while it is cancelled."""
        if self.attempt("squeue", "--noheader").stdout.split():
            self.attempt("scancel", "--user", user())
            return False
        states = self.node_states()
        for name, state in states.items():
            if "drain" in state or "down" in state:
                self.attempt("scontrol", "update", f"nodename={name}", "state=resume")
        return states == dict.fromkeys(NODES, "idle")

    def start(self, *words: str, node: str | None = None) -> None:
        """A daemon in the foreground of a session of its own, so that its pid is known and nobody
        waits for its output."""
        name = node or words[0]
        # A node writes the same to a log that its steps share with it.
        file = f"{name}.out" if node else f"{name}.log"
        with (self.folder / file).open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                words,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def start_accounting(self) -> None:
        folder = self.folder
        self.call(
            *("mariadb-install-db", "--no-defaults", f"--user={user()}", f"--datadir={folder}/db"),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
            # One that starts beside it removes what is in a folder that they share.
            f"--tmpdir={folder}/tmp",
        )
        self.start(
            *("mariadbd", "--no-defaults", f"--user={user()}", f"--datadir={folder}/db"),
            *(f"--socket={folder}/db.sock", f"--pid-file={folder}/db.pid"),
            f"--tmpdir={folder}/tmp",
            *("--bind-address=127.0.0.1", f"--port={self.port('db')}", "--skip-name-resolve"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
        )
        client = ("mariadb", "--no-defaults", "--user=root", f"--socket={folder}/db.sock", "-e")
        self.wait(
            lambda: self.attempt(*client, "SELECT 1").returncode == 0, "database", START_SECONDS
        )
        self.call(
            *client,
            "CREATE DATABASE acct; CREATE USER slurm@127.0.0.1 IDENTIFIED BY 'slurmpw';"
            "GRANT ALL ON acct.* TO slurm@127.0.0.1",
        )
        configuration = folder / "slurmdbd.conf"
        configuration.touch(mode=0o600)  # slurmdbd refuses other modes
        configuration.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.sock\n"
            f"DbdHost={host()}\nDbdAddr=127.0.0.1\nDbdPort={self.port('dbd')}\nSlurmUser={user()}\n"
            f"PidFile={folder}/slurmdbd.pid\n"
            "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={self.port('db')}\nStorageUser=slurm\nStoragePass=slurmpw\n"
            "StorageLoc=acct\n"
        )
        self.start("slurmdbd", "-D")
        accounts = ("sacctmgr", "--immediate", "--noheader")
        self.wait(
            lambda: self.attempt(*accounts, "list", "cluster").returncode == 0,
            "accounting",
            START_SECONDS,
        )
        self.call(*accounts, "add", "cluster", "t")

    def start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        paths = {"key-file": key} | {
            f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("pid", "log", "seed")
        }
        # By force: it wants others to reach its socket, which here none should.
        self.start(
            *("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock"),
            *(f"--{option}={path}" for option, path in paths.items()),
        )
        self.wait((self.folder / "munge.sock").exists, "munge", START_SECONDS)

    def start_all(self) -> None:
        for name in ("db", "tmp", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        self.write_configuration()
        self.start_munge()
        self.start_accounting()
        self.start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for name in NODES:
            self.start_node(name)
        self.wait(self.emptied, "idle nodes", START_SECONDS)

    def stop(self) -> None:
        """At once: nothing that it wrote is kept."""
        kill_all(self.all_processes)
        for daemon in self.daemons.values():
            daemon.wait(timeout=30)
        self.daemons.clear()
        for held in self.ports.values():
            held.close()
        shutil.rmtree(self.folder)

    def all_processes(self) -> set[int]:
        """Those that live, of the daemons and of the steps."""
        daemons = {daemon.pid for daemon in self.daemons.values() if daemon.poll() is None}
        steps = [self.node_processes(name) for name in NODES]
        return with_descendants(daemons, living_processes()).union(*steps)


def start_cluster(folder: Path) -> Cluster:
    """In a scratch folder of a short path, as sockets are in it, which goes with the cluster."""
    cluster = Cluster(folder)
    try:
        cluster.start_all()
    except BaseException:
        cluster.stop()
        raise
    return cluster


def scratch_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))


def missing_programs() -> str | None:
    """Why no cluster can be started here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if not missing:
        return None
    return (
        f"no {', '.join(missing)}: `sh scripts/system_packages.sh slurm` installs a SLURM for tests "
        "(Debian packages slurm-wlm munge slurmdbd mariadb-server)"
    )


def host() -> str:
    return socket.gethostname().split(".")[0]


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def reserve_port() -> socket.socket:
    """A free port that nobody else is given as long as this is open, while a daemon that asks for
    it by number can listen on it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("0.0.0.0", 0))
    return held


def kill_all(living: Callable[[], set[int]]) -> None:
    """Until none is left, as they may start others meanwhile."""
    deadline = time.monotonic() + 30
    while pids := living():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{pids} do not die")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def living_processes() -> dict[int, int]:
    """Of each process the parent."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name, in brackets, may hold spaces and brackets.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(folder.name)] = int(parent)
    return found


def with_descendants(pids: set[int], processes: dict[int, int]) -> set[int]:
    found = set(pids)
    while more := {pid for pid, parent in processes.items() if parent in found} - found:
        found |= more
    return found


def open_files(pid: int) -> set[str]:
    found = set()
    for link in Path("/proc").glob(f"{pid}/fd/*"):
        with suppress(OSError):
            found.add(os.readlink(link))
    return found


def environment_of(pid: int) -> set[bytes]:
    with suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return set()
