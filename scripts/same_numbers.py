"""Test whether two versions of the code train and evaluate to the same bits.

    python scripts/same_numbers.py record /tmp/before.json                # in the version to compare with
    python scripts/same_numbers.py compare /tmp/before.json               # in the version to be judged
    python scripts/same_numbers.py compare /tmp/before.json --tree DIR    # a version in another folder

It runs three short trainings with fixed seeds on scikit-learn's digits (MoCo x2, SimCLR x2 in two processes, supervised
EnsTeach + MCL) and four evaluations of the first, and compares every logged number except clocks, every file of every
export, and every result. Each process has one thread, so that sums have one order. Bits agree on one machine only.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peerlearn.runs.metrics import CLOCK_WORDS

HOME = Path(__file__).resolve().parent.parent

SMALL = [
    *("--data.name", "digits", "--data.image_size", "16", "--data.limit", "300", "--epochs", "2"),
    *("--batch_size", "32", "--cohort.backbones", "conv4", "--cohort.embedding_dim", "16"),
    *("--monitor.k", "5", "--monitor.log_every_steps", "1", "--device", "cpu", "--seed", "3"),
]
CONTRASTIVE = ["--data.augmentation", "crop_flip", "--base_lr", "0.1"]
TRAININGS = {
    "moco x2": (1, [*SMALL, *CONTRASTIVE, "--queue.size", "80"]),
    "simclr x2, two processes": (2, [*SMALL, *CONTRASTIVE, "--method", "simclr"]),
    "supervised EnsTeach + MCL": (1, ["supervised_fashion_mnist", *SMALL, "--data.shots", "20"]),
}
EVALUATIONS = {
    "knn": ["knn", "--k", "5", "--network", "ensemble"],
    "linear": ["linear", "logistic_regression", "--network", "ensemble"],
    "linear by SGD": ["linear", "lr_sweep", "--epochs", "2", "--data.limit", "200"],
    "fine-tuning": ["linear", "finetune", "--epochs", "2", "--data.limit", "200"],
}


def main() -> int:
    """Record or compare.

    Returns:
        0 if the numbers are recorded or all equal, 1 if anything differs.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="where the numbers are kept, as JSON")
    parser.add_argument("--tree", type=Path, default=HOME, help="folder of the version to run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(arguments.tree.resolve(), Path(folder))
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"recorded in {arguments.file}: {', '.join(numbers)}")
        return 0
    return compare(json.loads(arguments.file.read_text()), numbers)


def measure(tree: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """All numbers, by the name of the run and their own name."""
    numbers = {}
    for number, (name, (processes, words)) in enumerate(TRAININGS.items()):
        run = folder / f"run-{number}"
        call(tree, ["pretrain", *words, "--run", str(run)], processes)
        numbers[name] = logged(run) | files(run / "export") | results(run / "results")
        print(f"ran {name}", flush=True)
    for name, words in EVALUATIONS.items():
        place = folder / name
        where = ["--checkpoint", str(folder / "run-0"), "--results", str(place)]
        call(tree, [*words, *where, "--device", "cpu", "--cache", "false"], 1)
        numbers[name] = results(place)
        print(f"ran {name}", flush=True)
    return numbers


def call(tree: Path, words: list[str], processes: int) -> None:
    """Run the command of that version, whatever is installed. Its output is shown only if it fails."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "peerlearn", *words],
            cwd=tree,
            env=environment | (rank_variables(rank, processes, port) if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        output, _ = rank.communicate()
        if rank.returncode:
            sys.exit(f"{' '.join(words)} ended with {rank.returncode}:\n{output}")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def rank_variables(rank: int, processes: int, port: str) -> dict[str, str]:
    """The environment variables of a rank, as torchrun sets them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def logged(run: Path) -> dict[str, Any]:
    """The numbers of metrics.jsonl without clocks and rates."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"step {row['step']} {key}": value
        for row in rows
        for key, value in row.items()
        if not any(word in key for word in CLOCK_WORDS)
    }


def files(folder: Path) -> dict[str, Any]:
    """The SHA-256 of every file below the folder, except the cards, whose words are for people."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


def results(folder: Path) -> dict[str, Any]:
    """The metrics, protocol and export hash of every result file, by its name."""
    kept = ("metrics", "protocol", "export_hash", "seed")
    numbers = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        numbers |= {f"{path.name} {key}": result[key] for key in kept}
    return numbers


def compare(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> int:
    """Print what was compared and what differs."""
    differs = False
    for name in {**before, **now}:
        old, new = before.get(name, {}), now.get(name, {})
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        verdict = f"{len(changed)} DIFFER" if changed or not old else "all the same"
        print(f"{name:<28} {len(old):>5} values  {verdict}")
        for key in changed[:5]:
            print(f"    {key}: {old.get(key)} -> {new.get(key)}")
        differs |= bool(changed) or not old
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
