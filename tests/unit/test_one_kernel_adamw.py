"""torch's AdamW in one kernel, as on CUDA: its numbers, and its step counts through checkpoints; here on the CPU."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megafuse.checkpoint.folder import step_name
from megafuse.checkpoint.optimizer_state import fill_empty_state, steps_on_host, unshare_steps
from megafuse.config.train import TrainConfig
from megafuse.converters.importer import import_hf
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed, run_trainings
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama
from megafuse.training import optim

one_kernel = optim.use_one_kernel


def holder(*params: torch.Tensor, wanted: bool) -> Any:
    """What stands for mcore's wrapper around an AdamW of `params`."""
    adam = torch.optim.AdamW([{"params": [p]} for p in params], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = SimpleNamespace(optimizer=adam)
    one_kernel(optimizer, wanted=wanted)
    return optimizer


def test_five_updates_are_as_near_to_float64_as_those_of_many_kernels() -> None:
    """Each update rounds a weight twice, by half an ulp: 5 ulp of the largest. Gradients from 1e-8 to 100."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        start = torch.randn(3001, generator=generator)
        size = 10 ** (torch.rand(3001, generator=generator) * 10 - 8)
        gradients = [size * torch.randn(3001, generator=generator) for _ in range(5)]

        def updated(dtype: torch.dtype, wanted: bool, start: Any = start, gradients: Any = gradients) -> torch.Tensor:
            param = torch.nn.Parameter(start.to(dtype, copy=True))
            adam = holder(param, wanted=wanted).optimizer
            for gradient in gradients:
                param.grad = gradient.to(dtype)
                adam.step()
            return param.detach().double()

        exact = updated(torch.float64, False)
        error, usual = ((updated(torch.float32, wanted) - exact).abs().max() for wanted in (True, False))
        ulp = 2**-23 * float(start.abs().max())
        assert error < 5 * ulp and usual < 5 * ulp
        assert float((exact - start).abs().median()) > 1000 * ulp, "weights have moved"


def test_step_counts_are_where_the_kernel_reads_them() -> None:
    """`meta` stands for a GPU: a kernel there that is given a count on the host reads what is not its memory."""
    for wanted in (True, False):
        here, there = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, device="meta"))
        optimizer = holder(here, there, wanted=wanted)
        fill_empty_state(optimizer)
        state = optimizer.optimizer.state
        where = "meta" if wanted else "cpu"
        assert (state[here]["step"].device.type, state[there]["step"].device.type) == ("cpu", where)
        loaded = torch.tensor(7.0)
        state[here]["step"] = state[there]["step"] = loaded
        unshare_steps(optimizer)
        assert (state[here]["step"].device.type, state[there]["step"].device.type) == ("cpu", where)
        assert state[here]["step"] == 7 and state[here]["step"] is not loaded


def test_what_is_stored_names_no_device() -> None:
    class Elsewhere(torch.Tensor):
        def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor(3.0)

    count = torch.ones(()).as_subclass(Elsewhere)
    for state in ({"state": {"common_step": count}}, {"optimizer": {"state": {"common_step": count}}}):
        steps_on_host({0: state, 1: {"state": {}}})
        assert type(state.get("optimizer", state)["state"]["common_step"]) is torch.Tensor


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_and_its_resumption(tmp_path: Path, distributed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers to the bit after a resumption, those of many kernels to 1e-6, and from their checkpoint on."""
    model, data = tmp_path / "model", write_tiny_dataset(tmp_path / "data", "sft", seed=1, groups=8)
    import_hf(write_tiny_llama(tmp_path / "hf", seed=0, layers=1), model)

    def config(name: str) -> TrainConfig:
        settings: dict[str, Any] = {"checkpoint": {"interval": 2, "keep": 9}, "optim": {"distributed": distributed}}
        return tiny_run(tmp_path / name, model, data, global_batch_size=2, max_steps=4, **settings)

    def again(name: str, copy: str) -> TrainConfig:
        shutil.copytree(tmp_path / name, tmp_path / copy)
        shutil.rmtree(tmp_path / copy / "checkpoints" / step_name(4))
        return config(copy)

    def numbers(name: str) -> list[tuple[float, float]]:
        return [(record["loss"], record["grad_norm"]) for record in read_metrics(tmp_path / name)]

    run_distributed(run_trainings, 1, [config("many")])
    used = []

    def on_cpu(optimizer: Any, *, wanted: bool) -> None:
        assert not wanted, "no GPU here"
        one_kernel(optimizer, wanted=True)
        used.append(optimizer.param_groups[0]["fused"])

    monkeypatch.setattr(optim, "use_one_kernel", on_cpu)
    run_distributed(run_trainings, 1, [config("one")])
    run_distributed(run_trainings, 1, [again("one", "resumed"), again("many", "changed")])
    assert used == [True] * 3
    assert numbers("resumed") == numbers("one")
    assert numbers("changed")[:2] == numbers("many")[:2]
    for name in ("one", "changed"):
        assert [x for pair in numbers(name) for x in pair] == pytest.approx(
            [x for pair in numbers("many") for x in pair], rel=1e-6
        )
