"""The few collectives of the topology, on real processes."""

import os

import pytest

from megafuse.testing.collectives import every_rank_hears_of_rank_zero, process_facts
from megafuse.testing.distributed import WorkerFailed, run_distributed
from megafuse.testing.faults import die

pytestmark = pytest.mark.distributed


def test_an_error_of_rank_zero_is_raised_on_every_rank_and_the_world_stays_usable() -> None:
    for rank, seen in enumerate(run_distributed(every_rank_hears_of_rank_zero, 3, timeout=120)):
        assert seen == {"value": "from 0", "error": "ConfigError: not today", "after": 3.0, "rank": rank}


def test_a_worker_that_dies_fails_the_call_at_once() -> None:
    with pytest.raises(WorkerFailed, match=r"rank 1 died|rank 0 raised"):
        run_distributed(die, 2, 1, timeout=120)


def test_ranks_are_new_processes_of_one_server_with_the_environment_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, found = "MEGAFUSE_TEST_VARIABLE", []
    for value in ("first", "second"):
        monkeypatch.setenv(name, value)
        ranks = run_distributed(process_facts, 2, name)
        assert [rank["variable"] for rank in ranks] == [value, value]
        found += ranks
    assert len({rank["pid"] for rank in found} | {os.getpid()}) == 5
    (server,) = {rank["parent"] for rank in found}
    assert server != os.getpid()


def test_ranks_that_need_a_cuda_context_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has looked for a device hands its children a driver that they cannot use."""
    monkeypatch.setattr("megafuse.testing.distributed.has_cuda", lambda: True)
    ranks = run_distributed(process_facts, 2, "MEGAFUSE_TEST_VARIABLE")
    assert {rank["parent"] for rank in ranks} == {os.getpid()}
