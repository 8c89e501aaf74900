"""What the losses must satisfy by their definitions: closed forms, limits, hand-worked numbers, refusals."""

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megafuse.config.loss import LossConfig
from megafuse.losses import LOSSES, ResponseSums, Terms, dpo, ln_dpo, make_loss, rloo, sft, simpo, wrpo

MIN = {"sft": {}, "dpo": {"beta": 0.1}, "ln_dpo": {"beta": 10.0}, "simpo": {"beta": 2.0, "gamma": 1.0}}
SETTINGS: dict[str, dict[str, Any]] = {**MIN, "rloo": {"beta_kl": 0.01}, "wrpo": {"beta": 0.1, "alpha": 0.1}}
WIDTH = {"sft": 1, "dpo": 2, "ln_dpo": 2, "simpo": 2, "rloo": 2, "wrpo": 3}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed = {seed}")
    return np.random.default_rng(seed)


def sums_of(
    logps: Any, refs: Any = None, lengths: Any = None, rewards: Any = None, dtype: torch.dtype = torch.float64
) -> ResponseSums:
    policy = torch.as_tensor(logps, dtype=dtype).clone().requires_grad_()
    n = len(policy)
    return ResponseSums(
        policy,
        torch.as_tensor([1] * n if lengths is None else lengths),
        torch.as_tensor([0.0] * n if rewards is None else rewards, dtype=dtype),
        None if refs is None else torch.as_tensor(refs, dtype=dtype),
    )


def terms_of(members: list[list[int]], weights: list[float] | None = None, group: list[int] | None = None) -> Terms:
    m = len(members)
    group = [0] * m if group is None else group
    weight = torch.tensor([1.0 / m] * m if weights is None else weights, dtype=torch.float64)
    return Terms(torch.tensor(members), weight, torch.tensor(group), max(group) + 1)


def grad_of(loss: Tensor, sums: ResponseSums) -> Tensor:
    (grad,) = torch.autograd.grad(loss.sum(), sums.logps)
    return grad


# ---- numbers worked by hand


