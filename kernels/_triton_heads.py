"""Triton kernels of the losses on response sums: a term's loss, its derivative and its metrics in one pass.

One lane a term, everything in float64. `terms_*` write, for each of the m terms: `loss` [m] (unweighted), `coef` [m, k]
= d (weight * loss) / d log pi of each member, `values` [Q, m] the metrics. `reduce_terms` adds them up by group and
over all terms, in a fixed order. A term without the members that it needs has loss NaN.
"""

import triton
import triton.language as tl

from megafuse.kernels._triton_math import sigmoid64, softplus64


@triton.jit
def _take(values: tl.tensor, index: tl.tensor, ok: tl.tensor) -> tl.tensor:
    """values[index] as float64, 0 where not ok."""
    return tl.load(values + index, mask=ok, other=0.0).to(tl.float64)


@triton.jit
def _response(
    logps: tl.tensor, refs: tl.tensor, lengths: tl.tensor, index: tl.tensor, ok: tl.tensor, HAS_REF: tl.constexpr
) -> tl.tensor:
    """`(log pi, d, |y|)` of responses; d = log pi - log pi_ref, or log pi without a reference."""
    logp = _take(logps, index, ok)
    length = tl.maximum(tl.load(lengths + index, mask=ok, other=1), 1).to(tl.float64)
    if HAS_REF:
        return logp, logp - _take(refs, index, ok), length
    else:
        return logp, logp, length


@triton.jit
def _score(
    logp: tl.tensor, d: tl.tensor, length: tl.tensor, beta: tl.tensor, USE_REF: tl.constexpr, PER_TOKEN: tl.constexpr
) -> tl.tensor:
    """The implicit reward of a response and its derivative by log pi."""
    slope = beta / length if PER_TOKEN else beta + 0.0 * length
    return (d if USE_REF else logp) * slope, slope


