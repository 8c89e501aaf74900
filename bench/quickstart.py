"""The quick start over several seeds and data sets: rank accuracies before and after each stage, as one JSON file.

python bench/quickstart.py --seeds 0 1 2 --out bench/results/quickstart_cpu.json
python bench/quickstart.py --data scored.jsonl.gz --seeds 0 --out bench/results/quickstart_cpu.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megafuse.observe.manifest import read_json, utc_now, versions, write_json_atomic

RUN = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "run.py"


def one(data: Path | None, seed: int, flags: list[str]) -> dict[str, Any]:
    """Run the quick start once; its summary with the minutes that it took."""
    name = data.name.split(".")[0] if data else "shipped"
    folder = Path("runs") / f"quickstart-{name}-{seed}"
    fresh = not folder.exists()  # a run that only finishes an earlier one has no time of its own
    start = time.monotonic()
    line = [sys.executable, str(RUN), "--seed", str(seed), "--run", str(folder), *flags]
    subprocess.run([*line, *(["--data", str(data)] if data else [])], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    sizes = {kind: read_json(folder / "data" / kind / "manifest.json") for kind in ("sft", "pair", "rank")}
    prompts = {kind: {"prompts": m["groups"], "tokens": m["tokens"]} for kind, m in sizes.items()}
    return {
        **summary,
        "data": name,
        "minutes": round((time.monotonic() - start) / 60, 1) if fresh else None,
        "sizes": prompts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="scored answers; default: the shipped data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; runs of other data sets in it are kept")
    args, flags = parser.parse_known_args()
    runs = [one(args.data, seed, flags) for seed in args.seeds]
    kept = [r for r in (read_json(args.out)["runs"] if args.out.exists() else []) if r["data"] != runs[0]["data"]]
    device = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    write_json_atomic(args.out, {"created": utc_now(), "device": device, "versions": versions(), "runs": kept + runs})
    for run in runs:
        line = ", ".join(f"{s['stage']} {s['intra']:.3f}" for s in run["stages"])
        print(f"{run['data']} seed {run['seed']}: intra-rank accuracy {line} ({run['minutes']} minutes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
