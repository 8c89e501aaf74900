"""Which precision a device computes natively, and what `auto` therefore means: decided once for all ranks of a run."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megafuse.config.base import Config

if TYPE_CHECKING:
    import torch

    from megafuse.parallel.topology import Topology

RunT = TypeVar("RunT", bound=Config)
Began = Callable[[], tuple[str, str] | None]
BEGAN = "what it began with"

# Instructions that multiply bf16 matrices, by their names in /proc/cpuinfo: x86 ("flags") and Arm ("Features")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
CPUINFO = Path("/proc/cpuinfo")
ENOUGH = 0.8  # of the time of an fp32 product: what is about as fast must not be decided by noise
SIZE = 384  # of the square matrices of the timed product: emulated, one takes half a second at most


@dataclass(frozen=True)
class Bf16:
    """Whether bf16 products are at least as fast as fp32 ones on a device, and how that is known."""

    native: bool
    reason: str


def cpu_flags() -> frozenset[str] | None:
    """Instruction sets of the first core, as Linux names them; None where they cannot be read."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0]) if found else None


def bf16_of(device: "torch.device") -> Bf16:
    """Whether `device` computes bf16 products itself. On a CPU without readable flags a half-second product decides."""
    import torch

    if device.type == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if major >= 8 or torch.version.hip:
            return Bf16(True, f"{name} computes it")
        return Bf16(False, f"{name} (sm_{major}{minor}) emulates bf16")
    flags = cpu_flags()
    if flags is None:
        return _measured()
    if has := sorted(BF16_FLAGS & flags):
        return Bf16(True, f"this CPU has {', '.join(has)}")
    return Bf16(False, f"this CPU emulates bf16 (none of {', '.join(sorted(BF16_FLAGS))})")


def product_seconds(dtype: "torch.dtype", *, size: int = SIZE, seconds: float = 0.2) -> float:
    """Wall seconds of a [size, size] product in `dtype` on the CPU: the fastest of all in `seconds`, at least two."""
    import torch

    left, right = (torch.ones(size, size).to(dtype) for _ in range(2))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def _measured() -> Bf16:
    import torch

    ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    told = f"a bf16 product takes {ratio:.2g} times as long as one in fp32 on this {platform.machine()} CPU"
    return Bf16(ratio <= ENOUGH, told)


def settle_precision(wanted: str, topology: "Topology", began: Began = lambda: None) -> tuple[str, str]:
    """(bf16 | fp32, reason) of a run, the same on every rank. Collective unless `wanted` is fp32.

    `auto` is what the run is bound to (`began()`, called on rank 0: the precision, and what binds it), so that it goes
    on to the bit on any machine; for a new run bf16 if every rank's device computes it, else fp32. What was asked
    for is taken; its reason is "", but for bf16 where a device emulates it, which takes a user by surprise.
    """
    if wanted == "fp32":
        return wanted, ""
    found = topology.gather_on_rank_zero(bf16_of(topology.device))

    def decide() -> tuple[str, str]:
        assert found is not None, "rank 0 has gathered"
        worst = next((one for one in found if not one.native), found[0])
        if wanted != "auto":
            return wanted, "" if worst.native else f"as asked for, though {worst.reason}: fp32 is faster"
        if bound := began():
            return bound[0], f"{bound[1]}; here {worst.reason}"
        return ("bf16" if worst.native else "fp32"), worst.reason

    return topology.on_rank_zero(decide)


def settled(config: RunT, topology: "Topology", began: Began = lambda: None) -> tuple[RunT, str]:
    """(`config`, whose `model` is a ModelConfig, with a `model.precision` that is not `auto`; the reason).

    See `settle_precision`.
    """
    model = config.model  # type: ignore[attr-defined]
    precision, reason = settle_precision(model.precision, topology, began)
    return config.model_copy(update={"model": model.model_copy(update={"precision": precision})}), reason
