"""Gathering responses into terms and terms into groups: deterministic, and without NaN gradients from padding."""

import torch
from torch import Tensor

from megafuse.losses.types import Metrics, ResponseSums, Terms


def widen(values: Tensor) -> Tensor:
    """float64 stays, everything narrower becomes float32: no loss is computed in half precision."""
    return values if values.dtype == torch.float64 else values.float()


def log_ratios(sums: ResponseSums) -> Tensor:
    """d(y) = log pi(y|x) - log pi_ref(y|x). [n]; the reference is constant.

    Subtracted in the wider of the two types BEFORE rounding: both sums are in the hundreds, their difference near 0.
    Raises ValueError without reference log-probs.
    """
    if sums.ref_logps is None:
        raise ValueError("ref_logps is None: this loss needs the reference log-probs of every response")
    logps = widen(sums.logps)
    return (logps - sums.ref_logps.detach()).to(logps.dtype)


def per_token(values: Tensor, sums: ResponseSums) -> Tensor:
    """values / |y|. [n]."""
    return values / sums.lengths.clamp(min=1).to(values.dtype)


def checked_members(terms: Terms, name: str, *, width: int | None = None, least: int = 1) -> Tensor:
    """`terms.members` [m, k], once it is known that every term has the members that the loss `name` combines.

    A row without groups has m = 0 and any width. Costs one device synchronisation.

    Raises:
        ValueError: naming the first wrong term: not exactly `width` columns, fewer than `least` responses, or a group
            outside [0, num_groups), which would otherwise drop the term without a word.
    """
    members, group = terms.members, terms.group
    if members.shape[0] == 0:
        return members.new_zeros(0, width or members.shape[1])
    if width is not None and members.shape[1] != width:
        raise ValueError(f"{name} needs members [m, {width}], got {tuple(members.shape)}: is the data set of its kind?")
    few = (members >= 0).sum(1) < (width or least)
    stray = (group < 0) | (group >= terms.num_groups)
    if bool((few | stray).any()):
        t = int((few | stray).nonzero()[0])
        if bool(few[t]):
            need = f"exactly {width}" if width else f"at least {least}"
            raise ValueError(f"{name} needs {need} responses a term, but term {t} has members {members[t].tolist()}")
        raise ValueError(f"term {t} belongs to group {int(group[t])}, outside [0, {terms.num_groups})")
    return members


def at(values: Tensor, members: Tensor) -> Tensor:
    """values[members], 0 where a member is -1. [..] of the shape of `members`.

    Indexing, whose backward sorts on CUDA, rather than `gather` or `index_select`, whose backwards race with atomics.
    """
    return torch.where(members >= 0, values[members.clamp(min=0)], 0.0)


def mixed(parts: Tensor, mix: tuple[float, ...]) -> Tensor:
    """sum_i mix[i] * parts[:, i]. [m] from [m, len(mix)]; for the usual mix (1.0,) the column itself, bit by bit."""
    total = mix[0] * parts[:, 0]
    for i in range(1, len(mix)):
        total = total + mix[i] * parts[:, i]
    return total


def group_sum(values: Tensor, terms: Terms) -> Tensor:
    """Sum of weight * value over the terms of each group. [g], the type of `values` [m].

    A [g, m] selection instead of a scatter: no atomics, and a NaN stays in its own group. Added in float64, so that a
    float32 result does not depend on the order of the terms, or on what else is in the row.
    """
    own = terms.group == torch.arange(terms.num_groups, device=terms.group.device)[:, None]
    weighted = terms.weights.to(values.dtype) * values
    return torch.where(own, weighted, 0.0).sum(1, dtype=torch.float64).to(values.dtype)


def metric(values: Tensor, weights: Tensor) -> Tensor:
    """(sum of weight * value, sum of weight). [2] float64, detached."""
    values, weights = values.detach().double(), weights.detach().double()
    return torch.stack(((weights * values).sum(), weights.sum()))


def weight_entropy(terms: Terms) -> Tensor:
    """Entropy -sum w ln w of the term weights of each group, in nats; one unit of weight a group that has terms.

    A group whose terms lie in several rows is counted in one of them (`Terms.counted`); its entropy is the sum of all.
    """
    own = terms.group == torch.arange(terms.num_groups, device=terms.group.device)[:, None]
    entropy = torch.where(own, torch.special.entr(terms.weights.detach().double()), 0.0).sum(1)
    counted = own.any(1) if terms.counted is None else own.any(1) & terms.counted
    return torch.stack((entropy.sum(), counted.double().sum()))


def preference_metrics(
    sums: ResponseSums, terms: Terms, scores: Tensor, chosen: Tensor, mix: tuple[float, ...], rejected: Tensor
) -> Metrics:
    """What every preference loss reports; group means, since the weights of a group sum to 1.

    scores [n] is the loss's implicit reward; `chosen` [m, c] are mixed with the weights `mix`, `rejected` is [m].
    With s = scores, |y| the length, d the log-ratio to the reference:

    - `margin`: s(chosen) - s(rejected); for a sigmoid loss its argument, before SimPO's gamma is subtracted
    - `accuracy`: share of terms with margin > 0; a tie counts as wrong (so 0 at step 0, where policy = reference)
    - `chosen_rewards`, `rejected_rewards`: s
    - `chosen_logps`, `rejected_logps` (and `.._per_token`): log pi(y|x) (and that over |y|)
    - `reward_margin`: the reward model's r(chosen) - r(rejected): a property of the data
    - `weight_entropy`: see the function of that name
    """

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(at(values, chosen), mix), at(values, rejected)

    logps = widen(sums.logps).detach()
    quantities = {"rewards": scores.detach(), "logps": logps, "logps_per_token": per_token(logps, sums)}
    metrics: Metrics = {}
    for name, values in quantities.items():
        for side, value in zip(("chosen", "rejected"), sides(values)):
            metrics[f"{side}_{name}"] = metric(value, terms.weights)
    (won, lost), (best, worst) = sides(quantities["rewards"]), sides(widen(sums.rewards))
    metrics["margin"] = metric(won - lost, terms.weights)
    metrics["accuracy"] = metric(won > lost, terms.weights)
    metrics["reward_margin"] = metric(best - worst, terms.weights)
    metrics["weight_entropy"] = weight_entropy(terms)
    return metrics


def kl_metrics(sums: ResponseSums, terms: Terms, members: Tensor) -> Metrics:
    """`kl`: mean of d(y) over the responses of a term, and `kl_per_token`: of d(y) / |y|. Empty without a reference.

    d is the usual one-sample estimate of KL(pi || pi_ref), but these responses were not sampled from pi: read it as
    how far the policy has moved on the data. (Schulman's k3 is exp(-d) - 1 + d: over whole sequences it overflows.)
    """
    if sums.ref_logps is None:
        return {}
    d, count = log_ratios(sums).detach(), (members >= 0).sum(1)
    named = {"kl": d, "kl_per_token": per_token(d, sums)}
    return {name: metric(at(values, members).sum(1) / count, terms.weights) for name, values in named.items()}
