"""The fused losses against their float64 twins in plain Python, and their gradients against the torch losses' own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megafuse.kernels.heads import fused_loss, fused_losses_run_on
from megafuse.losses import LOSSES, ResponseSums, Terms
from megafuse.losses.reference import TWINS, from_tensors

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-mean": ("sft", {"reduction": "sequence_mean"}),
    "sft-sum": ("sft", {"reduction": "sequence_sum"}),
    "dpo": ("dpo", {"beta": 0.07}),
    "dpo-smoothed": ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    "ln_dpo": ("ln_dpo", {"beta": 10.0, "label_smoothing": 0.1}),
    "simpo": ("simpo", {"beta": 2.5, "gamma": 1.375}),
    "rloo": ("rloo", {"beta_kl": 0.03}),
    "rloo-no-kl": ("rloo", {"beta_kl": 0.0}),
    "rloo-clipped": ("rloo", {"beta_kl": 0.01, "surrogate": "clipped_ratio", "clip": 0.25}),
    "wrpo": ("wrpo", {"beta": 0.05, "alpha": 0.07}),
    "wrpo-smoothed": ("wrpo", {"beta": 0.2, "alpha": 0.6, "label_smoothing": 0.15}),
}
WIDTH = {"sft": 1, "dpo": 2, "ln_dpo": 2, "simpo": 2, "wrpo": 3}


def random_row(name: str, *, reference: bool, groups: int = 4) -> tuple[ResponseSums, Terms]:
    """Float32 sums of groups with 5 responses and 1 .. 30 terms each (two blocks of terms), in any order."""
    width = WIDTH.get(name, 5)
    members, weights, group = [], [], []
    for g in range(groups):
        for share in torch.distributions.Dirichlet(torch.ones(int(torch.randint(1, 31, ())))).sample():
            k = WIDTH.get(name) or int(torch.randint(2, 6, ()))
            chosen = torch.randperm(5)[:k] + 5 * g
            members.append(torch.cat([chosen, torch.full((width - k,), -1)]))
            weights.append(share)
            group.append(g)
    n = 5 * groups
    lengths = torch.randint(1, 300, (n,))
    logps = -lengths * torch.empty(n).uniform_(0.2, 2.0)
    step = 0.3 if name == "rloo" else 0.3 * lengths.sqrt()
    refs = logps.double() - torch.randn(n, dtype=torch.float64) * step
    order = torch.randperm(len(members))
    rewards = torch.randn(n) * 0.05 + 0.1
    sums = ResponseSums(logps.requires_grad_(), lengths, rewards, refs if reference else None)
    return sums, Terms(torch.stack(members)[order], torch.stack(weights)[order], torch.tensor(group)[order], groups)


def move(sums: ResponseSums, terms: Terms, device: torch.device) -> tuple[ResponseSums, Terms]:
    refs = None if sums.ref_logps is None else sums.ref_logps.to(device)
    logps = sums.logps.detach().to(device).requires_grad_()
    there = ResponseSums(logps, sums.lengths.to(device), sums.rewards.to(device), refs)
    return there, Terms(terms.members.to(device), terms.weights.to(device), terms.group.to(device), terms.num_groups)


def wide(sums: ResponseSums, terms: Terms) -> tuple[ResponseSums, Terms]:
    logps = sums.logps.detach().double().requires_grad_()
    exact = ResponseSums(logps, sums.lengths, sums.rewards.double(), sums.ref_logps)
    return exact, Terms(terms.members, terms.weights.double(), terms.group, terms.num_groups)


def close(got: Tensor, expected: Tensor, bound: float = 1e-6) -> bool:
    scale = expected.double().abs().max().clamp(min=1e-12)
    return float((got.detach().double().cpu() - expected.double()).abs().max() / scale) <= bound


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reference", [True, False])
def test_fused_loss_equals_the_twin(case: str, reference: bool, device: torch.device) -> None:
    name, settings = CASES[case]
    if not reference and (name in ("dpo", "ln_dpo", "wrpo") or case in ("rloo", "rloo-clipped")):
        sums, terms = random_row(name, reference=False)
        with pytest.raises(ValueError, match="ref_logps is None"):
            fused_loss(name, *move(sums, terms, device), **settings)
        return
    sums, terms = random_row(name, reference=reference)
    assert fused_losses_run_on(sums.logps.to(device), "triton")
    there, there_terms = move(sums, terms, device)
    losses, metrics = fused_loss(name, there, there_terms, **settings)
    grad = torch.randn(terms.num_groups)
    losses.backward(grad.to(device))

    exact_losses, exact_metrics = TWINS[name](from_tensors(sums, terms), **settings)
    assert losses.dtype == torch.float32 and close(losses, torch.tensor(exact_losses))
    assert set(metrics) == set(exact_metrics)
    for key, pair in exact_metrics.items():
        assert metrics[key].dtype == torch.float64 and not metrics[key].requires_grad
        assert torch.allclose(metrics[key].cpu(), torch.tensor(pair, dtype=torch.float64), rtol=1e-6, atol=1e-6), key

    exact_sums, exact_terms = wide(sums, terms)
    LOSSES[name][0](exact_sums, exact_terms, **settings)[0].backward(grad.double())
    assert exact_sums.logps.grad is not None and there.logps.grad is not None
    assert close(there.logps.grad, exact_sums.logps.grad)


def test_ties_equal_rewards_and_ln_2(device: torch.device) -> None:
    """Equal rewards: advantage exactly 0. Policy = reference: loss ln 2, accuracy 0."""
    sums, terms = random_row("rloo", reference=False)
    sums, terms = move(sums, terms, device)
    sums.rewards.fill_(0.3)
    losses, metrics = fused_loss("rloo", sums, terms, beta_kl=0.0)
    losses.sum().backward()
    assert sums.logps.grad is not None and not sums.logps.grad.any() and not losses.any()
    assert metrics["reward_margin"][0] == 0 and metrics["advantage_abs"][0] == 0
    sums, terms = random_row("dpo", reference=True)
    sums, terms = move(
        ResponseSums(sums.logps, sums.lengths, sums.rewards, sums.logps.detach().double()), terms, device
    )
    losses, metrics = fused_loss("dpo", sums, terms, beta=0.1)
    assert close(losses, torch.full((4,), math.log(2.0)), 1e-6) and metrics["accuracy"][0] == 0


def test_large_margins_neither_overflow_nor_vanish(device: torch.device) -> None:
    logps = torch.tensor([-5000.0, -1.0, -1.0, -5000.0], device=device, requires_grad=True)
    lengths, zero = torch.ones(4, dtype=torch.int64, device=device), torch.zeros(4, device=device)
    terms = Terms(
        torch.tensor([[0, 1], [2, 3]], device=device), torch.ones(2, device=device), torch.arange(2, device=device), 2
    )
    losses, _ = fused_loss("dpo", ResponseSums(logps, lengths, zero, zero), terms, beta=1.0)
    losses.sum().backward()
    assert losses.tolist() == [4999.0, 0.0]
    assert logps.grad is not None and logps.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_malformed_terms_give_nan_or_an_error(device: torch.device) -> None:
    sums, terms = move(*random_row("dpo", reference=True), device)
    with pytest.raises(ValueError, match=r"wrpo needs members \[m, 3\]"):
        fused_loss("wrpo", sums, terms, beta=0.1, alpha=0.1)
    for match, name, settings in (
        ("loss = 'kto'", "kto", {}),
        ("surrogate = 'x'", "rloo", {"beta_kl": 0.0, "surrogate": "x"}),
        ("reduction = 'x'", "sft", {"reduction": "x"}),
    ):
        with pytest.raises(ValueError, match=match):
            fused_loss(name, sums, terms, **settings)
    missing = terms.members.clone()
    missing[0, 1] = -1
    losses, _ = fused_loss("dpo", sums, Terms(missing, terms.weights, terms.group, 4), beta=0.1)
    assert losses[terms.group[0]].isnan() and losses.isnan().sum() == 1
    stray = terms.group.clone()
    stray[0] = 4
    assert fused_loss("dpo", sums, Terms(terms.members, terms.weights, stray, 4), beta=0.1)[0].isnan().all()
    alone = torch.full_like(terms.members, -1)
    alone[:, 0] = 0
    losses, _ = fused_loss("rloo", sums, Terms(alone, terms.weights, terms.group, 4), beta_kl=0.0)
    assert losses.isnan().all()


def test_a_row_without_terms(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    terms = Terms(none.view(0, 2), torch.zeros(0, device=device), none, 0)
    sums = ResponseSums(torch.zeros(0, device=device, requires_grad=True), none, torch.zeros(0, device=device), None)
    losses, metrics = fused_loss("simpo", sums, terms, beta=1.0, gamma=0.0)
    losses.sum().backward()
    assert (
        losses.shape == (0,) and metrics["margin"].tolist() == [0, 0] and metrics["weight_entropy"].tolist() == [0, 0]
    )


def test_a_group_whose_terms_lie_in_two_rows_is_counted_in_one(device: torch.device) -> None:
    sums, terms = move(*random_row("sft", reference=False), device)
    whole = fused_loss("sft", sums, terms)[1]["weight_entropy"]
    first = torch.tensor([int((terms.group.cpu() == g).nonzero()[0]) for g in range(terms.num_groups)])
    here = torch.zeros(len(terms.group), dtype=torch.bool)
    here[first] = True
    total = torch.zeros_like(whole)
    for own, counted in ((here, True), (~here, False)):
        own = own.to(device)
        part = Terms(
            terms.members[own], terms.weights[own], terms.group[own], terms.num_groups,
            torch.full((terms.num_groups,), counted, device=device),
        )  # fmt: skip
        total += fused_loss("sft", sums, part)[1]["weight_entropy"]
    assert total[1] == terms.num_groups and torch.allclose(total, whole, rtol=1e-12)
