"""Losses by name: what each needs of the data set and of a reference, bound to a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megafuse.kernels.heads import fused_loss, fused_losses_run_on
from megafuse.losses.pairwise import dpo, ln_dpo, simpo
from megafuse.losses.rloo import rloo
from megafuse.losses.sft import sft
from megafuse.losses.types import LossOutput, ResponseSums, Terms
from megafuse.losses.wrpo import wrpo

if TYPE_CHECKING:  # losses are usable without the configuration package
    from megafuse.config.loss import LossConfig

LOSSES: Mapping[str, tuple[Callable[..., LossOutput], str]] = {
    "sft": (sft, "sft"),
    "dpo": (dpo, "pair"),
    "ln_dpo": (ln_dpo, "pair"),
    "simpo": (simpo, "pair"),
    "rloo": (rloo, "rloo"),
    "wrpo": (wrpo, "wrpo"),
}
"""Name -> (function, kind of data set that it trains on)."""


@dataclass(frozen=True)
class Loss:
    """One loss with its hyper-parameters, as the training loop uses it."""

    name: str  # a key of LOSSES
    kind: str  # the `kind` that the data set's manifest must have
    needs_reference: bool  # ResponseSums.ref_logps must be given
    settings: Mapping[str, Any]  # keyword arguments; wrpo: alpha_max in place of alpha

    def __call__(self, sums: ResponseSums, terms: Terms, progress: float) -> LossOutput:
        """(loss_per_group [g], metrics). progress: share of the steps behind us, in [0, 1], for WRPO's schedule."""
        settings = dict(self.settings)
        if self.name == "wrpo":
            settings["alpha"] = settings.pop("alpha_max") * min(max(progress, 0.0), 1.0)
        if fused_losses_run_on(sums.logps):
            return fused_loss(self.name, sums, terms, **settings)
        return LOSSES[self.name][0](sums, terms, **settings)

    @property
    def vanishes(self) -> bool:
        """Whether the gradient of a response that has weight may be exactly 0: equal rewards, clipped ratios."""
        return self.name == "rloo"

    def denominator(self, members: np.ndarray, weights: np.ndarray, lengths: np.ndarray) -> float:
        """What one group adds to the denominator of the global batch: 1, or sum_i w_i |y_i| for sft's `token_mean`.

        members [m, k] and weights [m] of the group's terms, lengths [n] of its responses (as in `megafuse.data.Group`).
        """
        if self.settings.get("reduction") != "token_mean":
            return 1.0
        return float(np.dot(weights.astype(np.float64), lengths[members[:, 0]].astype(np.float64)))


def make_loss(config: "LossConfig") -> Loss:
    """The loss that `config` describes."""
    settings = config.settings()
    needs = {
        "sft": False,
        "simpo": False,
        "rloo": settings.get("beta_kl") != 0 or settings.get("surrogate") != "reinforce",
    }
    return Loss(config.name, LOSSES[config.name][1], needs.get(config.name, True), settings)
