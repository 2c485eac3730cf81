"""Features of exported networks, computed once and kept on disk.

    CACHE/features/KEY.safetensors   KEY.json {"sha256", "export_hash", "dataset", "transform", ...}

KEY is the hash of what decides the features: the export, the images, the transform and the kind of device. The JSON is
written last; features whose bytes are not those it names are computed again.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.data.augment import EVALUATION_VIEW
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.downloads import cache_folder
from peerlearn.errors import UserError
from peerlearn.evaluation.features import extract_features
from peerlearn.evaluation.networks import by_input, frozen, load_backbones
from peerlearn.export import export_hash
from peerlearn.runs.files import file_sha256, load_tensors, write_text
from peerlearn.runs.output import warn_once
from peerlearn.runs.progress import progress

# How long another process may take that computes the same features.
_LOCK_SECONDS = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features are computed; none of it changes them beyond rounding.

    Attributes:
        ranks: the processes that share the work.
        batch_size: images encoded at once by each of them.
        workers: of each of them, that read image files.
        cached: keep features on disk, and take those that are there.
    """

    ranks: Ranks
    batch_size: int
    workers: int
    cached: bool


def load_features(
    folders: Mapping[str, Path], dataset: ImageDataset, how: Extraction
) -> dict[str, Tensor]:
    """The features of every image of a dataset, by every exported network: pooled backbone output.

    Images are sized and normalised as each network's config.json says (`peerlearn.data.augment.evaluation_view`). All
    ranks call it together and all get all features.

    Args:
        folders: the export of each network, by its name.
        dataset: in whose order the features come; its own mean and std are not used.

    Returns:
        float32 (N, D) by the networks' names, on the CPU.

    Raises:
        UserError: an export that cannot be loaded or takes other channels, an image that cannot be decoded, features
            that are not finite.
    """
    ranks = how.ranks
    root = ranks.from_main(_cache_root) if how.cached else None
    if root is None:
        return _extract(folders, dataset, how)
    keys = ranks.from_main(
        lambda: {
            name: cache_key(folder, dataset, ranks.device.type) for name, folder in folders.items()
        }
    )
    with ExitStack() as held:
        locked = ranks.from_main(lambda: _lock_missing(held, root, keys))
        kept = {name: _read(root, key) for name, key in keys.items()}
        missing = {
            name: folder for name, folder in folders.items() if ranks.any(kept[name] is None)
        }
        computed = _extract(missing, dataset, how) if missing else {}
        if ranks.main and locked:
            for name, features in computed.items():
                _write(root, keys[name], features, folders[name], dataset)
    return {name: computed[name] if name in computed else _present(kept[name]) for name in folders}


