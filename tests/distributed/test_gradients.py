"""Every loss x layout x kind of rows x split into micro-batches: the gradient of each parameter against float64."""

import os

import pytest

from megafuse.config.parity import ParityConfig
from megafuse.doctor.parity import Cell, parity_in_processes
from megafuse.testing.chunked_parity import parity_in_chunks
from megafuse.testing.distributed import run_distributed
from megafuse.testing.mutations import MUTATIONS, parity_with_faults
from megafuse.testing.parity import LOSSES

pytestmark = pytest.mark.distributed

LAYOUTS = {
    1: ("dp",),
    2: ("dp", "do", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "pp2-vpp2-first2", "pp2-first1-last3", "cp2"),
    4: ("tp2-pp2", "tp2-cp2", "pp2-cp2"),
}
MOE_LAYOUTS = ("ep2-do", "tp2-sp-ep2", "cp2-ep2")


def config(**changes: object) -> ParityConfig:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return ParityConfig.model_validate({"seed": seed, "groups": 8, **changes})


def assert_equal_to_the_oracle(cells: list[Cell], layouts: tuple[str, ...], losses: tuple[str, ...]) -> None:
    assert [cell for cell in cells if not cell.ok] == []
    assert max(cell.own_norm_difference for cell in cells) < 1e-12  # the same numbers, added up in another order
    assert len(cells) == len(layouts) * len(losses) * 4
    assert {(c.layout, c.loss, c.rows, c.micro_batches) for c in cells} == {
        (layout, loss, rows, split)
        for layout in layouts
        for loss in losses
        for rows in ("shared", "separate")
        for split in ("many", "few")
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_parameter_of_every_layout(world: int) -> None:
    cells = run_distributed(parity_in_processes, world, config(layouts=LAYOUTS[world]), timeout=580)[0]
    assert_equal_to_the_oracle(cells, LAYOUTS[world], tuple(LOSSES))


def test_every_parameter_of_experts() -> None:
    asked = config(layouts=MOE_LAYOUTS, architecture="qwen3_moe")
    cells = run_distributed(parity_in_processes, 2, asked, timeout=580)[0]
    assert_equal_to_the_oracle(cells, MOE_LAYOUTS, tuple(LOSSES))


def test_long_and_short_responses_together() -> None:
    """Past the length at which attention takes one call a response, and stripes have more than one place."""
    layouts, losses = ("do", "cp2", "pp2"), ("sft", "ln_dpo")
    asked = config(layouts=layouts, losses=losses, groups=4, response_tokens=150)
    assert_equal_to_the_oracle(run_distributed(parity_in_processes, 2, asked)[0], layouts, losses)


def test_sixteen_sources_with_eight_responses_each_stay_one_group() -> None:
    losses = ("sft", "ln_dpo", "rloo")
    asked = config(layouts=("dp",), losses=losses, sources=16, responses=8, groups=1)
    assert_equal_to_the_oracle(run_distributed(parity_in_processes, 1, asked)[0], ("dp",), losses)


def test_rows_that_the_head_cuts_into_chunks() -> None:
    """As every row of a real vocabulary is: the loss, and both gradients, between one chunk and the next."""
    layouts, losses = ("dp", "tp2-sp", "cp2", "pp2-vpp2"), ("ln_dpo", "rloo")
    asked = config(layouts=layouts, losses=losses, groups=5)
    cells, chunks = run_distributed(parity_in_chunks, 2, asked, 12)[0]
    assert_equal_to_the_oracle(cells, layouts, losses)
    assert chunks > 2


def test_the_suite_notices_the_silent_bugs() -> None:
    faults = {name: "cp2" if name == "context sum dropped" else "dp" for name in MUTATIONS}
    asked = config(layouts=("dp", "cp2"), losses=("ln_dpo", "sft"), groups=4)
    found = run_distributed(parity_with_faults, 2, asked, faults, timeout=580)[0]
    assert [cell for cell in found.pop("") if not cell.ok] == []
    for name, cells in found.items():
        caught = [cell for cell in cells if not cell.ok]
        print(name, [(c.loss, c.rows, c.micro_batches) for c in caught])
        assert any(cell.gradient_difference > 1e-2 for cell in caught), name
