"""What docs/against_trl.md says of TRL, seen in the TRL that is installed: equal losses, and the differences."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megafuse import losses
from megafuse.config.train import TrainConfig
from megafuse.data.tokenise import ChatTokenizer
from megafuse.losses import ResponseSums, Terms
from megafuse.testing.tokenizer import make_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="trains on a CPU")
VOCAB, PAD, BETA = 512, 0, 0.7


@pytest.fixture
def seed() -> int:
    made = int.from_bytes(os.urandom(4), "little")
    print("seed", made)
    torch.manual_seed(made)
    return made


def llama(**settings: Any) -> LlamaForCausalLM:
    """Logits of some size, so that no loss is that of a model that knows nothing."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**shape | heads | settings))


def ids(low: int, high: int) -> list[int]:
    return torch.randint(3, VOCAB, (int(torch.randint(low, high, ())),)).tolist()


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": ids(3, 9), "chosen_ids": ids(2, 20), "rejected_ids": ids(2, 20)}
        | {f"ref_{side}_logps": -50 * float(torch.rand(())) for side in ("chosen", "rejected")}
        for _ in range(count)
    ]


def dpo_trainer(folder: Path, model: LlamaForCausalLM, data: list[dict[str, Any]], **settings: Any) -> Any:
    """A real DPOTrainer over token ids and reference log-probs that are given."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    class Given(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    plain = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    plain |= {"per_device_train_batch_size": len(data), "max_length": None, "gradient_checkpointing": False}
    plain |= {
        "precompute_ref_log_probs": True,
        "beta": BETA,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    config = trl.DPOConfig(output_dir=str(folder / "out"), **plain | settings)
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder / "tokenizer", VOCAB))
    return Given(model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def log_prob(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()


def ours(name: str, model: LlamaForCausalLM, data: list[dict[str, Any]], **settings: float) -> tuple[float, float]:
    """megafuse's loss over these pairs, a prompt each, and its margin: means, as a global batch has them."""
    sides = ("chosen", "rejected")
    with torch.no_grad():
        logps = torch.stack([log_prob(model, row["prompt_ids"], row[f"{side}_ids"]) for row in data for side in sides])
    lengths = torch.tensor([len(row[f"{side}_ids"]) for row in data for side in sides])
    refs = torch.tensor([row[f"ref_{side}_logps"] for row in data for side in sides], dtype=torch.float64)
    count = len(data)
    terms = Terms(torch.arange(2 * count).view(-1, 2), torch.ones(count), torch.arange(count), count)
    loss, metrics = getattr(losses, name)(ResponseSums(logps, lengths, torch.zeros(2 * count), refs), terms, **settings)
    return float(loss.mean()), float(metrics["margin"][0] / metrics["margin"][1])


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ln_dpo", "sigmoid_norm")])
def test_the_same_loss_and_other_margins(tmp_path: Path, seed: int, loss: str, theirs: str) -> None:
    model, data = llama(), pairs(5)
    trainer = dpo_trainer(tmp_path, model, data, loss_type=[theirs])
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, inputs))
    mine, margin = ours(loss, model, data, beta=BETA)
    assert found == pytest.approx(mine, rel=1e-4)
    shown = trainer._metrics["train"]["rewards/margins"][0]
    sums = ours("dpo", model, data, beta=BETA)[1]
    assert shown == pytest.approx(sums, rel=1e-4)  # of whole responses, also where the loss is of means per token
    assert (abs(shown - margin) <= 1e-4 * abs(margin)) == (loss == "dpo")


def test_simpo_has_the_same_margin_inside_the_sigmoid(seed: int) -> None:
    from trl.experimental.cpo import CPOTrainer

    model, data, gamma = llama(), pairs(5), 0.4
    settings = {"alpha": 0.0, "beta": BETA, "simpo_gamma": gamma, "loss_type": "simpo", "label_smoothing": 0.1}
    stand = SimpleNamespace(**settings, accelerator=SimpleNamespace(device=torch.device("cpu")))
    sides = []
    with torch.no_grad():
        for side in ("chosen_ids", "rejected_ids"):
            logps = [log_prob(model, row["prompt_ids"], row[side]) / len(row[side]) for row in data]
            sides.append(torch.stack(logps))
        found = CPOTrainer.cpo_loss(stand, *sides)[0]
    mine, _ = ours("simpo", model, data, beta=BETA, gamma=gamma, label_smoothing=0.1)
    assert float(found.mean()) == pytest.approx(mine, rel=1e-4)


