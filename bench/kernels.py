"""Measures the log-prob kernels against the physical limit and against every peer that is installed. CUDA only.

    python bench/kernels.py [--out bench/results] [--tokens 8192 32768] [--shapes llama-3-8b ..] [--repeats 30]
                            [--only megafuse-triton cce ..] [--seconds 300]

One process. The ceilings come first: a copy, and the three products of the head with their real operands (the matrix
of exponentials toggles fewer bits than random data, so it runs faster). Then all providers, in random order within each
round, on operands that rotate over three sets, with the L2 cache overwritten before each call; median of the rounds
after the warm-up. The device's time counts, not Python's: it sleeps until the launches of a call wait in its queue.
Peak memory is what a call adds to its operands. Errors are to float64, on the first rows.

Prints a table, and writes OUT/kernels_DEVICE.json (OUT itself where it ends in .json) after each case. A provider that
raises is `failed` in its row and stays out of the rest of the case. After SECONDS it ends with what it has: the exit
status is 0 all the same, and `complete` is false in the JSON. Exits 2 without a CUDA device, 1 when an error has left
the device unusable.

--predict says instead, anywhere, how many products and how much workspace a preference loss takes: arithmetic.
"""

import argparse
import datetime
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megafuse
from megafuse.config.train import ParallelConfig
from megafuse.errors import reason
from megafuse.parallel.topology import layout, process_groups
from megafuse.testing.kernel_oracle import exact_logprobs
from megafuse.testing.kernel_peers import (
    IGNORE,
    SHAPES,
    Operands,
    Provider,
    Shape,
    available,
    prediction,
    response_lengths,
)
from megafuse.testing.kernel_timer import Timer

PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "transformer-engine", "megatron-core")
H100_TFLOPS = 798.0  # bfloat16 products of random data, as published; for --predict only
CHECKED_ROWS = 64
SETS = 3
COPIED_BYTES = 1 << 30  # of the copy that is a ceiling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="JSON file, or the folder of one")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="rows of hidden states")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--responses", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="share of response tokens")
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds, after a third as many to warm up")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these; a wrong name lists what is there")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit of the whole run")
    parser.add_argument("--predict", action="store_true", help="count products and workspace; measure nothing")
    args = parser.parse_args()
    if args.predict:
        predict([s for s in SHAPES if s.name in args.shapes], args.tokens, args.responses)
        return 0
    if not torch.cuda.is_available():
        print("bench/kernels.py measures a CUDA device, and there is none here", file=sys.stderr)
        return 2
    end = time.monotonic() + args.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    with process_groups(), layout(ParallelConfig()):  # Megatron's functions ask for the groups of a world, here of one
        providers, absent = available()
        if args.only:
            providers = chosen(providers, args.only, absent)
        name = torch.cuda.get_device_name(device).lower().replace(" ", "_")
        out = args.out if args.out.suffix == ".json" else args.out / f"kernels_{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        timer = Timer(device)
        result: dict[str, Any] = {"environment": environment(device), "absent": absent}
        return measure_all(providers, cases(args), out, result, args.repeats, timer, end)


def chosen(providers: Sequence[Provider], names: Sequence[str], absent: dict[str, str]) -> list[Provider]:
    """Those of `names`; exits with status 2 where one is not there."""
    there = sorted({p.name for p in providers})
    if wrong := [n for n in names if n not in there]:
        print(f"--only {' '.join(wrong)}: not here. Here: {', '.join(there)}. Absent: {absent}", file=sys.stderr)
        sys.exit(2)
    return [p for p in providers if p.name in names]


Case = tuple[Shape, int, float]


def cases(args: argparse.Namespace) -> list[Case]:
    """(shape, tokens, share of response tokens), in the order of measurement."""
    shapes = [s for s in SHAPES if s.name in args.shapes]
    return [(shape, tokens, share) for shape in shapes for tokens in args.tokens for share in args.responses]


def measure_all(
    providers: Sequence[Provider],
    todo: Sequence[Case],
    out: Path,
    result: dict[str, Any],
    repeats: int,
    timer: Timer,
    end: float = math.inf,
) -> int:
    """Every provider on every case, until `end` (time.monotonic); `out` is written after each. The exit status."""
    result |= {"complete": False, "cases": []}
    status = 0
    for shape, tokens, share in todo:
        if time.monotonic() > end:
            print(f"time is up: {len(result['cases'])} of {len(todo)} cases were measured, the last perhaps in part")
            break
        try:
            case = measure(providers, shape, tokens, share, repeats, timer, end)
        except Exception as error:  # not a provider's: most likely there is no memory for the operands
            case = {"shape": shape.name, "tokens": tokens, "response_share": share, "failed": reason(error)}
        status = 0 if timer.usable() else 1
        result["cases"].append(case)
        result["complete"] = len(result["cases"]) == len(todo) and not case.get("cut") and not status
        out.write_text(json.dumps(result, indent=1) + "\n")
        show(case)
        if status:
            print("the device can be used no more: later cases are left out", file=sys.stderr)
            break
    return status


