"""Float64 references of the log-prob kernels, and inputs that are hard for them; for tests and the kernel benchmark."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

U_BF16 = 2.0**-8  # largest relative error of rounding to bfloat16
ULP_BF16 = 2.0**-7  # the same for truncation, which Triton's interpreter does


def exact_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probs [T] float64 of `targets [T]` under `logits [T, V]`, differentiable, without cancellation.

    log p = -softplus(log sum of the OTHER entries - z_y), so that log p = -1e-20 is -1e-20 and not 0.
    """
    z = logits[:, :vocab_size].double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    others = z.scatter(1, targets.long()[:, None], -torch.inf).logsumexp(1)
    return torch.nn.functional.logsigmoid(z.gather(1, targets.long()[:, None]).squeeze(1) - others)


def hard_head(
    rows: int, vocab: int, width: int, dtype: torch.dtype, *, confidence: float = 16.0, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [T, H], weight [V, H] and targets [T] of a model that is anything between sure and wrong.

    Hidden states mix noise with the target's row of the weight: log p reaches from about -1e-6 to -3 * spread^2.
    """
    weight = torch.randn(vocab, width) / width**0.5
    targets = torch.randint(vocab, (rows,))
    hidden = torch.randn(rows, width) * spread + torch.rand(rows, 1) * confidence * weight[targets]
    return hidden.to(dtype), weight.to(dtype), targets


def dyadic_head(hidden: Tensor, weight: Tensor, bits: int = 7) -> tuple[Tensor, Tensor]:
    """Both [.., H] rounded to multiples of 2^-bits: float32 adds up `hidden @ weight^T` exactly, in whatever order.

    For tests of bits: in Triton's interpreter a product is numpy's, and a BLAS may add up a row in an order that
    depends on the row's place in the matrix (OpenBLAS's kernels for Haswell and Zen do, those for Sandybridge do not).

    Raises:
        ValueError: a partial sum could have more than float32's 24 bits.
    """
    hidden, weight = ((t * 2**bits).round() / 2**bits for t in (hidden, weight))
    largest = float((hidden.double().abs() @ weight.double().abs().t()).max())
    if largest * 4**bits > 2**24:
        raise ValueError(f"bits={bits}: sums reach {largest:.3g} in units of 4^-{bits}, over 2^24: take fewer bits")
    return hidden, weight


def worst(got: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    if not expected.numel():
        return 0.0 if got.shape == expected.shape else float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (largest value for integers) inside: a kernel that reads what it never wrote is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
