"""How many images an epoch of class-aware batches sees: the table in docs/supervised.md.

python scripts/class_aware_coverage.py
"""

import torch

from peerlearn.data.sampler import class_aware, coverage

# What is sampled: the number of images of each class, and the batch size.
CASES = {
    "CIFAR-100 (100 x 500), 128": ([500] * 100, 128),
    "Fashion-MNIST, 100 labels per class (10 x 100), 64": ([100] * 10, 64),
    "a long tail (500 to 5 of 100 classes), 128": (
        [round(500 * 100 ** (-c / 99)) for c in range(100)],
        128,
    ),
    "two classes, 9,000 and 1,000, 64": ([9000, 1000], 64),
}


def rows() -> list[str]:
    """The rows of the table."""
    found = []
    for name, (sizes, batch_size) in CASES.items():
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        sampler = class_aware(labels, batch_size=batch_size, images_per_class=2, seed=0, epoch=0)
        seen = coverage(sampler, labels)
        found.append(f"| {name} | {seen.drawn_percent:.2f} % | {seen.most_draws} |")
    return found


if __name__ == "__main__":
    print("\n".join(rows()))
