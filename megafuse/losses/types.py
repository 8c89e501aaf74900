"""What a loss sees: one number per response, and the terms that combine them (docs/ARCHITECTURE.md, "Losses")."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseSums:
    """The n responses of one row. log pi(y|x) sums over response tokens only; |y| includes the end-of-turn token.

    Raises ValueError when the tensors disagree about n.
    """

    logps: Tensor  # [n] log pi(y|x), differentiable
    lengths: Tensor  # [n] int64, |y|
    rewards: Tensor  # [n] r(x, y)
    ref_logps: Tensor | None  # [n] log pi_ref(y|x); float64 keeps the digits that a difference of sums loses

    def __post_init__(self) -> None:
        shapes = {k: tuple(v.shape) for k, v in vars(self).items() if v is not None}
        if self.logps.dim() != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"response sums must all be [n], got {shapes}")


@dataclass(frozen=True)
class Terms:
    """The m summands of the loss: which responses each involves, its weight, its group.

    Raises ValueError when the tensors disagree about m.
    """

    members: Tensor  # [m, k] int64 into the n responses; -1 pads
    weights: Tensor  # [m]; those of a group sum to 1
    group: Tensor  # [m] int64 in [0, num_groups)
    num_groups: int  # g
    counted: Tensor | None = None
    """[g] bool: where a metric is one number a group, whether the group counts here. A group whose terms lie in several
    rows counts where its first term does. None: all do."""

    def to(self, device: torch.device) -> "Terms":
        """The same terms on `device`."""
        counted = None if self.counted is None else self.counted.to(device)
        members, weights, group = self.members.to(device), self.weights.to(device), self.group.to(device)
        return Terms(members, weights, group, self.num_groups, counted)

    def __post_init__(self) -> None:
        m = self.members.shape[0]
        if self.members.dim() != 2 or self.weights.shape != (m,) or self.group.shape != (m,):
            shapes = {k: tuple(v.shape) for k, v in vars(self).items() if isinstance(v, Tensor)}
            raise ValueError(f"terms must be members [m, k], weights [m], group [m], got {shapes}")


Metrics = dict[str, Tensor]
"""Name -> [2] float64, detached: (weighted sum, weight). Adding them over rows and ranks, then dividing, is exact."""

LossOutput = tuple[Tensor, Metrics]
"""(loss_per_group [g], metrics). The caller divides the sum over groups by the denominator of the GLOBAL batch."""
