"""The quick start over several seeds and data sets: rank accuracies before and after each stage, as one JSON file.

python bench/quickstart.py --seeds 0 1 2 --out bench/results/quickstart_cpu_fp32.json
python bench/quickstart.py --data scored.jsonl.gz --seeds 0 --out bench/results/quickstart_cpu_fp32.json
"""

import argparse
import contextlib
import json
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from megafuse.doctor.hardware import memory_bytes, usable_cores
from megafuse.observe.manifest import read_json, utc_now, versions, write_json_atomic
from megafuse.parallel.precision import CPUINFO, bf16_of

RUN = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "run.py"


class Peak(threading.Thread):
    """The most memory that a process and its children hold together, in GiB: shared pages count once (PSS)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.gib = psutil.Process(pid), 0.0

    def run(self) -> None:
        """Look twice a second, until the process ends."""
        with contextlib.suppress(psutil.NoSuchProcess):  # of the root: it has ended
            while self.root.status() != psutil.STATUS_ZOMBIE:
                total = 0
                for process in [self.root, *self.root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        total += process.memory_full_info().pss
                self.gib = max(self.gib, total / 2**30)
                time.sleep(0.5)


def cpu_name() -> str:
    """The processor's name, and the instructions that decide its fast precision."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return f"{name[1] if name else platform.processor() or platform.machine()} ({bf16_of(torch.device('cpu')).reason})"


def one(data: Path | None, seed: int, flags: list[str]) -> dict[str, Any]:
    """Run the quick start once; its summary with the minutes that it took."""
    name = data.name.split(".")[0] if data else "shipped"
    folder = Path("runs") / f"quickstart-{name}-{seed}"
    fresh = not folder.exists()  # a run that only finishes an earlier one has no time of its own
    start = time.monotonic()
    line = [sys.executable, str(RUN), "--seed", str(seed), "--run", str(folder), *flags]
    process = subprocess.Popen([*line, *(["--data", str(data)] if data else [])])
    peak = Peak(process.pid)
    peak.start()
    if process.wait():
        raise SystemExit(f"the quick start ended with {process.returncode}")
    summary = json.loads((folder / "summary.json").read_text())
    sizes = {kind: read_json(folder / "data" / kind / "manifest.json") for kind in ("sft", "pair", "rank")}
    prompts = {kind: {"prompts": m["groups"], "tokens": m["tokens"]} for kind, m in sizes.items()}
    return {
        **summary,
        "data": name,
        "memory_limit_gib": round(memory_bytes() / 2**30, 1),
        "minutes": round((time.monotonic() - start) / 60, 1) if fresh else None,
        "peak_memory_gib": round(peak.gib, 2),
        "sizes": prompts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="scored answers; default: the shipped data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; runs of another data set, seed or --processes are kept"
    )
    args, flags = parser.parse_known_args()
    runs = [one(args.data, seed, flags) for seed in args.seeds]

    def identity(run: dict[str, Any]) -> tuple[str, int, int]:
        return run["data"], run["seed"], run.get("processes", 0)  # older files have none

    made = {identity(run) for run in runs}
    before = read_json(args.out)["runs"] if args.out.exists() else []
    kept = [run for run in before if identity(run) not in made]
    device = {"machine": cpu_name(), "cores": usable_cores()}
    write_json_atomic(
        args.out,
        {
            "created": utc_now(),
            "device": device,
            "versions": versions(),
            "runs": sorted(kept + runs, key=identity),
        },
    )
    for run in runs:
        line = ", ".join(f"{s['stage']} {s['intra']:.3f}" for s in run["stages"])
        print(
            f"{run['data']} seed {run['seed']}: intra-rank accuracy {line} ({run['minutes']} minutes, "
            f"{run['peak_memory_gib']} GiB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