def predict(shapes: Sequence[Shape], tokens: Sequence[int], shares: Sequence[float]) -> None:
    """Products and workspace of a preference loss, and milliseconds at the rate of an H100's products."""
    for shape in shapes:
        for count in tokens:
            for share in shares:
                p = prediction(shape, max(int(count * share), 1))
                ms = {way: p[f"products_{way}"] * p["product_tflop"] / H100_TFLOPS * 1e3 for way in ("inside", "apart")}
                print(
                    f"{shape.name:12} {count:6} tokens {share:4.0%}: {p['chunks']:.0f} chunks, "
                    f"{p['products_inside']:.2f} products ({ms['inside']:.1f} ms), apart {p['products_apart']:.2f} "
                    f"({ms['apart']:.1f} ms), workspace {p['workspace_gb']:.2f} GB"
                )


def environment(device: torch.device) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", *PEERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "megafuse": megafuse.__version__,
        "versions": versions,
    }


def operands(shape: Shape, tokens: int, share: float, device: torch.device, weight: Tensor) -> Operands:
    """Hidden states that mix noise with their target's row, so that log-probs are anything from sure to wrong."""
    ids = torch.randint(shape.vocab, (tokens,), device=device)
    hidden = torch.randn(tokens, shape.hidden, device=device) * 2
    hidden += torch.rand(tokens, 1, device=device) * 16 * weight.detach()[ids].float()
    count = max(int(tokens * share), 1)
    rows = torch.arange(tokens - count, tokens)  # the prompt comes first
    labels = ids.clone()
    labels[: tokens - count] = IGNORE
    return Operands(
        shape,
        hidden.bfloat16().requires_grad_(),
        weight,
        ids[tokens - count :].clone(),
        labels,
        rows,
        rows.to(device),
        torch.repeat_interleave(torch.tensor(response_lengths(count))).to(device),
        torch.randn(count, device=device) / tokens,
    )


def head(shape: Shape, device: torch.device) -> Tensor:
    weight = torch.randn(shape.vocab, shape.hidden, device=device) / shape.hidden**0.5
    return weight.bfloat16().requires_grad_()


def ceilings(o: Operands, repeats: int, timer: Timer) -> dict[str, float]:
    """Milliseconds of the three products on this case's rows, and of reading the logits once at copy speed."""
    x = o.hidden.detach()[o.device_rows]
    w = o.weight.detach()
    e = torch.exp2((x @ w.t()).float().clamp_(max=20) - 40).bfloat16()
    copy = copy_ms(timer, e.device, repeats)
    product, dw = torch.empty_like(e), torch.empty_like(w)
    dx = torch.empty_like(x)
    read = e.numel() * 2 / (2 * COPIED_BYTES / copy)
    return {
        "copy_gb_s": round(2 * COPIED_BYTES / copy / 1e6, 1),
        "read_logits": read,
        "h_wt": timer.median(lambda: torch.mm(x, w.t(), out=product), repeats),
        "e_w": timer.median(lambda: torch.mm(e, w, out=dx), repeats),
        "et_x": timer.median(lambda: torch.mm(e.t(), x, out=dw), repeats),
    }


def copy_ms(timer: Timer, device: torch.device, repeats: int) -> float:
    """Milliseconds to copy COPIED_BYTES."""
    both = torch.empty((2, COPIED_BYTES), dtype=torch.uint8, device=device)
    return timer.median(lambda: both[0].copy_(both[1]), repeats)


def floor(level: str, backward: bool, limits: dict[str, float]) -> float:
    """What the case costs at the ceilings: one read (and one read and write) of the logits, or one (three) products."""
    if level == "logits":
        return limits["read_logits"] * (3 if backward else 1)
    return limits["h_wt"] + (limits["e_w"] + limits["et_x"] if backward else 0.0)


def attempts(providers: Sequence[Provider], shape: Shape) -> Iterator[tuple[Provider, bool]]:
    """(provider, with backward?) that can do the shape."""
    for provider in providers:
        if shape.softcap is None or provider.softcap:
            yield provider, False
            if provider.backward:
                yield provider, True


def step(provider: Provider, o: Operands, backward: bool) -> Tensor:
    """What is timed."""
    o.hidden.grad = o.weight.grad = None
    if not backward:
        with torch.no_grad():
            return provider.call(o)
    out = provider.call(o)
    grad = None if provider.mean_only else o.grad.to(out.dtype)
    if o.logits is not None:
        torch.autograd.grad(out, o.logits, grad)
    else:
        out.backward(grad)
    return out.detach()


Key = tuple[str, str, bool]  # provider, level, with backward?


