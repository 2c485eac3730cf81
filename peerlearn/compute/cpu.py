"""The number formats that this processor has hardware units for."""

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# Names of the instructions in /proc/cpuinfo, of x86 and of Arm.
BF16_UNITS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
FP16_UNITS = frozenset(("avx512_fp16", "amx_fp16", "asimdhp"))


def cpu_flags() -> set[str]:
    """The abilities of this processor by Linux's names; empty on other systems."""
    return set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
