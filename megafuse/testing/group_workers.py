"""What tests run on every gloo rank: `linear_group_loss` with this rank's shard of a vocabulary, sequence or row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.kernels.group_loss import Blocks, linear_group_loss
from megafuse.testing.group_problem import Problem, problem

CASES = (("torch", "dpo"), ("torch", "rloo"), ("torch", "sft"), ("triton", "ln_dpo"))
ROWS = 9  # targets that the workspace holds: more than most blocks, less than some


def case(name: str, seed: int) -> Problem:
    """The same row on every rank and in the parent; its places and the rows of its head are multiples of 2 and 3.

    That of `sft` is bfloat16.
    """
    dtype = torch.bfloat16 if name == "sft" else torch.float32
    while len((p := problem(name, dtype=dtype, seed=seed, groups=4, level=True, multiple=6)).blocks.cut(ROWS)) < 2:
        seed += 1
    return p


def _run(p: Problem, backend: str, columns: int, hidden: Tensor, weight: Tensor, **options: Any) -> dict[str, Any]:
    given = options.pop("groups", p.groups())
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    stride = columns * 4 // 3 if backend == "torch" else -(-columns // 64) * 64
    more: dict[str, Any] = {"row_index": p.row_index, "vocab_size": 131, "backend": backend}
    more["workspace_bytes"] = ROWS * stride * weight.element_size()
    value, metrics = linear_group_loss(hidden, weight, p.targets, given, **{**more, **options})
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    found = {"value": value.detach(), "hidden": hidden.grad, "weight": weight.grad, **metrics}
    return {key: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for key, t in found.items()}


def _context_parallel(p: Problem, backend: str, group: dist.ProcessGroup) -> dict[str, Any]:
    """Places are dealt in turn; a rank has the targets that its places predict."""
    rank, ways = group.rank(), group.size()
    owner = torch.arange(p.hidden.shape[0]) % ways
    counts = torch.stack(
        [torch.bincount(p.response[owner[p.row_index] == r], minlength=len(p.rewards)) for r in range(ways)]
    )
    here = owner[p.row_index] == rank
    local = replace(p, targets=p.targets[here], row_index=p.row_index[here] // ways)
    groups = p.groups(blocks=Blocks(counts, p.blocks.sizes), cp_group=group)
    return _run(local, backend, p.weight.shape[0], p.hidden[rank::ways], p.weight, groups=groups)


def every_case_on_this_rank(seed: int) -> dict[str, dict[str, Any]]:
    """All cases, as vocabulary shards, with sequence parallelism, and as context-parallel ranks; arrays."""
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    out = {}
    for backend, name in CASES:
        p = case(name, seed)
        size, places = p.weight.shape[0] // world, p.hidden.shape[0] // world
        weight, mine = p.weight[rank * size :][:size], p.hidden[rank * places :][:places]
        shard = {"vocab_start": rank * size, "tp_group": group}
        out[f"{backend}/{name}/tp"] = _run(p, backend, size, p.hidden, weight, **shard)
        out[f"{backend}/{name}/sp"] = _run(p, backend, size, mine, weight, sequence_parallel=True, **shard)
        out[f"{backend}/{name}/cp"] = _context_parallel(p, backend, group)
    return out
