"""The time of one call on a CUDA device: the device's own, with a cold cache, without Python's launches."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

SHORTEST, LONGEST = 1 << 22, 1 << 26  # cycles that the device sleeps: about 2 and 35 ms


class Timer:
    """CUDA events around one call, with the L2 cache overwritten before it.

    The device sleeps in front of the first event, so that the host has queued the whole call when that event is
    reached: else the time of the launches, milliseconds where a call is a dozen of them, counts as the kernels'. A call
    that looks at a value waits for the device, and comes behind the event however long the sleep is: its time holds
    what the host did. `late` says so.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.late: dict[Any, list[bool]] = {}  # of each call of a key: was the event reached before all was queued?
        self._sleep: dict[Any, int] = {}
        if device.type == "cuda":
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
            self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(self, call: Callable[[], Any], key: Any) -> float:
        """Milliseconds of one call; `key` names what is called, so that its sleep is known from the call before."""
        cycles = self._sleep.get(key, SHORTEST)
        self._flush.zero_()
        if cycles:
            torch.cuda._sleep(cycles)
        self._start.record()
        call()
        self._end.record()
        late = self._start.query()
        self.late.setdefault(key, []).append(late)
        self._sleep[key] = next_sleep(cycles, late)
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def median(self, call: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds of `repeats` calls after a third as many to warm up."""
        key = object()
        times = [self.once(call, key) for _ in range(repeats + repeats // 3)]
        return statistics.median(times[repeats // 3 :])

    def host_bound(self, key: Any, rounds: int) -> bool:
        """Whether most of the last `rounds` times of `key` hold what the host did."""
        return 2 * sum(self.late.get(key, [])[-rounds:]) > rounds

    def usable(self) -> bool:
        """Whether the device still works: some errors of a kernel leave it useless for this process."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
            torch.cuda.empty_cache()
        return True


def next_sleep(cycles: int, late: bool) -> int:
    """Cycles in front of the next call: twice as many where the event came too early, none where no sleep helps."""
    if not late:
        return cycles
    return 2 * cycles if cycles < LONGEST else 0
