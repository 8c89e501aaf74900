"""Log-probs over a split vocabulary, and sums over a split sequence: real gloo processes against one process.

The file is its own worker: `python test_logprob_tp.py RANK WORLD SEED FOLDER` computes every case on one rank and saves
what it got. One start of the processes serves all cases.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.errors import MegafuseError
from megafuse.kernels._vocab_softmax import _refuse_overlap
from megafuse.kernels.group_loss import Blocks, GroupLoss, linear_group_loss
from megafuse.kernels.logprob import linear_logprobs, segment_logprobs, vocab_parallel_logprobs

ROOT = Path(__file__).resolve().parents[2]
VOCAB, PADDED, HIDDEN, SEQUENCE = 131, 150, 12, 24

# name -> (dtype, options of both functions, options of linear_logprobs)
CASES: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "plain": (torch.float64, {"vocab_size": VOCAB}, {}),
    "softcap": (torch.float64, {"vocab_size": VOCAB, "softcap": 2.5, "temperature": 0.7}, {}),
    "whole": (torch.float64, {}, {}),
    "chunked": (torch.float64, {"vocab_size": VOCAB}, {"workspace_bytes": 4000}),
    "float32": (torch.float32, {"vocab_size": VOCAB}, {}),
    "bfloat16": (torch.bfloat16, {"vocab_size": VOCAB}, {}),
    "empty": (torch.float64, {"vocab_size": VOCAB}, {}),
}


def cuts(world: int, name: str) -> list[int]:
    """Borders of uneven vocabulary shards; the last shard of `softcap` is nothing but padding."""
    if name == "softcap":
        return [*(40 * i for i in range(world - 1)), VOCAB + 3, PADDED]
    return [0, *(50 * i + 7 for i in range(1, world)), PADDED]


def inputs(name: str, seed: int) -> dict[str, Tensor]:
    """The same tensors on every rank and in the parent."""
    rng = torch.Generator().manual_seed(seed + sum(name.encode()))
    count = 0 if name == "empty" else 70
    dtype = CASES[name][0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    ids = PADDED if name == "whole" else VOCAB
    return {
        "hidden": normal(SEQUENCE, HIDDEN),
        "weight": normal(PADDED, HIDDEN),
        "logits": normal(count, PADDED) * 4,
        "row_index": torch.randint(SEQUENCE, (count,), generator=rng),
        "targets": torch.randint(ids, (count,), generator=rng),
        "grad": torch.randn(count, generator=rng, dtype=torch.float64).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        ),
    }


def run_linear(
    t: dict[str, Tensor], options: dict[str, Any], rows: slice, columns: slice, **kwargs: Any
) -> dict[str, Tensor]:
    hidden = t["hidden"][rows].clone().requires_grad_()
    weight = t["weight"][columns].clone().requires_grad_()
    logp = linear_logprobs(
        hidden, weight, t["targets"], row_index=t["row_index"], vocab_start=columns.start, **options, **kwargs
    )
    logp.backward(t["grad"])
    assert hidden.grad is not None and weight.grad is not None
    return {"logp": logp.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run_logits(t: dict[str, Tensor], options: dict[str, Any], columns: slice, **kwargs: Any) -> dict[str, Tensor]:
    leaf = t["logits"][:, columns].clone().requires_grad_()
    logp = vocab_parallel_logprobs(leaf * 1, t["targets"], vocab_start=columns.start, **options, **kwargs)
    logp.backward(t["grad"])
    assert leaf.grad is not None
    return {"logp": logp.detach(), "logits": leaf.grad}


def segments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 4, (90,), generator=rng)
    return torch.randn(90, generator=rng), ids, torch.randn(5, generator=rng)


def run_segments(seed: int, part: slice, mean: bool, group: Any) -> dict[str, Tensor]:
    logp, ids, grad = segments(seed)
    leaf = logp[part].clone().requires_grad_()
    sums, counts = segment_logprobs(leaf, ids[part], 5, normalize="mean" if mean else "none", cp_group=group)
    sums.backward(grad)
    assert leaf.grad is not None
    return {"sums": sums.detach(), "counts": counts, "grad": leaf.grad}


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except MegafuseError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def refusals(rank: int, world: int, group: Any) -> dict[str, str]:
    """What this rank is told: about a target that no shard holds, and about shards that hold the same ids."""
    out, ids = {}, torch.tensor([3, PADDED])
    z, border = torch.zeros(2, PADDED), cuts(world, "whole")
    out["default"] = refused(
        lambda: vocab_parallel_logprobs(
            z[:, border[rank] : border[rank + 1]], ids, vocab_start=border[rank], group=group
        )
    )
    x, size = torch.ones(2, 16), 60
    w, groups = (
        torch.randn(size, 16),
        GroupLoss(lambda sums, *_: (sums.sum(), {}), Blocks(torch.tensor([[1, 1]]), (2,))),
    )
    for backend in ("torch", "triton"):
        given: dict[str, Any] = {"vocab_size": 60 * world + 30, "backend": backend}
        calls: dict[str, Callable[..., Any]] = {
            "linear": lambda ids, start, given=given: linear_logprobs(
                x, w, ids, vocab_start=start, tp_group=group, **given
            ),
            "logits": lambda ids, start, given=given: vocab_parallel_logprobs(
                x @ w.t(), ids, vocab_start=start, group=group, **given
            ),
            "groups": lambda ids, start, given=given: linear_group_loss(
                x, w, ids, groups, vocab_start=start, tp_group=group, **given
            )[0],
        }
        good = torch.tensor([5, 60 * world - 1])
        for name, call in calls.items():
            out[f"{backend}/{name}/good"] = refused(functools.partial(call, good, rank * size))
            out[f"{backend}/{name}/unowned"] = refused(functools.partial(call, good + 20, rank * size))
            if name == "groups":  # rank 0 would wait: each rank checks by itself that shards are equally large
                continue
            out[f"{backend}/{name}/forgotten"] = refused(functools.partial(call, good % 60, 0))
            out[f"{backend}/{name}/one in common"] = refused(functools.partial(call, good % 60, rank * (size - 1)))
    return out


def worker(rank: int, world: int, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    out: dict[str, Any] = {}
    mine = slice(rank * SEQUENCE // world, (rank + 1) * SEQUENCE // world)
    for name, (_, options, linear) in CASES.items():
        t, border = inputs(name, seed), cuts(world, name)
        columns = slice(border[rank], border[rank + 1])
        out[f"{name}/tp"] = run_linear(t, options | linear, slice(None), columns, tp_group=group)
        out[f"{name}/sp"] = run_linear(t, options | linear, mine, columns, tp_group=group, sequence_parallel=True)
        out[f"{name}/logits"] = run_logits(t, options, columns, group=group, inplace_backward=True)
    token = slice(rank * 90 // world, (rank + 1) * 90 // world)
    for mean in (False, True):
        out[f"segments/{mean}"] = run_segments(seed, token, mean, group)
    out["refused"] = refusals(rank, world, group)
    torch.save(out, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=lambda w: f"{w}ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """`(seed, what each rank computed)`."""
    world, seed = request.param, random.SystemRandom().randrange(2**30)
    print("seed", seed)
    folder = tmp_path_factory.mktemp(f"gloo{world}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(seed), str(folder)],
            env=env,
            stderr=subprocess.STDOUT,
            stdout=(folder / f"log{rank}").open("w"),
        )
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join((folder / f"log{r}").read_text()[-2000:] for r in range(world))
    return seed, [torch.load(folder / f"rank{r}.pt") for r in range(world)]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Float64 to rounding; bfloat16 gradients differ by the rounding of each shard's part (2^-8 of the largest)."""
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if expected.numel():
        assert (got - expected).abs().max() <= bound * expected.abs().max().clamp(min=1e-30)


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["tp", "sp"])
@pytest.mark.parametrize("name", CASES)
def test_linear_sharded_equals_whole(name: str, mode: str, ranks: tuple[int, list[dict[str, Any]]]) -> None:
    seed, results = ranks
    dtype, options, linear = CASES[name]
    whole = run_linear(inputs(name, seed), options | linear, slice(None), slice(0, PADDED))
    got = [result[f"{name}/{mode}"] for result in results]
    for part in got:
        assert torch.equal(part["logp"], got[0]["logp"])  # bit-equal on all ranks
    close(got[0]["logp"], whole["logp"], torch.float32 if dtype == torch.bfloat16 else dtype)
    close(torch.cat([part["weight"] for part in got]), whole["weight"], dtype)
    if mode == "sp":
        close(torch.cat([part["hidden"] for part in got]), whole["hidden"], dtype)
    else:
        for part in got:
            close(part["hidden"], whole["hidden"], dtype)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_logits_sharded_equals_whole(name: str, ranks: tuple[int, list[dict[str, Any]]]) -> None:
    seed, results = ranks
    dtype, options, _ = CASES[name]
    whole = run_logits(inputs(name, seed), options, slice(0, PADDED))
    got = [result[f"{name}/logits"] for result in results]
    for part in got:
        assert torch.equal(part["logp"], got[0]["logp"])
    close(got[0]["logp"], whole["logp"], torch.float32 if dtype == torch.bfloat16 else dtype)
    close(torch.cat([part["logits"] for part in got], 1), whole["logits"], dtype)


