"""Where a fine-tuning keeps what it needs to go on after a stop: a run directory beside the result files."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linear_eval.config import LinearConfig
from peerlearn.compute.dist import Ranks
from peerlearn.config import fixed_values
from peerlearn.evaluation.results import short_hash
from peerlearn.evaluation.selection import Selection, results_folder
from peerlearn.export import export_hash
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.step_folders import step_folders


def finetuning_run(
    config: LinearConfig, selection: Selection, protocol: Mapping[str, Any], ranks: Ranks
) -> RunDirectory:
    """The run directory of a fine-tuning: ``finetune-<step>-<hash>`` in the folder of the result files.

    The hash is of all that decides what is learned and of every key that may not change on the way, so that the same
    command finds what it has begun, and another is never refused for it. A fine-tuning that came to its end, and has
    dropped its saves, is begun anew.
    """

    def find() -> str:
        hashes = {name: export_hash(folder) for name, folder in selection.folders.items()}
        identity = {
            "protocol": protocol,
            "exports": hashes,
            "config": fixed_values(config),
            "processes": ranks.world_size,
        }
        name = f"finetune-{selection.step:08d}-{short_hash(identity)}"
        run = RunDirectory(results_folder(config.results, selection) / name)
        if run.done and not step_folders(run.checkpoints):
            shutil.rmtree(run.root)
        return str(run.root)

    return RunDirectory(Path(ranks.from_main(find)))


def own_config(config: LinearConfig, selection: Selection) -> LinearConfig:
    """The config for these networks alone, where it was for those of several checkpoints."""
    if len(selection.folders) == 1:
        return dataclasses.replace(
            config, checkpoint=str(next(iter(selection.folders.values()))), network="all"
        )
    return dataclasses.replace(config, checkpoint=str(selection.exports))
