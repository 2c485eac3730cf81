"""`peerlearn replay RUN --step N`: a step of a run, computed again."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, check_complete, load_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import step_folder
from peerlearn.runs.terminal import say
from peerlearn.runs.training_facts import training_verb
from pretrain.config import PretrainConfig
from pretrain.run_history import last_step_begun, stretch_of, stretches

_VERB = "pretrain"


def main(argv: Sequence[str]) -> int:
    """`peerlearn replay RUN --step N [--anomaly] [--device D] [--data.root DIR]`. Returns the exit code.

    Raises:
        UserError: no such run or step, or it was trained by another number of processes.
    """
    arguments = _parse(argv)
    run = RunDirectory(arguments.run)
    config = _read_config(run, arguments)
    step, last = arguments.step, last_step_begun(run)
    if not 1 <= step <= last:
        raise UsageError(
            f"--step {step} must be within 1..{last}, the steps that {run.root} has begun"
        )
    history = stretches(run, epochs=config.epochs)
    stretch = stretch_of(history, step)
    if stretch.layout:
        raise UserError(
            f"step {step} of {run.root} was trained by networks on different processes ({stretch.layout}), which "
            "replay cannot compute again"
        )
    processes = stretch.processes
    if processes != int(os.environ.get("WORLD_SIZE", "1")):
        start = f"torchrun --nproc_per_node {processes} -m -- " if processes > 1 else ""
        raise UsageError(
            f"step {step} of {run.root} was trained by {processes} process{'es' if processes > 1 else ''}, whose batch "
            f"norms see parts of the batch of their own: start `{start}peerlearn replay {run.root} --step {step}`"
        )
    # Imported here: a wrong word should not wait for torch.
    from peerlearn.compute.dist import joined_ranks
    from pretrain.replay import replay
    from pretrain.replay_files import told

    with joined_ranks(config.device, timeout_seconds=config.rank_timeout_seconds) as ranks:
        facts = replay(config, run, ranks, history=history, step=step, anomaly=arguments.anomaly)
        if ranks.main:
            for line in told(facts, config):
                say(line)
            say(f"wrote {run.replays / step_folder(step)}")
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn replay",
        description="Compute a step of a pretraining run again, bit for bit as training did, from the save before it, "
        "and write its images, views, embeddings, terms and gradients below RUN/replay. Nothing else of the run is "
        "changed. Example: peerlearn replay runs/demo --step 40 --anomaly",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, which may still be training")
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help="number of the step, as in the rows of metrics.jsonl: the first is 1 (an event step_skipped says N - 1)",
    )
    parser.add_argument(
        "--anomaly",
        action="store_true",
        help="name the operation, module and network in which NaN or Inf arose",
    )
    parser.add_argument("--device", help="another device than that of the run's config")
    parser.add_argument(
        "--data.root",
        dest="data_root",
        metavar="DIR",
        help="where the images lie, if not where the config says",
    )
    return parser.parse_args(argv)


def _read_config(run: RunDirectory, arguments: argparse.Namespace) -> PretrainConfig:
    """The config of the run, on the device and with the images that the command names."""
    run.check_exists()
    verb = training_verb(run.env)
    if verb != _VERB:
        raise UserError(
            f"{run.root} was trained by `peerlearn {verb}`: replay computes steps of `peerlearn {_VERB}` alone"
        )
    check_complete(PretrainConfig, run.config)
    config = load_config(PretrainConfig, run.config)
    if arguments.device is not None:
        config = dataclasses.replace(config, device=arguments.device)
    if arguments.data_root is not None:
        data = dataclasses.replace(config.data, root=arguments.data_root)
        config = dataclasses.replace(config, data=data)
    return config
