"""What this processor can compute by units of its own."""

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# Names of the instructions in /proc/cpuinfo, x86's and Arm's.
BF16_UNITS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
FP16_UNITS = frozenset(("avx512_fp16", "amx_fp16", "asimdhp"))


def cpu_flags() -> set[str]:
    """What the processor can do, by Linux' names; empty on other systems."""
    return set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
