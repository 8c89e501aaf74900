"""Configuration of `megafuse doctor layout`."""

from pathlib import Path

from pydantic import Field

from megafuse.config.base import Config
from megafuse.config.train import ParallelConfig


class LayoutConfig(Config):
    """Which model, on how many ranks, cut how."""

    model: Path
    """Hugging Face folder, checkpoint, or named shape (`llama-3.1-70b`)."""
    ranks: int = Field(1, ge=1)
    """GPUs of all nodes together."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout; data parallel is what it leaves of the ranks."""
