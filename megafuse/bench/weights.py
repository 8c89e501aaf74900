"""Random weights for a model whose shape alone matters: of the usual size, and equal where copies must be."""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

STD = 0.02  # what Llama and Qwen start from


@torch.no_grad()
def randomise(model: Sequence[Any], *, tp_rank: int, seed: int) -> None:
    """Matrices of the chunks `model` from N(0, 0.02), vectors (norms) stay at one.

    Copies are equal: a parameter's numbers follow from its name and, where it is cut over the tensor-parallel ranks,
    from this rank's number; an embedding that first and last pipeline stage share counts as one name.
    """
    for chunk in model:
        for name, param in chunk.named_parameters():
            if param.ndim < 2:
                continue
            key = "shared embedding" if getattr(param, "shared_embedding", False) else name
            part = tp_rank if getattr(param, "tensor_model_parallel", False) else 0
            generator = torch.Generator(device=param.device)
            generator.manual_seed(crc32(f"{seed}:{key}:{part}".encode()))
            param.normal_(0.0, STD, generator=generator)
