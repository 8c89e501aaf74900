"""ArmoRM-Llama3-8B-v0.1 (arXiv 2406.12845) from its published weights, without their remote code.

    score = sum_k gate_k(prompt) * (regression(answer) @ reward_transform_matrix)_k          19 objectives

`regression_layer.weight [19, h]` is applied to the hidden state of the last token; the gating network (ReLU layers,
then softmax of logits / temperature, times `gating.logit_scale`) to the hidden state at the first token of the last
`<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n`, which has seen the prompt and not the answer.
The heads are computed in float32, or in the precision of the backbone where that is higher.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megafuse.errors import ConfigError

ARCHITECTURE = "LlamaForRewardModelWithGating"
ANSWER_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class GatedHeads(nn.Module):
    """The regression layer, the transform and the gating network; parameter names are those of the published files.

    Args:
        hidden_size: of the backbone, h.
        objectives: outputs of the regression layer, K.
        gating_width: of the gating network's hidden layers.
        gating_layers: number of its hidden layers.
        temperature: of its softmax.
    """

    def __init__(
        self, hidden_size: int, objectives: int, *, gating_width: int, gating_layers: int, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.regression_layer = nn.Linear(hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives), requires_grad=False)
        widths = [hidden_size] + [gating_width] * gating_layers + [objectives]
        self.gating = nn.Module()
        self.gating.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.gating.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, answer: Tensor, prompt: Tensor) -> Tensor:
        """Scores [n] from the hidden states [n, h] at the last token and at the answer's header."""
        rewards = self.regression_layer(answer) @ self.reward_transform_matrix
        gate = prompt
        layers = list(self.gating.layers)  # type: ignore[arg-type]
        for layer in layers[:-1]:
            gate = torch.relu(layer(gate))
        scale = self.gating.logit_scale
        assert isinstance(scale, Tensor)
        return (torch.softmax(layers[-1](gate) / self.temperature, dim=1) * scale * rewards).sum(dim=1)


def load_whole(kind: Any, folder: Path, **settings: Any) -> Any:
    """`kind.from_pretrained(folder, **settings)`, which fills what the folder lacks with random numbers, and warns.

    Raises:
        ConfigError: a weight is not there or of another shape, or transformers cannot load the folder.
    """
    try:
        # weights of another shape too are to be listed, not told of in a report on standard error
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = kind.from_pretrained(str(folder), **told, **settings)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ConfigError(f"model: {folder} is no model that transformers can load as {kind.__name__}: {e}") from e
    absent = sorted(str(k) for kind in ("missing_keys", "mismatched_keys") for k in found.get(kind, ()))
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ConfigError(
            f"model: {folder} has no fitting weights of {', '.join(absent[:5])}{more}: its scores would be random. "
            "Give the folder of a trained reward model"
        )
    return model


class ArmoRM:
    """The backbone and its heads, for scoring token sequences.

    Raises:
        ConfigError: the folder holds another architecture, or not all of the weights, or other shapes than it says.
    """

    def __init__(self, folder: Path, tokenizer: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaModel

        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if ARCHITECTURE not in (raw.get("architectures") or []):
            raise ConfigError(f"{folder}: architectures = {raw.get('architectures')} is not {ARCHITECTURE}")
        raw = {k: v for k, v in raw.items() if k != "auto_map"}
        settings = {"config": LlamaConfig(**raw), "dtype": dtype, "local_files_only": True}
        self.backbone = load_whole(LlamaModel, folder, **settings)
        self.backbone.to(device).eval()
        self.vocab_size = int(self.backbone.get_input_embeddings().num_embeddings)
        self.heads = GatedHeads(
            raw["hidden_size"],
            raw.get("num_objectives", 19),
            gating_width=raw.get("gating_hidden_dim", 1024),
            gating_layers=raw.get("gating_n_hidden", 3),
            temperature=raw.get("gating_temperature", 10),
        )
        try:
            self.heads.load_state_dict(_weights(folder, list(self.heads.state_dict())))
        except RuntimeError as error:  # torch lists every shape that differs
            raise ConfigError(f"{folder}: its heads are not those of its config.json: {error}") from None
        self.precision = torch.promote_types(dtype, torch.float32)
        self.heads.to(device, self.precision).eval()
        self.header: list[int] = tokenizer(ANSWER_HEADER, add_special_tokens=False)["input_ids"]

    def score(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Scores [n] in the precision of the heads, of right-padded sequences [n, t].

        Raises:
            ConfigError: a sequence without an answer's header.
        """
        hidden = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        places = [last_occurrence(row[:n].tolist(), self.header) for row, n in zip(ids, lengths)]
        prompt = hidden[rows, torch.tensor(places, device=ids.device)]
        scores: Tensor = self.heads(hidden[rows, lengths - 1].to(self.precision), prompt.to(self.precision))
        return scores


def last_occurrence(tokens: Sequence[int], pattern: Sequence[int]) -> int:
    """Where the last occurrence of `pattern` starts.

    Raises:
        ConfigError: it does not occur.
    """
    for start in range(len(tokens) - len(pattern), -1, -1):
        if list(tokens[start : start + len(pattern)]) == list(pattern):
            return start
    raise ConfigError(
        f"a conversation has no {ANSWER_HEADER!r}: ArmoRM needs the chat template of Llama 3 and its tokenizer"
    )


def _weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys() if name in names})  # noqa: SIM118
    missing = sorted(set(names) - set(found))
    if missing:
        raise ConfigError(f"{folder}: no weights of {', '.join(missing)} in its safetensors files")
    return found
