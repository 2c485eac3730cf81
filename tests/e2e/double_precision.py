"""Runs the command with networks, queue and views in float64, where only the last bits depend on the order of sums."""

import sys
from functools import partial

import torch

import peerlearn.evaluation.features
import pretrain.methods
import pretrain.state
from peerlearn.cli import main
from peerlearn.data.loader import ViewLoader


def use_double_precision() -> None:
    build_networks, epoch = pretrain.state.build_networks, ViewLoader.epoch
    build_probe = pretrain.state.build_probe

    def double_views(loader, *position):
        for batch in epoch(loader, *position):
            yield batch._replace(views=tuple(view.double() for view in batch.views))

    evaluation_batches = peerlearn.evaluation.features.evaluation_batches
    peerlearn.evaluation.features.evaluation_batches = lambda *args, **named: (
        views.double() for views in evaluation_batches(*args, **named)
    )
    pretrain.methods.KeyQueue = partial(pretrain.methods.KeyQueue, dtype=torch.float64)
    pretrain.state.build_networks = lambda *args, **named: build_networks(*args, **named).double()
    pretrain.state.build_probe = lambda *args, **named: build_probe(
        *args, **named, dtype=torch.float64
    )
    ViewLoader.epoch = double_views


if __name__ == "__main__":
    use_double_precision()
    sys.exit(main(sys.argv[1:]))
