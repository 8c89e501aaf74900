"""Every loss, its gradient and its metrics against float64 twins in plain Python, on fresh random inputs."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megafuse.losses import LOSSES, Loss, ResponseSums, Terms
from megafuse.losses.reference import TWINS, Batch, from_tensors

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-mean": ("sft", {"reduction": "sequence_mean"}),
    "sft-sum": ("sft", {"reduction": "sequence_sum"}),
    "sft-token": ("sft", {"reduction": "token_mean"}),
    "dpo": ("dpo", {"beta": 0.07}),
    "dpo-smoothed": ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    "ln_dpo": ("ln_dpo", {"beta": 10.0}),
    "ln_dpo-smoothed": ("ln_dpo", {"beta": 3.0, "label_smoothing": 0.1}),
    "simpo": ("simpo", {"beta": 2.5, "gamma": 1.375}),
    "simpo-smoothed": ("simpo", {"beta": 10.0, "gamma": 3.0, "label_smoothing": 0.05}),
    "rloo": ("rloo", {"beta_kl": 0.03}),
    "rloo-no-kl": ("rloo", {"beta_kl": 0.0}),
    "rloo-clipped": ("rloo", {"beta_kl": 0.01, "surrogate": "clipped_ratio", "clip": 0.25}),
    "wrpo": ("wrpo", {"beta": 0.05, "alpha": 0.07}),
    "wrpo-smoothed": ("wrpo", {"beta": 0.2, "alpha": 0.6, "label_smoothing": 0.15}),
}
WIDTH = {"sft": 1, "dpo": 2, "ln_dpo": 2, "simpo": 2, "wrpo": 3}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed = {seed}")
    return np.random.default_rng(seed)


def random_row(rng: np.random.Generator, name: str, *, reference: bool = True) -> tuple[ResponseSums, Terms]:
    """Several groups with uneven numbers of responses and terms, weights that sum to 1, padding where it may be."""
    lengths, members, weights, group = [], [], [], []
    groups = int(rng.integers(2, 6))
    for g in range(groups):
        responses = int(rng.integers(5, 9))
        here = np.arange(responses) + len(lengths)
        lengths += rng.integers(1, 300, responses).tolist()
        share = rng.dirichlet(np.ones(int(rng.integers(1, 5))))
        for weight in share:
            width = WIDTH.get(name) or int(rng.integers(2, 6))
            members.append(np.pad(rng.permutation(here)[:width], (0, 5 - width), constant_values=-1))
            weights.append(weight)
            group.append(g)
    table = np.array(members)[:, : WIDTH.get(name, 5)]
    n = np.array(lengths, dtype=np.float64)
    logps = -n * rng.uniform(0.2, 2.0, len(n))
    refs = logps - rng.normal(0.05, 0.3, len(n)) * (1.0 if name == "rloo" else np.sqrt(n))
    order = rng.permutation(len(members))  # the terms of a group need not be neighbours
    sums = ResponseSums(
        torch.tensor(logps), torch.tensor(lengths), torch.tensor(rng.normal(0.1, 0.05, len(n))), torch.tensor(refs)
    )
    if not reference:
        sums = ResponseSums(sums.logps, sums.lengths, sums.rewards, None)
    terms = Terms(
        torch.tensor(table[order]), torch.tensor(np.array(weights)[order]), torch.tensor(np.array(group)[order]), groups
    )
    return sums, terms


def float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cast(sums: ResponseSums, terms: Terms, dtype: torch.dtype) -> tuple[ResponseSums, Terms]:
    refs = None if sums.ref_logps is None else sums.ref_logps.to(dtype)
    logps = sums.logps.detach().to(dtype).requires_grad_()
    return (
        ResponseSums(logps, sums.lengths, sums.rewards.to(dtype), refs),
        Terms(terms.members, terms.weights.to(dtype), terms.group, terms.num_groups),
    )


def numeric_gradient(name: str, batch: Batch, scale: list[float], settings: dict[str, Any]) -> Tensor:
    """d(sum_g scale_g * loss_g)/d logps of the twin, by fourth-order central differences."""
    fixed = {"constant_logps": list(batch.logps)} if name == "rloo" else {}

    def value(i: int, step: float) -> float:
        logps = list(batch.logps)
        logps[i] += step
        moved = Batch(logps, batch.refs, batch.lengths, batch.rewards, batch.terms, batch.groups)
        losses, _ = TWINS[name](moved, **settings, **fixed)
        return sum(s * loss for s, loss in zip(scale, losses))

    h = 1e-3
    return torch.tensor(
        [
            (8 * (value(i, h) - value(i, -h)) - (value(i, 2 * h) - value(i, -2 * h))) / (12 * h)
            for i in range(len(batch.logps))
        ],
        dtype=torch.float64,
    )


def away_from_kinks(sums: ResponseSums, clip: float) -> bool:
    assert sums.ref_logps is not None
    ratio = (sums.logps - sums.ref_logps).exp()
    return bool(((ratio - 1).abs() - clip).abs().min() > 0.01)


TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-11}, torch.float32: {"rtol": 3e-5, "atol": 2e-5}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_metrics(case: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    name, settings = CASES[case]
    for _ in range(5):
        sums, terms = cast(*random_row(rng, name, reference=name not in ("sft", "simpo")), dtype)
        losses, metrics = LOSSES[name][0](sums, terms, **settings)
        expected, expected_metrics = TWINS[name](from_tensors(sums, terms), **settings)
        assert losses.dtype == dtype and losses.shape == (terms.num_groups,)
        torch.testing.assert_close(losses.double(), float64(expected), **TOLERANCE[dtype])
        assert metrics.keys() == expected_metrics.keys()
        for key, value in metrics.items():
            assert value.shape == (2,) and value.dtype == torch.float64 and not value.requires_grad
            if dtype == torch.float32 and key in ("accuracy", "clip_fraction"):
                continue  # what is next to a threshold may cross it in rounding
            torch.testing.assert_close(
                value,
                float64(expected_metrics[key]),
                msg=lambda m, k=key: f"{k}: {m}",
                **TOLERANCE[dtype],
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_gradient(case: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    name, settings = CASES[case]
    sums, terms = cast(*random_row(rng, name), dtype)
    while name == "rloo" and not away_from_kinks(sums, 0.25):
        sums, terms = cast(*random_row(rng, name), dtype)
    scale = torch.tensor(rng.normal(size=terms.num_groups))
    losses, _ = LOSSES[name][0](sums, terms, **settings)
    (losses.double() * scale).sum().backward()
    expected = numeric_gradient(name, from_tensors(sums, terms), scale.tolist(), settings)
    assert sums.logps.grad is not None
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-6}
    torch.testing.assert_close(sums.logps.grad.double(), expected, **tolerance)


def test_without_reference_rloo_is_reinforce_on_plain_rewards(rng: np.random.Generator) -> None:
    sums, terms = random_row(rng, "rloo", reference=False)
    losses, metrics = LOSSES["rloo"][0](sums, terms, beta_kl=0.0)
    expected, expected_metrics = TWINS["rloo"](from_tensors(sums, terms), beta_kl=0.0)
    torch.testing.assert_close(losses, float64(expected), rtol=1e-11, atol=1e-11)
    assert metrics.keys() == expected_metrics.keys() and "kl" not in metrics
    for key, value in metrics.items():
        torch.testing.assert_close(value, float64(expected_metrics[key]), rtol=1e-11, atol=1e-11)


def gradient(name: str, settings: dict[str, Any], sums: ResponseSums, terms: Terms) -> tuple[Tensor, Tensor, dict]:
    logps = sums.logps.detach().clone().requires_grad_()
    sums = ResponseSums(logps, sums.lengths, sums.rewards, sums.ref_logps)
    losses, metrics = LOSSES[name][0](sums, terms, **settings)
    losses.sum().backward()
    assert logps.grad is not None
    return losses.detach(), logps.grad, metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_a_group_does_not_see_its_row(case: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Groups one by one, renumbered, or rows in another order: the same losses, gradients and metric sums."""
    name, settings = CASES[case]
    sums, terms = cast(*random_row(rng, name), dtype)
    assert sums.ref_logps is not None
    losses, grad, metrics = gradient(name, settings, sums, terms)

    responses = torch.tensor(rng.permutation(len(sums.lengths)))  # new position -> old position
    where = torch.argsort(responses)
    groups = torch.tensor(rng.permutation(terms.num_groups))  # old number -> new number
    order = torch.tensor(rng.permutation(len(terms.weights)))
    moved = torch.where(terms.members >= 0, where[terms.members.clamp(min=0)], -1)
    others = ResponseSums(
        sums.logps[responses], sums.lengths[responses], sums.rewards[responses], sums.ref_logps[responses]
    )
    permuted = Terms(moved[order], terms.weights[order], groups[terms.group[order]], terms.num_groups)
    losses2, grad2, metrics2 = gradient(name, settings, others, permuted)
    tight = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(losses2[groups], losses, **tight)
    torch.testing.assert_close(grad2[where], grad, **tight)

    total = {key: torch.zeros(2, dtype=torch.float64) for key in metrics}
    grads, parts = torch.zeros_like(grad), []
    for g in range(terms.num_groups):
        mine = terms.group == g
        part = Terms(terms.members[mine], terms.weights[mine], torch.zeros_like(terms.group[mine]), 1)
        loss, grad_of_part, values = gradient(name, settings, sums, part)
        parts.append(loss)
        grads += grad_of_part
        for key, value in values.items():
            total[key] += value
    torch.testing.assert_close(torch.cat(parts), losses, **tight)
    torch.testing.assert_close(grads, grad, **tight)
    for key in metrics:
        torch.testing.assert_close(total[key], metrics[key], **tight)
        torch.testing.assert_close(metrics2[key], metrics[key], **tight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_cuda_equals_cpu_and_repeats_bit_by_bit(case: str, rng: np.random.Generator) -> None:
    name, settings = CASES[case]
    sums, terms = cast(*random_row(rng, name), torch.float32)
    assert sums.ref_logps is not None
    there = ResponseSums(sums.logps.cuda(), sums.lengths.cuda(), sums.rewards.cuda(), sums.ref_logps.cuda())
    there_terms = Terms(terms.members.cuda(), terms.weights.cuda(), terms.group.cuda(), terms.num_groups)
    losses, grad, _ = gradient(name, settings, sums, terms)
    runs = [gradient(name, settings, there, there_terms) for _ in range(5)]
    torch.testing.assert_close(runs[0][0].cpu(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runs[0][1].cpu(), grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)


def test_every_loss_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(LOSSES) == set(TWINS)
    assert Loss.__dataclass_params__.frozen  # type: ignore[attr-defined]
