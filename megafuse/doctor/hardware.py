"""Probes of the machine: cores, memory, instructions."""

import os
from pathlib import Path

from megafuse.doctor.finding import Finding
from megafuse.parallel.precision import BF16_FLAGS, SIZE, bf16_of, cpu_flags, product_seconds

OWN_GROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine, or the least that a control group of this process allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = OWN_GROUP.read_text().rpartition("::/")[2].strip() if OWN_GROUP.is_file() else ""  # version 2: "0::/a/b"
    for folder in [CGROUPS / own, *(CGROUPS / own).parents]:
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
        if folder == CGROUPS:
            break
    return memory


def machine() -> Finding:
    """Cores that this process may use, and memory in GiB, the control groups' limits included."""
    return Finding("machine", "ok", f"{usable_cores()} cores, {memory_bytes() / 2**30:.1f} GiB memory")


def cpu_precision() -> Finding:
    """Which precision is fast on this CPU, by its instructions and by two products, and what `auto` makes of it."""
    import torch

    flags = cpu_flags() or frozenset()
    has = [flag for flag in ("avx2", "avx512f", *sorted(BF16_FLAGS)) if flag in flags]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: 2 * SIZE**3 / product_seconds(dtype) / 1e9 for name, dtype in dtypes.items()}
    told = ", ".join(f"{name} {rate:.3g} GFLOP/s" for name, rate in rates.items())
    detail = f"{', '.join(has) or 'instructions unknown'}; products: {told}"
    support = bf16_of(torch.device("cpu"))
    if support.native:
        return Finding("CPU", "ok", f"{detail}; auto trains in bf16: {support.reason}")
    fix = "nothing, unless a run began in bf16 elsewhere (it keeps it): go on with that one on another machine"
    return Finding("CPU", "ok", f"{detail}; auto trains in fp32: {support.reason}", fix)
