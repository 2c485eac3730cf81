"""Files of other programs, read without running anything in them."""

import contextlib
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from peerlearn.errors import UserError
from peerlearn.runs.files import load_tensors

# torch does not compress its files, but a user may have compressed one by hand.
_MOST_EXPANSION = 20


class _IgnoredNumber:
    """Stands for numpy's numbers and their types: nothing is kept."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _IgnoredObject:
    """Stands for an object that is data, such as a script's arguments: a plain mapping, with the object's attributes.

    A mapping, because dicts of other classes are filled item by item, which torch's reader allows of plain ones alone.
    """

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def _stand_ins(names: Iterable[str]) -> list[Any]:
    """What takes the place of the classes of these names, as `torch.serialization.safe_globals` wants it."""
    # torch.save writes Python 2's names of built-in classes, and torch's reader looks for Python 3's.
    return [
        (
            _IgnoredNumber if name.startswith("numpy.") else _IgnoredObject,
            name.replace("__builtin__.", "builtins."),
        )
        for name in names
        if re.fullmatch(_DATA_CLASSES, name)
    ]


def load_file(file: Path) -> Any:
    """The content of a .pth, .pt, .tar, .ckpt or .safetensors file: tensors and plain values.

    Of objects of other classes that are data, a mapping with their attributes is left; nothing of them is imported.

    Raises:
        UserError: the file cannot be read, or would run code.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder: give the checkpoint file in it")
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if empty:
        raise UserError(f"{file} is empty: get it again")
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file)
        _check_archive(file)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_stand_ins(_called_names(file))),
        ):
            # Unusual pickles cause warnings. A file that cannot be read is an error in any case.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    # A file made to break the reader can raise anything.
    except Exception as error:
        _refuse(file, error)


def _check_archive(file: Path) -> None:
    """Refuse what torch would read without a message: damaged records, and records that grow when unpacked."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(record.file_size for record in archive.infolist())
        if size > _MOST_EXPANSION * file.stat().st_size + 2**20:
            raise UserError(
                f"{file}: {file.stat().st_size:,} bytes unpack to {size:,}: refused; save it again uncompressed"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(
            f"{file} is damaged: the checksum of {printable(damaged)} does not match; get it again"
        )


def _refuse(file: Path, error: Exception) -> NoReturn:
    called = sorted(_called_names(file))
    if called:
        names = ", ".join(map(printable, called[:3]))
        names += f" and {len(called) - 3} more" if len(called) > 3 else ""
        harmless = all(re.fullmatch(_DATA_CLASSES, name) for name in called)
        does = (
            "holds more than tensors and plain values" if harmless else "would run code when loaded"
        )
        raise UserError(
            f"{file} {does} ({names}): refused; a file of torch.save(model.state_dict(), ...) alone can be imported"
        ) from error
    if tarfile.is_tarfile(file):
        raise UserError(
            f"{file} is of PyTorch's first format, a tar file, which could run code when loaded: refused; "
            "have it saved again by a newer PyTorch"
        ) from error
    raise UserError(
        f"{file} is no checkpoint that can be read safely: damaged, cut short, or of another format"
    ) from error


# The functions and classes that a pickle of tensors and plain values may name.
_TENSOR_CLASSES = (
    r"torch\.(\w*Storage|Size|device|Tensor|bool|[a-z]+\d+\w*)|torch\.storage\.\w+Storage|torch\._utils\._rebuild_\w+"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
)
# Harmless classes that scripts often put beside their tensors: numbers, arguments, configs.
_DATA_CLASSES = (
    r"numpy\.(dtype|ndarray)|numpy\.(_core|core)\.\w+\.(scalar|_reconstruct|_frombuffer)|numpy\.dtypes\.\w+"
    r"|argparse\.Namespace|pathlib\.\w+|datetime\.\w+|collections\.defaultdict|typing\.\w+"
    r"|(omegaconf|easydict|addict|yacs|pytorch_lightning|lightning|lightning_fabric)(\.\w+)+"
    r"|(builtins|__builtin__)\.(dict|list|tuple|frozenset|int|float|str|bool|bytes|slice)|"
    + _TENSOR_CLASSES
)


def _called_names(file: Path) -> set[str]:
    """The functions and classes beyond tensors that the file's pickles name, found without loading them."""
    names: set[str] = set()
    # A file that cannot be parsed is refused in any case. Only the message is less precise.
    with contextlib.suppress(Exception):
        for stream in _pickles(file):
            _add_named(stream, names)
    return {name for name in names if not re.fullmatch(_TENSOR_CLASSES, name)}


def _pickles(file: Path) -> Iterator[IO[bytes]]:
    """The pickles in a torch file: today's format (a zip file), the first format (a tar file), or a bare pickle."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield archive.open(name)
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as tar:
            for member in tar.getmembers():
                stream = tar.extractfile(member) if member.name == "pickle" else None
                if stream:
                    yield stream
    else:
        with file.open("rb") as stream:
            yield stream


def _add_named(stream: IO[bytes], names: set[str]) -> None:
    """Add the names in the pickles of a stream. For a name in two strings, the two that were pushed last are taken."""
    # PyTorch's second format has five pickles, one after the other, before the numbers.
    for _ in range(5):
        pushed: list[Any] = [None, None]
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.add(f"{pushed[-2]}.{pushed[-1]}")
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name.endswith("BINPUT"):
                memo[int(argument or 0)] = pushed[-1]
            elif opcode.name.endswith("BINGET"):
                pushed.append(memo.get(int(argument or 0)))
            else:
                pushed.append(argument)


def printable(text: str) -> str:
    """A name from a foreign file, safe to print on a terminal."""
    return text if re.fullmatch(r"[\w. -]{1,80}", text) else ascii(text[:80])
