"""Offline RLOO: REINFORCE over the responses of one source, each against the mean reward of the others."""

import torch

from megafuse.losses._terms import (
    at,
    checked_members,
    group_sum,
    kl_metrics,
    log_ratios,
    metric,
    preference_metrics,
    widen,
)
from megafuse.losses.types import LossOutput, ResponseSums, Terms

SURROGATES = ("reinforce", "clipped_ratio")
MAX_LOG_RATIO = 20.0  # exp(d) of a whole sequence overflows float32 at d = 89; at 20 it has long left every clip range


def rloo(
    sums: ResponseSums, terms: Terms, *, beta_kl: float, surrogate: str = "reinforce", clip: float = 0.2
) -> LossOutput:
    """-(1/k) sum_j A_j * log pi(y_j|x), A_j = Rhat_j - mean of the other Rhat. FuseRL Eqs. 2, 3; arXiv 2402.14740.

    Rhat_j = r_j - beta_kl * d(y_j), d = log pi - log pi_ref; no gradient passes through Rhat, hence none through A.
    Members of a term: all k >= 2 responses of one source, -1 pads. `surrogate = "clipped_ratio"` replaces
    A_j * log pi(y_j|x) by PPO's min(q_j A_j, clamp(q_j, 1 - clip, 1 + clip) A_j), q_j = exp(d(y_j)), |d| cut at 20.
    Without a KL penalty and without ratios no reference is needed.

    Metrics: those of `preference_metrics`, with the highest-reward response as chosen, the lowest as rejected and d as
    the score (log pi without a reference); `advantage_abs` (mean |A_j|), `rewards` (mean r_j), `kl`, `kl_per_token`;
    `clip_fraction`, the share of responses whose ratio is outside the clip range, for `clipped_ratio`.
    Raises ValueError for an unknown surrogate, and for a term of fewer than two responses, naming it.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"rloo: surrogate = {surrogate!r}: choose one of {', '.join(SURROGATES)}")
    members = checked_members(terms, "rloo", least=2)
    present, logps = members >= 0, widen(sums.logps)
    count = present.sum(1)
    rewards = sums.rewards.detach().to(logps.dtype)
    free = sums.ref_logps is None and beta_kl == 0 and surrogate == "reinforce"
    d = logps if free else log_ratios(sums)
    adjusted = at(rewards if free else rewards - beta_kl * d.detach(), members)
    # A_j as the mean difference to the others: exactly 0 for equal rewards, whatever their rounding.
    both = present[:, :, None] & present[:, None, :]
    difference = torch.where(both, adjusted[:, :, None] - adjusted[:, None, :], 0.0)
    advantage = difference.sum(2) / (count - 1)[:, None]

    metrics = {
        "advantage_abs": metric(advantage.abs().sum(1) / count, terms.weights),
        "rewards": metric(at(rewards, members).sum(1) / count, terms.weights),
    }
    if surrogate == "reinforce":
        gain = advantage * at(logps, members)
    else:
        ratio = at(d, members).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        metrics["clip_fraction"] = metric((ratio != clipped).double().sum(1) / count, terms.weights)

    reward = at(rewards, members)
    order = torch.stack(
        (reward.masked_fill(~present, -torch.inf).argmax(1), reward.masked_fill(~present, torch.inf).argmin(1)), 1
    )
    best, worst = members.gather(1, order).unbind(1)
    metrics |= preference_metrics(sums, terms, d, best[:, None], (1.0,), worst)
    return group_sum(-gain.sum(1) / count, terms), {**metrics, **kl_metrics(sums, terms, members)}
