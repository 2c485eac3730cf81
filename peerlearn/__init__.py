"""peerlearn: networks that teach each other, and what their checkpoints are good for."""

from pathlib import Path
from types import ModuleType

import wrapt

__version__ = "0.1.0"
# The folder that holds the packages: a checkout, or site-packages.
HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("peerlearn", "pretrain", "linear_eval", "slurm", "studies")


@wrapt.when_imported("timm")
def _register_networks(timm: ModuleType) -> None:
    """Makes the networks of `peerlearn.backbones` known to timm as soon as timm itself is loaded.

    A hook and not an import, because torch and timm take seconds that `peerlearn --help` must not.
    """
    import peerlearn.backbones  # noqa: F401
