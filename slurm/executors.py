"""Submitting: to a SLURM cluster by sbatch, or to this machine by submitit, in the background or in the foreground.

FOLDER/batch-ID.sh   what sbatch is given, under a name by which squeue tells the job: it starts start.sh and, however
                     that ends, decides on the job (`slurm.requeue`)
FOLDER/start.sh      one start: the user's setup and variables, then the processes
"""

import contextlib
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from peerlearn.runs.files import PRIVATE, write_text
from peerlearn.runs.launcher import module_words
from slurm.client import NoAnswerError, call, jobs_of_script, outside_any_job
from slurm.job import Job
from slurm.private_folder import PRIVATE_OR_EXIT, private_or_exit
from slurm.submission import (
    BATCH_SCRIPTS,
    EXECUTED,
    START_SCRIPT,
    Submission,
    job_numbers,
    read_submission,
    record_jobs,
    remove_submission,
)

# Slurm gives these a meaning in the paths of logs.
_NOT_IN_PATHS = ("%", "\\", "\n")
# sbatch with --parsable prints the job's number, and the cluster where there are several.
_NUMBER = re.compile(r"(\d+)(;\S*)?")
# A controller that answers again may first take the submissions that were sent to it.
_PATIENCE_SECONDS, _APPEARS_SECONDS, _PAUSE_SECONDS = 300.0, 20.0, 2.0


def submit(submission: Submission, name: str, *, at_once: int | None = None) -> list[str]:
    """Submit, and record the jobs. If the submission is refused, its folder is removed.

    Args:
        submission: the submission, whose folder is complete.
        name: name of the job.
        at_once: largest number of the tasks that run at once; None = as many as the cluster gives.

    Returns:
        The job of each task: Slurm's 123 or 123_4, or the process number of a local job.

    Raises:
        UserError: sbatch is not on this machine, or refuses. The message has its own words.
    """
    if submission.config.executor == "slurm":
        return _submit_to_slurm(submission, name, at_once)
    with _removed_on_failure(submission), _outside_any_job():
        # submitit's own process would else take modules from the working directory.
        os.environ.update({**submission.config.variables(), "PYTHONSAFEPATH": "1"})
        # A job of this machine is one task.
        job = _executor_here(submission).submit(Job(str(submission.folder.resolve()), 0))
        record_jobs(submission, [job.job_id])
    if submission.config.executor == "debug":
        job.results()
    return [job.job_id]


def adopt(home: Path) -> None:
    """Record the jobs of submissions whose submitter ended before it could: sbatch was killed, or gave no answer.

    Raises:
        UserError: Slurm does not answer.
    """
    for script in home.glob(f"*/{BATCH_SCRIPTS}"):
        try:
            job_numbers(script.parent)
        except (OSError, ValueError):
            try:
                submission = read_submission(script.parent)
            except (OSError, ValueError, TypeError, LookupError, AttributeError):
                continue  # Nor can a job read it, if there is one: it ends at once.
            if number := _number_of(script.resolve()):
                record_jobs(submission, _job_of_each_task(submission, number))


