"""Attention of prefix-shared rows on a CUDA device: flex in three builds, and sdpa. One layer's heads, one process.

    python bench/flex.py [--out flex.json] [--tokens 4096 8192 16384 32768] [--heads 32 8] [--head-dim 64]
                         [--dtype bf16] [--sources 4] [--repeats 12] [--seconds 130]

    flex-tiles     lengths handed over as 128 x n, as megafuse trains: whole tiles by construction, any length one graph
    flex-dynamic   a length that is a symbol, of which torch cannot tell that it is a multiple of 128
    flex-static    a graph for each length: what flex-tiles is to reach
    sdpa           a call for each response over its prompt and itself, as megafuse trains where flex cannot be

Rows are packed with groups of a prompt and two responses of each source, whose lengths are drawn around those of
GSM8K's answers (139 and 131 tokens, log-normal) by --seed. Times are the device's, the cache cold, forward alone and
backward alone (with the forward's graph kept); median of the rounds after the warm-up. Masks are made before.

OUT is written after each case; one that raises is `failed` in it, and the next begins. After SECONDS it ends with what
it has: `complete` is false then. Exit status: 0 all was measured, 1 a case failed or was not reached, 2 no CUDA device.
"""

import argparse
import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafuse.errors import reason
from megafuse.model.attention import sdpa_attend, sdpa_blocks
from megafuse.model.build import DTYPES
from megafuse.model.flex import TILE, _attend, alone, attend_compiled, flex_attend, flex_mask
from megafuse.observe.manifest import utc_now, versions, write_json_atomic
from megafuse.testing.kernel_timer import Timer

PROMPT, RESPONSE, SPREAD = 139, 131, 0.4  # mean tokens, and the deviation of their logarithm

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [1, h, t, d], k and v [1, g, t, d] -> [1, h, t, d]


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("bench/flex.py measures a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    return measure_all(args, Timer(device), torch.cuda.get_device_name(device))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="of a row")
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of queries, and of keys")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--sources", type=int, default=4, help="of a prompt, each with two responses")
    parser.add_argument("--repeats", type=int, default=12, help="timed rounds, after a third as many to warm up")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and operands")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(given)


def row(tokens: int, sources: int, seed: int) -> tuple[Tensor, Tensor]:
    """(segment, parent) [tokens] int32 of a row that groups fill; what is left for no whole group is padding, -1.

    Raises ValueError where not one fits.
    """
    rng = np.random.default_rng(seed)
    segment, parent = np.full(tokens, -1, np.int32), np.full(tokens, -1, np.int32)
    place = number = 0
    while True:
        drawn = rng.lognormal(-(SPREAD**2) / 2, SPREAD, 1 + 2 * sources) * [PROMPT, *[RESPONSE] * 2 * sources]
        lengths = np.maximum(drawn.astype(int), 1)
        if place + lengths.sum() > tokens:
            if not number:
                raise ValueError(f"--tokens {tokens} is less than the first group's {lengths.sum()}; raise it")
            return torch.from_numpy(segment), torch.from_numpy(parent)
        ids = np.arange(number, number + len(lengths), dtype=np.int32)
        segment[place : place + lengths.sum()] = np.repeat(ids, lengths)
        parent[place : place + lengths.sum()] = number
        place, number = place + int(lengths.sum()), number + len(lengths)


@functools.cache
def compiled(tokens: int | None) -> Any:
    """`flex_attention` for rows of this length, or for all."""
    return torch.compile(alone(_attend, tokens), fullgraph=True, dynamic=None if tokens is None else False)


