"""Slurm's side of a job on this one machine: the same recipe and node.sh, with stand-ins for srun and scontrol."""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from megafuse.launch.job import Job

STAND_INS = Path(__file__).resolve().parent / "single"


def local_environment(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """What Slurm would set for a job on one node, for `job.body`. `environ`: this process's."""
    gpus = job.env.get("NPROC") or environ.get("NPROC") or str(max(1, _gpus_here()))
    return {
        "PATH": os.pathsep.join([str(STAND_INS), environ.get("PATH", os.defpath)]),
        "SLURM_JOB_ID": str(time.time_ns() // 1_000_000 % 1_000_000_000),
        "SLURM_JOB_NAME": job.name,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_RESTART_COUNT": "0",
        "SLURM_SUBMIT_DIR": job.root,
    }


def _gpus_here() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
