"""Transformer Engine's user buffers: tensor-parallel communication inside the products that need it."""

import contextlib
from collections.abc import Iterator

import torch

from megafuse.parallel.topology import Topology


@contextlib.contextmanager
def user_buffers(enabled: bool, topology: Topology, *, row_tokens: int, hidden: int) -> Iterator[None]:
    """Buffers for activations [row_tokens / cp, hidden] in bf16 while the block runs; nothing where not `enabled`.

    They have one size, so every row must have `row_tokens` places (RowShape.lengths = `fixed`).
    """
    if not enabled:
        yield
        return
    from transformer_engine.pytorch.module import base  # only where policy has asked for it: TE is installed then

    base.initialize_ub(
        shape=[row_tokens // topology.cp_size, hidden],
        tp_size=topology.tp_size,
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
