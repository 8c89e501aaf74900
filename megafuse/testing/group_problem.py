"""Rows of prompt groups for the tests of `linear_group_loss`, and the same loss and gradients in float64, undivided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafuse.data.rows import block_sizes
from megafuse.kernels.group_loss import Blocks, GroupLoss
from megafuse.losses import LOSSES
from megafuse.losses.types import ResponseSums, Terms
from megafuse.testing.kernel_oracle import exact_logprobs

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"reduction": "sequence_mean"},
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ln_dpo": {"beta": 2.0},
    "simpo": {"beta": 2.0, "gamma": 0.4},
    "wrpo": {"beta": 0.3, "alpha": 0.3},
    "rloo": {"beta_kl": 0.05},
    "rloo-clipped": {"beta_kl": 0.05, "surrogate": "clipped_ratio"},
}
DENOMINATOR = 3.0


@dataclass(frozen=True)
class Problem:
    """A row of groups whose prompts are shared: the first target of every response hangs on its prompt's last place."""

    name: str  # key of SETTINGS
    hidden: Tensor  # [S, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    row_index: Tensor  # [T] CPU
    response: Tensor  # [T] CPU, in order
    rewards: Tensor  # [n]
    refs: Tensor  # [n] float64
    terms: Terms

    @property
    def blocks(self) -> Blocks:
        """Of one process."""
        n = len(self.rewards)
        counts = torch.bincount(self.response, minlength=n)[None]
        return Blocks(counts, block_sizes(self.terms.members.cpu().numpy(), n))

    def loss(self, sums: Tensor, lengths: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms that involve the responses `part`, which alone it looks at."""
        inside = [t for t, m in enumerate(self.terms.members.tolist()) if part.start <= max(m) < part.stop]
        chosen = torch.tensor(inside, dtype=torch.int64, device=sums.device)
        own = self.terms.members[chosen]
        assert not inside or int(own[own >= 0].min()) >= part.start
        members = torch.where(own >= 0, own - part.start, -1)
        terms = replace(self.terms, members=members, weights=self.terms.weights[chosen], group=self.terms.group[chosen])
        given = ResponseSums(sums[part], lengths[part], self.rewards[part], self.refs[part])
        losses, metrics = LOSSES[self.name.partition("-")[0]][0](given, terms, **SETTINGS[self.name])
        return losses.sum() / DENOMINATOR, metrics

    def groups(self, **more: Any) -> GroupLoss:
        """What `linear_group_loss` takes."""
        return GroupLoss(self.loss, **{"blocks": self.blocks, **more})

    def exact(self, **options: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """(loss, metrics, gradient of hidden, gradient of weight) by autograd in float64, all logits at once."""
        hidden, weight = (t.detach().clone().double().requires_grad_() for t in (self.hidden, self.weight))
        logits = (hidden @ weight.t())[self.row_index.to(hidden.device)]
        logp = exact_logprobs(logits, self.targets, **options)
        n, ids = len(self.rewards), self.response.to(logp.device)
        own = ids == torch.arange(n, device=logp.device)[:, None]
        value, metrics = self.loss(torch.where(own, logp, 0).sum(1), own.sum(1), slice(0, n))
        value.backward()
        assert hidden.grad is not None and weight.grad is not None
        return value.detach(), metrics, hidden.grad, weight.grad


def problem(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    groups: int = 5,
    vocab: int = 150,
    ids: int = 131,
    width: int = 16,
    longest: int = 7,
    level: bool = False,
    multiple: int = 1,
) -> Problem:
    """A random row: `groups` groups of 2 to 6 responses, of 1 to `longest` tokens below `ids`, on a multiple
    of `multiple` places.

    `level`: the responses of every second group have equal rewards, and every third term has weight 0.
    """
    rng = np.random.default_rng(seed if seed is not None else int(torch.randint(2**31, ())))
    torch_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
    members: list[list[int]] = []
    group_of: list[int] = []
    lengths: list[int] = []
    rewards: list[float] = []
    rows: list[int] = []
    place = 0
    for g in range(groups):
        first = len(lengths)
        terms = _terms(name.partition("-")[0], int(rng.integers(1, 4)), rng)
        count = max(max(t) for t in terms) + 1
        members += [[first + i if i >= 0 else -1 for i in t] for t in terms]
        group_of += [g] * len(terms)
        rewards += [0.5] * count if level and g % 2 else rng.random(count).tolist()
        prompt_end = place + int(rng.integers(0, 3))
        place = prompt_end + 1
        for _ in range(count):
            size = int(rng.integers(1, longest + 1))
            rows += [prompt_end, *range(place, place + size - 1)]
            place += size  # the last token of a response predicts nothing
            lengths.append(size)
    wide = max(len(m) for m in members)
    weights = rng.random(len(members)) + 0.1
    if level:
        weights[::3] = 0
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch_rng)

    weight = normal(vocab, width)
    targets = torch.randint(ids, (total,), generator=torch_rng)
    hidden = normal(-(-place // multiple) * multiple, width) * 0.7
    return Problem(
        name,
        hidden.to(device, dtype),
        weight.to(device, dtype),
        targets.to(device),
        torch.tensor(rows),
        torch.repeat_interleave(torch.tensor(lengths)),
        torch.tensor(rewards, device=device),
        (-5.0 * torch.tensor(lengths).double() + normal(len(lengths)).double()).to(device),
        Terms(
            torch.tensor([m + [-1] * (wide - len(m)) for m in members], device=device),
            torch.tensor(weights, dtype=torch.float32, device=device),
            torch.tensor(group_of, device=device),
            groups,
        ),
    )


def _terms(name: str, count: int, rng: np.random.Generator) -> list[list[int]]:
    """Terms of one group, by the responses of that group."""
    if name == "sft":
        return [[i] for i in range(count)]
    if name == "wrpo":
        return [[0, 1, 2]]
    if name == "rloo":
        ends = np.cumsum([0, *rng.integers(2, 4, count).tolist()]).tolist()
        return [list(range(a, b)) for a, b in pairwise(ends)]
    return [[2 * i, 2 * i + 1] for i in range(count)]
