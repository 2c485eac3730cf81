"""JSON files that hold one object, read by those who must go on whatever a file holds."""

import json
from pathlib import Path
from typing import Any

from peerlearn.runs.files import open_regular


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds anything else: another value, half of an object, no text at all; or a NaN, which is equal
            to nothing, not to itself.
    """
    try:
        with open_regular(file) as opened:
            content = json.loads(opened.read(), parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds a NaN")
    return float(name)
