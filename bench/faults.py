"""How long a fault goes unnoticed, and how long until training goes on: measured on real processes.

One run of two ranks under torchrun, a model of one small layer on CPU, is broken in turn; every start goes on from the
checkpoint before. `detected` is from the fault to the end of the last process, `again` from the new start to the first
new line of metrics.jsonl: nearly all of it Python's imports here, and model loading where models are large. `code` is
torchrun's, which turns every exit code of a rank into 1; RUN/outcome.json keeps the rank's.

    PYTHONPATH=. python bench/faults.py [OUT.json]      (default bench/results/faults.json)
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megafuse.checkpoint.folder import complete_steps, step_name
from megafuse.config.load import dump_toml
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.observe.manifest import utc_now, versions, write_json_atomic
from megafuse.testing.tiny import write_tiny_dataset, write_tiny_llama

HANG_SECONDS = 20.0


def make_run(root: Path) -> TrainConfig:
    """A run that lasts longer than the measurement."""
    import_hf(write_tiny_llama(root / "hf", seed=1, layers=1), root / "model")
    write_tiny_dataset(root / "sft", "sft", seed=2)
    config = TrainConfig.model_validate(
        {
            "run_dir": root / "run",
            "model": {"path": root / "model", "precision": "fp32"},
            "data": {"dataset": root / "sft", "max_row_tokens": 256},
            "loss": {"name": "sft"},
            "optim": {"lr": 1e-4},
            "checkpoint": {"interval": 5},
            "guard": {"hang_seconds": HANG_SECONDS},
            "observe": {"tensorboard": False},
            "global_batch_size": 4,
            "epochs": 1_000_000,
        }
    )
    (root / "run.toml").write_text(dump_toml(config))
    return config


def start(root: Path) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.getcwd()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    log = open(root / "log.txt", "ab")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen([*launcher, "-m", "megafuse", "train", str(root / "run.toml")], env=environment, stderr=log)


def lines(run: Path) -> bytes:
    """metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes() if path.is_file() else b""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> float:
    """Seconds until `condition()`; raises where `process` ends before."""
    begin = time.perf_counter()
    while not condition():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode}")
        time.sleep(0.01)
    return time.perf_counter() - begin


def ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The two rank processes."""
    return [p for p in psutil.Process(process.pid).children() if "megafuse" in " ".join(p.cmdline())]


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of one rank."""
    ranks(process)[1].kill()


def freeze(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP of one rank: it neither works nor dies."""
    ranks(process)[1].suspend()


def tell(number: int) -> Callable[[subprocess.Popen[bytes]], None]:
    """A signal to every rank, as Slurm sends it."""

    def send(process: subprocess.Popen[bytes]) -> None:
        for rank in ranks(process):
            rank.send_signal(number)

    return send


def kill_and_flip(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of all, and a bit of the newest checkpoint flipped."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()


FAULTS: dict[str, tuple[str, Callable[[subprocess.Popen[bytes]], None]]] = {
    "F1": ("kill -9 of one rank", kill),
    "F10": (f"one rank frozen (SIGSTOP), guard.hang_seconds = {HANG_SECONDS:.0f}", freeze),
    "F11": ("USR1 to every rank", tell(signal.SIGUSR1)),
    "F3": ("kill -9 of all ranks; a bit of the newest checkpoint flipped", kill_and_flip),
}


def measure(root: Path) -> dict[str, dict[str, Any]]:
    """One row a fault."""
    config = make_run(root)
    process, found = start(root), {}
    checkpoints = config.run_dir / "checkpoints"
    wait_for(lambda: len(complete_steps(checkpoints)) >= 2, process)
    for row, (fault, inject) in FAULTS.items():
        time.sleep(1.0)
        members = ranks(process)
        inject(process)
        detected = wait_for(lambda: process.poll() is not None and not any(map(psutil.pid_exists, pids(members))))  # noqa: B023
        reached = lines(config.run_dir).count(b"\n")
        if row == "F3":
            shard = max((checkpoints / step_name(complete_steps(checkpoints)[-1])).glob("*.distcp"))
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        before, code = lines(config.run_dir), process.returncode
        process = start(root)
        # the new start first cuts the file back to its checkpoint; the line after that is a new one
        again = wait_for(lambda: grew(config.run_dir, before), process)  # noqa: B023
        resumed = sum(1 for old, new in zip(before.splitlines(), lines(config.run_dir).splitlines()) if old == new)
        found[row] = {"fault": fault, "detected_s": round(detected, 2), "again_s": round(again, 2),
                      "steps_lost": reached - resumed, "code": code}  # fmt: skip
        print(row, found[row], flush=True)
        wait_for(lambda: lines(config.run_dir).count(b"\n") > reached + 6, process)  # noqa: B023
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    return found


def grew(run: Path, before: bytes) -> bool:
    """Whether a line is there that an earlier start did not write."""
    now = lines(run)
    return bool(now) and not before.startswith(now)


def pids(members: list[psutil.Process]) -> list[int]:
    """Their process ids."""
    return [p.pid for p in members]


def main() -> None:
    """Measure, print, write."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/faults.json")
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(Path(folder))
        except RuntimeError:
            sys.stderr.write((Path(folder) / "log.txt").read_text()[-3000:])
            raise
    facts = {"date": utc_now(), "device": f"CPU, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
             "machine": platform.processor() or platform.machine(), "ranks": 2, "versions": versions()}  # fmt: skip
    write_json_atomic(out, {**facts, "faults": found})
    print(json.dumps(facts["device"]))


if __name__ == "__main__":
    main()
