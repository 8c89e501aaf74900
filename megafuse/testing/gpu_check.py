"""`python -m megafuse.testing.gpu_check`: parity of one CUDA device with the float64 oracle, written as JSON."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megafuse.model.build import te_usable
from megafuse.observe.manifest import utc_now, versions, write_json_atomic
from megafuse.observe.metrics import read_metrics
from megafuse.testing.oracle import oracle_steps
from megafuse.testing.parity import LOSSES, STEPS, Lab, differences

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # fp32: other summation orders than the CPU's; bf16: 8 bits of mantissa


def check(lab: Lab, loss: str, precision: str, layers: str) -> dict[str, float]:
    """Largest relative differences of one run on this device to the oracle."""
    from megafuse.training.run import train

    changes = {"precision": precision, "layers": layers}
    config = lab.config(loss, f"{precision}-{layers}", model=changes)
    train(config)
    exact = oracle_steps(lab.hf(loss), config, STEPS)
    return differences(read_metrics(config.run_dir), [(s.loss, s.grad_norm) for s in exact], exact)


def main() -> int:
    """Run every loss in fp32 and bf16, with Transformer Engine layers too where usable. 1 when one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for device, versions and results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: gpu_check has nothing to check", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine asks cuBLAS for TF32 by itself
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), int.from_bytes(os.urandom(4), "little")).prepare()
        for layers in ("torch", "te") if te_usable() else ("torch",):
            for precision in ("fp32", "bf16"):
                for loss in LOSSES:
                    found = check(lab, loss, precision, layers)
                    ok = max(found.values()) <= TOLERANCE[precision]
                    results[f"{loss}/{precision}/{layers}"] = {**found, "ok": ok}
                    print(f"{loss:16} {precision} {layers:6} {found} {'ok' if ok else 'OUT OF BOUNDS'}", flush=True)
    facts = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "created": utc_now(),
        "seed": lab.seed,
        "tolerance": TOLERANCE,
        "versions": {**versions(), "cuda": torch.version.cuda},
    }
    write_json_atomic(args.out, {**facts, "results": results})
    return 0 if all(r["ok"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
