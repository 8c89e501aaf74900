"""Measures the packer: how full rows get, how even ranks are, and how long plans take. CPU only.

    python bench/packing.py [--data SCORED.jsonl.gz] [--out bench/results]

Prints one JSON object, and with `--out` writes it to OUT/packing_cpu.json as well. Without `--data`, only synthetic
groups are measured. Times are the best of several runs in this process, one thread.
"""

import argparse
import datetime
import functools
import gzip
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import megafuse
from megafuse.kernels import packing

CHARS_PER_TOKEN = 4.3  # a proxy for a tokenizer, good for English
MAX_RESPONSE = 2048
COSTS = {"linear_cost": 2.4e9, "attention_cost": 1.3e5}  # forward FLOPs of a token and of a pair, a 1B model
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="scored responses, such as alpacaeval_fusion.jsonl.gz")
    parser.add_argument("--out", type=Path, help="folder for packing_cpu.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "synthetic": synthetic()}
    if args.data:
        result["data"] = args.data.name
        result["real"] = [real(args.data, sources, sharing) for sources in (1, 2, 4, 7) for sharing in (True, False)]
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "packing_cpu.json").write_text(text + "\n")


def environment() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "device": cpu,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "megafuse": megafuse.__version__,
    }


def best_ms(call: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e3, 3)


def synthetic() -> dict[str, Any]:
    """A million log-normal groups into rows, and batches of thousands of groups onto many ranks."""
    tokens = np.clip(np.random.default_rng(1).lognormal(7, 0.8, 1_000_000), 16, 8192).astype(np.int64)
    rows = packing.pack_rows(tokens, 8192)
    million = {
        "groups": len(tokens),
        "budget": 8192,
        "rows": len(rows),
        "rows_lower_bound": int(-(-tokens.sum() // 8192)),
        "ms": best_ms(lambda: packing.pack_rows(tokens, 8192), 3),
    }
    batches = []
    for groups, ranks, budget in ((128, 8, 8192), (1024, 16, 8192), (4096, 64, 8192), (4096, 256, 16384)):
        batches.append(measure_batch(tokens[:groups], tokens[:groups] * 1.0, budget, ranks))
    return {"pack_rows": million, "pack_batch": batches}


def measure_batch(tokens: np.ndarray, cost: np.ndarray, budget: int, ranks: int) -> dict[str, Any]:
    plan = packing.pack_batch(tokens, cost, budget, ranks)
    per_rank = len(plan[0])
    longest = max(tokens[row].sum() for rows in plan for row in rows)
    return {
        "groups": len(tokens),
        "ranks": ranks,
        "budget": budget,
        "rows_per_rank": per_rank,
        "rows_per_rank_lower_bound": int(-(-tokens.sum() // (budget * ranks))),
        # the dearest rank over the mean (or over the dearest group), minus 1: the share of a step others wait
        "imbalance": excess([np.concatenate(rows) for rows in plan], cost),
        "imbalance_round_robin": excess([np.arange(rank, len(tokens), ranks) for rank in range(ranks)], cost),
        # the longest row over what its mean or the largest group needs, minus 1: the share of padding
        "longest_row_excess": round(longest / max(tokens.max(), tokens.sum() / (ranks * per_rank)) - 1, 5),
        "ms": best_ms(lambda: packing.pack_batch(tokens, cost, budget, ranks)),
    }


def excess(ranks: list[np.ndarray], cost: np.ndarray) -> float:
    loads = [cost[groups.astype(np.int64)].sum() for groups in ranks]
    return round(float(max(loads) / max(np.mean(loads), cost.max()) - 1), 5)


def read_lengths(path: Path, sources: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best and worst response of the best `sources` families that have two: prompts, responses, offsets in tokens."""
    prompts, responses, offsets = [], [], [0]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            families: dict[str, list[tuple[float, int]]] = {}
            for response in record["responses"]:
                families.setdefault(response["source"], []).append((response["reward"], len(response["text"])))
            ranked = sorted(
                (sorted(family, reverse=True) for family in families.values() if len(family) > 1), reverse=True
            )
            prompts.append(len(record["prompt"]))
            responses += [chars for family in ranked[:sources] for chars in (family[0][1], family[-1][1])]
            offsets.append(len(responses))

    def tokens(chars: list[int]) -> np.ndarray:
        return np.minimum(MAX_RESPONSE, np.asarray(chars) / CHARS_PER_TOKEN).astype(np.int64) + 1

    return tokens(prompts), tokens(responses), np.asarray(offsets)


def real(path: Path, sources: int, sharing: bool) -> dict[str, Any]:
    """Rows of the whole file, and random batches of it on 1 to 16 ranks (worst of 20 batches each)."""
    lengths = read_lengths(path, sources)
    tokens = packing.group_tokens(*lengths, prefix_sharing=sharing)
    cost = packing.group_cost(*lengths, **COSTS, prefix_sharing=sharing)
    result: dict[str, Any] = {
        "sources": sources,
        "prefix_sharing": sharing,
        "groups": len(tokens),
        "mean_tokens": round(float(tokens.mean()), 1),
        "max_tokens": int(tokens.max()),
        "pack_rows": [],
        "pack_batch": [],
    }
    for budget in sorted({max(wanted, int(tokens.max())) for wanted in (4096, 8192)}):
        rows = packing.pack_rows(tokens, budget)
        fill = np.array([tokens[row].sum() for row in rows[:-1]]) / budget
        result["pack_rows"].append(
            {
                "budget": budget,
                "rows": len(rows),
                "rows_lower_bound": int(-(-tokens.sum() // budget)),
                "fill_mean": round(float(fill.mean()), 5),
                "fill_min": round(float(fill.min()), 5),
                "ms": best_ms(functools.partial(packing.pack_rows, tokens, budget)),
            }
        )
        for ranks in (1, 2, 8, 16):
            rng = np.random.default_rng(0)
            draws = [rng.choice(len(tokens), BATCH, replace=False) for _ in range(20)]
            runs = [measure_batch(tokens[draw], cost[draw], budget, ranks) for draw in draws]
            worst = {key: max(run[key] for run in runs) for key in ("imbalance", "longest_row_excess", "ms")}
            extra = sum(run["rows_per_rank"] > run["rows_per_rank_lower_bound"] for run in runs)
            robin = min(run["imbalance_round_robin"] for run in runs)
            batch = {"budget": budget, "ranks": ranks, "batches": len(runs), "batches_above_row_bound": extra}
            result["pack_batch"].append({**batch, **worst, "imbalance_round_robin_least": robin})
    return result


if __name__ == "__main__":
    main()