def measure(
    providers: Sequence[Provider],
    shape: Shape,
    tokens: int,
    share: float,
    repeats: int,
    timer: Timer,
    end: float = math.inf,
) -> dict[str, Any]:
    """All providers on one shape, in rounds until `end` (time.monotonic)."""
    device = timer.device
    weight = head(shape, device)
    sets = [operands(shape, tokens, share, device, weight) for _ in range(SETS)]
    limits = ceilings(sets[0], repeats, timer)
    todo = list(attempts(providers, shape))
    times: dict[Key, list[float]] = {(p.name, p.level, b): [] for p, b in todo}
    facts: dict[Key, dict[str, Any]] = {}
    with torch.no_grad():
        master = sets[0].hidden[sets[0].device_rows] @ weight.t()
    turns = (repeats + repeats // 3) if todo else 0
    cut = False
    for turn in range(turns):
        random.shuffle(todo)
        for provider, backward in list(todo):
            if cut := time.monotonic() > end:
                break
            key = (provider.name, provider.level, backward)
            o = sets[0] if provider.level == "logits" else sets[turn % SETS]
            try:
                o.logits = master.clone().requires_grad_() if provider.level == "logits" else None
                if key not in facts:
                    facts[key] = inspect(provider, o, backward)
                else:
                    times[key].append(timer.once(lambda: step(provider, o, backward), key))  # noqa: B023
            except Exception as error:  # a peer may raise anything; Triton's errors are no RuntimeErrors
                facts[key] = {"failed": reason(error)}
                todo.remove((provider, backward))
                cut = not timer.usable()
            o.logits = None
            if cut:
                break
        if cut:
            break
    rows = [row_of(key, facts.get(key, {}), times[key], limits, repeats, timer) for key in times]
    rows.sort(key=lambda row: (row["level"], row["backward"], row["provider"]))
    case = {"shape": shape.name, "tokens": tokens, "response_share": share, "cut": cut}
    return {**case, "ceilings_ms": {k: round(v, 4) for k, v in limits.items()}, "results": rows}


def row_of(
    key: Key, fact: dict[str, Any], times: Sequence[float], limits: dict[str, float], repeats: int, timer: Timer
) -> dict[str, Any]:
    """One line of a case: of the times after the warm-up the median, of a case that was cut what there is."""
    name, level, backward = key
    row = {"provider": name, "level": level, "backward": backward, **fact}
    late = times[repeats // 3 :] or times
    if late and "failed" not in fact:
        row["ms"] = round(statistics.median(late), 4)
        row["rounds"] = len(late)
        row["ratio_to_floor"] = round(floor(level, backward, limits) / row["ms"], 4)
        row["host_bound"] = timer.host_bound(key, len(late))
    return row


def inspect(provider: Provider, o: Operands, backward: bool) -> dict[str, Any]:
    """Peak memory of a first call, and its error to float64 on a few rows."""
    cuda = o.hidden.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    out = step(provider, o, backward)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    fact: dict[str, Any] = {"peak_mb": round(peak / 2**20, 1), "mean_only": provider.mean_only}
    if not provider.mean_only:
        rows = o.device_rows[:CHECKED_ROWS]
        if provider.level == "logits" and not backward and o.logits is not None:
            logits = o.logits[:CHECKED_ROWS].detach()
        else:
            logits = o.hidden.detach()[rows].double() @ o.weight.detach().double().t()
        exact = exact_logprobs(logits, o.targets[:CHECKED_ROWS], softcap=o.shape.softcap)
        error = (out[:CHECKED_ROWS].double() - exact).abs()
        fact |= {"max_error": float(error.max()), "sum_error": float(error.sum()), "above_zero": bool((out > 0).any())}
    return fact


def show(case: dict[str, Any]) -> None:
    print(f"\n{case['shape']}  {case['tokens']} tokens, {case['response_share']:.0%} of them responses")
    if "failed" in case:
        print(f"  {case['failed']}", flush=True)
        return
    print("  ceilings: " + ", ".join(f"{k} {v:.3f}" for k, v in case["ceilings_ms"].items()))
    for row in case["results"]:
        kind = f"{row['level']} {'forward + backward' if row['backward'] else 'forward'}"
        if "ms" not in row:
            told = f"failed: {row['failed']}" if "failed" in row else "not timed"
            print(f"  {kind:26} {row['provider']:20} {told}", flush=True)
            continue
        error = f"{row['max_error']:.1e}" if "max_error" in row else "mean loss"
        figures = f"{row['ms']:10.3f} ms {row['ratio_to_floor']:7.3f} of the floor {row['peak_mb']:9.0f} MB"
        host = "  (host included)" if row["host_bound"] else ""
        print(f"  {kind:26} {row['provider']:20} {figures}  error {error}{host}", flush=True)
    if case["cut"]:
        print("  time was up: the rounds of this case are fewer")


if __name__ == "__main__":
    sys.exit(main())
