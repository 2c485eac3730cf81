"""`peerlearn submit`: run a verb as a job."""

import sys
from collections.abc import Sequence
from pathlib import Path

from peerlearn.cli import dispatch
from peerlearn.config import find_config, parse_config
from peerlearn.errors import DONE, UsageError
from peerlearn.runs.trackers import check_installed
from slurm.config import SubmitConfig
from slurm.plan import plan_task
from slurm.private_folder import warn_of_profile
from slurm.submission import (
    BATCH_SCRIPTS,
    START_SCRIPT,
    Submission,
    Task,
    create_submission,
    locked_home,
)

CLUSTERS = Path(__file__).parent / "clusters"


def main(argv: Sequence[str]) -> int:
    """`peerlearn submit [--cluster C] [--key value ...] [--dry_run] -- VERB ...`.

    Returns:
        The exit code.
    """
    words = list(argv)
    own, command = _split(words)
    if {"-h", "--help"} & set(command):
        return dispatch(command)
    config, dry_run = read_cluster(own)
    # --dry_run counts on either side of the dashes.
    dry_run = dry_run or "--dry_run" in command
    command = [word for word in command if word != "--dry_run"]
    # A job that comes first may make the checkpoints.
    home, task = plan_task(
        command,
        to_come=config.dependency is not None,
        processes=config.nodes * config.tasks_per_node,
    )
    if config.mirror is not None:
        if not task.trains:
            raise UsageError(f"--mirror goes with a training, and {task.words[0]} is none")
        check_installed(config.mirror)
    name = config.name or job_name(task)
    if dry_run:
        _print_plan(home, task, config, name)
        return DONE
    from slurm.executors import adopt, submit
    from slurm.jobs import check_free

    with locked_home(home):
        if config.executor == "slurm":
            adopt(home)
        if task.run is not None and task.trains:
            check_free(Path(task.run))
        submission = create_submission(home, [task], config)
        jobs = submit(submission, name)
    _announce(submission, jobs)
    if not config.wait and config.executor != "debug":
        return DONE
    from slurm.outcome import wait_for_jobs

    return wait_for_jobs(submission, jobs)


def read_cluster(words: Sequence[str]) -> tuple[SubmitConfig, bool]:
    """The config from `--cluster C` and further keys, and whether `--dry_run` was given.

    Raises:
        UsageError: `--cluster` is missing, a key is unknown, or a value is wrong.
    """
    words = list(words)
    for position, word in enumerate(words):
        if word == "--cluster" or word.startswith("--cluster="):
            taken = 1 if "=" in word else 2
            named = word.partition("=")[2] or (words[position + 1 :] or [""])[0]
            words = [named, *words[:position], *words[position + taken :]]
            break
    else:
        if not {"-h", "--help"} & set(words):
            raise UsageError(
                "--cluster is missing: local, debug, slurm, or the YAML file of your cluster (docs/slurm.md)"
            )
    if words[:1] == [""]:
        raise UsageError("--cluster needs a name or a file: local, debug, slurm, my_cluster.yaml")
    found = parse_config(
        SubmitConfig,
        words,
        verb="submit",
        description="Run any other verb as a job of a SLURM cluster or of this machine. --cluster C names a shipped "
        "profile (local, debug, slurm, gpu_node) or a YAML file; the keys below override its values.",
        example="peerlearn submit --cluster local -- pretrain mcl_fashion_mnist_demo --run runs/a",
        essential=(
            *("partition", "account", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task"),
            *("memory_gb", "time_minutes", "setup", "name", "dependency", "wait"),
        ),
        shipped=CLUSTERS,
        usage="--cluster C [--key value ...] [--dry_run] -- VERB ...",
    )
    warn_of_profile(find_config(words[0], CLUSTERS))
    return found


def job_name(task: Task) -> str:
    """The name of a job in squeue: the verb, and the run."""
    folder = Path(task.run).name if task.run else ""
    return f"{task.words[0]}-{folder}" if folder else task.words[0]


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" in words:
        at = words.index("--")
        return words[:at], words[at + 1 :]
    if {"-h", "--help"} & set(words):
        return words, []
    raise UsageError(
        "the command stands after --: peerlearn submit --cluster local -- pretrain ..."
    )


def _print_plan(home: Path, task: Task, config: SubmitConfig, name: str) -> None:
    submission = Submission(
        folder=home / f"{task.words[0]}-N",
        tasks=[task],
        config=config,
        working_directory=str(Path.cwd()),
    )
    print(f"# peerlearn {' '.join(submission.command(0))}")
    if task.config_yaml is not None:
        print(f"# {submission.config_file(0)}:\n{task.config_yaml}")
    if config.executor == "slurm":
        from slurm.executors import batch_script, start_script

        script = submission.folder / BATCH_SCRIPTS
        print(f"# {script}:\n{batch_script(submission, script, name)}")
        print(f"# {submission.folder / START_SCRIPT}:\n{start_script(submission)}")


def _announce(submission: Submission, jobs: Sequence[str]) -> None:
    for task, job in zip(submission.tasks, jobs, strict=True):
        place = f" ({task.run})" if task.run else ""
        print(f"job {job}: {' '.join(task.words)}{place}")
    print(f"submission: {submission.folder}")
    sys.stdout.flush()
