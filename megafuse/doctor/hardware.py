"""Probes of the machine: cores, memory, instructions."""

import os
from pathlib import Path

from megafuse.doctor.finding import Finding


def machine() -> Finding:
    """Cores that this process may use, and memory in GiB, the control group's limit included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Finding("machine", "ok", f"{cores} cores, {memory / 2**30:.1f} GiB memory")


def cpu_features() -> Finding:
    """Whether bf16 matrix products are native: they decide which precision is fast on a CPU."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return Finding("CPU", "ok", "instructions unknown: no /proc/cpuinfo here")
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].partition(":")[2].split()) if lines else set()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
    has = [flag for flag in known if flag in flags]
    native = {"avx512_bf16", "amx_bf16", "bf16"} & flags
    hint = "" if native else "; bf16 is emulated: on this CPU model.precision = 'fp32' is faster"
    return Finding("CPU", "ok", (", ".join(has) or "none of " + ", ".join(known)) + hint)
