"""Probes of the machine: cores, memory, instructions."""

import os
from collections.abc import Iterator
from pathlib import Path

from megafuse.doctor.finding import Finding
from megafuse.parallel.precision import BF16_FLAGS, SIZE, bf16_of, cpu_flags, product_seconds

OWN_GROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, or the least time that a control group of it allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu"):
        # version 2: "200000 100000", so many microseconds of every 100 000, or "max 100000"; version 1: a file each
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit():
            cores = min(cores, max(1, round(int(quota) / int(period or 100_000))))
    return cores


def memory_bytes() -> int:
    """Memory of the machine, or the least that a control group of this process allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_text(f / name) for f in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min([memory, *(int(text) for text in limits if text.isdigit())])


def _groups(controller: str) -> Iterator[Path]:
    """The folders of all control groups that this process is in, each from its own to the root's: both versions."""
    for line in _text(OWN_GROUP).splitlines():  # "0::/a/b" of version 2, "4:cpu,cpuacct:/a" of version 1
        number, controllers, own = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = CGROUPS if number == "0" else CGROUPS / controller
        place = root / own.strip("/")
        yield from (place, *(parent for parent in place.parents if parent.is_relative_to(root)))


def _text(path: Path) -> str:
    """A small file's text; "" where there is none."""
    return path.read_text().strip() if path.is_file() else ""


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
    fix = "nothing for new runs; go on with a run that began in bf16 on a machine that computes it"
    return Finding("CPU", "ok", f"{detail}; auto trains in fp32: {support.reason}", fix)
