"""Qwen3 through megatron-core against transformers, tiny models, and the oracle's own float64 arithmetic."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megafuse.converters.importer import import_hf
from megafuse.converters.logits import compare_logits
from megafuse.errors import IntegrityError
from megafuse.model.norm import RMSNorm
from megafuse.testing.oracle import ExactRouter, double_model, hf_gradients
from megafuse.testing.tiny import write_tiny_llama, write_tiny_qwen3, write_tiny_qwen3_moe

BOUND = 2e-6  # of the largest logit, in fp32
HEAD_DIM = 12  # of the tiny models


def seed() -> int:
    value = int.from_bytes(os.urandom(4), "little")
    print("seed", value)
    return value


@pytest.mark.parametrize("tied", [True, False])
def test_dense_logits(tmp_path, tied):
    hf = write_tiny_qwen3(tmp_path / "hf", seed=seed(), tied=tied)
    import_hf(hf, tmp_path / "ckpt")
    report = compare_logits(tmp_path / "ckpt", hf, tokens=200)
    # of two logits closer than the bound either may be the largest: a tie is no fault
    assert report.difference < BOUND * report.largest and report.agree >= 0.99


def test_without_its_qk_norm_it_is_another_model(tmp_path, monkeypatch):
    hf = write_tiny_qwen3(tmp_path / "hf", seed=seed())
    import_hf(hf, tmp_path / "ckpt")
    normalise = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x if x.size(-1) == HEAD_DIM else normalise(self, x))
    with pytest.raises(IntegrityError, match="different logits"):
        compare_logits(tmp_path / "ckpt", hf, tokens=50)


@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_qwen3, write_tiny_qwen3_moe])
def test_oracle_is_float64_and_names_gradients_as_files_do(tmp_path, write):
    """Central differences agree to 1e-7: any step of the model in fp32 would leave noise of 1e-2 in them."""
    hf = write(tmp_path / "hf", seed=seed())
    model, disk = double_model(hf), load_file(hf / "model.safetensors")
    ids = torch.randint(0, 120, (1, 30))

    def loss() -> torch.Tensor:
        return -model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).mean()

    loss().backward()
    gradients = hf_gradients(model)
    assert {n: g.shape for n, g in gradients.items()} == {n: t.shape for n, t in disk.items()}
    weights = _views(model)
    assert weights.keys() == gradients.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.float(), disk[name]), name
    for part in ("o_proj", "q_norm", "mlp.gate.", "experts.1.gate_proj", "experts.5.up_proj", "experts.0.down_proj"):
        name = next((n for n in gradients if part in n and ".layers.2." in n), None)
        if name is None:  # no such weight in this family
            continue
        place = int(gradients[name].abs().argmax())
        value = weights[name].reshape(-1)[place].item()
        ends = []
        for step in (1e-5, -1e-5):
            _set(weights[name], place, value + step)
            with torch.no_grad():
                ends.append(float(loss()))
        _set(weights[name], place, value)
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope == pytest.approx(float(gradients[name].reshape(-1)[place]), rel=1e-6, abs=1e-10), name


def _views(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by on-disk name, as views of the model's own: the inverse of what save_pretrained does."""
    views = {}
    for name, parameter in model.named_parameters():
        layer, fused, kind = name.partition(".mlp.experts.")
        for i, expert in enumerate(parameter.data if fused else ()):
            if kind == "down_proj":
                views[f"{layer}{fused}{i}.down_proj.weight"] = expert
            else:
                half = expert.size(0) // 2
                views[f"{layer}{fused}{i}.gate_proj.weight"] = expert[:half]
                views[f"{layer}{fused}{i}.up_proj.weight"] = expert[half:]
        if not fused:
            views[name] = parameter.data
    return views


def _set(tensor: torch.Tensor, place: int, value: float) -> None:
    tensor.view(-1)[place] = value


def test_the_tiny_router_never_stands_between_two_choices(tmp_path):
    """The k-th and the next logit of every token and layer are more than 1 apart; every expert is used."""
    hf = write_tiny_qwen3_moe(tmp_path / "hf", seed=seed())
    model = double_model(hf)
    gaps: list[float] = []
    used: set[int] = set()

    def look(router: ExactRouter, _: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, _, chosen = output
        top = logits.sort(-1, descending=True).values
        gaps.append(float((top[:, router.top_k - 1] - top[:, router.top_k]).min()))
        used.update(chosen.flatten().tolist())

    for module in model.modules():
        if isinstance(module, ExactRouter):
            module.register_forward_hook(look)
    with torch.no_grad():
        model(torch.randint(0, 120, (4, 300)))
    assert len(gaps) == 4 and min(gaps) > 1 and used == set(range(8))


def test_same_seed_same_files(tmp_path: Path):
    for write in (write_tiny_qwen3, write_tiny_qwen3_moe):
        one, two = (write(tmp_path / f"{write.__name__}{i}", seed=7) / "model.safetensors" for i in range(2))
        assert one.read_bytes() == two.read_bytes()
