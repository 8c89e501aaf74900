"""A real vLLM loads the exported folder of every family and computes what transformers computes from it."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.testing.families import WRITERS
from megafuse.testing.vllm_probe import ask_vllm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

FAMILIES = sorted(WRITERS)
WIDE = {"hidden": 128, "heads": 4, "kv_heads": 2, "vocab": 128}  # vLLM's attention on CPUs wants heads of 32 or more
LENGTHS = (100, 3)  # windows are of 8 tokens; the knee of the rope scaling is at 16, its original context has 64
BOUND = 1e-5  # log-probs in fp32, near -5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], dict[str, Any]]:
    """Folder of the exports by family, prompts, what vLLM found."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    root, rng = tmp_path_factory.mktemp("vllm"), random.Random(seed)
    prompts = [[rng.randrange(WIDE["vocab"]) for _ in range(length)] for length in LENGTHS]
    for family in FAMILIES:
        heads = {"head_dim": 32} if family in ("gemma2", "qwen3", "qwen3_moe") else {}
        WRITERS[family](root / "hf" / family, seed=seed, **WIDE, **heads)
        import_hf(root / "hf" / family, root / "ckpt" / family)
        export_hf(root / "ckpt" / family, root / "out" / family)
    try:
        found = ask_vllm([{"folder": root / "out" / family, "prompts": prompts} for family in FAMILIES], root)
    except LookupError as error:
        pytest.skip(str(error))
    return root / "out", prompts, dict(zip(FAMILIES, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_computes_what_transformers_computes(
    served: tuple[Path, list[list[int]], dict[str, Any]], family: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, prompts, found = served
    assert "error" not in found[family], found[family]["error"]
    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32, attn_implementation="eager")
    for ids, theirs in zip(prompts, found[family]["logps"], strict=True):
        with torch.no_grad():
            logps = model.eval()(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        ours = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert theirs == pytest.approx(ours.tolist(), abs=BOUND)
