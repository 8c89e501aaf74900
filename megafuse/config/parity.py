"""What a parity check is: `megafuse doctor parity`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megafuse.config.base import Config

Architecture = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2"]


class ParityConfig(Config):
    """Which layouts to compare with the float64 oracle, and on what."""

    layouts: tuple[str, ...] = ()
    """Layouts such as `tp2-sp`, `pp2-vpp2`, `cp2-ep2-do` (`do`: distributed optimizer; `dp`: data parallel only).
    None given: every evenly cut layout that fits the ranks at hand."""
    architecture: Architecture = "llama"
    """Family of the tiny random model."""
    losses: tuple[str, ...] = ()
    """Of sft, sft_token_mean, sft_sum, dpo, ln_dpo, simpo, rloo, rloo_clipped, wrpo. None given: all (in bf16 without
    rloo_clipped, whose gradient jumps where a rounded ratio crosses the clip range)."""
    rows: tuple[Literal["shared", "separate"], ...] = ("shared", "separate")
    """Prefix-shared rows, and packed rows in which every response carries its own copy of the prompt."""
    micro_batches: tuple[Literal["many", "few"], ...] = ("many", "few")
    """Splits of the batch: rows as short as the longest group, and rows as long as the whole batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations."""
    processes: int = Field(1, ge=1)
    """Ranks to start on this machine over gloo; under torchrun or srun leave it at 1."""
    groups: int = Field(12, ge=1)
    """Prompt groups of the batch."""
    sources: int = Field(3, ge=1)
    """Sources of a group, at most."""
    responses: int | None = Field(None, ge=2)
    """Responses of every source; None: few, and unevenly many."""
    response_tokens: int = Field(12, ge=1)
    """Tokens of the longest response; the shortest have one."""
    seed: int | None = Field(None, ge=0, le=1 << 62)
    """Of the random model and data; None: a fresh one, printed."""
    tolerance: float | None = Field(None, gt=0)
    """Largest difference that passes: of the loss, of a log-prob relative to the largest, of a parameter's gradient
    relative to its norm, of the gradient norm. None: 1e-5 in fp32 on a CPU, 1e-4 in fp32 on CUDA, 5e-2 in bf16."""
    out: Path | None = None
    """JSON file for every figure."""