def test_hand_worked_values() -> None:
    pair, lengths = terms_of([[0, 1]]), [4, 5]
    s = sums_of([-10.0, -20.0], [-12.0, -17.0], lengths)  # d = 2, -3
    softplus = lambda z: math.log1p(math.exp(z))  # noqa: E731
    assert dpo(s, pair, beta=0.1)[0].item() == pytest.approx(softplus(-0.5), rel=1e-14)
    assert ln_dpo(s, pair, beta=10.0)[0].item() == pytest.approx(softplus(-(10 * 2 / 4 + 10 * 3 / 5)), rel=1e-12)
    assert simpo(s, pair, beta=2.0, gamma=0.5)[0].item() == pytest.approx(softplus(-(-5.0 + 8.0 - 0.5)), rel=1e-14)
    smooth = 0.9 * softplus(-0.5) + 0.1 * softplus(0.5)
    assert dpo(s, pair, beta=0.1, label_smoothing=0.1)[0].item() == pytest.approx(smooth, rel=1e-14)
    assert sft(s, terms_of([[0], [1]], [0.75, 0.25]))[0].item() == 0.75 * 2.5 + 0.25 * 4.0
    assert sft(s, terms_of([[0], [1]], [0.75, 0.25]), reduction="sequence_sum")[0].item() == 0.75 * 10 + 0.25 * 20
    three = sums_of([-10.0, -20.0, -30.0], [-11.0, -20.0, -28.0])  # d = 1, 0, -2
    expected = softplus(-0.5 * (0.2 * 1 + 0.8 * 0 + 2))
    assert wrpo(three, terms_of([[0, 1, 2]]), beta=0.5, alpha=0.2)[0].item() == pytest.approx(expected, rel=1e-14)
    # Rhat = 1 - .1, 2, 4 + .2 = .9, 2, 4.2; baselines 3.1, 2.55, 1.45; A = -2.2, -.55, 2.75
    r = sums_of([-10.0, -20.0, -30.0], [-11.0, -20.0, -28.0], rewards=[1.0, 2.0, 4.0])
    expected = -(-2.2 * -10 - 0.55 * -20 + 2.75 * -30) / 3
    assert rloo(r, terms_of([[0, 1, 2]]), beta_kl=0.1)[0].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_step_zero_is_ln_2(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Policy = reference: whatever the lengths, weights and beta, each group's loss is ln 2."""
    logps = rng.uniform(-2000, -1, 9)
    for name in ("dpo", "ln_dpo", "wrpo"):
        members = [rng.permutation(9)[: WIDTH[name]].tolist() for _ in range(4)]
        terms = terms_of(members, [0.3, 0.7, 0.9, 0.1], [0, 0, 1, 1])
        s = sums_of(logps, logps, rng.integers(1, 2000, 9), dtype=dtype)
        for smoothing in (0.0, 0.3):
            losses, metrics = LOSSES[name][0](s, terms, **SETTINGS[name], label_smoothing=smoothing)
            assert (losses.double() - math.log(2)).abs().max() < 1e-6
        assert metrics["kl"].tolist() == [0.0, 2.0] and metrics["margin"][0] == 0
        assert metrics["accuracy"].tolist() == [0.0, 2.0]  # a tie is not a win


def test_float64_reference_keeps_its_digits() -> None:
    """A float32 policy near -3000 and a float64 reference: the difference is rounded once, after subtracting."""
    policy = torch.tensor([-3000.0, -10.0], requires_grad=True)
    exact = torch.tensor([-3000.00001, -10.0], dtype=torch.float64)
    s = ResponseSums(policy, torch.tensor([1, 1]), torch.zeros(2), exact)
    _, metrics = dpo(s, terms_of([[0, 1]]), beta=1.0)
    assert metrics["margin"][0].item() == pytest.approx(1e-5, rel=1e-3)


# ---- gradients in closed form


def test_dpo_gradient_closed_form(rng: np.random.Generator) -> None:
    """dL/dlogp_w = -w beta sigma(-z) = -dL/dlogp_l; a response in two terms gets both."""
    logps, refs = rng.normal(-50, 5, 4), rng.normal(-50, 5, 4)
    s, w, beta = sums_of(logps, refs), [0.35, 0.65], 0.2
    grad = grad_of(dpo(s, terms_of([[0, 1], [0, 3]], w), beta=beta)[0], s)
    d = logps - refs
    push = [w[i] * beta / (1 + math.exp(beta * (d[0] - d[j]))) for i, j in ((0, 1), (1, 3))]
    torch.testing.assert_close(grad, torch.tensor([-push[0] - push[1], push[0], 0.0, push[1]]).double())


def test_no_gradient_through_rloo_advantages(rng: np.random.Generator) -> None:
    logps, refs, rewards = rng.normal(-50, 5, 4), rng.normal(-50, 5, 4), rng.normal(size=4)
    s = sums_of(logps, refs, rewards=rewards)
    grad = grad_of(rloo(s, terms_of([[0, 1, 2, 3]]), beta_kl=0.5)[0], s)
    adjusted = rewards - 0.5 * (logps - refs)
    advantage = adjusted - (adjusted.sum() - adjusted) / 3
    torch.testing.assert_close(grad, torch.tensor(-advantage / 4))


def test_clipped_ratio_stops_pushing_outside_the_range() -> None:
    """Better than the others and already 1.5 times as likely: no gradient. Worse and as likely: full gradient."""
    s = sums_of([math.log(1.5), math.log(1.5)], [0.0, 0.0], rewards=[1.0, 0.0])
    losses, metrics = rloo(s, terms_of([[0, 1]]), beta_kl=0.0, surrogate="clipped_ratio")
    torch.testing.assert_close(grad_of(losses, s), torch.tensor([0.0, 0.75]).double())
    assert losses.item() == pytest.approx(-(1.2 - 1.5) / 2)
    assert metrics["clip_fraction"].tolist() == [1.0, 1.0]


def test_reinforce_and_clipped_ratio_agree_at_step_zero(rng: np.random.Generator) -> None:
    logps = rng.normal(-50, 5, 4)
    s = sums_of(logps, logps, rewards=rng.normal(size=4))
    grads = [
        grad_of(rloo(s, terms_of([[0, 1, 2, 3]]), beta_kl=0.1, surrogate=name)[0], s)
        for name in ("reinforce", "clipped_ratio")
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6, -7e-5])
def test_equal_rewards_give_exactly_no_advantage(reward: float) -> None:
    s = sums_of([-5.0, -7.0, -9.0, -11.0, -13.0], rewards=[reward] * 5, dtype=torch.float32)
    losses, metrics = rloo(s, terms_of([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]), beta_kl=0.0)
    assert losses.item() == 0 and metrics["advantage_abs"][0] == 0
    assert not grad_of(losses, s).any()


