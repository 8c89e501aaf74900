"""Sums per response in Triton: exact order-free sums, lengths, gradient; interpreted on a CPU, compiled on a GPU."""

import math

import pytest
import torch

from megafuse.errors import ConfigError, DataError
from megafuse.kernels.logprob import segment_logprobs


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("mean", [False, True])
def test_sums_lengths_and_gradient(mean: bool, order: str, device: torch.device) -> None:
    """Float64 sums rounded once: relative error at most 2^-24; two blocks of tokens, one segment without any."""
    lengths = torch.tensor([1500, 1, 0, 700])
    ids = torch.cat([torch.arange(4).repeat_interleave(lengths), torch.full((9,), -1)])
    if order == "shuffled":
        ids = ids[torch.randperm(ids.numel())]
    logp = -torch.rand(ids.numel()).exp() * 3
    logp[ids < 0] = torch.nan
    leaf = logp.to(device).requires_grad_()
    normalize = "mean" if mean else "none"
    got, counts = segment_logprobs(leaf, ids.int().to(device), 4, normalize=normalize, backend="triton")
    again, _ = segment_logprobs(leaf, ids.int().to(device), 4, normalize=normalize, backend="triton")
    assert torch.equal(got, again)
    assert counts.tolist() == lengths.tolist() and counts.dtype == torch.int64 and got.dtype == torch.float32
    for i, n in enumerate(lengths.tolist()):
        exact = math.fsum(logp[ids == i].tolist()) / (max(n, 1) if mean else 1)
        assert abs(float(got[i]) - exact) <= 2.0**-24 * 1.01 * abs(exact)
    grad = torch.randn(4)
    got.backward(grad.to(device))
    scale = grad / lengths.clamp(min=1) if mean else grad
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad.cpu(), torch.where(ids < 0, 0, scale[ids.clamp(min=0)]), rtol=1e-6)


def test_corners(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    leaf = torch.zeros(0, device=device, requires_grad=True)
    sums, counts = segment_logprobs(leaf, none, 3, backend="triton")
    assert sums.tolist() == [0, 0, 0] and counts.tolist() == [0, 0, 0]
    sums.sum().backward()
    assert segment_logprobs(leaf, none, 0, backend="triton")[0].shape == (0,)
    ignored = torch.full((5,), -1, device=device)
    sums, counts = segment_logprobs(torch.full((5,), torch.nan, device=device), ignored, 2, backend="triton")
    assert sums.tolist() == [0, 0] and counts.tolist() == [0, 0]


def test_an_id_that_is_too_large_is_never_a_wrong_number(device: torch.device) -> None:
    logp, ids = torch.ones(4, device=device), torch.tensor([0, 1, 2, 1], device=device)
    if device.type == "cpu":
        with pytest.raises(DataError, match="segment_ids holds 2"):
            segment_logprobs(logp, ids, 2, backend="triton")
        from megafuse.kernels._segments_triton import TritonSegmentLogprobs

        sums, _ = TritonSegmentLogprobs.apply(logp, ids, 2, False, None)
    else:
        sums, _ = segment_logprobs(logp, ids, 2, backend="triton")
    assert sums.isnan().all()
    with pytest.raises(ConfigError, match=r"segment_ids are torch.float32"):
        segment_logprobs(logp, ids.float(), 3, backend="triton")
