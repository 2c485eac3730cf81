"""What a dataset is called before people."""

import os

from peerlearn.runs.text import printable

# The dataset that is any folder of images.
FOLDER = "folder"
# What the title of scores ends with that are of held-out training images, not of the test images.
VALIDATION_ENDING = ", validation images"


def dataset_title(name: str, root: str | None) -> str:
    """The name of a dataset for titles, results and messages: of a folder of images its own name, not "folder".

    Args:
        name: name of the dataset in configs.
        root: folder that it lies in; None = the usual places.
    """
    if name != FOLDER or root is None:
        return name
    own = os.path.basename(os.path.abspath(os.path.expanduser(root)))
    return printable(own) or name
