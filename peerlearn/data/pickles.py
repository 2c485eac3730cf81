"""Pickles of arrays, read without running anything that they name.

A pickle may name any function and have it called. Data sets that are published as pickles need few functions.
Stand-ins are called in their place, which make arrays and nothing else. Every other name is refused.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peerlearn.data.files import unreadable
from peerlearn.errors import UserError

# Arrays of numbers, words and objects; neither records nor times.
_ORDERS = ("|", "<", ">", "=")
_CODE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|O8?|[SU]\d{1,6})")


class Array:
    """Stand-in for numpy.ndarray.

    Attributes:
        values: what it holds, which may not be written to; of dtype object, anything that the pickle holds.
    """

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, content = state
        self.values = _values(content, dtype, shape, "F" if fortran_order else "C")


def array_in(value: Any) -> np.ndarray | None:
    """The array that stands at a place in a pickle; None if something else does."""
    return value.values if isinstance(value, Array) else None


def text_in(value: Any) -> Any:
    """The word that stands at a place in a pickle, which of Python 2 are bytes; anything else as it is."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def read_pickle(path: Path, *, advice: str) -> Any:
    """What a pickle holds: dictionaries, lists, words (bytes in those of Python 2), numbers, and `Array`.

    Args:
        path: the file.
        advice: what to do about a damaged file, for messages.

    Raises:
        UserError: the file cannot be read, or asks for anything to be run. The message names it.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        try:
            # Python 2's strings hold pixels in some entries, and words in others.
            return _Unpickler(file, encoding="bytes").load()
        except Exception as error:  # Damaged bytes can make the unpickler raise anything.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read {path} ({reason}): {advice}") from error


def read_pickled_dictionary(path: Path, *, advice: str) -> dict[Any, Any]:
    """The dictionary that a pickle holds, with its keys as text.

    Raises:
        UserError: as `read_pickle` does; or the pickle holds something else.
    """
    content = read_pickle(path, advice=advice)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dictionary: {advice}")
    return {text_in(key): value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _StandIn(_STAND_INS[module, name])
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'!r}, which was not run and which no arrays need"
            ) from None


class _StandIn:
    """A function of this file, which a pickle may call and not change: the state of a bare one could be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


class _DType:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: str) -> None:
        self._code = code.lstrip("|<>=")
        self._order = code[: -len(self._code)]

    def __setstate__(self, state: Any) -> None:
        _, order, subtype, names, *_ = state
        if text_in(order) not in _ORDERS or subtype is not None or names is not None:
            raise pickle.UnpicklingError("its arrays are of records")
        self._order = text_in(order)

    def numpy(self) -> np.dtype:
        order = "" if self._order in ("|", "=") else self._order
        return np.dtype("O" if self._code.startswith("O") else order + self._code)


def _dtype(code: Any, *flags: Any) -> _DType:
    text = text_in(code)
    if not isinstance(text, str) or not _CODE.fullmatch(text):
        raise pickle.UnpicklingError(f"its arrays are of {code!r}, not of numbers or words")
    return _DType(text)


def _values(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise pickle.UnpicklingError("its arrays are of no known form")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise pickle.UnpicklingError("its arrays are of no known shape")
    kind = dtype.numpy()
    if kind.hasobject:
        if not isinstance(content, list) or len(content) != math.prod(shape):
            raise pickle.UnpicklingError("its arrays are not as long as they say")
        flat = np.empty(len(content), dtype=object)
        # One by one: numpy would look into what is a sequence itself.
        for place, item in enumerate(content):
            flat[place] = item
    elif isinstance(content, bytes | bytearray):
        flat = np.frombuffer(content, dtype=kind)
    else:
        raise pickle.UnpicklingError("its arrays are not of bytes")
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*arguments: Any) -> Array:
    # The arguments describe an empty array, which the state then replaces.
    return Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Stand-in for numpy's own _frombuffer, by which protocol 5 makes arrays."""
    array = Array()
    array.values = _values(content, dtype, shape, order)
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    """Stand-in for numpy's scalar: the plain number or word."""
    value = _values(content, dtype, (), "C")
    if value.dtype.hasobject:
        raise pickle.UnpicklingError("it holds a single object as an array")
    return value.item()


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand-in for _codecs.encode: Python 3 writes bytes as such a call in protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something other than bytes")
    return text.encode("latin1")


def _array_type(*arguments: Any) -> Any:
    """Stand-in for numpy.ndarray, which is only ever handed to _reconstruct."""
    raise pickle.UnpicklingError("it makes an array in no known way")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _scalar
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_buffer
