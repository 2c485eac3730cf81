"""Figures beside the tables of `peerlearn study where_mcl_helps`, in docs/supervised.md, from its 15 seeds.

python scripts/where_mcl_helps.py results     # what MCL changes in top-1, top-5 and calibration, by the result files
python scripts/where_mcl_helps.py halves      # accuracy on garments and on the other half, by the exported networks
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

STUDY = Path("runs/where_mcl_helps")
VANILLA = "alpha-0.0_beta-0.0_supervised.teaching-none"
MCL = "supervised.teaching-none"
STEP = "step-00001500"
SEEDS = range(15)
# T-shirt, pullover, dress, coat and shirt.
GARMENTS = [0, 2, 3, 4, 6]


def print_results() -> None:
    """The change of each metric from vanilla to MCL, mean over two networks, paired by seed."""
    for name in ("top1", "top5", "calibration_error"):
        vanilla, mcl = (
            [_mean_result(cell, seed, name) for seed in SEEDS] for cell in (VANILLA, MCL)
        )
        print(f"{name}: {_change(vanilla, mcl)}, n {len(mcl)}")


def _mean_result(cell: str, seed: int, name: str) -> float:
    files = (STUDY / f"{cell}-seed-{seed}" / "results").glob(
        "classification-*-00001500-[01]-*.json"
    )
    return fmean(json.loads(file.read_text())["metrics"][name] for file in files)


def print_halves() -> None:
    """Accuracy on test images of garments and of the other classes, mean over two networks."""
    import torch

    from peerlearn.data.datasets import load_dataset
    from peerlearn.data.loader import evaluation_batches

    test = load_dataset("fashion_mnist", "test")
    images = list(
        evaluation_batches(test, image_size=16, batch_size=500, device=torch.device("cpu"))
    )
    assert test.labels is not None
    garment = torch.isin(test.labels, torch.tensor(GARMENTS))
    for name, part in (("garments", garment), ("others", ~garment)):
        vanilla, mcl = (
            [_accuracy(cell, seed, images, test.labels, part) for seed in SEEDS]
            for cell in (VANILLA, MCL)
        )
        print(f"{name}: {fmean(vanilla):.2f} -> {fmean(mcl):.2f}, {_change(vanilla, mcl)}")


def _accuracy(cell: str, seed: int, images: Sequence, labels, part) -> float:
    """Mean accuracy of two exported networks on a part of the images, in percent."""
    import timm
    import torch

    exports = STUDY / f"{cell}-seed-{seed}" / "export" / STEP
    found = []
    for network in (0, 1):
        net = timm.create_model(f"local-dir:{exports}/net-{network}", pretrained=True).eval()
        with torch.no_grad():
            hit = torch.cat([net(batch).argmax(1) for batch in images]) == labels
        found.append(hit[part].double().mean().item())
    return 100 * fmean(found)


def _change(old: Sequence[float], new: Sequence[float]) -> str:
    """Mean difference, its 95 % interval by Student's t, and the p of the paired test."""
    from scipy import stats

    change = [b - a for a, b in zip(old, new, strict=True)]
    half = stats.t.ppf(0.975, len(change) - 1) * stats.sem(change)
    mean, p = fmean(change), stats.ttest_1samp(change, 0).pvalue
    return f"{mean:+.2f} ({mean - half:.2f} .. {mean + half:.2f}), p {p:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", choices=["results", "halves"])
    print_halves() if parser.parse_args().figures == "halves" else print_results()
