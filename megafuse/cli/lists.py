"""`megafuse prompts list` and `megafuse sample list`: the names that those commands know."""

from collections.abc import Sequence

from megafuse.config.base import Config


class ListConfig(Config):
    """Nothing to set."""


def show_recipes(config: ListConfig) -> int:
    """Print the prompt sets."""
    from megafuse.data.prompt_recipes import RECIPES

    return _show(("recipe", "domain", "set"), [(name, recipe.domain, recipe.hub) for name, recipe in RECIPES.items()])


def show_sources(config: ListConfig) -> int:
    """Print the sources whose sampling parameters are known."""
    from megafuse.sampling.registry import REGISTRY

    rows = [
        (name, f"{row.temperature:g}", f"{row.top_p:g}", f"{row.repetition_penalty:g}", row.model)
        for name, row in REGISTRY.items()
    ]
    _show(("source", "temperature", "top-p", "repetition penalty", "model"), rows)
    print("Those of deepseek and of any other source (0.8, 0.95, 1) are megafuse's choice, the rest FuseChat-3.0's.")
    return 0


def _show(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> int:
    """Plain columns, never wrapped: names are there to be copied."""
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


COMMANDS = {"prompts": (ListConfig, show_recipes), "sample": (ListConfig, show_sources)}