@triton.jit(do_not_specialize=["terms"])
def terms_pair(
    logps: tl.tensor,  # [n] float32
    refs: tl.tensor,  # [n] float32 or float64
    lengths: tl.tensor,  # [n] integer
    rewards: tl.tensor,  # [n] float
    members: tl.tensor,  # [m, 2] int64: chosen, rejected; [m, 3]: source's best, own best, own worst
    weights: tl.tensor,  # [m] float
    loss: tl.tensor,
    coef: tl.tensor,
    values: tl.tensor,
    terms: tl.tensor,
    beta: tl.tensor,
    gamma: tl.tensor,
    smoothing: tl.tensor,
    alpha: tl.tensor,
    HAS_REF: tl.constexpr,
    USE_REF: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TRIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Logistic loss of z = s(chosen) - s(rejected) - gamma: DPO, LN-DPO, SimPO; WRPO mixes two chosen responses."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < terms
    width: tl.constexpr = 3 if TRIPLE else 2
    first = tl.load(members + t * width, mask=live, other=-1)
    last = tl.load(members + t * width + width - 1, mask=live, other=-1)
    complete = (first >= 0) & (last >= 0)
    chosen, chosen_d, chosen_len = _response(logps, refs, lengths, first, first >= 0, HAS_REF)
    rejected, rejected_d, rejected_len = _response(logps, refs, lengths, last, last >= 0, HAS_REF)
    chosen_score, slope = _score(chosen, chosen_d, chosen_len, beta, USE_REF, PER_TOKEN)
    rejected_score, rejected_slope = _score(rejected, rejected_d, rejected_len, beta, USE_REF, PER_TOKEN)
    chosen_mean = chosen / chosen_len
    reward = _take(rewards, first, first >= 0)
    kl = chosen_d + rejected_d
    kl_mean = chosen_d / chosen_len + rejected_d / rejected_len
    own_slope = slope * 0.0
    if TRIPLE:
        middle = tl.load(members + t * width + 1, mask=live, other=-1)
        complete = complete & (middle >= 0)
        own, own_d, own_len = _response(logps, refs, lengths, middle, middle >= 0, HAS_REF)
        own_score, own_slope = _score(own, own_d, own_len, beta, USE_REF, PER_TOKEN)
        kl += own_d
        kl_mean += own_d / own_len
        rest = 1.0 - alpha
        chosen = alpha * chosen + rest * own
        chosen_score = alpha * chosen_score + rest * own_score
        chosen_mean = alpha * chosen_mean + rest * (own / own_len)
        reward = alpha * reward + rest * _take(rewards, middle, middle >= 0)
        slope = slope * alpha
        own_slope = own_slope * rest
    margin = chosen_score - rejected_score
    z = margin - gamma
    value = (1.0 - smoothing) * softplus64(-z) + smoothing * softplus64(z)
    weight = _take(weights, t, live)
    dz = weight * (smoothing * sigmoid64(z) - (1.0 - smoothing) * sigmoid64(-z))
    tl.store(loss + t, tl.where(complete, value, float("nan")), mask=live)
    tl.store(coef + t * width, dz * slope, mask=live)
    tl.store(coef + t * width + width - 1, -dz * rejected_slope, mask=live)
    if TRIPLE:
        tl.store(coef + t * width + 1, dz * own_slope, mask=live)
    out = values + t
    tl.store(out, chosen_score, mask=live)
    tl.store(out + terms, rejected_score, mask=live)
    tl.store(out + 2 * terms, chosen, mask=live)
    tl.store(out + 3 * terms, rejected, mask=live)
    tl.store(out + 4 * terms, chosen_mean, mask=live)
    tl.store(out + 5 * terms, rejected / rejected_len, mask=live)
    tl.store(out + 6 * terms, margin, mask=live)
    tl.store(out + 7 * terms, (margin > 0.0).to(tl.float64), mask=live)
    tl.store(out + 8 * terms, reward - _take(rewards, last, last >= 0), mask=live)
    if HAS_REF:
        tl.store(out + 9 * terms, kl / width, mask=live)
        tl.store(out + 10 * terms, kl_mean / width, mask=live)


@triton.jit(do_not_specialize=["terms"])
def terms_sft(
    logps: tl.tensor,
    lengths: tl.tensor,
    members: tl.tensor,  # [m, 1]
    weights: tl.tensor,
    loss: tl.tensor,
    coef: tl.tensor,  # [m, 1]
    values: tl.tensor,  # [2, m]: nll, nll per token
    terms: tl.tensor,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Negative log-likelihood of one response, by token or not."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < terms
    index = tl.load(members + t, mask=live, other=-1)
    logp, _, length = _response(logps, logps, lengths, index, index >= 0, False)
    weight = _take(weights, t, live)
    mean = -logp / length
    value = mean if PER_TOKEN else -logp
    tl.store(loss + t, tl.where(index >= 0, value, float("nan")), mask=live)
    tl.store(coef + t, -weight / length if PER_TOKEN else -weight, mask=live)
    tl.store(values + t, -logp, mask=live)
    tl.store(values + terms + t, mean, mask=live)


@triton.jit
def _pick(values: tl.tensor, chosen: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """values[i, chosen[i]] of values [B, K]."""
    return tl.sum(tl.where(tl.arange(0, K)[None, :] == chosen[:, None], values, 0.0), 1)


@triton.jit(do_not_specialize=["terms"])
def terms_rloo(
    logps: tl.tensor,
    refs: tl.tensor,
    lengths: tl.tensor,
    rewards: tl.tensor,
    members: tl.tensor,  # [m, k] int64; -1 pads
    weights: tl.tensor,
    loss: tl.tensor,
    coef: tl.tensor,  # [m, k]
    values: tl.tensor,  # [Q, m]: 9 of the preference metrics, advantage_abs, rewards, clip_fraction, kl, kl_per_token
    terms: tl.tensor,
    width: tl.tensor,
    beta_kl: tl.tensor,
    clip: tl.tensor,
    max_log_ratio: tl.tensor,
    HAS_REF: tl.constexpr,
    CLIPPED: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """REINFORCE with the mean reward of the others as baseline, or PPO's clipped ratio with that advantage."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < terms
    slot = tl.arange(0, K)[None, :]
    place = t[:, None] * width + slot
    exists = live[:, None] & (slot < width)
    index = tl.load(members + place, mask=exists, other=-1)
    present = index >= 0
    count = tl.sum(present.to(tl.float64), 1)
    logp, d, length = _response(logps, refs, lengths, index, present, HAS_REF)
    reward = _take(rewards, index, present).to(tl.float32).to(tl.float64)  # as the torch loss sees it
    adjusted = reward - beta_kl * d if HAS_REF else reward
    advantage = tl.zeros((BLOCK, K), tl.float64)
    for other in tl.static_range(K):
        # As the mean difference to the others: exactly 0 for equal rewards.
        column = slot == other
        theirs = tl.sum(tl.where(column, adjusted, 0.0), 1)
        there = tl.sum((column & present).to(tl.int32), 1) > 0
        advantage += tl.where(present & there[:, None], adjusted - theirs[:, None], 0.0)
    advantage = advantage / (count - 1.0)[:, None]
    weight = _take(weights, t, live)
    if CLIPPED:
        ratio = tl.exp(tl.minimum(tl.maximum(d, -max_log_ratio), max_log_ratio))
        clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip), 1.0 + clip)
        gain = tl.minimum(ratio * advantage, clipped * advantage)
        moves = (ratio * advantage <= clipped * advantage) & (tl.abs(d) <= max_log_ratio)
        slope = tl.where(moves, ratio * advantage, 0.0)
        outside = tl.sum((present & (ratio != clipped)).to(tl.float64), 1) / count
    else:
        gain = advantage * logp
        slope = advantage
        outside = count * 0.0
    value = -tl.sum(tl.where(present, gain, 0.0), 1) / count
    tl.store(loss + t, tl.where(count > 1.0, value, float("nan")), mask=live)
    tl.store(coef + place, tl.where(present, -weight[:, None] * slope / count[:, None], 0.0), mask=exists)
    best = tl.argmax(tl.where(present, reward, -float("inf")), 1)
    worst = tl.argmin(tl.where(present, reward, float("inf")), 1)
    exact = _take(rewards, index, present)
    margin = _pick(d, best, K) - _pick(d, worst, K)
    out = values + t
    tl.store(out, _pick(d, best, K), mask=live)
    tl.store(out + terms, _pick(d, worst, K), mask=live)
    tl.store(out + 2 * terms, _pick(logp, best, K), mask=live)
    tl.store(out + 3 * terms, _pick(logp, worst, K), mask=live)
    tl.store(out + 4 * terms, _pick(logp / length, best, K), mask=live)
    tl.store(out + 5 * terms, _pick(logp / length, worst, K), mask=live)
    tl.store(out + 6 * terms, margin, mask=live)
    tl.store(out + 7 * terms, (margin > 0.0).to(tl.float64), mask=live)
    tl.store(out + 8 * terms, _pick(exact, best, K) - _pick(exact, worst, K), mask=live)
    tl.store(out + 9 * terms, tl.sum(tl.where(present, tl.abs(advantage), 0.0), 1) / count, mask=live)
    tl.store(out + 10 * terms, tl.sum(reward, 1) / count, mask=live)
    tl.store(out + 11 * terms, outside, mask=live)
    if HAS_REF:
        tl.store(out + 12 * terms, tl.sum(tl.where(present, d, 0.0), 1) / count, mask=live)
        tl.store(out + 13 * terms, tl.sum(tl.where(present, d / length, 0.0), 1) / count, mask=live)


@triton.jit(do_not_specialize=["terms", "groups"])
def reduce_terms(
    loss: tl.tensor,
    values: tl.tensor,
    weights: tl.tensor,
    group: tl.tensor,  # [m] integer
    terms: tl.tensor,
    groups: tl.tensor,
    losses: tl.tensor,  # [g] float32 out
    entropy: tl.tensor,  # [g, 2] float64 out: entropy of the group's weights, 1 if it has terms
    metrics: tl.tensor,  # [Q, 2] float64 out: sum of weight * value, sum of weight
    BLOCK: tl.constexpr,
) -> None:
    """Programs 0 .. g-1 a group each, then one a metric. A group index outside [0, g) makes every loss NaN."""
    this = tl.program_id(0)
    first_sum = tl.zeros((BLOCK,), tl.float64)
    second_sum = tl.zeros((BLOCK,), tl.float64)
    third_sum = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, terms, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < terms
        weight = _take(weights, t, live)
        if this < groups:
            home = tl.load(group + t, mask=live, other=0)
            own = live & (home == this)
            stray = live & ((home < 0) | (home >= groups))
            first_sum += tl.where(own, weight * _take(loss, t, own), 0.0) + tl.where(stray, float("nan"), 0.0)
            second_sum += tl.where(own & (weight > 0.0), -weight * tl.log(tl.maximum(weight, 1e-300)), 0.0)
            third_sum += own.to(tl.float64)
        else:
            first_sum += weight * _take(values + (this - groups) * terms, t, live)
            second_sum += weight
    if this < groups:
        tl.store(losses + this, tl.sum(first_sum, 0).to(tl.float32))
        tl.store(entropy + 2 * this, tl.sum(second_sum, 0))
        tl.store(entropy + 2 * this + 1, tl.where(tl.sum(third_sum, 0) > 0.0, 1.0, 0.0))
    else:
        tl.store(metrics + 2 * (this - groups), tl.sum(first_sum, 0))
        tl.store(metrics + 2 * (this - groups) + 1, tl.sum(second_sum, 0))


@triton.jit(do_not_specialize=["pairs", "groups"])
def sums_gradient(
    members: tl.tensor,  # [m * k] int64
    group: tl.tensor,  # [m]
    coef: tl.tensor,  # [m * k] float64
    grad: tl.tensor,  # [g]: d total / d loss of each group
    out: tl.tensor,  # [n] float32: d total / d log pi
    pairs: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program a response adds up, in order, what the terms that it is a member of say."""
    response = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, pairs, BLOCK):
        j = first + tl.arange(0, BLOCK)
        own = tl.load(members + j, mask=j < pairs, other=-1) == response
        home = tl.load(group + j // width, mask=own, other=-1)
        own = own & (home >= 0) & (home < groups)
        total += _take(coef, j, own) * _take(grad, home, own)
    tl.store(out + response, tl.sum(total, 0).to(tl.float32))
