"""`megafuse prompts`: a published data set to a file of prompts."""

from megafuse.config.prompts import PromptsConfig
from megafuse.data.prompts import make_prompts
from megafuse.observe.console import make_console

DESCRIPTION = "Take the prompts of a published set: filtered, one of a kind, counted at every step."
CONFIG = PromptsConfig


def run(config: PromptsConfig) -> int:
    """Write the prompts and print the counts."""
    console = make_console()
    result = make_prompts(config)
    if result.files:
        more = f" and {len(result.files) - 5} more" if len(result.files) > 5 else ""
        console.print(f"read: {', '.join(result.files[:5])}{more}", soft_wrap=True, markup=False)
    for name, number in result.counts.items():
        console.print(f"{name}: {number:,}")
    console.print(f"{config.output}: written", soft_wrap=True)
    return 0
