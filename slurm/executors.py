"""Submitting by submitit: to a cluster, in the background of this machine, or in the foreground."""

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peerlearn.errors import UserError
from slurm.client import own_words
from slurm.job import Job
from slurm.private_folder import PRIVATE_OR_EXIT, private_or_exit
from slurm.submission import EXECUTED, Submission, record_jobs, remove_submission

# Variables that make a process part of a job. SLURM_CONF is none of them: it only says where the cluster is.
_JOB_VARIABLES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
_RANK_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)


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
    if submission.config.executor == "slurm" and "%" in str(submission.folder.resolve()):
        remove_submission(submission)
        raise UserError(
            f"{submission.folder}: to Slurm % in a path has a meaning: choose another folder for the run by --run"
        )
    with undisturbed(submission.config.executor):
        handed_over = _hand_over(submission, name, at_once)
        jobs = [job.job_id for job in handed_over]
        record_jobs(submission, jobs)
    if submission.config.executor == "debug":
        for job in handed_over:
            job.results()
    return jobs


def _hand_over(submission: Submission, name: str, at_once: int | None) -> list[Any]:
    import submitit

    functions: list[Any] = [
        Job(str(submission.folder.resolve()), task) for task in range(len(submission.tasks))
    ]
    try:
        with _outside_any_job():
            executor = _executor(submission, name, at_once)
            if len(functions) > 1 and submission.config.executor == "slurm":
                return list(executor.submit_array(functions))
            return [executor.submit(function) for function in functions]
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        words = own_words("sbatch", str(error))
        if "timed out" in words or isinstance(error, submitit.core.utils.FailedSubmissionError):
            raise UserError(
                f"{words}: the job may be there all the same, see `squeue --me`; its folder is {submission.folder}"
            ) from error
        remove_submission(submission)
        raise UserError(words) from error
    except BaseException:
        remove_submission(submission)
        raise


@contextmanager
def undisturbed(executor: str) -> Iterator[None]:
    """Block signals while sbatch runs.

    sbatch inherits the block. Without it a signal could kill sbatch midway and leave a job that nobody knows.
    """
    if executor != "slurm":
        yield  # A local job would inherit the block too, and could not be stopped.
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def batch_script(submission: Submission, name: str) -> str:
    """The batch script for sbatch."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    arguments = _sbatch_parameters(submission, name)
    folder = submission.folder.resolve()
    command = _process_command(folder)
    arguments = SlurmExecutor._convert_parameters(SlurmExecutor.__new__(SlurmExecutor), arguments)
    return str(_make_sbatch_string(command, folder, **arguments))


def _executor(submission: Submission, name: str, at_once: int | None) -> Any:
    import submitit

    config, folder = submission.config, submission.folder.resolve()
    if config.executor == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError(
                "`sbatch` is not on this machine: submit from a login node of the cluster, or use --cluster local"
            )
        executor: Any = _slurm_executor(folder)
        parameters = _sbatch_parameters(submission, name)
        executor.update_parameters(**parameters, array_parallelism=at_once or len(submission.tasks))
        return executor
    os.environ.update(_variables(submission))
    if config.executor == "debug":
        return submitit.DebugExecutor(folder)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        timeout_min=config.time_minutes,
        tasks_per_node=config.tasks_per_node,
        gpus_per_node=config.gpus_per_node or _gpus_here(),
        signal_delay_s=config.signal_seconds,
        stderr_to_stdout=True,
    )
    return executor


def _slurm_executor(folder: Path) -> Any:
    """submitit's executor, whose jobs read the submission's own files and no pickle.

    submitit renames its pickle after sbatch. A submitter that is killed before that would leave a job without one.
    """
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            return _process_command(folder)

    return Executor(folder)


def _process_command(folder: Path) -> str:
    """The command of each process of a job."""
    return f"{shlex.quote(sys.executable)} -u -P -m slurm.job {shlex.quote(str(folder))}"


def _sbatch_parameters(submission: Submission, name: str) -> dict[str, Any]:
    config = submission.config
    folder = submission.folder.resolve()
    python = f"{shlex.quote(sys.executable)} -P -m"
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
        # srun does not inherit the cores per task from sbatch.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={config.cpus_per_task}",
            *(f"--{word}" for word in config.srun),
        ],
        "setup": [
            # The signal for the processes may reach this shell too, and must not end it.
            "trap : USR2",
            private_or_exit(folder, EXECUTED),
            *config.setup,
            *(
                f"export {variable}={shlex.quote(value)}"
                for variable, value in _variables(submission).items()
            ),
        ],
        "teardown": [
            "rc=$?",
            # It may have been hours.
            PRIVATE_OR_EXIT,
            f'{python} slurm.requeue {shlex.quote(str(folder))} "${{SLURM_ARRAY_TASK_ID:-0}}" $rc',
            "exit $?",
        ],
    }
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def _variables(submission: Submission) -> dict[str, str]:
    """The variables that the user asked for, and those that make Python find the submission's copy of the program."""
    asked = submission.config.variables()
    earlier = asked.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    path = str(submission.code.resolve())
    return {
        **asked,
        "PYTHONPATH": f"{path}{os.pathsep}{earlier}" if earlier else path,
        "PYTHONSAFEPATH": "1",
    }


def _gpus_here() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Submit as from a login node, even inside a job. Processes that are started here outlive the terminal."""
    earlier = dict(os.environ)
    for name in earlier:
        if (name.startswith(_JOB_VARIABLES) and name != "SLURM_CONF") or name in _RANK_VARIABLES:
            del os.environ[name]
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
