"""What becomes of the memory that this process frees."""

import ctypes

# glibc's own numbers for mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keep freed memory for what comes next, where the C library is glibc; elsewhere nothing changes.

    A training step on a CPU frees hundreds of MiB and takes them again. Memory that went back to the system in between
    is cleared page by page, which costs a tenth of the step and more (`benchmarks/step.py`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_MAX, 0)
    # -1 = never give the end of the heap back.
    mallopt(_TRIM_THRESHOLD, -1)
