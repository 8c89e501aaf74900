"""FlexAttention against sdpa on a CUDA device, forward and backward, whole rows and context-parallel parts of them."""

import os

import pytest
import torch

from megafuse.data.shard import owners
from megafuse.model.attention import sdpa_attend, sdpa_blocks
from megafuse.model.flex import flex_attend, flex_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# bf16: 8 bits of mantissa in the probabilities and in the sums over up to 1500 keys; fp32: other summation orders
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def row(generator: torch.Generator, shared: bool, length: int) -> torch.Tensor:
    """Groups of a prompt and four responses, padded to `length`. [2, t] int32"""
    segment: list[int] = []
    parent: list[int] = []
    while True:
        prompt = max([-1, *segment]) + 1
        sizes = torch.randint(20, 300, (5,), generator=generator).tolist()
        if len(segment) + sum(sizes) > length:
            break
        for i, size in enumerate(sizes):
            segment += [prompt + i] * size
            parent += [prompt if shared else prompt + i] * size
    pad = [-1] * (length - len(segment))
    return torch.tensor([segment + pad, parent + pad], dtype=torch.int32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
def test_flex_equals_sdpa(dtype: torch.dtype, shared: bool, ways: int) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    layout = row(generator, shared, 4096)
    places = (owners(layout, ways) == 0).nonzero().flatten().cuda()
    layout = layout.cuda()
    q, k, v = (torch.randn(1, h, 4096, 64, generator=generator).to("cuda", dtype) for h in (8, 2, 2))
    push = torch.randn(1, 8, len(places), 64, generator=generator).to("cuda", dtype)
    results = []
    for attend, mask in ((sdpa_attend, sdpa_blocks), (flex_attend, flex_mask)):
        leaves = [x.clone().requires_grad_() for x in (q[:, :, places], k, v)]
        out = attend(*leaves, mask(layout[0], layout[1], places), 0.125)
        out.backward(push)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        scale = float(one.float().norm())
        assert float((one.float() - other.float()).norm()) / scale < TOLERANCE[dtype]
