"""Where a process stands in its job: torchrun, a bare Slurm step, or alone."""

import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from megafuse.errors import ConfigError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first since torch 2.9, which warns of the second


def cuda_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process that computes on CUDA wants in its environment before torch is imported; {} where all is set.

    Rows and workspaces change their sizes from step to step: segments that grow keep them from cutting memory into
    pieces that fit nothing. One connection: megatron-core relies on communication being queued in order. What the user
    has set stays.
    """
    found = {}
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in environ:
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if not any(name in environ for name in ALLOCATOR):
        try:
            release = tuple(int(n) for n in version("torch").split("+")[0].split(".")[:2])
        except (PackageNotFoundError, ValueError):
            return found
        found[ALLOCATOR[release < (2, 9)]] = "expandable_segments:True"
    return found


def world_from_environment(environ: dict[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from torchrun, a Slurm step, or (alone) one process.

    Raises:
        ConfigError: inside a Slurm step whose host list cannot be read.
    """
    if "RANK" in environ:
        return {}
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        return {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_NTASKS"],
            "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(hosts),
            # below the ephemeral range, different for jobs that share a node
            "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000),
        }
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _first_host(hosts: str) -> str:
    if not re.search(r"[\[,]", hosts):
        return hosts or "127.0.0.1"
    try:
        out = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"cannot expand the Slurm host list {hosts!r} ({error}); set MASTER_ADDR") from error
    return out.stdout.split()[0]
