"""peerlearn: pretraining of networks that teach each other, and what all programs of this project share."""

from pathlib import Path
from types import ModuleType

import wrapt

__version__ = "0.2.0"
# The folder that holds the packages: a checkout, or site-packages.
HOME = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> tuple[str, ...]:
    """PACKAGES: this project's packages: peerlearn and those that a verb lives in."""
    if name != "PACKAGES":
        raise AttributeError(f"module 'peerlearn' has no attribute {name!r}")
    from peerlearn.commands.verbs import VERBS

    lived_in = (verb.module.partition(".")[0] for verb in VERBS.values())
    return tuple(dict.fromkeys(["peerlearn", *lived_in]))


@wrapt.when_imported("timm")
def _register_networks(timm: ModuleType) -> None:
    """Make the networks of `peerlearn.backbones` known to timm as soon as timm itself is loaded.

    This is a hook and not an import: torch and timm take seconds to load, and `peerlearn --help` must answer at once.
    """
    import peerlearn.backbones  # noqa: F401
