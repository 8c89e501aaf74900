"""The few collectives of the topology, on real processes."""

import pytest

from megafuse.testing.collectives import every_rank_hears_of_rank_zero
from megafuse.testing.distributed import WorkerFailed, run_distributed
from megafuse.testing.faults import die

pytestmark = pytest.mark.distributed


def test_an_error_of_rank_zero_is_raised_on_every_rank_and_the_world_stays_usable() -> None:
    for rank, seen in enumerate(run_distributed(every_rank_hears_of_rank_zero, 3, timeout=120)):
        assert seen == {"value": "from 0", "error": "ConfigError: not today", "after": 3.0, "rank": rank}


def test_a_worker_that_dies_fails_the_call_at_once() -> None:
    with pytest.raises(WorkerFailed, match=r"rank 1 died|rank 0 raised"):
        run_distributed(die, 2, 1, timeout=120)
