"""Jobs without NeMo-Run: `sbatch` on a login node, `bash` on this machine."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megafuse.config.launch import WhereConfig
from megafuse.errors import ConfigError
from megafuse.launch.job import Job
from megafuse.launch.local import local_environment

SECONDS_BETWEEN_LOOKS = 3.0


@dataclass(frozen=True)
class Result:
    """What became of a job: SUBMITTED, or how it ended (SUCCEEDED, FAILED, CANCELLED ...)."""

    name: str
    state: str
    job: str = ""
    """Slurm's number; empty where it ran here."""


def run_plainly(jobs: Sequence[Job], config: WhereConfig, *, quiet: bool = False) -> list[Result]:
    """Submit (and with `follow` wait for) the jobs, or run them here one after another.

    `quiet`: on this machine their output goes to RUN/NAME.out only.

    Raises:
        ConfigError: there is no sbatch, or it refuses a job; says what it said.
    """
    if config.on == "local":
        return [_here(job, quiet) for job in jobs]
    results = [Result(job.name, "SUBMITTED", _sbatch(job)) for job in jobs]
    return [_followed(result) for result in results] if config.follow else results


def _here(job: Job, quiet: bool) -> Result:
    environment = {**os.environ, **local_environment(job, os.environ)}
    Path(job.run).mkdir(parents=True, exist_ok=True)
    with open(Path(job.run) / f"{job.name}.out" if quiet else os.devnull, "ab") as log:
        streams = {"stdout": log, "stderr": log} if quiet else {}
        code = subprocess.run(["bash", "-c", job.body], env=environment, **streams).returncode  # type: ignore[call-overload]
    return Result(job.name, "SUCCEEDED" if code == 0 else f"FAILED ({code})")


def _sbatch(job: Job) -> str:
    Path(job.run).mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=job.batch_script, capture_output=True, text=True, cwd=job.root
        )
    except FileNotFoundError:
        raise ConfigError("no sbatch here: run this on a login node, or set --on local") from None
    if done.returncode:
        raise ConfigError(f"sbatch refuses {job.name}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _followed(result: Result) -> Result:
    while True:
        shown = subprocess.run(["scontrol", "-o", "show", "job", result.job], capture_output=True, text=True)
        state = re.search(r" JobState=(\S+)", shown.stdout)
        if state and state[1] == "COMPLETED":
            return Result(result.name, "SUCCEEDED", result.job)
        if not state or state[1] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"):
            return Result(result.name, state[1] if state else "UNKNOWN", result.job)
        time.sleep(SECONDS_BETWEEN_LOOKS)
