"""The scripts of the example folders as modules: the folders are no packages, and a wheel does not hold them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def quickstart_module(name: str) -> ModuleType:
    """A module of examples/quickstart, whose scripts import each other by bare name."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(QUICKSTART))
