"""`megafuse prompts`: a published data set to a file of prompts."""

from rich.console import Console

from megafuse.config.prompts import PromptsConfig
from megafuse.data.prompts import make_prompts

DESCRIPTION = "Take the prompts of a published set: filtered, one of a kind, counted at every step."
CONFIG = PromptsConfig


def run(config: PromptsConfig) -> int:
    """Write the prompts and print the counts."""
    console = Console()
    for name, number in make_prompts(config).counts.items():
        console.print(f"{name}: {number:,}")
    console.print(f"{config.output}: written", soft_wrap=True)
    return 0
