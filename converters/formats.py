"""What lies in a model folder besides the safetensors of the model: other formats of weights, adapters, quantisation.

Two questions: which files must not follow the weights into a checkpoint or an exported folder, because transformers or
vLLM would load them with (or instead of) the weights; and what to tell a user whose folder has such files alone.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megafuse.errors import ConfigError

# Weights, optimizer states and pickles, of any program.
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pickle", ".pkl", ".pt",
    ".pth",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# What describes weights other than these. transformers puts an adapter on top of the model beside which it finds the
# first; the next three say how weights are quantised, to vLLM; the last belongs to consolidated.*, which is not kept.
_OTHER_DESCRIPTIONS = {ADAPTER, "hf_quant_config.json", "quant_config.json", "quantize_config.json", "params.json"}


def describes_other_weights(name: str) -> bool:
    """A file of this name holds, lists or describes weights that are not the model's safetensors."""
    indexed = name.endswith(".index.json") and name != INDEX
    other = name.removesuffix(".index.json") if indexed else name
    return name in _OTHER_DESCRIPTIONS or other.endswith(_OTHER_WEIGHTS)


def is_model(file: str) -> bool:
    """A *.safetensors file that may be the model: no adapter, and not Mistral's own form of the same weights."""
    return not file.startswith(("adapter_", "consolidated"))


def refuse_without_safetensors(folder: Path) -> NoReturn:
    """Raise ConfigError: there are no weights that megafuse reads. Where others are there, it says what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for what, starts, fix in _KNOWN:
        if files := [name for name in names if name.startswith(starts) or name.endswith(starts)]:
            raise ConfigError(
                f"{folder} holds {what} ({_some(files)}) and no safetensors of a model; "
                f"fix: {_command(fix, folder) if fix.startswith('from ') else fix}"
            )
    raise ConfigError(
        f"{folder} holds no weights ({INDEX}, model.safetensors, or one *.safetensors file) but {_some(names)}; "
        "fix: fetch all files of the model"
    )


def refuse_other_formats(folder: Path) -> None:
    """The same where weights of another format are all that is there; nothing for any other folder."""
    if not folder.is_dir() or any(is_model(path.name) for path in folder.glob("*.safetensors")):
        return
    ends = tuple(end for _, each, _ in _KNOWN for end in each)
    if any(path.name.startswith(ends) or path.name.endswith(ends) for path in folder.iterdir()):
        refuse_without_safetensors(folder)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def _command(code: str, folder: Path) -> str:
    """A shell command for Python `code` that loads the folder `i` and saves the folder `o` beside it."""
    places = f"i, o = {json.dumps(str(folder))}, {json.dumps(f'{folder}-safetensors')}"
    return f"python -c {shlex.quote(f'{places}; {code}')}"


_FETCH = "fetch the form of this model that has model*.safetensors and config.json"
_PICKLED = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    'M.from_pretrained(i, dtype="auto").save_pretrained(o); T.from_pretrained(i).save_pretrained(o)'
)
_MERGED = "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained(i).merge_and_unload().save_pretrained(o)"
# (what it is, how its files' names begin or end, what to do: Python where it can be done in a line)
_KNOWN = (
    ("an adapter", ("adapter_config.json", "adapter_model."), _MERGED),
    ("pickled weights", ("pytorch_model.bin", "pytorch_model-"), _PICKLED),
    ("weights under their authors' own names", ("consolidated",), _FETCH),
    ("GGUF weights", (".gguf",), f"{_FETCH}: what GGUF has rounded stays rounded"),
    ("weights of TensorFlow or Flax", ("tf_model", "flax_model"), f"{_FETCH}, or save it so with transformers 4"),
)
