"""`megafuse bench` on a tiny shape: alone, and over two processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megafuse.bench.breakdown import PARTS, Timeline, _timed, instrumented
from megafuse.bench.measure import Stepper
from megafuse.bench.report import ratios
from megafuse.bench.run import bench
from megafuse.bench.shapes import SHAPES
from megafuse.cli.main import main
from megafuse.config.bench import BenchConfig
from megafuse.config.load import validate
from megafuse.data.rows import BatchPlan
from megafuse.errors import ConfigError
from megafuse.observe.flops import flops_per_token, model_flops
from megafuse.testing.bench_workers import one_rank_breaks, raising
from megafuse.testing.distributed import WorkerFailed, run_distributed
from megafuse.training.step import StepResult


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 prompts of 3 sources with 2 responses each."""
    rng = np.random.default_rng()
    path = tmp_path_factory.mktemp("bench") / "scored.jsonl"
    with path.open("w") as file:
        for i in range(12):
            responses = [
                {"source": f"s{j % 3}", "reward": rng.random(), "text": "word " * int(rng.integers(1, 20))}
                for j in range(6)
            ]
            record = {"prompt_id": f"p{i}", "prompt": "word " * int(rng.integers(5, 30)), "responses": responses}
            file.write(json.dumps(record) + "\n")
    return path


def settings(scored: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": "tiny", "precision": "fp32"},
        "data": {"path": scored, "max_row_tokens": 512},
        "sources": [2, 4],
        "global_batch_size": 6,
        "steps": 3,
        "warmup": 1,
        **changes,
    }


def check(report: dict[str, Any], config: BenchConfig) -> None:
    kinds = [(k, sharing) for k in config.sources for sharing in (True, False)]
    assert [(r["sources"], r["prefix_sharing"]) for r in report["results"]] == kinds
    for r in report["results"]:
        assert r["prompts"] == 6 and r["responses"] == 6 * 2 * r["sources"] and len(r["step_seconds_all"]) == 3
        assert r["step_seconds"] == sorted(r["step_seconds_all"])[1] > 0
        assert r["prompts_per_second"] == pytest.approx(6 / r["step_seconds"])
        assert r["responses_per_second"] == pytest.approx(r["responses"] / r["step_seconds"])
        assert r["tokens_computed"] >= r["tokens"] and r["peak_memory_bytes"] > 1 << 20
        parts = dict(r["breakdown"])
        assert parts.pop("step_seconds") == pytest.approx(sum(parts.values())) and list(parts) == list(PARTS)
        assert all(parts[name] > 0 for name in ("attention", "linears", "head", "optimizer", "host", "other"))
    shared, separate = report["results"][:2]
    assert shared["tokens"] == separate["tokens"] < separate["tokens_computed"]
    assert shared["model_flops"] < separate["model_flops"]
    gains = [r["value"] for r in report["ratios"] if "prefix-shared / separate" in r["name"]]
    assert gains[0] == pytest.approx(shared["prompts_per_second"] / separate["prompts_per_second"])
    assert report["ratios"][0]["name"] == "K=2: prompts/s prefix-shared / separate"


