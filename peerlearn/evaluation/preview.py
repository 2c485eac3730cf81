"""What an evaluation would score, told before it starts: its networks and images. Nothing is computed."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from peerlearn.errors import NotThereYetError
from peerlearn.evaluation.data import (
    DatasetPlace,
    EvaluationDataConfig,
    find_dataset,
    load_labelled,
    load_splits,
)
from peerlearn.evaluation.selection import Selection, select_runs
from peerlearn.runs.export_folders import WEIGHTS_FILE


def preview(
    checkpoints: Sequence[str],
    network: str,
    data: EvaluationDataConfig | None,
    *,
    ensembles: bool,
) -> list[str]:
    """The lines that `--dry_run` ends with.

    Args:
        checkpoints: checkpoints that are scored.
        network: which of their networks.
        data: dataset that they are scored on; None for evaluators that have keys of their own for it.
        ensembles: whether networks can be scored together.

    Raises:
        UserError: networks or images that the evaluation would refuse.
        NotThereYetError: a checkpoint is not there; everything else is right.
    """
    missing = [each for each in checkpoints if not Path(each).exists()]
    if missing:
        if data is not None and data.name is not None:
            _check_splits(data, DatasetPlace(data.name, data.root))
        raise NotThereYetError(f"--checkpoint {missing[0]} is not there")
    selections = select_runs(checkpoints, network, ensembles=ensembles)
    lines = [_networks(selection) for selection in selections]
    if data is not None:
        lines += list(dict.fromkeys(_images(data, selection) for selection in selections))
    return lines


def _networks(selection: Selection) -> str:
    counted = [f"{name} of {_parameters(path):,}" for name, path in selection.folders.items()]
    together = " and their ensemble" if selection.ensemble else ""
    return f"networks of {selection.exports}: {', '.join(counted)} parameters{together}"


def _parameters(export: Path) -> int:
    """The number of weights in an export, by the shapes that its file begins with."""
    from safetensors import safe_open

    with safe_open(export / WEIGHTS_FILE, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _images(data: EvaluationDataConfig, selection: Selection) -> str:
    import torch

    from peerlearn.compute.dist import Ranks
    from peerlearn.data.downloads import NotHereError, without_downloads

    try:
        with without_downloads():
            splits = load_splits(data, selection, Ranks(torch.device("cpu")))
    except NotHereError:
        name = find_dataset(data, selection).name
        return f"images: {name} (not on this machine: the evaluation downloads it)"
    train, test = len(splits.train), len(splits.test)
    kind = " validation images" if splits.seen else ""
    return f"images of {splits.train.name}: {train:,} to learn from and {test:,}{kind} to score on"


def _check_splits(data: EvaluationDataConfig, place: DatasetPlace) -> None:
    """Make sure that the images can be had, where it is not known yet by which networks."""
    from peerlearn.data.downloads import NotHereError, without_downloads

    with without_downloads(), contextlib.suppress(NotHereError):
        load_labelled(data, place, None)
