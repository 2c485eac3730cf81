"""The trackers that a run can be mirrored to: their packages and their variables."""

import importlib.util
from typing import TYPE_CHECKING, Literal, NamedTuple

from peerlearn.errors import UserError


class Kind(NamedTuple):
    """A tracker.

    Attributes:
        module: module that connects to it.
        minimum: oldest version of its package that this was tested with; "" = it is required anyway.
        project_variable: its own variable that names a project; "" = it has none.
        uri_variable: its own variable that names a server or a folder; "" = it has none.
    """

    module: str
    minimum: str
    project_variable: str
    uri_variable: str


KINDS = {
    "wandb": Kind("mirror_wandb", "0.31", "WANDB_PROJECT", "WANDB_BASE_URL"),
    "mlflow": Kind("mirror_mlflow", "3.17", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"),
    "trackio": Kind("mirror_trackio", "0.43", "TRACKIO_PROJECT", "TRACKIO_DIR"),
    "tensorboard": Kind("mirror_tensorboard", "", "", ""),
}
if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[tuple(KINDS)]


def requirement(tracker: str) -> str:
    """The package of a tracker, as a word for pip."""
    return f"'{tracker}>={KINDS[tracker].minimum}'"


def check_installed(tracker: str) -> None:
    """Make sure that the package of a tracker is there.

    Raises:
        UserError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"{tracker} is not installed: pip install {requirement(tracker)}")
