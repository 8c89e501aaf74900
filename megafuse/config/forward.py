"""What a forward-only pass over a data set is: `megafuse reference` and `megafuse eval`."""

from pathlib import Path

from megafuse.config.base import Config
from megafuse.config.train import DataConfig, ModelConfig, ParallelConfig


class ReferenceRunConfig(Config):
    """Log-probs of every response of a data set under one model, written once."""

    out: Path
    """Cache folder. Started again, it is finished where it stopped; with another key it is refused."""
    model: ModelConfig
    data: DataConfig
    name: str = "ref"
    """Name of the reference; several references stand side by side in folders of their own."""
    parallel: ParallelConfig = ParallelConfig()


class EvalConfig(Config):
    """Rank accuracy of a model on a data set of kind `rank`."""

    out: Path
    """Folder for accuracy.json and the log-probs behind it."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
