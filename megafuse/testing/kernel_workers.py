"""What tests run on every gloo rank: the log-prob kernels on this rank's shard of a vocabulary and of a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

VOCAB, PADDED, HIDDEN, SEQUENCE, TARGETS = 131, 150, 16, 24, 30

# name -> options of both functions, options of the linear one
CASES: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "plain": (torch.float32, {"vocab_size": VOCAB}, {}),
    "softcap": (torch.float32, {"vocab_size": VOCAB, "softcap": 8.0, "temperature": 0.7}, {}),
    "chunked": (torch.float32, {"vocab_size": VOCAB}, {"workspace_bytes": 10_000}),
    "bfloat16": (torch.bfloat16, {"vocab_size": VOCAB}, {}),
    "gaps": (torch.float32, {"vocab_size": VOCAB}, {}),  # a target 100 .. 300 nats below another rank's logits
    "empty": (torch.float32, {"vocab_size": VOCAB}, {}),
}


def inputs(name: str, seed: int) -> dict[str, Tensor]:
    """The same tensors on every rank and in the parent."""
    rng = torch.Generator().manual_seed(seed + sum(name.encode()))
    dtype, count = CASES[name][0], 0 if name == "empty" else TARGETS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    hidden, weight = normal(SEQUENCE, HIDDEN), normal(PADDED, HIDDEN)
    if name == "gaps":
        hidden[::3] *= 30.0
    return {
        "hidden": hidden,
        "weight": weight,
        "logits": normal(count, PADDED) * (60 if name == "gaps" else 3),
        "row_index": torch.randint(SEQUENCE, (count,), generator=rng),
        "targets": torch.randint(VOCAB, (count,), generator=rng),
        "grad": torch.randn(count, generator=rng),
    }


def shard(name: str, rank: int, world: int) -> slice:
    """Uneven shards of the vocabulary; the last one of `softcap` is nothing but padding."""
    inner = [50 * i + 7 for i in range(1, world)]
    if name == "softcap":
        inner = [*(40 * i for i in range(1, world - 1)), VOCAB + 3]
    border = [0, *inner, PADDED]
    return slice(border[rank], border[rank + 1])


def run_linear(name: str, t: dict[str, Tensor], rows: slice, columns: slice, **more: Any) -> dict[str, Tensor]:
    """Log-probs, entropies and both gradients of one shard."""
    from megafuse.kernels.logprob import linear_logprobs_and_entropy

    _, options, linear = CASES[name]
    hidden, weight = t["hidden"][rows].clone().requires_grad_(), t["weight"][columns].clone().requires_grad_()
    logp, entropy = linear_logprobs_and_entropy(
        *(hidden, weight, t["targets"]),
        **{"row_index": t["row_index"], "vocab_start": columns.start, **options, **linear, **more},
    )
    logp.backward(t["grad"].to(logp.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return {"logp": logp.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run_logits(name: str, t: dict[str, Tensor], columns: slice, **more: Any) -> dict[str, Tensor]:
    """Log-probs and gradient of one shard of existing logits."""
    from megafuse.kernels.logprob import vocab_parallel_logprobs

    leaf = t["logits"][:, columns].clone().requires_grad_()
    options = CASES[name][1] | more
    logp = vocab_parallel_logprobs(leaf * 1, t["targets"], vocab_start=columns.start, **options)
    logp.backward(t["grad"].to(logp.dtype))
    assert leaf.grad is not None
    return {"logp": logp.detach(), "logits": leaf.grad}


def run_segments(seed: int, part: slice, mean: bool, **more: Any) -> dict[str, Tensor]:
    """Sums per response of one part of the tokens."""
    from megafuse.kernels.logprob import segment_logprobs

    rng = torch.Generator().manual_seed(seed)
    ids, grad = torch.randint(-1, 4, (90,), generator=rng), torch.randn(5, generator=rng)
    leaf = torch.randn(90, generator=rng)[part].clone().requires_grad_()
    sums, counts = segment_logprobs(leaf, ids[part], 5, normalize="mean" if mean else "none", **more)
    sums.backward(grad)
    assert leaf.grad is not None
    return {"sums": sums.detach(), "counts": counts, "grad": leaf.grad}


def every_case_on_this_rank(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """All cases through Triton's interpreter, this rank holding its part of the vocabulary, sequence and tokens.

    `TRITON_INTERPRET=1` must be in the environment of the process. The results are arrays (float32 for bfloat16):
    tensors travel between processes as shared memory that is gone with its owner.
    """
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    triton: dict[str, Any] = {"backend": "triton"}
    out = {}
    for name in CASES:
        t, columns = inputs(name, seed), shard(name, rank, world)
        mine = slice(rank * SEQUENCE // world, (rank + 1) * SEQUENCE // world)
        out[f"{name}/tp"] = run_linear(name, t, slice(None), columns, tp_group=group, **triton)
        if name in ("plain", "bfloat16", "empty"):
            more = {"tp_group": group, "sequence_parallel": True, **triton}
            out[f"{name}/sp"] = run_linear(name, t, mine, columns, **more)
        out[f"{name}/logits"] = run_logits(name, t, columns, group=group, inplace_backward=True, **triton)
    part = slice(rank * 90 // world, (rank + 1) * 90 // world)
    for mean in (False, True):
        out[f"segments/{mean}"] = run_segments(seed, part, mean, cp_group=group, **triton)
    return {
        name: {key: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for key, t in found.items()}
        for name, found in out.items()
    }
