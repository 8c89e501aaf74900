"""The parity of gradients with a workspace of the LM head so small that every row is cut into chunks."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from megafuse.config.parity import ParityConfig
from megafuse.doctor.parity import Cell, parity_in_processes
from megafuse.kernels import group_loss
from megafuse.model import gpt


def parity_in_chunks(config: ParityConfig, rows: int) -> tuple[list[Cell], int]:
    """`parity_in_processes` where the head keeps at most `rows` targets; also the most chunks that this rank had."""
    most = [0]

    def cramped(hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
        room = rows * weight.shape[0] * weight.element_size() * 4 // 3
        return group_loss.linear_group_loss(hidden, weight, *args, **{**options, "workspace_bytes": room})

    def cut(blocks: group_loss.Blocks, fit: int) -> list[slice]:
        found = whole(blocks, fit)
        most[0] = max(most[0], len(found))
        return found

    whole = group_loss.Blocks.cut
    with mock.patch.object(gpt, "linear_group_loss", cramped), mock.patch.object(group_loss.Blocks, "cut", cut):
        return parity_in_processes(config), most[0]
