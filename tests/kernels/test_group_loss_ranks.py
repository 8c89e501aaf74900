"""The head and the loss in one loop over a split vocabulary, sequence and row: gloo processes against float64."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from megafuse.testing.distributed import run_distributed
from megafuse.testing.group_workers import CASES, ROWS, case, every_case_on_this_rank
from megafuse.testing.kernel_oracle import worst

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, 3], ids=lambda w: f"{w}ranks")
def ranks(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, dict[str, Any]]]]:
    """`(seed, what each rank computed)`: on CPUs, Triton in its interpreter."""
    pytest.importorskip("triton")
    seed = random.SystemRandom().randrange(2**30)
    print("seed", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the new processes
        return seed, run_distributed(every_case_on_this_rank, request.param, seed)


@pytest.mark.parametrize("mode", ["tp", "sp", "cp"])
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_ranks_equal_one_process(backend: str, name: str, mode: str, ranks: tuple[int, list[Any]]) -> None:
    """Chunks are cut alike on all ranks, each with its collectives; loss and metrics are the same bits everywhere."""
    seed, results = ranks
    p = case(name, seed)
    value, metrics, hidden, weight = p.exact(vocab_size=131)
    assert len(p.blocks.cut(ROWS)) > 1
    # Values are those of float32 logits; bfloat16 gradients are rounded with the logits' and in every chunk's product.
    loose = 0.05 if p.hidden.dtype == torch.bfloat16 else 2e-5
    got = [result[f"{backend}/{name}/{mode}"] for result in results]
    for part in got:
        assert part["value"] == got[0]["value"]
        for key in metrics:
            assert np.array_equal(part[key], got[0][key])
            assert np.allclose(part[key], metrics[key], rtol=1e-4, atol=2e-5), key
    assert abs(float(got[0]["value"]) - float(value)) < 2e-5 * max(1.0, abs(float(value)))
    parts = {key: [torch.from_numpy(part[key]) for part in got] for key in ("hidden", "weight")}
    if mode == "cp":
        assert worst(sum(parts["weight"]), weight) < loose  # type: ignore[arg-type]
        assert worst(torch.stack(parts["hidden"], 1).flatten(0, 1), hidden) < loose
    else:
        assert worst(torch.cat(parts["weight"]), weight) < loose
        whole = [torch.cat(parts["hidden"])] if mode == "sp" else parts["hidden"]
        assert all(worst(part, hidden) < loose for part in whole)
