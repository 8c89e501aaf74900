"""Rules of one domain for `megafuse build`: FuseChat-3.0 treats instructions, math, code and Chinese apart."""

from typing import Literal

from pydantic import Field, model_validator

from megafuse.config.base import Config

EVERY_DOMAIN = "*"


class DomainRule(Config):
    """What becomes of the prompts of one domain: a table `[domain_rules.NAME]` of the configuration file."""

    sft: Literal["single_best", "top_k_all", "top1_per_source", "none"] = "single_best"
    """Selection of kind sft; none: the domain gives no SFT data."""
    pair: Literal["top1", "per_source", "none"] = "top1"
    """Selection of kind pair: top1, one pair a prompt, is FuseChat-3.0's; none: the domain gives no pairs."""
    correct: Literal["ignore", "required"] = "ignore"
    """required: sft takes correct responses only, pair takes correct against incorrect ones of a source, and a prompt
    without a grade, or whose responses have all failed, is left out."""
    min_gap: float | None = Field(None, ge=0)
    """Smallest reward gap of a pair, itself allowed. None: any but a tie."""
    max_gap: float | None = Field(None, ge=0)
    """Largest reward gap of a pair, itself allowed. None: no bound."""
    sources: tuple[str, ...] = ()
    """Take only responses of these sources. Empty: all."""
    responses_per_source: int | None = Field(None, ge=1)
    """Take only the first N responses of each source. None: all."""
    sft_fraction: float | None = Field(None, ge=0, le=1)
    """Fraction of this domain's prompts that go to SFT. None: sft_fraction of the whole build."""

    @model_validator(mode="after")
    def _consistent(self) -> "DomainRule":
        if self.min_gap is not None and self.max_gap is not None and self.min_gap > self.max_gap:
            raise ValueError(f"min_gap = {self.min_gap} is above max_gap = {self.max_gap}")
        if self.pair == "none" and (self.min_gap is not None or self.max_gap is not None):
            raise ValueError('min_gap and max_gap are for pairs, and pair = "none"')
        return self