def attentions(segment: Tensor, parent: Tensor, head_dim: int) -> dict[str, Callable[[], Attention]]:
    """What is compared on this row, made when asked for. On a CPU flex is not compiled: all three are the same."""
    places = torch.arange(segment.numel(), device=segment.device)
    scale = head_dim**-0.5

    def flex(function: Any, *more: Any, varied: bool = False) -> Attention:
        masks = [flex_mask(segment[:n], parent[:n], places[:n]) for n in (segment.numel(), segment.numel() - TILE)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if varied and len(masks) == 2:  # torch takes a length for a constant until it has seen another
                function(*(x.detach()[:, :, :-TILE].contiguous() for x in (q, k, v)), masks.pop(), *more)
            return function(q, k, v, masks[0], *more)

        return attend

    def built(kind: str) -> Attention:
        if segment.device.type == "cpu":
            return flex(flex_attend, scale, varied=kind != "static")
        if kind == "tiles":
            return flex(attend_compiled, scale, None, varied=True)
        if kind == "dynamic":
            return flex(compiled(None), None, scale, varied=True)
        return flex(compiled(segment.numel()), None, scale)

    def sdpa() -> Attention:
        blocks = sdpa_blocks(segment, parent, places)
        return lambda q, k, v: sdpa_attend(q, k, v, blocks, scale)

    flexes = {f"flex-{kind}": functools.partial(built, kind) for kind in ("tiles", "dynamic", "static")}
    return {**flexes, "sdpa": sdpa}


def operands(args: argparse.Namespace, tokens: int, device: torch.device) -> list[Tensor]:
    """q, k, v, and the gradient of what comes of them."""
    torch.manual_seed(args.seed)
    heads, groups = args.heads
    made = [torch.randn(1, h, tokens, args.head_dim, device=device) for h in (heads, groups, groups, heads)]
    return [x.to(DTYPES[args.dtype]).requires_grad_(i < 3) for i, x in enumerate(made)]


def case(
    found: dict[str, Any], attend: Attention, x: Sequence[Tensor], timer: Timer, repeats: int, exact: Tensor
) -> None:
    """Milliseconds of one attention, forward and backward, and how far it is from `exact` (relative to its size).

    `exact` [1, h, t, d] float32: of the same operands, zeros at padding.
    """
    q, k, v, grad = x
    free = [operand.detach() for operand in (q, k, v)]
    found["error"] = float((attend(*free).float() - exact).norm() / exact.norm())
    found["forward_ms"] = round(timer.median(lambda: attend(*free), repeats), 4)
    out = attend(q, k, v)
    backward = timer.median(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), repeats)
    found["backward_ms"] = round(backward, 4)


def measure_all(args: argparse.Namespace, timer: Timer, name: str) -> int:
    """Every attention on every length; `args.out` is written after each. The exit status."""
    end = time.monotonic() + args.seconds
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    given["seconds"] = None if math.isinf(args.seconds) else args.seconds
    report: dict[str, Any] = {"created": utc_now(), "device": name, "arguments": given, "complete": False}
    report |= {"versions": {**versions(), "cuda": torch.version.cuda}, "cases": []}
    random.seed(args.seed)
    status = 0
    for tokens in args.tokens:
        segment, parent = (ids.to(timer.device) for ids in row(-(-tokens // TILE) * TILE, args.sources, args.seed))
        kinds = list(attentions(segment, parent, args.head_dim).items())
        random.shuffle(kinds)
        exact: Tensor | None = None
        for kind, make in kinds:
            if time.monotonic() > end:
                print(f"time is up: {len(report['cases'])} cases were measured")
                return 1
            found: dict[str, Any] = {"tokens": segment.numel(), "padding": int((segment < 0).sum()), "attention": kind}
            try:
                x = operands(args, segment.numel(), timer.device)
                if exact is None:
                    exact = reference(segment, parent, x)
                case(found, make(), x, timer, args.repeats, exact)
            except Exception as error:  # a compiler may raise anything
                found["failed"] = reason(error)
                status = 1
            report["cases"].append(found)
            report["complete"] = tokens == args.tokens[-1] and kind == kinds[-1][0]
            if args.out:
                write_json_atomic(args.out, report)
            print(json.dumps(found), flush=True)
            if not timer.usable():
                print("the device can be used no more: later cases are left out", file=sys.stderr)
                return 1
    return status


def reference(segment: Tensor, parent: Tensor, x: Sequence[Tensor]) -> Tensor:
    """Float32 attention, call by call: what all are compared with."""
    blocks = sdpa_blocks(segment, parent, torch.arange(segment.numel(), device=segment.device))
    with torch.no_grad():
        return sdpa_attend(x[0].float(), x[1].float(), x[2].float(), blocks, x[0].size(-1) ** -0.5)


if __name__ == "__main__":
    sys.exit(main())
