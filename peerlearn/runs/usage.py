"""What this process has used of the machine."""

import re
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")


def usage() -> dict[str, float]:
    """Processor time in seconds and most resident memory in MB (2**20 bytes) of this process, threads included.

    getrusage would tell the memory of the process that started this one, if that had more.

    Returns:
        ``cpu_seconds``, and ``peak_memory_mb`` where the system is Linux.
    """
    used = {"cpu_seconds": round(time.process_time(), 3)}
    if _STATUS.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        used["peak_memory_mb"] = round(int(found[1]) / 1024, 1)
    return used