def test_alone_through_the_command_line(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "deep" / "bench.json", tmp_path / "trace"
    flags = [
        "bench", "--model.path", "tiny", "--model.precision", "fp32", "--data.path", scored,
        "--data.max_row_tokens", 512,
        "--sources", 2, 4, "--global_batch_size", 6, "--steps", 3, "--warmup", 1, "--out", out,
        "--observe.trace", trace, "--observe.peak_tflops", 0.5,
    ]  # fmt: skip
    assert main([str(flag) for flag in flags]) == 0
    report = json.loads(out.read_text())
    config = validate(BenchConfig, report["config"])
    check(report, config)
    assert report["complete"] and report["failed"] == []
    assert report["format"] == "megafuse-bench/1" and report["versions"]["torch"] and report["device"]["count"] == 1
    for r in report["results"]:
        assert r["mfu"] == pytest.approx(r["model_flops"] / r["step_seconds"] / 0.5e12)
    assert [r["name"] for r in report["ratios"]] == [
        "K=2: prompts/s prefix-shared / separate",
        "K=4: prompts/s prefix-shared / separate",
    ]
    assert report["data"]["sources_borrowed_share"] == {"2": 0, "4": 0.25}  # 3 of 4 sources are there
    assert {p.name for p in trace.iterdir()} == {
        f"k{k}_{kind}.json.gz" for k in (2, 4) for kind in ("shared", "separate")
    }
    shown = capsys.readouterr()
    assert "K=4: prompts/s prefix-shared / separate" in shown.out and "bench K=4 separate" in shown.err


def test_the_report_has_the_precision_that_was_settled(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, precision in (("avx2", "fp32"), ("avx512f avx512_bf16", "bf16")):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
        monkeypatch.setattr("megafuse.parallel.precision.CPUINFO", tmp_path / "cpuinfo")
        given = settings(scored, model={"path": "tiny"}, sources=[2], prefix_sharing="shared", steps=1, warmup=0)
        report = bench(validate(BenchConfig, given))
        assert report["config"]["model"]["precision"] == precision


def test_kinds_that_raise_leave_the_others(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four kinds, two steps each, one row a step: the first steps of the second and of the third run out of memory."""
    out = tmp_path / "bench.json"
    reports: list[dict[str, Any]] = []
    error = torch.OutOfMemoryError("CUDA out of memory.\n\nTried to allocate 9.00 GiB.")
    flags = [
        "bench", "--model.path", "tiny", "--model.precision", "fp32", "--data.path", scored,
        "--sources", 2, 4, "--global_batch_size", 2, "--steps", 1, "--warmup", 1, "--observe.no-breakdown",
        "--out", out,
    ]  # fmt: skip
    with raising(range(2, 4), error, lambda: reports.append(json.loads(out.read_text()))):
        assert main([str(flag) for flag in flags]) == 1
    first, second = reports  # what was there when the second and the third kind raised
    assert not first["complete"] and not first["failed"] and not second["complete"]
    assert [(r["sources"], r["prefix_sharing"]) for r in first["results"]] == [(2, True)]
    kinds = [{"sources": 2, "prefix_sharing": False}, {"sources": 4, "prefix_sharing": True}]
    told = "OutOfMemoryError: CUDA out of memory.: Tried to allocate 9.00 GiB."
    assert second["failed"] == [{**kinds[0], "failed": told}]
    last = json.loads(out.read_text())
    assert last["complete"] and last["failed"] == [{**kind, "failed": told} for kind in kinds]
    assert [(r["sources"], r["prefix_sharing"]) for r in last["results"]] == [(2, True), (4, False)]
    assert last["results"][0] == first["results"][0] and last["ratios"] == []  # nothing to compare with
    said = capsys.readouterr()
    assert f"K=2, separate rows, was not measured: {told}" in said.err and "in breaks" in said.err


def test_growth_is_relative_to_what_was_measured() -> None:
    kinds = [(k, sharing) for k in (2, 4, 8) for sharing in (True, False) if (k, sharing) != (4, False)]
    found = [{"sources": k, "prefix_sharing": s, "prompts_per_second": 1.0, "step_seconds": float(k)} for k, s in kinds]
    assert [(r["name"], r["value"]) for r in ratios(found)] == [
        ("K=2: prompts/s prefix-shared / separate", 1),
        ("K=8: prompts/s prefix-shared / separate", 1),
        ("time K=8 / K=4, prefix-shared", 2),
        ("time K=8 / K=2, separate", 4),
    ]
    assert ratios([]) == []


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_the_products_of_a_real_step_are_those_that_mfu_counts(
    scored: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts the matrix products of whole training steps; full recomputation adds one forward of the layers.

    Attention is left out on both sides: torch does not count its kernel on a CPU.
    """
    counted: list[tuple[int, BatchPlan]] = []
    step = Stepper.step

    def counting(stepper: Stepper, timeline: Any = None) -> tuple[BatchPlan, StepResult]:
        with FlopCounterMode(display=False) as counter:
            plan, result = step(stepper, timeline)
        counted.append((counter.get_total_flops(), plan))
        return plan, result

    monkeypatch.setattr(Stepper, "step", counting)
    for recompute in ("none", "full"):
        model = {"path": shape, "precision": "fp32", "recompute": recompute}
        quick = {"steps": 1, "warmup": 0, "observe": {"breakdown": False}, "sources": [2]}
        bench(validate(BenchConfig, settings(scored, model=model, **quick)))
    arch = SHAPES[shape]
    for (plain, plan), (again, _) in zip(counted[:2], counted[2:], strict=True):
        assert plain == model_flops(arch, plan.model_tokens, plan.head_rows, 0)
        assert again - plain == plan.model_tokens * flops_per_token(arch)


@pytest.mark.distributed
def test_two_processes(scored: Path) -> None:
    config = validate(BenchConfig, settings(scored, parallel={"tensor": 2, "sequence": True}, sources=[2]))
    report, other = run_distributed(bench, 2, config, timeout=120)
    assert other is None
    check(report, config)
    assert all(r["breakdown"]["communication"] > 0 and r["mfu"] is None for r in report["results"])
    assert report["device"]["count"] == 2


@pytest.mark.distributed
def test_an_error_of_one_rank_ends_all_and_leaves_what_was_measured(scored: Path, tmp_path: Path) -> None:
    out, quick = tmp_path / "bench.json", {"steps": 1, "warmup": 1, "observe": {"breakdown": False}, "sources": [2]}
    parallel = {"tensor": 2, "sequence": True}
    config = validate(BenchConfig, settings(scored, parallel=parallel, out=out, global_batch_size=2, **quick))
    with pytest.raises(WorkerFailed, match=r"(?s)rank 1 raised.*RuntimeError: rank 1 broke"):
        run_distributed(one_rank_breaks, 2, config, 2, timeout=120)
    report = json.loads(out.read_text())
    assert [r["prefix_sharing"] for r in report["results"]] == [True] and not report["complete"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [4, 0]}, r"sources\.1 = 0: Input should be greater than or equal to 1"),
        ({"sources": []}, r"sources = \[\]"),
        ({"sources": [4, 4]}, r"sources = \[4, 4\] names a number twice"),
        ({"responses_per_source": 3}, "responses_per_source = 3: ln_dpo takes the best and the worst"),
        ({"loss": "rloo", "responses_per_source": 1}, "rloo compares"),
        ({"loss": "wrpo"}, r"sources = \[2, 4\]: a wrpo group .* set sources = \[2\]"),
        ({"model": {"path": "lama-3.2-1b"}}, "did you mean llama-3.2-1b"),
        ({"model": {"path": "tiny", "attention": "te"}}, "needs CUDA"),
        ({"data": {"path": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
        ({"parallel": {"tensor": 2}}, "world size 1 is not divisible"),
        ({"global_batch_size": 13}, r"global_batch_size = 13, but 12 of the 12 prompts"),
        ({"data": {"max_group_tokens": 8}}, "but 0 of the 12 prompts .* within 8 tokens"),
    ],
)
def test_bad_input_is_refused_before_any_process_group(scored: Path, changes: dict[str, Any], message: str) -> None:
    values = settings(scored)
    for section, value in changes.items():
        values[section] = {**values[section], **value} if isinstance(values.get(section), dict) else value
    with pytest.raises(ConfigError, match=message):
        bench(validate(BenchConfig, values))
    assert not dist.is_initialized()


def test_every_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr("megafuse.bench.breakdown.time.perf_counter", lambda: next(clock))
    line = Timeline(torch.device("cpu"))
    line.enter("host")  # before the start: nothing
    line.start()  # 0
    line.enter("attention")  # 1
    with line.communication():  # 3
        line.leave("head")  # not its part: no mark
    line.leave("attention")  # 6 ended the communication, 10 the attention
    line.enter("linears")  # 15
    line.enter("head")  # 21: linears end
    line.stop()  # 28
    assert line.seconds() == {
        "attention": 2 + 4, "communication": 3, "linears": 6, "head": 7, "other": 1 + 5, "optimizer": 0, "host": 0,
    }  # fmt: skip


class _Optimizer:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def zero_grad(self) -> None: ...

    def prepare_grads(self) -> None:
        assert not self.fails


def test_marks_leave_nothing_behind() -> None:
    import megatron.core.tensor_parallel.mappings as mappings
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Chunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
            self.config.finalize_model_grads_func = print
            self.linear_fc1 = torch.nn.Linear(3, 3)

        def zero_grad_buffer(self) -> None: ...

    class Engine:
        def __init__(self, fails: bool) -> None:
            self.model, self.optimizer = [Chunk()], _Optimizer(fails)

    before = (dist.all_reduce, mappings.dist_all_gather_func, P2PCommunicator._communicate)
    for fails in (False, True):
        engine, line = Engine(fails), Timeline(torch.device("cpu"))
        try:
            with instrumented(line, engine):
                assert dist.all_reduce is not before[0] and mappings.dist_all_gather_func is not before[1]
                line.start()
                x = torch.ones(2, 3, requires_grad=True)
                engine.model[0].linear_fc1(x).sum().backward()
                assert line.seconds()["linears"] > 0
                engine.optimizer.prepare_grads()
        except AssertionError:
            assert fails
        assert before == (dist.all_reduce, mappings.dist_all_gather_func, P2PCommunicator._communicate)
        chunk = engine.model[0]
        assert "zero_grad_buffer" not in vars(chunk) and not vars(engine.optimizer).keys() - {"fails"}
        assert chunk.config.finalize_model_grads_func is print
        linear = chunk.linear_fc1
        assert not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        assert not linear._backward_pre_hooks


def test_backward_and_recomputation_are_charged_to_the_module() -> None:
    """A module that is slow in backward only, and one whose forward is run again."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, pause: float) -> torch.Tensor:
            ctx.pause = pause
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            from time import sleep

            sleep(ctx.pause)
            return grad, None

    class Part(torch.nn.Module):
        def __init__(self, pause: float) -> None:
            super().__init__()
            self.pause, self.weight = pause, torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Slow.apply(x * self.weight, self.pause)

    class Chunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from megatron.core.transformer.transformer_config import TransformerConfig

            self.config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
            self.config.finalize_model_grads_func = print
            self.core_attention, self.linear_fc1 = Part(0.05), Part(0.3)

        def zero_grad_buffer(self) -> None: ...

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            from torch.utils.checkpoint import checkpoint

            return x + self.linear_fc1(checkpoint(self.core_attention, x, use_reentrant=True))

    class Engine:
        model, optimizer = [Chunk()], _Optimizer()

    line = Timeline(torch.device("cpu"))
    with instrumented(line, Engine):
        line.start()
        Engine.model[0](torch.ones(2, 3, requires_grad=True)).sum().backward()
        line.stop()
    seconds = line.seconds()
    assert 0.05 <= seconds["attention"] < 0.3 <= seconds["linears"], seconds


def test_started_collectives_are_timed_when_they_are_awaited() -> None:
    from torch.distributed.distributed_c10d import _IllegalWork

    class Work:
        tag = "work"

        def wait(self, timeout: int) -> int:
            return timeout

    line = Timeline(torch.device("cpu"))
    line.start()
    work = _timed(Work, line)()
    assert (work.wait(7), work.tag) == (7, "work")
    assert line.seconds()["communication"] > 0
    illegal = _IllegalWork()  # what a coalesced collective returns: it refuses even to be asked
    assert _timed(lambda: illegal, line)() is illegal and _timed(lambda: None, line)() is None
