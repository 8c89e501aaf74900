"""Triton kernels over a split vocabulary and split tokens: real gloo processes against one process in float64."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megafuse.testing.distributed import run_distributed
from megafuse.testing.kernel_workers import (
    CASES,
    PADDED,
    every_case_on_this_rank,
    inputs,
    run_linear,
    run_logits,
    run_segments,
    shard,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, 3], ids=lambda w: f"{w}ranks")
def ranks(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, dict[str, Tensor]]]]:
    """`(seed, what each rank computed)`: on CPUs, in the interpreter, whether there is a GPU or not."""
    pytest.importorskip("triton")
    seed = random.SystemRandom().randrange(2**30)
    print("seed", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the new processes
        found = run_distributed(every_case_on_this_rank, request.param, seed)
    return seed, [{n: {k: torch.from_numpy(a) for k, a in case.items()} for n, case in rank.items()} for rank in found]


def exact(name: str, seed: int, run: Any, *parts: slice) -> dict[str, Tensor]:
    """One process, the whole vocabulary, the torch backend on the same numbers in float64."""
    t = {key: value.double() if value.is_floating_point() else value for key, value in inputs(name, seed).items()}
    return (
        run(name, t, *parts, backend="torch", workspace_bytes=1 << 30)
        if run is run_linear
        else run(name, t, *parts, backend="torch")
    )


def close(got: Tensor, expected: Tensor, bound: float) -> None:
    assert got.shape == expected.shape
    if expected.numel():
        assert (got.double() - expected).abs().max() <= bound * expected.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("mode", ["tp", "sp"])
@pytest.mark.parametrize("name", CASES)
def test_linear_sharded_equals_whole(name: str, mode: str, ranks: tuple[int, list[Any]]) -> None:
    seed, results = ranks
    if f"{name}/{mode}" not in results[0]:
        pytest.skip("covered by the other cases")
    got = [result[f"{name}/{mode}"] for result in results]
    whole = exact(name, seed, run_linear, slice(None), slice(0, PADDED))
    for part in got:
        assert torch.equal(part["logp"], got[0]["logp"]) and torch.equal(part["entropy"], got[0]["entropy"])
        assert (part["logp"] <= 0).all()
    close(got[0]["logp"], whole["logp"], 2e-6)
    close(got[0]["entropy"], whole["entropy"], 5e-6 if name != "gaps" else 1e-4)
    # bfloat16: E, v x and the result are cut off to 2^-7 by the interpreter, and so is each shard's part.
    bound = 2.0**-6 if CASES[name][0] == torch.bfloat16 else 1e-4 if name == "gaps" else 5e-6
    close(torch.cat([part["weight"] for part in got]), whole["weight"], bound)
    if mode == "sp":
        close(torch.cat([part["hidden"] for part in got]), whole["hidden"], bound)
    else:
        for part in got:
            close(part["hidden"], whole["hidden"], bound)


@pytest.mark.parametrize("name", CASES)
def test_logits_sharded_equals_whole(name: str, ranks: tuple[int, list[Any]]) -> None:
    seed, results = ranks
    got = [result[f"{name}/logits"] for result in results]
    whole = exact(name, seed, run_logits, slice(0, PADDED))
    for part in got:
        assert torch.equal(part["logp"], got[0]["logp"])
    close(got[0]["logp"], whole["logp"], 2e-6)
    bound = 2.0**-7 if CASES[name][0] == torch.bfloat16 else 1e-5
    close(torch.cat([part["logits"] for part in got], 1), whole["logits"], bound)


@pytest.mark.parametrize("mean", [False, True])
def test_segments_over_context_parallel_ranks(mean: bool, ranks: tuple[int, list[Any]]) -> None:
    seed, results = ranks
    whole = run_segments(seed, slice(None), mean, backend="torch")
    got = [result[f"segments/{mean}"] for result in results]
    for part in got:
        assert torch.equal(part["sums"], got[0]["sums"]) and torch.equal(part["counts"], whole["counts"])
    assert torch.allclose(got[0]["sums"], whole["sums"], rtol=1e-6)
    assert torch.allclose(torch.cat([part["grad"] for part in got]), whole["grad"], rtol=1e-6)


def test_shards_cover_the_vocabulary_unevenly() -> None:
    for world in (2, 3):
        for name in CASES:
            parts = [shard(name, rank, world) for rank in range(world)]
            assert parts[0].start == 0 and parts[-1].stop == PADDED
            assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
            assert len({part.stop - part.start for part in parts}) > 1
