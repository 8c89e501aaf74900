"""Reward models: ArmoRM's heads against an independent float64 twin, padding that cannot leak, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from megafuse.config.score import ScoreConfig
from megafuse.errors import ConfigError, DataError
from megafuse.rewards.armorm import ARCHITECTURE
from megafuse.rewards.models import RewardModel
from megafuse.rewards.score import _reward_model
from megafuse.testing.tokenizer import make_tokenizer

LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WORDS = ["the", "answer", "is", "not", "what", "you", "think", "it", "was", "but", "may", "be", "near", "42", "or", "7"]


def small(**more: Any) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=512, **shape, **more)


@pytest.fixture(scope="module")
def armorm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the published architecture: names and shapes of its files, small."""
    folder = make_tokenizer(tmp_path_factory.mktemp("armorm"), 512, chat_template=LLAMA3)
    extra = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 24, "gating_n_hidden": 3}
    config = small(pad_token_id=0)
    LlamaModel(config).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": [ARCHITECTURE], "auto_map": {"AutoModelForSequenceClassification": "evil.Model"}, **extra}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["regression_layer.weight"] = torch.randn(19, 32)
    weights["reward_transform_matrix"] = torch.eye(19) + 0.3 * torch.randn(19, 19)
    weights["gating.logit_scale"] = torch.tensor([1.7])
    for n, (a, b) in enumerate([(32, 24), (24, 24), (24, 24), (24, 19)]):
        weights[f"gating.layers.{n}.weight"] = torch.randn(b, a)
        weights[f"gating.layers.{n}.bias"] = torch.randn(b)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its padding token is the one that ends every conversation, as with many Llamas."""
    template = LLAMA3.replace("<|eot_id|>", "<|im_end|>")
    folder = make_tokenizer(tmp_path_factory.mktemp("classifier"), 512, chat_template=template)
    LlamaForSequenceClassification(small(num_labels=1, pad_token_id=2)).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token sees every other one, so that unmasked padding would count."""
    folder = make_tokenizer(tmp_path_factory.mktemp("encoder"), 512)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(
        BertConfig(vocab_size=512, num_labels=1, initializer_range=0.3, **shape)
    ).save_pretrained(folder)
    return folder


def records(n: int = 6) -> list[dict[str, Any]]:
    rng = np.random.default_rng()

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(1, longest))))

    return [
        {"prompt_id": f"p{i}", "prompt": text(20), "responses": [{"source": "a", "text": text(50)} for _ in range(3)]}
        for i in range(n)
    ]


def load(kind: str, folder: Path, **more: Any) -> RewardModel:
    settings = {"batch_tokens": 4096, "max_length": 512, "dtype": torch.float32, "device": torch.device("cpu")}
    return RewardModel(kind, folder, **{**settings, **more})


def test_system_messages_go_into_the_first_user_turn(armorm: Path, tmp_path: Path) -> None:
    """For reward models whose template knows no system role."""
    question = {"role": "user", "content": "Why?"}
    row = {"prompt_id": "p", "messages": [{"role": "system", "content": "Be brief."}, question]}
    row["responses"] = [{"source": "a", "text": "So."}]
    folded = {**row, "messages": [{**question, "content": "Be brief.\n\nWhy?"}]}
    plain, folds = load("armorm", armorm), load("armorm", armorm, fold_system=True)
    assert folds.tokens(row, 0) == folds.tokens(folded, 0) == plain.tokens(folded, 0) != plain.tokens(row, 0)
    files = {"inputs": (tmp_path / "in.jsonl",), "output": tmp_path / "out.jsonl", "model": armorm, "device": "cpu"}
    asked: Any = _reward_model(ScoreConfig(system_messages="first_user_turn", **files))
    assert asked.tokens(row, 0) == folds.tokens(row, 0)


def scores(model: RewardModel, rows: list[dict[str, Any]]) -> list[float]:
    return [update["reward"] for updates in model(rows) for update in updates]


def twin(folder: Path, ids: list[int], header: list[int]) -> float:
    """ArmoRM's score of one sequence, written from its description, in float64 numpy but for the backbone."""
    w = {name: t.double().numpy() for name, t in load_file(folder / "model.safetensors").items()}
    raw = json.loads((folder / "config.json").read_text())
    backbone = LlamaModel(small(pad_token_id=0)).double()
    backbone.load_state_dict({k[6:]: torch.tensor(v) for k, v in w.items() if k.startswith("model.")})
    with torch.no_grad():
        hidden = backbone.eval()(torch.tensor([ids])).last_hidden_state[0].numpy()
    at = max(i for i in range(len(ids)) if ids[i : i + len(header)] == header)
    x = hidden[at]
    for n in range(4):
        x = w[f"gating.layers.{n}.weight"] @ x + w[f"gating.layers.{n}.bias"]
        x = np.maximum(x, 0) if n < 3 else x / raw["gating_temperature"]
    gate = np.exp(x - x.max()) / np.exp(x - x.max()).sum() * w["gating.logit_scale"][0]
    rewards = w["regression_layer.weight"] @ hidden[-1]
    return float(
        sum(gate[k] * sum(rewards[j] * w["reward_transform_matrix"][j, k] for j in range(19)) for k in range(19))
    )


