"""`megafuse prompts`: a published data set to a file of prompts."""

from rich.console import Console
from rich.table import Table

from megafuse.config.prompts import PromptsConfig
from megafuse.data.prompt_recipes import RECIPES
from megafuse.data.prompts import make_prompts

DESCRIPTION = "Take the prompts of a published set: filtered, one of a kind, counted at every step."
CONFIG = PromptsConfig


def run(config: PromptsConfig) -> int:
    """Write the prompts and print the counts; `--recipe list` shows the recipes."""
    console = Console()
    if config.recipe == "list":
        table = Table(title="Recipes")
        for column in ("recipe", "set", "domain"):
            table.add_column(column)
        for name, recipe in RECIPES.items():
            table.add_row(name, recipe.hub, recipe.domain)
        console.print(table)
        return 0
    for name, number in make_prompts(config).counts.items():
        console.print(f"{name}: {number:,}")
    console.print(f"{config.output}: written", soft_wrap=True)
    return 0