# ---- limits


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_margins_stay_finite(name: str, size: float) -> None:
    kinds = [{}, {"label_smoothing": 0.1}] if name in ("dpo", "ln_dpo", "simpo", "wrpo") else [{}]
    if name == "rloo":
        kinds.append({"surrogate": "clipped_ratio"})
    for extra in kinds:
        settings = {**SETTINGS[name], **extra}
        settings = {k: (1.0 if k in ("beta", "beta_kl") else v) for k, v in settings.items()}
        s = sums_of([size, 0.0, -size], [0.0] * 3, rewards=[1.0, 0.0, 2.0], dtype=torch.float32)
        members = {1: [[0]], 2: [[0, 2]], 3: [[0, 0, 2]]}[WIDTH[name]]
        losses, metrics = LOSSES[name][0](s, terms_of(members), **settings)
        grad = grad_of(losses, s)
        assert torch.isfinite(losses).all() and torch.isfinite(grad).all()
        assert all(torch.isfinite(v).all() for v in metrics.values())
        if name in ("dpo", "ln_dpo", "wrpo") and not extra:
            assert losses.item() == (0.0 if size > 0 else 2e4)
            assert grad[2].item() == (0.0 if size > 0 else 1.0)


def test_padding_and_foreign_nan_do_not_leak() -> None:
    """A NaN response 0 poisons its own group and no other, though every -1 is looked up at index 0."""
    s = sums_of([math.nan, -5.0, -5.1, -4.9], [-5.0] * 4, rewards=[0.0, 1.0, 2.0, 3.0])
    terms = terms_of([[0, 1, -1], [2, 3, -1]], [1.0, 1.0], [0, 1])
    for surrogate in ("reinforce", "clipped_ratio"):
        losses, _ = rloo(s, terms, beta_kl=0.1, surrogate=surrogate)
        assert losses[0].isnan() and losses[1].isfinite()
        (grad,) = torch.autograd.grad(losses[1], s.logps)
        assert torch.isfinite(grad[2:]).all() and grad[2:].all()
    s = sums_of([math.nan, -5.0, -6.0, -7.0], [-5.0] * 4)
    losses, _ = dpo(s, terms_of([[0, 1], [2, 3]], [1.0, 1.0], [0, 1]), beta=0.1)
    assert losses[0].isnan() and losses[1].isfinite()


def test_uneven_k_equals_narrow_terms(rng: np.random.Generator) -> None:
    """The width that the widest group gives a row changes nothing."""
    s = sums_of(rng.normal(-50, 5, 6), rng.normal(-50, 5, 6), rewards=rng.normal(size=6))
    wide, _ = rloo(s, terms_of([[0, 1, -1, -1], [2, 3, 4, 5]], [1.0, 1.0], [0, 1]), beta_kl=0.1)
    narrow, _ = rloo(s, terms_of([[0, 1]]), beta_kl=0.1)
    assert wide[0].item() == pytest.approx(narrow.item(), rel=1e-14)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_without_groups(name: str) -> None:
    """It has the same metrics as any other row, all zero, and a loss that can be differentiated."""
    logps = torch.zeros(0, requires_grad=True)
    s = ResponseSums(logps, torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0))
    empty = Terms(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0)
    losses, metrics = LOSSES[name][0](s, empty, **SETTINGS[name])
    losses.sum().backward()
    full = sums_of([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0])
    _, usual = LOSSES[name][0](full, terms_of([list(range(WIDTH[name]))]), **SETTINGS[name])
    assert list(metrics) == list(usual) and not any(v.any() for v in metrics.values())


def test_half_precision_sums_are_widened() -> None:
    s = sums_of([-1.0, -2.0], [-1.0, -2.5], dtype=torch.bfloat16)
    losses, _ = dpo(s, terms_of([[0, 1]]), beta=1.0)
    assert losses.dtype == torch.float32 and losses.item() == pytest.approx(math.log1p(math.exp(0.5)), rel=1e-6)


def test_wrpo_between_two_dpo_losses(rng: np.random.Generator) -> None:
    s = sums_of(rng.normal(-50, 5, 3), rng.normal(-50, 5, 3))
    for alpha, pair in ((0.0, [[1, 2]]), (1.0, [[0, 2]])):
        mixed, _ = wrpo(s, terms_of([[0, 1, 2]]), beta=0.1, alpha=alpha)
        torch.testing.assert_close(mixed, dpo(s, terms_of(pair), beta=0.1)[0])


# ---- refusals


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_terms_are_refused_by_name(name: str) -> None:
    function, width = LOSSES[name][0], WIDTH[name]
    s = sums_of([-1.0] * 4, [-1.0] * 4)
    good = list(range(width))
    with pytest.raises(ValueError, match=r"term 1 .*members \[0(, -1)*\]|term 1 .*members \[-1\]"):
        bad = [0, *[-1] * (width - 1)] if width > 1 else [-1]
        function(s, terms_of([good, bad]), **SETTINGS[name])
    with pytest.raises(ValueError, match="term 0 belongs to group 3"):
        function(s, Terms(torch.tensor([good]), torch.ones(1), torch.tensor([3]), 3), **SETTINGS[name])
    if name != "rloo":
        with pytest.raises(ValueError, match=f"{name} needs members"):
            function(s, terms_of([[*good, 3]]), **SETTINGS[name])
    with pytest.raises(IndexError):
        function(s, terms_of([[*good[:-1], 4]]), **SETTINGS[name])


