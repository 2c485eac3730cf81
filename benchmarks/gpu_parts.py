"""The parts of `benchmarks.gpu_check`: each measures one thing on this device, and gives rows of a table."""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loss import DIM, clean, gradient, obvious, ours
from peerlearn.compute.dist import Ranks
from peerlearn.compute.optimizers import build_optimizer
from peerlearn.compute.precision import Precision
from peerlearn.config import parse_config
from peerlearn.runs.checkpoint import load_checkpoint, saved_steps
from peerlearn.runs.directory import RunDirectory
from pretrain.cohort import build_networks
from pretrain.config import PretrainConfig
from pretrain.method import build_method
from pretrain.terms import objective

# Dense products a second in 1e12, by the data sheets, for fp32, tf32 and half formats.
PEAKS = {"H100": (67, 494, 989), "H200": (67, 494, 989), "A100": (19.5, 156, 312)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUN = [
    *("--data.name", "digits", "--data.image_size", "16", "--data.augmentation", "crop_flip"),
    *("--cohort.backbones", "conv4", "--cohort.embedding_dim", "16", "--queue.size", "256"),
    *("--batch_size", "32", "--monitor.every_epochs", "0", "--monitor.log_every_steps", "1"),
]


def seconds(call: Callable[[], object]) -> float:
    """Of one call, until the device has done it."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def compare(calls: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, Any]]:
    """A row per rival: median seconds, and how many times as fast as the first; they take turns.

    A rival that fails is told with its error, and the others go on.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            call()
            rows[name] = {"rival": name, "peak_mib": _peak_mib(call), "seconds": []}
        except Exception as error:  # Whatever a compiler may raise.
            rows[name] = {"rival": name, "failed": str(error).splitlines()[0][:200]}
    for _ in range(rounds):
        for name, row in rows.items():
            if "failed" not in row:
                row["seconds"].append(seconds(calls[name]))
    base = next(iter(rows.values())).get("seconds")
    for row in rows.values():
        if "failed" in row:
            continue
        if base:
            ratios = [a / b for a, b in zip(base, row["seconds"], strict=True)]
            row["times_as_fast"] = statistics.median(base) / statistics.median(row["seconds"])
            row["range"] = [min(ratios), max(ratios)]
        row["seconds"] = statistics.median(row["seconds"])
    return list(rows.values())


def part_loss(*, small: bool) -> list[dict[str, Any]]:
    """The queue form, forward and backward, by the authors' way and by ours."""
    sizes = [(256, 16384, 2), (256, 65536, 2), (128, 65536, 4), (512, 65536, 4)]
    rows = []
    for batch, total, networks in [(8, 64, 2)] if small else sizes:
        generator = torch.Generator().manual_seed(0)
        query, key, queue = (
            F.normalize(torch.randn(networks, n, DIM, generator=generator), dim=-1).to(DEVICE)
            for n in (batch, batch, total)
        )
        half = queue.half()
        losses: dict[str, Callable[..., Tensor]] = {
            "authors' way": obvious,
            "clean": clean,
            "flat": partial(ours, backend="flat"),
            "flat, tiles kept": partial(ours, backend="flat", tile_bytes=2**30),
            "triton": partial(ours, backend="triton"),
        }
        if not small:
            losses["clean, compiled"] = torch.compile(clean, dynamic=False)
        calls: dict[str, Callable[[], object]] = {
            name: partial(gradient, loss, query, key, queue) for name, loss in losses.items()
        }
        for name in ("flat", "triton"):
            calls[f"{name}, fp16 queue"] = partial(gradient, losses[name], query, key, half)
        exact = gradient(
            partial(ours, backend="reference"), query.double(), key.double(), queue.double()
        )
        for row in compare(calls, 2 if small else 20):
            if "failed" not in row:
                found = calls[row["rival"]]()
                assert isinstance(found, Tensor)
                row["gradient_error"] = float((found - exact).norm() / exact.norm())
            rows.append({"B": batch, "K": total, "M": networks, **row})
    return rows


def part_steps(*, small: bool) -> list[dict[str, Any]]:
    """Steps of MCL: forward of queries and keys, loss, backward, optimiser; images are there already."""
    in_formats = [(2, precision) for precision in ("fp32", "tf32", "bf16", "fp16")]
    cases = [
        *(("resnet32", 32, 512, *each) for each in [(1, "fp32"), (4, "fp32"), *in_formats]),
        *(("resnet50", 224, 64, *each) for each in [(1, "bf16"), (4, "bf16"), *in_formats]),
    ]
    if small:
        cases = [("resnet32", 8, 4, 1, "fp32"), ("resnet32", 8, 4, 2, "bf16")]
    rows = []
    for backbone, size, batch, networks, precision in cases:
        row = {"backbone": backbone, "pixels": size, "B": batch, "M": networks, "format": precision}
        try:
            rows.append(
                row | _step_figures(backbone, size, batch, networks, precision, small=small)
            )
        except torch.cuda.OutOfMemoryError:
            rows.append(row | {"failed": "out of memory"})
    return rows


def _step_figures(
    backbone: str, size: int, batch: int, networks: int, precision: str, *, small: bool
) -> dict[str, Any]:
    words = ["--cohort.networks", str(networks), "--cohort.backbones", backbone]
    words += ["--cohort.share_stages", "0", "--queue.size", "128" if small else "65536"]
    config, _ = parse_config(PretrainConfig, words, verb="pretrain", description="", example="")
    tf32 = precision == "tf32"
    number_format = Precision("fp32" if tf32 else precision, DEVICE, tf32=tf32)
    cohort = build_networks(config, in_chans=3, image_size=size, num_classes=0).to(DEVICE)
    method = build_method(cohort, config, Ranks(DEVICE))
    optimizer = build_optimizer(cohort, config.optimizer, lr=0.03)
    views = tuple(
        torch.randn(batch, 3, size, size, device=DEVICE).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        method.begin_step(number)
        optimizer.zero_grad(set_to_none=True)
        with number_format.autocast():
            terms = method.terms(views, None)
        number_format.backward(objective(terms, config))
        number_format.unscale(optimizer)
        number_format.step(optimizer)
        method.end_step()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    peak_mib = _peak_mib(step)
    times = [seconds(step) for _ in range(2 if small else 20)]
    median = statistics.median(times)
    figures = {
        "seconds": median,
        "range": [min(times), max(times)],
        "images_per_second": batch / median,
        "tflops": counter.get_total_flops() / median / 1e12,
        "peak_mib": peak_mib,
    }
    peak = _peak_tflops(precision)
    return figures | ({"mfu_percent": 100 * figures["tflops"] / peak} if peak else {})


def part_knn(*, small: bool) -> list[dict[str, Any]]:
    """The search among training features, by torch on this device; faiss on the CPU is `benchmarks/knn.py`."""
    from peerlearn.knn import knn_scores

    sizes = [(200, 50, 16)] if small else [(50_000, 10_000, 512), (1_000_000, 10_000, 384)]
    rows = []
    for total, queries, size in sizes:
        generator = torch.Generator().manual_seed(0)
        train, asked = (torch.randn(n, size, generator=generator) for n in (total, queries))
        labels = torch.randint(10, (total,), generator=generator)
        call = partial(knn_scores, k=20, temperature=0.07, num_classes=10)
        calls = {
            "on the device": partial(call, train.to(DEVICE), labels.to(DEVICE), asked.to(DEVICE))
        }
        for row in compare(calls, 2 if small else 3):
            rows.append({"N": total, "Q": queries, "D": size, **row})
    return rows


def part_resume(*, small: bool) -> list[dict[str, Any]]:
    """A run that is told to stop and goes on, beside one that is not: how many tensors are equal to the bit."""
    epochs = "4" if small else "20"
    with tempfile.TemporaryDirectory() as place:
        whole, parts = Path(place, "whole"), Path(place, "parts")
        words = ["--epochs", epochs, "--device", DEVICE.type]
        _peerlearn("pretrain", *RUN, *words, "--run", str(whole))
        process = subprocess.Popen(
            [sys.executable, "-m", "peerlearn", "pretrain", *RUN, *words, "--run", str(parts)],
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not _has_rows(parts, 10):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code == 75:
            _peerlearn("resume", str(parts))
        ours, theirs = (_last_tensors(run) for run in (whole, parts))
    pairs = [(tensor, theirs[name]) for name, tensor in ours.items() if tensor.numel()]
    # Bytes, as some tensors of the state are NaN on purpose.
    equal = [torch.equal(_bytes(a), _bytes(b)) for a, b in pairs]
    gaps = [float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs]
    return [
        {
            "stopped": code == 75,
            "tensors": len(pairs),
            "equal_to_the_bit": sum(equal),
            "largest_difference": max(gaps),
        }
    ]


def part_data_wait(*, small: bool) -> list[dict[str, Any]]:
    """The share of a run's time for which the loop waits for its batch."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place, "run")
        epochs = "1" if small else "10"
        _peerlearn("pretrain", *RUN, "--epochs", epochs, "--device", DEVICE.type, "--run", str(run))
        rows = list(RunDirectory(run).metric_rows())
    later = rows[len(rows) // 2 :]
    return [
        {
            name: statistics.median(row[name] for row in later)
            for name in ("images_per_second", "data_wait_percent")
        }
    ]


def part_tests(*, small: bool) -> list[dict[str, Any]]:
    """The tests marked gpu, and those of the Triton kernels."""
    runs = [["-m", "gpu", "tests/peerlearn/test_knn.py" if small else "tests"]]
    if not small:
        runs.append(["tests/pretrain/test_triton_loss.py"])
    rows = []
    for words in runs:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = done.stdout.strip().splitlines() or ["nothing was printed"]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        rows.append({"tests": " ".join(words), "exit_code": done.returncode, "summary": lines[-1]})
        rows += [{"tests": line, "exit_code": 1, "summary": "failed"} for line in failed]
    return rows


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak_mib(call: Callable[[], object]) -> float | None:
    """What a call takes at most beside what is held already."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _peak_tflops(precision: str) -> float | None:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    known = next((peaks for card, peaks in PEAKS.items() if card in name), None)
    return known[{"fp32": 0, "tf32": 1}.get(precision, 2)] if known else None


def _peerlearn(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "peerlearn", *words], stdout=subprocess.DEVNULL, check=True
    )


def _has_rows(run: Path, count: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= count


def _last_tensors(run: Path) -> dict[str, Tensor]:
    groups, _ = load_checkpoint(saved_steps(RunDirectory(run).checkpoints)[0])
    return {
        f"{group}/{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "tests": part_tests,
    "loss": part_loss,
    "steps": part_steps,
    "knn": part_knn,
    "resume": part_resume,
    "data_wait": part_data_wait,
}
