"""What `peerlearn runs` takes for many runs: without an index, with it, and after some runs have gone on.

    python -m benchmarks.registry [--runs 1000] [--rows 500] [--rounds 5] [--output FILE]

The runs lie on this machine's disk in folders of ten, with a whole config, rows of metrics as a cohort of four networks
logs them, two result files and a note. Each round starts the command as a process of its own, three times: after the
index was removed, with it, and after one run in a hundred has got another row. Times are wall seconds of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import write_results
from peerlearn.config import config_to_yaml
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import append_text
from peerlearn.runs.notes import add_note
from peerlearn.runs.run_index import INDEX_FILE
from peerlearn.runs.score_names import ENSEMBLE, KNN_K, KNN_TEMPERATURE, KNN_TOP1, score_name
from pretrain.config import PretrainConfig

NETWORKS, ROWS_OF_EPOCH, STEPS_OF_ROW = 4, 10, 10
TERMS = ("scl_hard", "scl_soft", "icl_hard", "icl_soft", "loss", "grad_norm")


def _rows(count: int, first: int = 1) -> str:
    lines = []
    for number in range(first, first + count):
        row: dict[str, float] = {"step": number * STEPS_OF_ROW, "epoch": number / ROWS_OF_EPOCH}
        row |= {"seconds": number / 3, "attempt": 1, "lr": 0.03, "images_per_second": 512.5}
        row |= {score_name(m, term): 1 / (number + 7) for m in range(NETWORKS) for term in TERMS}
        if number % ROWS_OF_EPOCH == 0:
            score = 80 - 40 / number
            row |= {score_name(m, KNN_TOP1): score for m in (*range(NETWORKS), ENSEMBLE)}
            row |= {KNN_K: 200, KNN_TEMPERATURE: 0.1}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def _write_run(folder: Path, number: int, rows: str) -> None:
    run = RunDirectory(folder)
    run.create_folder()
    run.write_config(config_to_yaml(PretrainConfig(seed=number, run=str(folder))))
    append_text(run.metrics, rows)
    run.results.mkdir()
    for network in range(2):
        result = {"task": "linear", "dataset": "cifar100", "network": str(network), "step": 1000}
        result["metrics"] = {"top1": 60 + number % 7, "per_class_top1": {str(c): 60.0 for c in range(100)}}  # fmt: skip
        (run.results / f"linear-cifar100-00001000-{network}.json").write_text(json.dumps(result))
    add_note(run.notes, f"run {number}", ["half"] if number % 2 else [])
    run.mark_done()


def _seconds(folder: Path) -> float:
    words = [sys.executable, "-m", "peerlearn", "runs", str(folder)]
    begun = time.monotonic()
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    seconds = time.monotonic() - begun
    assert printed.count("done") >= 1
    return seconds


def main() -> None:
    """Print the medians, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"without index": [], "with index": [], "1 in 100 went on": []}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder, rows = Path(place), _rows(options.rows)
        runs = [folder / f"grid-{n // 10:03d}" / f"run-{n:04d}" for n in range(options.runs)]
        for number, run in enumerate(runs):
            _write_run(run, number, rows)
        for each in range(options.rounds):
            (folder / INDEX_FILE).unlink(missing_ok=True)
            seconds["without index"].append(_seconds(folder))
            seconds["with index"].append(_seconds(folder))
            for run in runs[::100]:
                append_text(RunDirectory(run).metrics, _rows(10, options.rows + 10 * each))
            seconds["1 in 100 went on"].append(_seconds(folder))
        index_bytes = (folder / INDEX_FILE).stat().st_size
    print(
        f"{os.cpu_count()} cores; {options.runs} runs, metrics.jsonl of {len(rows) / 2**20:.2f} MiB each, "
        f"index of {index_bytes / 2**20:.1f} MiB"
    )
    measured = {}
    for name, found in seconds.items():
        middle = sorted(found)[len(found) // 2]
        measured[name] = {
            "median_seconds": round(middle, 2),
            "seconds": [round(each, 3) for each in found],
        }
        print(f"{name:18} {middle:6.2f} s   ({min(found):.2f} .. {max(found):.2f})")
    write_results(
        options.output,
        "registry",
        measured,
        runs=options.runs,
        rows_of_each_run=options.rows,
        metrics_bytes_of_each_run=len(rows),
        index_bytes=index_bytes,
        rounds=options.rounds,
        cores=os.cpu_count(),
    )


if __name__ == "__main__":
    main()
