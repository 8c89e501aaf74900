"""FuseSFT: weighted negative log-likelihood of several responses of a prompt."""

from megafuse.losses._terms import at, checked_members, group_sum, metric, per_token, weight_entropy, widen
from megafuse.losses.types import LossOutput, ResponseSums, Terms

REDUCTIONS = ("sequence_mean", "sequence_sum", "token_mean")


def sft(sums: ResponseSums, terms: Terms, *, reduction: str = "sequence_mean") -> LossOutput:
    """Sum over a group's responses of w_i * L_SFT(y_i, x), L_SFT = -log pi(y|x). FuseRL (arXiv 2504.06562) Eqs. 9, 10.

    Members of a term: `[i]`. reduction:

    - `sequence_mean`: L_SFT / |y|, so that a long response does not outweigh a short one
    - `sequence_sum`: Eq. 9 to the letter
    - `token_mean`: also the sum; the denominator of the global batch is then the weighted token count sum_i w_i |y_i|

    Metrics: `nll` (L_SFT), `nll_per_token` (L_SFT / |y|), `weight_entropy`; no reference is needed.
    Raises ValueError for an unknown reduction and for a term that is not one response.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"sft: reduction = {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    member = checked_members(terms, "sft", width=1)[:, 0]
    nll = -widen(sums.logps)
    each = {"nll": at(nll, member), "nll_per_token": at(per_token(nll, sums), member)}
    metrics = {name: metric(values, terms.weights) for name, values in each.items()}
    metrics["weight_entropy"] = weight_entropy(terms)
    return group_sum(each["nll_per_token" if reduction == "sequence_mean" else "nll"], terms), metrics
