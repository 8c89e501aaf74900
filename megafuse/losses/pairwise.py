"""FusePO on pairs: DPO, length-normalised DPO, SimPO. One core: logistic loss of a difference of implicit rewards."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from megafuse.losses._terms import (
    at,
    checked_members,
    group_sum,
    kl_metrics,
    log_ratios,
    mixed,
    per_token,
    preference_metrics,
    widen,
)
from megafuse.losses.types import LossOutput, ResponseSums, Terms


def preference_loss(
    sums: ResponseSums,
    terms: Terms,
    scores: Tensor,
    *,
    name: str,
    mix: tuple[float, ...] = (1.0,),
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Weighted sum over a group's terms of -log sigma(z), z = s(y_w) - s(y_l) - gamma. FuseRL Eq. 11 with L_pref so.

    `scores` [n] are the implicit rewards s. Members of a term: the chosen responses, mixed with the weights `mix`, and
    last the rejected one. Label smoothing e assumes that a preference is flipped with probability e (cDPO, Mitchell
    2023): (1 - e) * -log sigma(z) + e * -log sigma(-z). logsigmoid is linear for large |z|: nothing overflows.

    Metrics: those of `preference_metrics`, and `kl`, `kl_per_token` where reference log-probs are given.
    Raises ValueError for a term without exactly len(mix) + 1 members.
    """
    members = checked_members(terms, name, width=len(mix) + 1)
    parts = at(scores, members)
    z = mixed(parts[:, :-1], mix) - parts[:, -1] - gamma
    loss = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
    metrics = preference_metrics(sums, terms, scores, members[:, :-1], mix, members[:, -1])
    return group_sum(loss, terms), {**metrics, **kl_metrics(sums, terms, members)}


def dpo(sums: ResponseSums, terms: Terms, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """-log sigma(beta * (d(y_w) - d(y_l))), d = log pi - log pi_ref. Rafailov et al. 2023 (arXiv 2305.18290) Eq. 7.

    Members of a term: `[chosen, rejected]`. See `preference_loss` for label smoothing, metrics and errors.
    """
    return preference_loss(sums, terms, beta * log_ratios(sums), name="dpo", label_smoothing=label_smoothing)


def ln_dpo(sums: ResponseSums, terms: Terms, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """-log sigma(beta/|y_w| * d(y_w) - beta/|y_l| * d(y_l)): DPO on log-ratios per token. FuseChat-3.0's for Llama.

    Members of a term: `[chosen, rejected]`. See `preference_loss` for label smoothing, metrics and errors.
    """
    scores = beta * per_token(log_ratios(sums), sums)
    return preference_loss(sums, terms, scores, name="ln_dpo", label_smoothing=label_smoothing)


def simpo(sums: ResponseSums, terms: Terms, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> LossOutput:
    """-log sigma(beta/|y_w| * log pi(y_w) - beta/|y_l| * log pi(y_l) - gamma): no reference. FuseRL Eqs. 6, 7.

    gamma is the target margin itself (Meng et al. 2024, arXiv 2405.14734), not its ratio to beta.
    Members of a term: `[chosen, rejected]`. See `preference_loss` for label smoothing, metrics and errors.
    """
    scores = beta * per_token(widen(sums.logps), sums)
    return preference_loss(sums, terms, scores, name="simpo", gamma=gamma, label_smoothing=label_smoothing)
