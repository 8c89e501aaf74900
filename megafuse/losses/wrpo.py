"""WRPO: a source's best response joins the target's own best one on the chosen side, gradually."""

import torch

from megafuse.losses._terms import log_ratios, metric
from megafuse.losses.pairwise import preference_loss
from megafuse.losses.types import LossOutput, ResponseSums, Terms


def wrpo(sums: ResponseSums, terms: Terms, *, beta: float, alpha: float, label_smoothing: float = 0.0) -> LossOutput:
    """-log sigma(beta * (a*d(y_ws) + (1-a)*d(y_wt) - d(y_l))), d = log pi - log pi_ref. WRPO, arXiv 2412.03187.

    Members of a term: `[best source, best own, worst own]`. `alpha` is a at this step: 0 -> alpha_max over training.
    Every chosen-side metric is mixed in the same proportion, which `alpha` reports; see `preference_loss`.
    """
    scores = beta * log_ratios(sums)
    mix = (alpha, 1 - alpha)
    loss, metrics = preference_loss(sums, terms, scores, name="wrpo", mix=mix, label_smoothing=label_smoothing)
    return loss, {**metrics, "alpha": metric(torch.full_like(terms.weights, alpha), terms.weights)}
