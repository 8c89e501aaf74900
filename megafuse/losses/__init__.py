"""FuseSFT and FusePO, pure functions over per-response sums: `loss_per_group, metrics = dpo(sums, terms, beta=..)`."""

from megafuse.losses.pairwise import dpo, ln_dpo, simpo
from megafuse.losses.registry import LOSSES, Loss, make_loss
from megafuse.losses.rloo import rloo
from megafuse.losses.sft import sft
from megafuse.losses.types import LossOutput, Metrics, ResponseSums, Terms
from megafuse.losses.wrpo import wrpo

__all__ = [
    "LOSSES",
    "Loss",
    "LossOutput",
    "Metrics",
    "ResponseSums",
    "Terms",
    "dpo",
    "ln_dpo",
    "make_loss",
    "rloo",
    "sft",
    "simpo",
    "wrpo",
]