def test_armorm_against_a_twin(armorm: Path) -> None:
    rows = records()
    model = load("armorm", armorm)
    found = scores(model, rows)
    header = model.tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    want = [twin(armorm, model.tokens(r, j), header["input_ids"]) for r in rows for j in range(3)]
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    assert np.std(want) > 1e-2, "the twin says something"


@pytest.mark.parametrize("kind", ["armorm", "classifier", "encoder"])
def test_neither_order_nor_padding_changes_a_score(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    kind = kind if kind == "armorm" else "classifier"
    # a batch of another shape is added up in another order, and a gate amplifies that rounding: 6e-4 in float32. In
    # float64, heads included, 1e-13 is left of it (25 seeds), while padding that leaks changes scores by over 1e-2
    close = {"rtol": 1e-6, "atol": 1e-6}
    rows = records()
    together = scores(load(kind, folder, batch_tokens=1 << 20, dtype=torch.float64), rows)
    alone = scores(load(kind, folder, batch_tokens=1, dtype=torch.float64), rows)
    np.testing.assert_allclose(together, alone, **close)
    backwards = [{**r, "responses": r["responses"][::-1]} for r in rows[::-1]]
    np.testing.assert_allclose(
        scores(load(kind, folder, batch_tokens=300, dtype=torch.float64), backwards)[::-1], alone, **close
    )
    assert len({round(s, 6) for s in alone}) > 10


def test_the_classifier_is_read_at_the_last_token(classifier: Path) -> None:
    rows = records(1)
    model = load("classifier", classifier)
    ids = model.tokens(rows[0], 0)
    plain = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        last = plain.model(torch.tensor([ids])).last_hidden_state[0, -1]
        want, terms = plain.score(last), (plain.score.weight[0] * last).abs().sum()
    # a score is a sum of both signs and may end near 0: float32 knows it relative to the sum of its terms' sizes. 1e-7
    # of that is seen (60 seeds), and over 1e-3 where another token is read
    np.testing.assert_allclose(scores(model, rows)[0], float(want), rtol=0, atol=1e-6 * float(terms))


def test_what_has_no_score(classifier: Path) -> None:
    row = {
        "prompt_id": "p",
        "prompt": "x",
        "responses": [{"source": "a", "text": t} for t in (" ", "the " * 900, "ok")],
    }
    empty, long, good = load("classifier", classifier)([row])[0]
    assert empty == {"reward": None, "unscored": "empty_text"} and long == {"reward": None, "unscored": "too_long"}
    assert isinstance(good["reward"], float)


def test_refusals(classifier: Path, armorm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=ARCHITECTURE):
        load("armorm", classifier)
    small_folder = make_tokenizer(tmp_path / "small", 512)
    config = small(num_labels=1)
    config.vocab_size = 300
    LlamaForSequenceClassification(config).save_pretrained(small_folder)
    with pytest.raises(ConfigError, match=r"512 tokens and the model 300 embeddings"):
        load("classifier", small_folder)
    two = make_tokenizer(tmp_path / "two", 512)
    LlamaForSequenceClassification(small(num_labels=2)).save_pretrained(two)
    with pytest.raises(ConfigError, match="2 outputs"):
        load("classifier", two)
    headless = make_tokenizer(tmp_path / "headless", 512)
    LlamaForCausalLM(small()).save_pretrained(headless)
    raw = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**raw, "num_labels": 1}))
    with pytest.raises(ConfigError, match=r"no fitting weights of score\.weight"):
        load("classifier", headless)
    bare = make_tokenizer(tmp_path / "bare", 512, chat_template=None)
    LlamaForSequenceClassification(small(num_labels=1)).save_pretrained(bare)
    with pytest.raises(ConfigError, match="no chat template"):
        load("classifier", bare)
    wrong = make_tokenizer(tmp_path / "nan", 512)
    model = LlamaForSequenceClassification(small(num_labels=1))
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(wrong)
    with pytest.raises(DataError, match=r"nan to a response of 'a' to prompt 'p0'"):
        load("classifier", wrong)(records(1))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [("model.layers.1.mlp.up_proj.weight", None, r"no fitting weights of layers\.1\.mlp\.up_proj\.weight"),
     ("model.norm.weight", (31,), r"no fitting weights of .*norm\.weight"),
     ("gating.layers.2.bias", None, r"no weights of gating\.layers\.2\.bias"),
     ("regression_layer.weight", (18, 32), r"its heads are not those of its config\.json.*regression_layer\.weight")],
)  # fmt: skip
def test_an_armorm_that_is_not_whole_is_refused(
    armorm: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    """transformers would fill what is missing of the backbone with random numbers, and warn."""
    shutil.copytree(armorm, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights[name]
    if shape is not None:
        weights[name] = torch.zeros(shape)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load("armorm", tmp_path / "model")
