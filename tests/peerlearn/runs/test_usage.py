"""Processor time and memory of a process, against the kernel's own account of it."""

import subprocess
import sys

from peerlearn.runs.usage import usage

MEASURED = """
import resource, sys
from peerlearn.runs.usage import usage
held = bytearray(300 * 2**20)
del held
used, kernel = usage(0.0), resource.getrusage(resource.RUSAGE_SELF)
print(used["cpu_seconds"], kernel.ru_utime + kernel.ru_stime, used["peak_memory_mb"])
"""


def test_time_and_the_most_memory_ever_held() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True
    )
    ours, kernels, memory = map(float, done.stdout.split())
    assert abs(ours - kernels) < 0.05
    assert 300 < memory < 400


def test_time_counts_from_when_the_work_began() -> None:
    assert abs(usage(0.0)["cpu_seconds"] - usage(-5.0)["cpu_seconds"] + 5.0) < 0.5


def test_memory_of_the_process_that_started_it_does_not_count() -> None:
    held = bytearray(b"x") * (200 * 2**20)
    words = "from peerlearn.runs.usage import usage; print(usage(0.0)['peak_memory_mb'])"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    del held
    assert float(done.stdout) < 150
    assert usage(0.0)["peak_memory_mb"] > 200