@contextmanager
def _removed_on_failure(
    submission: Submission, but: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    """Remove the submission if the block fails, but not by an error after which a job may be there."""
    try:
        yield
    except but:
        raise
    except BaseException:
        remove_submission(submission)
        raise


def _submit_to_slurm(submission: Submission, name: str, at_once: int | None) -> list[str]:
    folder = submission.folder.resolve()
    script = folder / BATCH_SCRIPTS.replace("*", secrets.token_hex(8))
    with _removed_on_failure(submission):
        # The variables of the start may be secrets.
        write_text(folder / START_SCRIPT, start_script(submission), mode=PRIVATE)
        write_text(script, batch_script(submission, script, name, at_once), mode=PRIVATE)
    with _undisturbed():
        number, why = _sbatch(submission, script)
        if number:
            record_jobs(submission, _job_of_each_task(submission, number))
    if not number:
        number = _found_again(submission, script, why)
        record_jobs(submission, _job_of_each_task(submission, number))
    return _job_of_each_task(submission, number)


def _sbatch(submission: Submission, script: Path) -> tuple[str | None, str]:
    """Hand a script over: the job's number or, if it was not told, None and why. A refused submission is removed."""
    try:
        with _removed_on_failure(submission, but=NoAnswerError):
            environment = outside_any_job(dict(os.environ))
            printed = call("sbatch", "--parsable", str(script), environment=environment)
    except NoAnswerError as error:
        return None, str(error)
    return _number_in(printed), "sbatch told no number"


def _number_in(printed: str) -> str | None:
    """The job's number in what sbatch printed; None unless exactly one line is a number. A wrapper may chat."""
    numbers = [match[1] for line in printed.splitlines() if (match := _NUMBER.fullmatch(line))]
    return numbers[0] if len(numbers) == 1 else None


def _found_again(submission: Submission, script: Path, why: str) -> str:
    """The number of the job that a submission has become, as sbatch did not tell it.

    Raises:
        UserError: Slurm has no such job, and the submission is removed; or Slurm cannot be asked, and it stays.
    """
    print(f"{why}: looking for the job in squeue", file=sys.stderr, flush=True)
    folder = submission.folder
    deadline: float | None = None
    while deadline is None or time.monotonic() < deadline:
        try:
            number = _number_of(script, patience_seconds=_PATIENCE_SECONDS)
        except UserError as error:
            raise UserError(
                f"{why}, and whether a job came of it cannot be asked ({error}): the next submission for this run "
                f"finds it, else remove {folder}"
            ) from error
        if number:
            return number
        # The time counts from the first answer.
        deadline = deadline or time.monotonic() + _APPEARS_SECONDS
        time.sleep(_PAUSE_SECONDS)
    # A job that may yet come of it ends at once, as its files are gone.
    remove_submission(submission)
    raise UserError(f"{why}, and no job came of it: submit again")


def _number_of(script: Path, *, patience_seconds: float = 0.0) -> str | None:
    return min(jobs_of_script(script, patience_seconds=patience_seconds), key=int, default=None)


def _job_of_each_task(submission: Submission, number: str) -> list[str]:
    tasks = len(submission.tasks)
    return [number] if tasks == 1 else [f"{number}_{task}" for task in range(tasks)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block signals while sbatch runs, and until its job is recorded.

    sbatch inherits the block. Without it a signal could kill sbatch midway and leave a job that nobody knows.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def batch_script(
    submission: Submission, script: Path, name: str, at_once: int | None = None
) -> str:
    """The batch script for sbatch. It holds whatever the user's setup does: that runs in a shell of its own.

    Args:
        submission: the submission.
        script: the file that the script is written to.
        name: name of the job.
        at_once: largest number of the tasks that run at once; None = as many as the cluster gives.

    Raises:
        UserError: the path of the submission has characters with a meaning to Slurm.
    """
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    folder = submission.folder.resolve()
    for character in _NOT_IN_PATHS:
        if character in str(folder):
            raise UserError(
                f"{submission.folder}: to Slurm {character!r} in a path has a meaning: choose another folder for the "
                "run by --run"
            )
    # Where the setup leaves what it takes to call Slurm and Python.
    ready = f'{shlex.quote(str(submission.outcomes.resolve()))}/"ready-$SLURM_JOB_ID-$start"'
    requeue = shlex.join([*module_words(submission.code.resolve(), "slurm.requeue"), str(folder)])
    parameters = _sbatch_parameters(submission, name)
    tasks = len(submission.tasks)
    if tasks > 1:
        parameters |= {"map_count": tasks, "array_parallelism": at_once or tasks}
    parameters |= {
        "use_srun": False,
        "setup": [
            # What the user's BASH_ENV or SHELLOPTS have set must not end this shell, nor the signal for the processes.
            "set +eu; trap : USR2",
            "start=${SLURM_RESTART_COUNT:-0}",
            'echo "start $start on $SLURM_JOB_NODELIST"',
            private_or_exit(folder, EXECUTED),
            # Slurm may yet start what was given up, and a later submission may have the name of its folder.
            f"[ -e {shlex.quote(str(script))} ] || "
            "{ echo 'peerlearn: this submission was given up: nothing is run' >&2; exit 1; }",
        ],
        "teardown": [
            "code=$?",
            # It may have been hours.
            PRIVATE_OR_EXIT,
            f"if [ -s {ready} ]; then . {ready}; rm -f {ready}",
            'else echo "setup ended with $code, before the command"; [ $code != 0 ] || code=1; fi',
            f'{requeue} "${{SLURM_ARRAY_TASK_ID:-0}}" $code',
            "exit $?",
        ],
    }
    converted = SlurmExecutor._convert_parameters(SlurmExecutor.__new__(SlurmExecutor), parameters)
    command = f"bash {shlex.quote(str(folder / START_SCRIPT))} {ready}"
    return str(_make_sbatch_string(command, folder, **converted))


def start_script(submission: Submission) -> str:
    """The script of one start: the user's setup, then the processes."""
    config, folder = submission.config, submission.folder.resolve()
    job = "%j" if len(submission.tasks) == 1 else "%A_%a"
    srun = [
        *("srun", "--unbuffered", "--export=ALL", f"--output={folder}/{job}_%t_log.out"),
        # srun does not inherit the cores per task from sbatch.
        *("--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}"),
        # Ranks of one machine follow each other: what trains together, in consecutive ranks, shares a machine.
        "--distribution=block",
        *(f"--{word}" for word in config.srun),
        *module_words(submission.code.resolve(), "slurm.job"),
        str(folder),
    ]
    variables = config.variables().items()
    lines = [
        # The setup may set other words, and cannot set this.
        "readonly peerlearn_ready=$1",
        "# setup",
        *config.setup,
        "",
        "# whatever the setup has set",
        "set +eux; umask go-w; trap : USR2",
        'declare -px PATH LD_LIBRARY_PATH SLURM_CONF > "$peerlearn_ready" 2> /dev/null',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables),
        "",
        "# the processes",
        shlex.join(srun),
    ]
    return "\n".join(lines) + "\n"


def _sbatch_parameters(submission: Submission, name: str) -> dict[str, Any]:
    config = submission.config
    further = dict(word.partition("=")[::2] for word in config.sbatch)
    parameters = {
        "job_name": name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node,
        "cpus_per_task": config.cpus_per_task,
        # Every process sees all GPUs of its machine, because NCCL needs them, and takes that of its local rank.
        "gpus_per_node": config.gpus_per_node or None,
        "mem": config.memory_gb,
        "time": config.time_minutes,
        "signal_delay_s": config.signal_seconds,
        "dependency": config.dependency,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {
            "requeue": True,
            **{key: value or True for key, value in further.items()},
        },
    }
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def _executor_here(submission: Submission) -> Any:
    import submitit

    config, folder = submission.config, submission.folder.resolve()
    if config.executor == "debug":
        return submitit.DebugExecutor(folder)
    executor = _local_executor(submission)
    executor.update_parameters(
        timeout_min=config.time_minutes,
        tasks_per_node=config.tasks_per_node,
        gpus_per_node=config.gpus_per_node or _gpus_here(),
        signal_delay_s=config.signal_seconds,
        stderr_to_stdout=True,
    )
    return executor


def _local_executor(submission: Submission) -> Any:
    """submitit's executor, whose jobs run the submission's copy of the program and read no pickle."""
    from submitit import LocalExecutor

    words = module_words(submission.code.resolve(), "slurm.job")

    class Executor(LocalExecutor):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            return shlex.join([*words, str(submission.folder.resolve())])

    return Executor(submission.folder.resolve())


def _gpus_here() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Start processes as from a login node, even inside a job. They outlive the terminal."""
    earlier = dict(os.environ)
    os.environ.clear()
    os.environ.update(outside_any_job(earlier))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _silent_children():
            yield
    finally:
        signal.signal(signal.SIGHUP, hangup)
        os.environ.clear()
        os.environ.update(earlier)


@contextmanager
def _silent_children() -> Iterator[None]:
    """Close stdout and stderr for child processes: a job in the background must not keep a pipe or terminal open."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w"))
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
        try:
            yield
        finally:
            for number, original in zip((1, 2), saved, strict=True):
                os.dup2(original, number)
                os.close(original)
