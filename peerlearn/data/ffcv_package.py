"""The package ffcv: an extra that has to be compiled, so that not every machine has it.

Of ffcv the project takes the file format, the encoder and the decoder. Its loader and its writer are left aside: where
anything raises in them, they wait for ever.
"""

import warnings

from peerlearn.errors import UserError
from peerlearn.runs.text import printable

HOW_TO_INSTALL = "sh scripts/system_packages.sh ffcv && pip install --editable '.[ffcv]'"


def why_no_ffcv() -> str:
    """Why ffcv cannot be used, in one line; "" if it can."""
    # Imported here: the doctor looks for ffcv where torch may be missing.
    import torch

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            # Of the distutils that it still uses.
            warnings.simplefilter("ignore", DeprecationWarning)
            import ffcv  # noqa: F401
    except ModuleNotFoundError as error:
        return "ffcv is not installed" if error.name == "ffcv" else f"ffcv lacks {error.name}"
    except Exception as error:  # A package that does not fit the others raises anything.
        return f"ffcv does not import: {printable(str(error)) or type(error).__name__}"
    finally:
        # Its import leaves torch with a single thread.
        torch.set_num_threads(threads)
    return ""


def require_ffcv(what: str) -> None:
    """See that ffcv can be imported, and import it.

    Args:
        what: what needs it, for the message.

    Raises:
        UserError: it cannot.
    """
    reason = why_no_ffcv()
    if reason:
        raise UserError(f"{what} needs ffcv, and {reason}: {HOW_TO_INSTALL}")
