"""What this process has used of the machine."""

import re
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")


def usage(cpu_start_seconds: float) -> dict[str, float]:
    """Processor time and most resident memory of this process, threads included.

    getrusage would tell the memory of the process that started this one, if that had more.

    Args:
        cpu_start_seconds: `time.process_time` when the work began.

    Returns:
        ``cpu_seconds`` since then, and ``peak_memory_mb`` (of 2**20 bytes) where the system is Linux.
    """
    used = {"cpu_seconds": round(time.process_time() - cpu_start_seconds, 3)}
    if _STATUS.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        used["peak_memory_mb"] = round(int(found[1]) / 1024, 1)
    return used
