"""Float64 twins of the losses: loops over terms, straight from the equations, for tests only.

They share no code with the losses: plain Python floats, no tensors after `from_tensors`, no vectorisation, no padding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megafuse.losses.types import ResponseSums, Terms

Numbers = Sequence[float]
Result = tuple[list[float], dict[str, tuple[float, float]]]
"""(loss of each group, name -> (weighted sum, weight)), as the losses return them."""


@dataclass(frozen=True)
class Batch:
    """The responses and terms of some groups; a term is (members without padding, weight, group)."""

    logps: Numbers
    refs: Numbers  # NaN where there is no reference
    lengths: Sequence[int]
    rewards: Numbers
    terms: Sequence[tuple[list[int], float, int]]
    groups: int

    def d(self, y: int) -> float:
        """log pi(y|x) - log pi_ref(y|x)."""
        return self.logps[y] - self.refs[y]

    @property
    def has_reference(self) -> bool:
        """Whether d is known."""
        return not any(math.isnan(r) for r in self.refs)


def from_tensors(sums: ResponseSums, terms: Terms) -> Batch:
    """The same numbers as Python floats."""
    logps = sums.logps.detach().double().tolist()
    refs = [math.nan] * len(logps) if sums.ref_logps is None else sums.ref_logps.detach().double().tolist()
    members = [[y for y in row if y >= 0] for row in terms.members.tolist()]
    rows = list(zip(members, terms.weights.double().tolist(), terms.group.tolist()))
    return Batch(logps, refs, sums.lengths.tolist(), sums.rewards.double().tolist(), rows, terms.num_groups)


def minus_log_sigma(z: float) -> float:
    """-log(1 / (1 + exp(-z))), without overflow."""
    return math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z)) - z


def _combine(batch: Batch, each: Callable[[list[int]], tuple[float, dict[str, float]]]) -> Result:
    """Eqs. 10, 11: weight and add what `each` says of a term; the entropy of each group's weights."""
    losses = [0.0] * batch.groups
    metrics: dict[str, tuple[float, float]] = {}
    for members, weight, group in batch.terms:
        loss, values = each(members)
        losses[group] += weight * loss
        for name, value in values.items():
            total, weights = metrics.get(name, (0.0, 0.0))
            metrics[name] = (total + weight * value, weights + weight)
    used = sorted({group for _, _, group in batch.terms})
    entropy = -sum(w * math.log(w) for _, w, _ in batch.terms if w > 0)
    return losses, {**metrics, "weight_entropy": (entropy, float(len(used)))}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _preference(batch: Batch, score: Callable[[int], float], chosen: Mapping[int, float], bad: int) -> dict[str, float]:
    """Metrics of one term; `chosen` maps responses to their share of the chosen side."""

    def good(f: Callable[[int], float]) -> float:
        return math.fsum(share * f(y) for y, share in chosen.items())

    margin = good(score) - score(bad)
    values = {"margin": margin, "accuracy": float(margin > 0), "chosen_rewards": good(score)}
    values["rejected_rewards"] = score(bad)
    values["chosen_logps"], values["rejected_logps"] = good(lambda y: batch.logps[y]), batch.logps[bad]
    values["chosen_logps_per_token"] = good(lambda y: batch.logps[y] / batch.lengths[y])
    values["rejected_logps_per_token"] = batch.logps[bad] / batch.lengths[bad]
    values["reward_margin"] = good(lambda y: batch.rewards[y]) - batch.rewards[bad]
    return values


def _kl(batch: Batch, members: list[int]) -> dict[str, float]:
    if not batch.has_reference:
        return {}
    per_token = _mean([batch.d(y) / batch.lengths[y] for y in members])
    return {"kl": _mean([batch.d(y) for y in members]), "kl_per_token": per_token}


def sft(batch: Batch, *, reduction: str = "sequence_mean") -> Result:
    """Eqs. 9, 10."""

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        (y,) = members
        nll, mean = -batch.logps[y], -batch.logps[y] / batch.lengths[y]
        return (mean if reduction == "sequence_mean" else nll), {"nll": nll, "nll_per_token": mean}

    return _combine(batch, each)


def dpo(batch: Batch, *, beta: float, label_smoothing: float = 0.0) -> Result:
    """-log sigma(beta (d(y_w) - d(y_l)))."""

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        w, bad = members
        z = beta * (batch.d(w) - batch.d(bad))
        loss = (1 - label_smoothing) * minus_log_sigma(z) + label_smoothing * minus_log_sigma(-z)
        return loss, {**_preference(batch, lambda y: beta * batch.d(y), {w: 1.0}, bad), **_kl(batch, members)}

    return _combine(batch, each)


