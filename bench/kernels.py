"""Measures the log-prob kernels against the physical limit and against every peer that is installed. CUDA only.

    python bench/kernels.py [--out bench/results] [--tokens 8192 32768] [--shapes llama-3-8b ..] [--repeats 30]

One process. The ceilings come first: a copy, and the three products of the head with their real operands (the matrix
of exponentials toggles fewer bits than random data, so it runs faster). Then all providers, in random order within each
round, on operands that rotate over three sets, with the L2 cache overwritten before each call; median of the rounds
after the warm-up. Peak memory is what a call adds to its operands. Errors are to float64, on the first rows. Prints a
table and writes OUT/kernels_DEVICE.json. Exits 2 without a CUDA device.

--predict says instead, anywhere, how many products and how much workspace a preference loss takes: arithmetic.
"""

import argparse
import datetime
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megafuse
from megafuse.config.train import ParallelConfig
from megafuse.parallel.topology import layout, process_groups
from megafuse.testing.kernel_oracle import exact_logprobs
from megafuse.testing.kernel_peers import (
    IGNORE,
    SHAPES,
    NotSupported,
    Operands,
    Provider,
    Shape,
    available,
    prediction,
)

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformer-engine", "megatron-core")
H100_TFLOPS = 798.0  # bfloat16 products of random data, as published; for --predict only
CHECKED_ROWS = 64
SETS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="rows of hidden states")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--responses", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="share of response tokens")
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds, after a third as many to warm up")
    parser.add_argument("--predict", action="store_true", help="count products and workspace; measure nothing")
    args = parser.parse_args()
    if args.predict:
        predict([s for s in SHAPES if s.name in args.shapes], args.tokens, args.responses)
        return 0
    if not torch.cuda.is_available():
        print("bench/kernels.py measures a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    with process_groups(), layout(ParallelConfig()):  # Megatron's functions ask for the groups of a world, here of one
        return measure_all(args, device)


def measure_all(args: argparse.Namespace, device: torch.device) -> int:
    """Every provider on every shape that was asked for."""
    providers, absent = available()
    result: dict[str, Any] = {"environment": environment(device), "absent": absent, "cases": []}
    for shape in (s for s in SHAPES if s.name in args.shapes):
        for tokens in args.tokens:
            for share in args.responses:
                case = measure(providers, shape, tokens, share, args.repeats, device)
                result["cases"].append(case)
                show(case)
                name = torch.cuda.get_device_name(device).lower().replace(" ", "_")
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"kernels_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


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
    versions = {}
    for package in PACKAGES:
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
        torch.randn(count, device=device) / tokens,
    )


def head(shape: Shape, device: torch.device) -> Tensor:
    weight = torch.randn(shape.vocab, shape.hidden, device=device) / shape.hidden**0.5
    return weight.bfloat16().requires_grad_()


def ceilings(o: Operands, repeats: int) -> dict[str, float]:
    """Milliseconds of the three products on this case's rows, and of reading the logits once at copy speed."""
    x = o.hidden.detach()[o.rows.to(o.hidden.device)]
    w = o.weight.detach()
    e = torch.exp2((x @ w.t()).float().clamp_(max=20) - 40).bfloat16()
    timer = Timer(e.device)
    copy = copy_ms(timer, e.device, repeats)
    product, dw = torch.empty_like(e), torch.empty_like(w)
    dx = torch.empty_like(x)
    read = e.numel() * 2 / (2 * (1 << 30) / copy)
    return {
        "copy_gb_s": round(2 * (1 << 30) / copy / 1e6, 1),
        "read_logits": read,
        "h_wt": timer.median(lambda: torch.mm(x, w.t(), out=product), repeats),
        "e_w": timer.median(lambda: torch.mm(e, w, out=dx), repeats),
        "et_x": timer.median(lambda: torch.mm(e.t(), x, out=dw), repeats),
    }


def copy_ms(timer: "Timer", device: torch.device, repeats: int) -> float:
    """Milliseconds to copy 1 GiB."""
    both = torch.empty((2, 1 << 30), dtype=torch.uint8, device=device)
    return timer.median(lambda: both[0].copy_(both[1]), repeats)


def floor(level: str, backward: bool, limits: dict[str, float]) -> float:
    """What the case costs at the ceilings: one read (and one read and write) of the logits, or one (three) products."""
    if level == "logits":
        return limits["read_logits"] * (3 if backward else 1)
    return limits["h_wt"] + (limits["e_w"] + limits["et_x"] if backward else 0.0)


class Timer:
    """CUDA events around one call, with a cold L2 cache."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)

    def median(self, call: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds after a warm-up."""
        times = [self.once(call) for _ in range(repeats + repeats // 3)]
        return statistics.median(times[repeats // 3 :])


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


def measure(
    providers: Sequence[Provider], shape: Shape, tokens: int, share: float, repeats: int, device: torch.device
) -> dict[str, Any]:
    """All providers on one shape."""
    weight = head(shape, device)
    sets = [operands(shape, tokens, share, device, weight) for _ in range(SETS)]
    limits = ceilings(sets[0], repeats)
    todo = list(attempts(providers, shape))
    times: dict[tuple[str, str, bool], list[float]] = {(p.name, p.level, b): [] for p, b in todo}
    facts: dict[tuple[str, str, bool], dict[str, Any]] = {}
    timer = Timer(device)
    with torch.no_grad():
        master = sets[0].hidden[sets[0].rows.to(device)] @ weight.t()
    for turn in range(repeats + repeats // 3):
        random.shuffle(todo)
        for provider, backward in list(todo):
            key = (provider.name, provider.level, backward)
            o = sets[0] if provider.level == "logits" else sets[turn % SETS]
            o.logits = master.clone().requires_grad_() if provider.level == "logits" else None
            try:
                if key not in facts:
                    facts[key] = inspect(provider, o, backward)
                else:
                    times[key].append(timer.once(lambda: step(provider, o, backward)))  # noqa: B023
            except (torch.cuda.OutOfMemoryError, NotSupported, RuntimeError) as error:
                facts[key] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
                todo.remove((provider, backward))
            o.logits = None
    rows = []
    for (name, level, backward), fact in sorted(facts.items(), key=lambda item: item[0][1:] + item[0][:1]):
        row = {"provider": name, "level": level, "backward": backward, **fact}
        late = times[name, level, backward][repeats // 3 :]
        if late and "failed" not in fact:
            row["ms"] = round(statistics.median(late), 4)
            row["ratio_to_floor"] = round(floor(level, backward, limits) / row["ms"], 4)
        rows.append(row)
    case = {"shape": shape.name, "tokens": tokens, "response_share": share}
    return {**case, "ceilings_ms": {k: round(v, 4) for k, v in limits.items()}, "results": rows}


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
        rows = o.rows[:CHECKED_ROWS].to(o.hidden.device)
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
    print("  ceilings: " + ", ".join(f"{k} {v:.3f}" for k, v in case["ceilings_ms"].items()))
    for row in case["results"]:
        kind = f"{row['level']} {'forward + backward' if row['backward'] else 'forward'}"
        if "ms" not in row:
            print(f"  {kind:26} {row['provider']:20} {row.get('failed', 'not timed')}")
            continue
        error = f"{row['max_error']:.1e}" if "max_error" in row else "mean loss"
        figures = f"{row['ms']:10.3f} ms {row['ratio_to_floor']:7.3f} of the floor {row['peak_mb']:9.0f} MB"
        print(f"  {kind:26} {row['provider']:20} {figures}  error {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