@pytest.mark.parametrize("name", ["dpo", "ln_dpo", "wrpo", "rloo"])
def test_missing_reference_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ref_logps is None"):
        LOSSES[name][0](sums_of([-1.0] * 3), terms_of([list(range(WIDTH[name]))]), **SETTINGS[name])


def test_unknown_choices_and_shapes_are_refused() -> None:
    s, pair = sums_of([-1.0, -2.0]), terms_of([[0, 1]])
    with pytest.raises(ValueError, match="reduction = 'mean'"):
        sft(s, terms_of([[0]]), reduction="mean")
    with pytest.raises(ValueError, match="surrogate = 'ppo'"):
        rloo(s, pair, beta_kl=0.0, surrogate="ppo")
    with pytest.raises(ValueError, match="response sums must all be"):
        ResponseSums(s.logps, s.lengths[:1], s.rewards, None)
    with pytest.raises(ValueError, match="terms must be"):
        Terms(pair.members, pair.weights, pair.group[:0], 1)


# ---- as the training loop uses them


def test_token_mean_over_groups_is_a_weighted_token_mean(rng: np.random.Generator) -> None:
    loss = make_loss(LossConfig(name="sft", reduction="token_mean"))
    logps, lengths = rng.uniform(-500, -1, 7), rng.integers(1, 300, 7)
    members = [np.array([[0], [1], [2]]), np.array([[3], [5]])]
    weights = [np.array([0.5, 0.2, 0.3]), np.array([0.9, 0.1])]
    terms = terms_of(np.concatenate(members).tolist(), np.concatenate(weights).tolist(), [0, 0, 0, 1, 1])
    losses, _ = loss(sums_of(logps, lengths=lengths), terms, 0.0)
    parts = [loss.denominator(m.astype(np.int32), w, lengths) for m, w in zip(members, weights)]
    picked, w = [0, 1, 2, 3, 5], np.concatenate(weights)
    expected = -(w * logps[picked]).sum() / (w * lengths[picked]).sum()
    assert losses.sum().item() / sum(parts) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("config", "kind", "reference"),
    [
        ({"name": "sft"}, "sft", False),
        ({"name": "dpo", "beta": 0.1}, "pair", True),
        ({"name": "ln_dpo", "beta": 10}, "pair", True),
        ({"name": "simpo", "beta": 2, "gamma": 1}, "pair", False),
        ({"name": "rloo", "beta_kl": 0.1}, "rloo", True),
        ({"name": "rloo", "beta_kl": 0}, "rloo", False),
        ({"name": "rloo", "beta_kl": 0, "surrogate": "clipped_ratio"}, "rloo", True),
        ({"name": "wrpo", "beta": 0.1}, "wrpo", True),
    ],
)
def test_make_loss(config: dict[str, Any], kind: str, reference: bool, rng: np.random.Generator) -> None:
    loss = make_loss(LossConfig(**config))
    assert (loss.name, loss.kind, loss.needs_reference) == (config["name"], kind, reference)
    refs = rng.normal(-50, 5, 3) if reference else None
    s, terms = sums_of(rng.normal(-50, 5, 3), refs), terms_of([list(range(WIDTH[loss.name]))])
    losses, metrics = loss(s, terms, 0.5)
    given = {k: v for k, v in config.items() if k != "name"} | ({"alpha": 0.05} if loss.name == "wrpo" else {})
    expected, expected_metrics = LOSSES[loss.name][0](s, terms, **given)
    assert torch.equal(losses, expected) and metrics.keys() == expected_metrics.keys()
    assert loss.denominator(terms.members.numpy(), terms.weights.numpy(), s.lengths.numpy()) == 1.0


def test_wrpo_schedule_is_linear_and_clamped() -> None:
    loss = make_loss(LossConfig(name="wrpo", beta=0.1, alpha_max=0.4))
    s, terms = sums_of([-1.0, -2.0, -3.0], [-1.5, -2.0, -2.5]), terms_of([[0, 1, 2]])
    seen = [loss(s, terms, p)[1]["alpha"][0].item() for p in (-1.0, 0.0, 0.25, 1.0, 1.5)]
    assert seen == pytest.approx([0.0, 0.0, 0.1, 0.4, 0.4])


def test_weight_entropy() -> None:
    s = sums_of([-1.0] * 4)
    _, metrics = sft(s, terms_of([[0], [1], [2], [3]], [0.25, 0.25, 0.5, 1.0], [0, 0, 0, 2]))
    assert metrics["weight_entropy"].tolist() == pytest.approx([1.5 * math.log(2), 2.0])  # group 1 has no terms