def ln_dpo(batch: Batch, *, beta: float, label_smoothing: float = 0.0) -> Result:
    """-log sigma(beta/|y_w| d(y_w) - beta/|y_l| d(y_l))."""

    def score(y: int) -> float:
        return beta / batch.lengths[y] * batch.d(y)

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        w, bad = members
        z = beta / batch.lengths[w] * batch.d(w) - beta / batch.lengths[bad] * batch.d(bad)
        loss = (1 - label_smoothing) * minus_log_sigma(z) + label_smoothing * minus_log_sigma(-z)
        return loss, {**_preference(batch, score, {w: 1.0}, bad), **_kl(batch, members)}

    return _combine(batch, each)


def simpo(batch: Batch, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Result:
    """Eqs. 6, 7: r(y) = beta/|y| log pi(y); -log sigma(r(y_w) - r(y_l) - gamma)."""

    def reward(y: int) -> float:
        return beta / batch.lengths[y] * batch.logps[y]

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        w, bad = members
        z = reward(w) - reward(bad) - gamma
        loss = (1 - label_smoothing) * minus_log_sigma(z) + label_smoothing * minus_log_sigma(-z)
        return loss, {**_preference(batch, reward, {w: 1.0}, bad), **_kl(batch, members)}

    return _combine(batch, each)


def wrpo(batch: Batch, *, beta: float, alpha: float, label_smoothing: float = 0.0) -> Result:
    """-log sigma(beta (a d(y_ws) + (1-a) d(y_wt) - d(y_l)))."""

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        ws, wt, bad = members
        z = beta * (alpha * batch.d(ws) + (1 - alpha) * batch.d(wt) - batch.d(bad))
        loss = (1 - label_smoothing) * minus_log_sigma(z) + label_smoothing * minus_log_sigma(-z)
        values = _preference(batch, lambda y: beta * batch.d(y), {ws: alpha, wt: 1 - alpha}, bad)
        return loss, {**values, **_kl(batch, members), "alpha": alpha}

    return _combine(batch, each)


def rloo(
    batch: Batch,
    *,
    beta_kl: float,
    surrogate: str = "reinforce",
    clip: float = 0.2,
    constant_logps: Numbers | None = None,
) -> Result:
    """-(1/k) sum_j A_j log pi(y_j), A_j = Rhat_j - mean of the other Rhat, Rhat_j = r_j - beta_kl d(y_j).

    constant_logps: log-probs inside Rhat, held fixed while a test differentiates with respect to `batch.logps`.
    """
    logps = batch.logps if constant_logps is None else constant_logps

    def adjusted(y: int) -> float:
        return batch.rewards[y] - (beta_kl * (logps[y] - batch.refs[y]) if beta_kl else 0.0)

    def each(members: list[int]) -> tuple[float, dict[str, float]]:
        gains, advantages, clipped = [], [], 0
        for y in members:
            a = adjusted(y) - _mean([adjusted(other) for other in members if other != y])
            advantages.append(abs(a))
            if surrogate == "reinforce":
                gains.append(a * batch.logps[y])
            else:
                q = math.exp(min(max(batch.d(y), -20.0), 20.0))
                inside = min(max(q, 1 - clip), 1 + clip)
                clipped += q != inside
                gains.append(min(q * a, inside * a))
        best = max(members, key=lambda y: batch.rewards[y])
        worst = min(members, key=lambda y: batch.rewards[y])
        score = batch.d if batch.has_reference else batch.logps.__getitem__
        values = {**_preference(batch, score, {best: 1.0}, worst), **_kl(batch, members)}
        values |= {"advantage_abs": _mean(advantages), "rewards": _mean([batch.rewards[y] for y in members])}
        if surrogate == "clipped_ratio":
            values["clip_fraction"] = clipped / len(members)
        return -_mean(gains), values

    return _combine(batch, each)


TWINS: Mapping[str, Callable[..., Result]] = {
    "sft": sft,
    "dpo": dpo,
    "ln_dpo": ln_dpo,
    "simpo": simpo,
    "rloo": rloo,
    "wrpo": wrpo,
}
"""Name -> twin, as in `megafuse.losses.LOSSES`."""
