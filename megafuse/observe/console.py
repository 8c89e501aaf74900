"""Where commands print: a terminal as it is, anything else without an edge at which tables are cut and lines broken."""

import sys
from typing import Any

from rich.console import Console

# Elsewhere rich takes 80 columns and folds what is longer. Tables are as wide as what they hold, not as this.
_WIDE = 1_000_000


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """rich's Console of standard output or error, with its other `options`."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _WIDE, **options)
