"""Random images in the published layouts of CIFAR-10 and CIFAR-100, for speed alone: they teach nothing."""

from pathlib import Path

import numpy as np

_BYTES_OF_IMAGE = 3 * 32 * 32
# Of the binary versions: names of the files with their numbers of images, file of the class names, label bytes.
_LAYOUTS = {
    "cifar10": (
        {**{f"data_batch_{i}": 10_000 for i in range(1, 6)}, "test_batch": 10_000},
        "batches.meta.txt",
        1,
    ),
    "cifar100": ({"train": 50_000, "test": 10_000}, "fine_label_names.txt", 2),
}


def write_cifar(folder: Path, name: str, *, share: float = 1.0) -> None:
    """Write a CIFAR set of the published size, or a share of it."""
    files, names, label_bytes = _LAYOUTS[name]
    classes = int(name.removeprefix("cifar"))
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names).write_text("\n".join(f"class {i}" for i in range(classes)))
    for file, published in files.items():
        count = round(published * share)
        labels = generator.integers(classes, size=(count, 1), dtype=np.uint8)
        images = generator.integers(256, size=(count, _BYTES_OF_IMAGE), dtype=np.uint8)
        records = np.hstack([*[labels] * label_bytes, images])
        (folder / f"{file}.bin").write_bytes(records.tobytes())