@pytest.mark.distributed
@pytest.mark.parametrize("mean", [False, True])
def test_segments_over_context_parallel_ranks(mean: bool, ranks: tuple[int, list[dict[str, Any]]]) -> None:
    seed, results = ranks
    whole = run_segments(seed, slice(None), mean, None)
    got = [result[f"segments/{mean}"] for result in results]
    for part in got:
        assert torch.equal(part["sums"], got[0]["sums"])
        assert torch.equal(part["counts"], whole["counts"])
    assert torch.allclose(got[0]["sums"], whole["sums"], rtol=1e-6)
    assert torch.allclose(torch.cat([part["grad"] for part in got]), whole["grad"], rtol=1e-6)


@pytest.mark.distributed
def test_unowned_target_is_refused_on_every_rank(ranks: tuple[int, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        told: dict[str, str] = result["refused"]
        assert told["default"].startswith(f"DataError: target id {PADDED} ")
        unowned = {key: text for key, text in told.items() if key.endswith("/unowned")}
        assert len(unowned) == 6
        for key, text in unowned.items():  # vocab_size, larger than all shards together, does not hide it
            assert text.startswith(f"DataError: target id {60 * len(ranks[1]) + 19} has log-prob -inf"), (key, text)
        assert {text for key, text in told.items() if key.endswith("/good")} == {"nothing raised"}


@pytest.mark.distributed
def test_shards_with_an_id_in_common_are_refused_on_every_rank(ranks: tuple[int, list[dict[str, Any]]]) -> None:
    for result in ranks[1]:
        told: dict[str, str] = result["refused"]
        for backend in ("torch", "triton"):
            for name in ("linear", "logits"):
                text = told[f"{backend}/{name}/forgotten"]
                assert text.startswith("ConfigError: vocab_start=0 on rank 1 of the group: ranks 0 and 1 both"), text
                assert "hold the ids 0 to 59;" in text
                text = told[f"{backend}/{name}/one in common"]
                assert "vocab_start=59 on rank 1" in text and "hold the ids 59 to 59;" in text


def test_where_nobody_may_look_shared_ids_make_nan() -> None:
    """The way of CUDA, on a CPU. Empty shards share nothing, wherever they begin."""
    parts = torch.randn(3, 2, 5)
    for first, end, bad in (
        ([0, 60, 60], [60, 60, 90], False),
        ([60, 10, 0], [90, 10, 60], False),
        ([0, 59, 60], [60, 60, 90], True),
        ([0, 0, 0], [30, 30, 30], True),
    ):
        borders = [torch.tensor(x, dtype=torch.float32) for x in (first, end)]
        got = _refuse_overlap(*borders, parts, look=False)
        assert got.isnan().all() if bad else torch.equal(got, parts)
        told = refused(lambda borders=borders: _refuse_overlap(*borders, parts, look=True))
        assert told.startswith("ConfigError: vocab_start=") if bad else told == "nothing raised"


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
