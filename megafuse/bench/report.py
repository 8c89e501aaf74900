"""What a measurement says: one record a kind, ratios between kinds, and a table of both."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from megafuse.bench.breakdown import PARTS
from megafuse.bench.measure import Measurement
from megafuse.model.arch import ModelArch
from megafuse.observe.flops import mfu, model_flops

FORMAT = "megafuse-bench/1"
BASE = 4  # sources that other numbers are compared with: what FuseSFT keeps by default


def record(
    found: Measurement, *, arch: ModelArch, sources: int, prefix_sharing: bool, world_size: int, peak: float | None
) -> dict[str, Any]:
    """One measured kind as plain numbers.

    `tokens` are needed (a prompt once, and its responses), `tokens_computed` are places of rows, padding included; all
    rates are those of the median step over all devices. MFU counts the FLOPs of what the model computes, padding
    excluded, attention by the area of every layer's mask (see `megafuse.observe.flops`); None without a known peak.
    """
    plan, seconds = found.plan, found.median
    flops = model_flops(arch, plan.model_tokens, plan.head_rows, plan.pairs)
    parts = None
    if found.breakdown is not None:
        parts = {"step_seconds": sum(found.breakdown.values()), **found.breakdown}
    return {
        "sources": sources,
        "prefix_sharing": prefix_sharing,
        "prompts": plan.groups,
        "responses": found.responses,
        "rows": sum(map(len, plan.rows)),
        "longest_row": max(max(lengths) for lengths in plan.lengths),
        "tokens": plan.useful_tokens,
        "tokens_computed": plan.computed_tokens,
        "computed_over_needed": plan.computed_tokens / plan.useful_tokens,
        "model_flops": flops,
        "step_seconds": seconds,
        "step_seconds_all": found.step_seconds,
        "prompts_per_second": plan.groups / seconds,
        "responses_per_second": found.responses / seconds,
        "tokens_per_second": plan.useful_tokens / seconds,
        "tokens_computed_per_second": plan.computed_tokens / seconds,
        "mfu": mfu(flops, seconds, world_size, peak),
        "peak_memory_bytes": found.peak_memory,
        "peak_memory_kind": found.memory_kind,
        "breakdown": parts,
    }


def ratios(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the kinds say about each other: gain by sharing at each number of sources, and growth of the time with it.

    Growth is relative to 4 sources where they were measured, else to the smallest number. Of a kind that was not
    measured, nothing is said.
    """
    by_kind = {(r["sources"], r["prefix_sharing"]): r for r in results}
    found: list[dict[str, Any]] = []
    for k in sorted({r["sources"] for r in results}):
        if (k, True) in by_kind and (k, False) in by_kind:
            gain = by_kind[k, True]["prompts_per_second"] / by_kind[k, False]["prompts_per_second"]
            found.append({"name": f"K={k}: prompts/s prefix-shared / separate", "value": gain})
    for sharing in (True, False):
        numbers = sorted(k for k, kind in by_kind if kind == sharing)
        base = BASE if BASE in numbers else min(numbers, default=BASE)
        for k in numbers:
            if k > base:
                growth = by_kind[k, sharing]["step_seconds"] / by_kind[base, sharing]["step_seconds"]
                name = f"time K={k} / K={base}, {'prefix-shared' if sharing else 'separate'}"
                found.append({"name": name, "value": growth})
    return found


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report for a terminal: rates, where the time goes, and the ratios."""
    results = report["results"]
    device = report["device"]
    title = (
        f"{report['model']['path']} ({report['model']['parameters'] / 1e9:.2f}B), {report['config']['loss']}, "
        f"{device['count']} x {device['name']}, {report['backend']}"
    )
    rates = Table("K", "rows are", title=title, box=box.SIMPLE)
    for name in ("step s", "prompts/s", "responses/s", "computed tok/s", "computed/needed", "MFU", "peak GiB"):
        rates.add_column(name, justify="right")
    for r in results:
        rates.add_row(
            str(r["sources"]),
            "shared" if r["prefix_sharing"] else "separate",
            f"{r['step_seconds']:.3f}",
            f"{r['prompts_per_second']:.2f}",
            f"{r['responses_per_second']:.1f}",
            f"{r['tokens_computed_per_second']:,.0f}",
            f"{r['computed_over_needed']:.2f}",
            "-" if r["mfu"] is None else f"{100 * r['mfu']:.1f}%",
            f"{r['peak_memory_bytes'] / 2**30:.2f}",
        )
    return [rates, *_breakdown_table(results), *_ratio_table(report["ratios"])]


def _breakdown_table(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    if any(r["breakdown"] is None for r in results):
        return []
    table = Table("K", "rows are", title="Where a step's time goes (one more step, marked)", box=box.SIMPLE)
    for part in PARTS:
        table.add_column(part, justify="right")
    for r in results:
        whole = r["breakdown"]["step_seconds"]
        shares = (f"{100 * r['breakdown'][part] / whole:.1f}%" for part in PARTS)
        table.add_row(str(r["sources"]), "shared" if r["prefix_sharing"] else "separate", *shares)
    return [table]


def _ratio_table(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not found:
        return []
    table = Table("ratio", box=box.SIMPLE)
    table.add_column("", justify="right")
    for ratio in found:
        table.add_row(ratio["name"], f"{ratio['value']:.2f}")
    return [table]
