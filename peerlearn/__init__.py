"""peerlearn: pretraining of networks that teach each other, and what all programs of this project share."""

from pathlib import Path
from types import ModuleType

import wrapt

__version__ = "0.1.0"
# The folder that holds the packages: a checkout, or site-packages.
HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("peerlearn", "pretrain", "linear_eval", "slurm", "studies")


@wrapt.when_imported("timm")
def _register_networks(timm: ModuleType) -> None:
    """Make the networks of `peerlearn.backbones` known to timm as soon as timm itself is loaded.

    This is a hook and not an import: torch and timm take seconds to load, and `peerlearn --help` must answer at once.
    """
    import peerlearn.backbones  # noqa: F401
