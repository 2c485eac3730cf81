"""Memory that is freed and taken again, in a process of its own: the C library is told for good."""

import ctypes
import subprocess
import sys

import pytest

from peerlearn.compute.memory import keep_freed_memory

# 64 MiB are 16,384 pages, or 32 where the system gives huge ones.
FEW = 16
FAULTS = """
import ctypes, resource, sys
from peerlearn.compute.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = c.malloc(2**26)
    c.memset(memory, 1, 2**26)
    c.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
@pytest.mark.parametrize("how", ["default", "kept"])
def test_freed_memory_is_taken_again_without_a_page_fault(how: str):
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    faults = int(found.stdout)
    assert faults < FEW if how == "kept" else faults > FEW


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
