"""Configuration of `megafuse prompts`: a published data set to a file of prompts."""

from pathlib import Path

from pydantic import Field

from megafuse.config.base import Config


class PromptsConfig(Config):
    """Which set, from where, what is filtered, and where the prompts go."""

    recipe: str
    """Name of the set: `megafuse prompts list` shows them."""
    output: Path
    """Prompts (.jsonl, or .jsonl.gz). Beside it: OUTPUT.manifest.json with the counts of every step."""
    data: Path | None = None
    """Folder: what `datasets.save_to_disk` wrote, or .jsonl, .json, .parquet or .csv files; or one such file. None:
    from the hub, or the cache of `datasets` where there is no network (HF_HUB_OFFLINE=1)."""
    split: str | None = None
    """Split of the set; of files, by their names or their folders'. None: train, or files that name no split."""
    given: Path | None = None
    """Where to write the responses that the set itself has (OpenMathInstruct-2: of Llama-3.1-405B)."""
    given_per_prompt: int = Field(8, ge=1)
    """Most of the set's own responses to one prompt."""
    min_chars: int = Field(10, ge=0)
    """Shortest prompt, in characters."""
    max_chars: int = Field(6000, ge=1)
    """Longest prompt, in characters."""
    check_language: bool = True
    """Leave out prompts that are not in the recipe's language, by their script."""
    exclude: tuple[Path, ...] = ()
    """Files of prompts that must not be in the output, for example those of benchmarks, or of another set."""
    max_prompts: int | None = Field(None, ge=1)
    """Keep this many, the first by hash of the prompt and seed: a larger number is a superset. None: all."""
    seed: int = 0
    """Seed of the order behind `max_prompts`."""
