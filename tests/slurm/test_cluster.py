"""The SLURM that the other tests here run on: two nodes, accounting, a node that dies."""

from pathlib import Path

from tests.slurm.cluster import Cluster, living_processes, scratch_folder, start_cluster


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """The id of a job of one task on each of two nodes; each of its attempts adds to ``log``."""
    file = folder / "job.sh"
    file.write_text(f"#!/bin/bash\n{script}\n")
    words = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--open-mode=append")
    log = f"--output={folder}/log"
    return cluster.call("sbatch", *words, log, *options, str(file)).strip()


def setting(cluster: Cluster, key: str) -> str:
    lines = (line.split("=", 1) for line in cluster.call("scontrol", "show", "config").splitlines())
    return next(line[1].strip() for line in lines if line[0].strip() == key)


def test_both_nodes_are_idle_at_first(cluster: Cluster):
    assert cluster.node_states() == {"n1": "idle", "n2": "idle"}


def test_a_job_runs_one_task_on_each_node_and_is_accounted(cluster: Cluster, tmp_path: Path):
    report = 'echo "$SLURM_NODEID $SLURM_PROCID $SLURMD_NODENAME"'
    job = submit(cluster, tmp_path, f"srun bash -c '{report}'")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["0 0 n1", "1 1 n2"]
    accounted = ("sacct", "--noheader", "--allocations", "--format=State,NNodes", f"--jobs={job}")
    cluster.wait(lambda: cluster.call(*accounted).split() == ["COMPLETED", "2"], "account", 120)


def test_a_job_of_a_node_that_dies_is_requeued(cluster: Cluster, tmp_path: Path):
    tasks = "srun bash -c 'echo $SLURM_RESTART_COUNT; [ $SLURM_RESTART_COUNT ] || sleep 1000'"
    job = submit(cluster, tmp_path, tasks)
    cluster.wait_for_state(job, "RUNNING")
    log = tmp_path / "log"
    cluster.wait(lambda: log.exists() and log.read_text() == "\n\n", "both tasks", 120)
    steps = cluster.node_processes("n2")
    cluster.kill_node("n2")
    assert not steps & living_processes().keys()
    cluster.wait_for_state(job, "PENDING", timeout_seconds=180)
    assert cluster.restarts(job) == 1
    cluster.start_node("n2")
    cluster.wait_for_state(job, "COMPLETED", timeout_seconds=180)
    assert log.read_text().split()[-2:] == ["1", "1"]


def test_a_changed_configuration_is_in_force_until_restored(cluster: Cluster):
    assert setting(cluster, "SlurmctldParameters") == "preempt_send_user_signal"
    cluster.configure(SlurmctldParameters="", KillWait="7")
    assert setting(cluster, "SlurmctldParameters") == "(null)"
    assert setting(cluster, "KillWait") == "7 sec"
    cluster.restore_configuration()
    assert setting(cluster, "SlurmctldParameters") == "preempt_send_user_signal"
    assert setting(cluster, "KillWait") == "10 sec"


def test_a_second_cluster_beside_leaves_nothing_running(cluster: Cluster, tmp_path: Path):
    second = start_cluster(scratch_folder())
    try:
        job = submit(second, tmp_path, "trap '' TERM; sleep 1000 & srun sleep 1000")
        second.wait_for_state(job, "RUNNING")
        second.wait(lambda: len(second.node_processes("n2")) > 1, "step", 120)
        processes = second.all_processes()
    finally:
        second.stop()
    assert len(processes) > 7
    assert not processes & living_processes().keys()
    assert not second.folder.exists()
    assert cluster.node_states() == {"n1": "idle", "n2": "idle"}
