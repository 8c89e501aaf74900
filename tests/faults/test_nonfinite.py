"""A NaN on one rank: every rank learns of it before any rank updates a parameter."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megafuse.converters.importer import import_hf
from megafuse.observe.metrics import read_metrics
from megafuse.testing.distributed import run_distributed
from megafuse.testing.faults import poison_gradient
from megafuse.testing.tiny import tiny_run, write_tiny_dataset, write_tiny_llama

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nonfinite")
    import_hf(write_tiny_llama(root / "hf", seed=5), root / "model")
    write_tiny_dataset(root / "sft", "sft", seed=6)
    return root


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["dp2", "tp2", "pp2"])
@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_no_rank_updates(inputs: Path, tmp_path: Path, parallel: dict[str, Any], policy: str) -> None:
    config = tiny_run(
        tmp_path / "run", inputs / "model", inputs / "sft", parallel=parallel, max_steps=3, on_nonfinite=policy
    )
    for seen in run_distributed(poison_gradient, 2, config, 1, 2):
        assert seen["changed"] is False
        assert (seen["error"] or "").startswith("NonFiniteError: step 2") == (policy == "halt")
    records = read_metrics(tmp_path / "run")
    assert [r["updated"] for r in records] == ([True, False] if policy == "halt" else [True, False, True])
    assert records[1]["grad_norm"] is None and "grad_norm" in records[1]["nonfinite"]


def test_a_copy_of_the_summed_gradient_on_one_rank(inputs: Path, tmp_path: Path) -> None:
    """Without the distributed optimizer every rank has all of it: a NaN in the last one's copy is news to the rest."""
    config = tiny_run(
        tmp_path / "run", inputs / "model", inputs / "sft", optim={"distributed": False}, max_steps=1,
        on_nonfinite="skip",
    )  # fmt: skip
    for seen in run_distributed(partial(poison_gradient, reduced=True), 2, config, 1, 1):
        assert seen["changed"] is False and seen["error"] is None
    (record,) = read_metrics(tmp_path / "run")
    assert not record["updated"] and "grad_norm" in record["nonfinite"]