def test_sft_is_a_mean_over_tokens(tmp_path: Path, seed: int) -> None:
    """`token_mean` with equal weights is SFTTrainer's loss; our default counts every response alike."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    model = llama()
    data = [(ids(3, 9), ids(2, 5)), (ids(3, 9), ids(20, 30))]
    rows = [{"input_ids": p + r, "labels": [-100] * len(p) + r} for p, r in data]
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "max_length": None}
    plain |= {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "disable_tqdm": True}
    skip = {"skip_prepare_dataset": True}
    config = trl.SFTConfig(output_dir=str(tmp_path / "out"), dataset_kwargs=skip, **plain)
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer", VOCAB))
    trainer = trl.SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, inputs))
        logps = torch.stack([log_prob(model, p, r) for p, r in data])
    lengths = torch.tensor([len(r) for _, r in data])
    sums = ResponseSums(logps, lengths, torch.zeros(2), None)
    terms = Terms(torch.arange(2).view(-1, 1), torch.ones(2), torch.arange(2), 2)
    summed, mean = (losses.sft(sums, terms, reduction=r)[0] for r in ("token_mean", "sequence_mean"))
    assert found == pytest.approx(float(summed.sum() / lengths.sum()), rel=1e-4)
    assert found != pytest.approx(float(mean.mean()), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_drops_the_gradient_of_the_padding_row(seed: int, tied: bool) -> None:
    """Of the look-up alone: the output layer's part of a tied row stays. Without a pad_token_id it is all there."""
    model = llama(pad_token_id=PAD, tie_word_embeddings=tied)
    tokens = torch.tensor([[5, PAD, 7, PAD, 9, 11]])  # as an end of turn that is the padding token too

    def row() -> Tensor:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return model.get_input_embeddings().weight.grad[PAD].clone()

    dropped = row()
    model.get_input_embeddings().padding_idx = None
    whole = row()
    assert whole.abs().max() > 1e-3 and bool(dropped.abs().max() > 1e-4) == tied
    assert (whole - dropped).abs().max() > 1e-3


def test_the_first_step_of_a_warm_up_changes_nothing(tmp_path: Path, seed: int) -> None:
    for warmup, moves in ((2, False), (0, True)):
        model = llama()
        before = [p.detach().clone() for p in model.parameters()]
        more = {"warmup_steps": warmup, "max_steps": 1, "learning_rate": 1e-2, "weight_decay": 0.1}
        more |= {"lr_scheduler_type": "constant_with_warmup"}
        dpo_trainer(tmp_path / str(warmup), model, pairs(2), **more).train()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same != moves


def test_it_trains_the_newline_behind_the_end_of_turn(tmp_path: Path, seed: int) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    folder = make_tokenizer(tmp_path / "tokenizer", VOCAB)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "well?"}], **answers}])
    config = trl.DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    model = llama()
    model.save_pretrained(tmp_path / "model")  # TRL loads the reference again, by its name
    model.config._name_or_path = str(tmp_path / "model")
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    end = ChatTokenizer(folder, vocab_size=VOCAB).end_of_turn.tolist()
    newline = tokenizer.encode("\n", add_special_tokens=False)
    assert end == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for side in ("chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[0][side][-2:] == end + newline


def test_defaults_that_the_page_names() -> None:
    config = trl.DPOConfig(output_dir="x", use_cpu=True, bf16=False)
    assert (config.learning_rate, config.beta, config.lr_scheduler_type.value) == (1e-6, 0.1, "linear")
    assert (config.max_length, config.truncation_mode, config.loss_type) == (1024, "keep_start", ["sigmoid"])
    assert config.gradient_checkpointing and not config.precompute_ref_log_probs


def test_settings_that_the_page_names_are_there() -> None:
    """In its table of settings, on either side."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "against_trl.md").read_text().rpartition("| here |")[2]
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    theirs = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert len(rows) > 10 and theirs <= {field.name for field in dataclasses.fields(trl.DPOConfig)}
    ours = {name for row in rows for name in re.findall(r"`(\w+)\.(\w+)`", row[1])}
    assert len(ours) > 6
    for section, field in ours:
        assert field in TrainConfig.model_fields[section].annotation.model_fields