def cache_key(folder: Path, dataset: ImageDataset, device_type: str) -> str:
    """The SHA-256, in hex, of all that decides a network's features of a dataset.

    Image files count by name, size and time of change: their bytes would take as long to read as to encode.
    """
    parts: dict[str, Any] = {
        "export": export_hash(folder),
        "dataset": dataset.fingerprint(),
        "transform": EVALUATION_VIEW,
        "device": device_type,
    }
    if not isinstance(dataset.images, Tensor):
        stamps = list(map(_stamp, dataset.images))
        parts["files"] = hashlib.sha256(repr(stamps).encode()).hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change; zeros for a file that is gone, which is reported when it is decoded."""
    try:
        facts = file.stat()
    except OSError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


def _extract(
    folders: Mapping[str, Path], dataset: ImageDataset, how: Extraction
) -> dict[str, Tensor]:
    backbones = load_backbones(folders, dataset.channels, images=dataset.name)
    features: dict[str, Tensor] = {}
    groups = by_input(backbones, dataset)
    total, unit = len(groups) * len(dataset), f"{dataset.title} {dataset.split} images"
    every = [backbone.to(how.ranks.device) for backbone in backbones.values()]
    with frozen(every), progress(total, unit, name="encoding", quiet=not how.ranks.main) as report:
        for view, size, names in groups:
            encoded = extract_features(
                [backbones[name] for name in names],
                view,
                image_size=size,
                batch_size=how.batch_size,
                device=how.ranks.device,
                workers=how.workers,
                progress=report.advance,
                ranks=how.ranks,
            )
            features |= dict(zip(names, encoded, strict=True))
    _check_finite(features, folders, dataset)
    return features


def _check_finite(
    features: Mapping[str, Tensor], folders: Mapping[str, Path], dataset: ImageDataset
) -> None:
    for name, rows in features.items():
        bad = (~rows.isfinite()).any(dim=1).sum()
        if bad:
            raise UserError(
                f"{folders[name]} gives NaN or Inf features for {int(bad)} of {len(dataset)} images of "
                f"{dataset.title} {dataset.split}: its training has diverged; choose an earlier export"
            )


def _cache_root() -> Path | None:
    """The folder of the kept features; None for a user without a home folder."""
    try:
        return cache_folder() / "features"
    except UserError:
        warn_once(logger, None, "%s", f"this user has no home folder: {_NOT_KEPT}")
        return None


_NOT_KEPT = (
    "features are not kept, and are computed anew each time; XDG_CACHE_HOME names another folder"
)


def _lock_missing(held: ExitStack, root: Path, keys: Mapping[str, str]) -> bool:
    """Of two processes that want the same features, one computes them and the other waits for it.

    Returns:
        Whether features can be kept; one warning says if not.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # In one order everywhere, so that no two processes wait for each other.
        for key in sorted(set(keys.values())):
            if not _facts(root, key).exists():
                _wait_for(held, root / f"{key}.lock")
    except (OSError, NotImplementedError) as error:
        # The latter comes of file systems without locks.
        reason = getattr(error, "strerror", None) or error
        warn_once(logger, root, "%s cannot be written (%s): %s", root, reason, _NOT_KEPT)
        return False
    return True


def _wait_for(held: ExitStack, file: Path) -> None:
    """Hold the lock; but do without it where another process takes too long, which costs only its computation."""
    try:
        held.enter_context(FileLock(file, timeout=0))
    except Timeout:
        logger.warning("another process computes these features: waiting for it (%s)", file)
        try:
            held.enter_context(FileLock(file, timeout=_LOCK_SECONDS))
        except Timeout:
            logger.warning("it has not done so in %.0f s: computing them here too", _LOCK_SECONDS)


def _facts(root: Path, key: str) -> Path:
    return root / f"{key}.json"


def _read(root: Path, key: str) -> Tensor | None:
    """The features, or None where there are none or their bytes have changed."""
    file = root / f"{key}.safetensors"
    try:
        expected = json.loads(_facts(root, key).read_text())["sha256"]
        whole = file_sha256(file) == expected
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        logger.warning("%s is damaged: its features are computed again", file)
        return None
    return load_tensors(file)["features"]


def _write(root: Path, key: str, features: Tensor, export: Path, dataset: ImageDataset) -> None:
    file = root / f"{key}.safetensors"
    try:
        # In a folder that no other process knows: a link in the file's place would lead the features elsewhere.
        with TemporaryDirectory(dir=root, prefix=f".{key}.", suffix=".tmp") as folder:
            temporary = Path(folder) / file.name
            safetensors.torch.save_file({"features": features.contiguous()}, temporary)
            sha256 = file_sha256(temporary)
            temporary.replace(file)
        facts = {
            "sha256": sha256,
            "export_hash": export_hash(export),
            "dataset": f"{dataset.title} {dataset.split}",
            "images": len(features),
            "transform": EVALUATION_VIEW,
        }
        write_text(_facts(root, key), json.dumps(facts, indent=2) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        warn_once(logger, root, "%s could not be written (%s): %s", file, reason, _NOT_KEPT)


def _present(features: Tensor | None) -> Tensor:
    assert features is not None
    return features
