"""Why a part of a page is not there, in words."""

from peerlearn.errors import UserError
from peerlearn.runs.text import printable

_LONGEST = 600


def reason_text(error: Exception) -> str:
    """The reason of an error on one line; what nobody has foreseen is named by its class too."""
    if isinstance(error, UserError):
        return printable(str(error), _LONGEST)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return printable(f"{error.strerror}{where}", _LONGEST)
    return printable(f"{type(error).__name__}: {error}", _LONGEST)
