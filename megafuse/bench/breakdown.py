"""Where the time of one training step goes, by marks on the device's own time line.

Every moment of the step belongs to exactly one part, so that the parts, `other` included, add up to the step. A mark
stands wherever the part changes; on a CPU it is a reading of the clock, on CUDA an event in the current stream, so that
nothing waits for the device before the step has ended. What lies between two marks is charged as follows.

    attention      core attention: scores, softmax, weighted values
    linears        QKV and output projections, both MLP projections, MoE routers; with Transformer Engine the norms that
                   its linear layers contain
    head           LM head, log-probs of the response tokens and the loss of them, with their gradients
    optimizer      gradient norm, clipping, update, and clearing of gradients
    communication  collectives and messages between stages while they run alone, waiting for other ranks included;
                   those inside the parts above are taken out of them
    host           rows built and copied to the device
    other          norms, rotary positions, activation function, residuals, embedding, the gaps between all these

Forward is marked by module hooks. Backward of a module begins when the gradient of its output is known and ends when
that of its input is (full backward hooks); autograd runs what lies between them and little else, the weights' gradients
included. A recomputed forward counts for its module. Communication behind computation costs nothing until something
waits for it: that wait is communication where it is a call of the training step, else it belongs to the part that
waits. The hooks cost time themselves, so this step is not one of those whose median is reported.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

PARTS = ("attention", "linears", "head", "optimizer", "communication", "host", "other")
MODULES = {
    "core_attention": "attention",
    "linear_qkv": "linears",
    "linear_proj": "linears",
    "linear_fc1": "linears",
    "linear_fc2": "linears",
    "router": "linears",
    "output_layer": "head",
}
"""Last part of a module's name -> part of the step."""
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class Timeline:
    """Marks of one step, and the time between them by part."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._part, self._waiting = "other", 0
        self._stamps: list[Any] = []
        self._charged: list[str] = []  # [i]: the part from stamp i to stamp i + 1

    def start(self) -> None:
        """The step begins."""
        self._stamps, self._charged, self._part, self._waiting = [self._now()], [], "other", 0

    def stop(self) -> None:
        """The step has ended."""
        self._mark()

    def enter(self, part: str) -> None:
        """From here on the time is `part`'s."""
        self._mark()
        self._part = part

    def leave(self, part: str) -> None:
        """`part` ends. Nothing happens where another part has begun since."""
        if self._part == part:
            self._mark()
            self._part = "other"

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        """The time of this block is communication, whatever part it interrupts."""
        self._mark()
        self._waiting += 1
        try:
            yield
        finally:
            self._mark()
            self._waiting -= 1

    def seconds(self) -> dict[str, float]:
        """Seconds of each part between `start` and `stop`. Call it when the device has nothing left to do."""
        total = dict.fromkeys(PARTS, 0.0)
        for part, before, after in zip(self._charged, self._stamps, self._stamps[1:]):
            total[part] += before.elapsed_time(after) / 1e3 if self._cuda else after - before
        return total

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        if self._stamps:
            self._charged.append("communication" if self._waiting else self._part)
            self._stamps.append(self._now())


@contextlib.contextmanager
def instrumented(timeline: Timeline, engine: Any) -> Iterator[None]:
    """Let the modules and the optimizer of `engine` (training.optim.Engine), and all collectives, mark `timeline`.

    Everything is as before when the block ends.
    """
    with contextlib.ExitStack() as stack:
        for chunk in engine.model:
            for name, module in chunk.named_modules():
                part = MODULES.get(name.rpartition(".")[2])
                if part is not None:
                    _hook(stack, timeline, module, part)
        _wrap_collectives(stack, timeline)
        _wrap_step(stack, timeline, engine)
        yield


def _hook(stack: contextlib.ExitStack, timeline: Timeline, module: Any, part: str) -> None:
    """Mark forward and backward of one module."""

    def begin(*_: Any) -> None:
        timeline.enter(part)

    def end(*_: Any) -> None:
        timeline.leave(part)

    for handle in (
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end),
        module.register_full_backward_pre_hook(begin),
        module.register_full_backward_hook(end),
    ):
        stack.callback(handle.remove)


class _Work:
    """A collective that has been started: its wait is communication, the rest is the collective's own."""

    def __init__(self, work: Any, timeline: Timeline) -> None:
        self._work, self._timeline = work, timeline

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._timeline.communication():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _can_be_awaited(result: Any) -> bool:
    """Whether a collective has returned work to wait for; of a coalesced one, torch returns work that is not."""
    try:
        return hasattr(result, "wait")
    except ValueError:
        return False


def _timed(function: Callable[..., Any], timeline: Timeline) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with timeline.communication():
            result = function(*args, **kwargs)
        return _Work(result, timeline) if _can_be_awaited(result) else result

    return call


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """`owner.name = value` until the stack unwinds; an instance gets the class's attribute back."""
    own = vars(owner)
    stack.callback(*(setattr, owner, name, own[name]) if name in own else (delattr, owner, name))
    setattr(owner, name, value)


def _wrap_collectives(stack: contextlib.ExitStack, timeline: Timeline) -> None:
    """Replace the collectives in torch.distributed, and wherever megatron-core has imported them by name."""
    timed = {id(getattr(dist, name)): _timed(getattr(dist, name), timeline) for name in COLLECTIVES}
    modules = [dist, *(m for n, m in list(sys.modules.items()) if n.startswith("megatron.core") and m is not None)]
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in timed:
                _replace(stack, module, name, timed[id(value)])


def _wrap_step(stack: contextlib.ExitStack, timeline: Timeline, engine: Any) -> None:
    """Mark what the schedule and the optimizer do as wholes."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.utils import get_model_config

    _replace(stack, P2PCommunicator, "_communicate", _timed(P2PCommunicator._communicate, timeline))
    core = get_model_config(engine.model[0])
    _replace(stack, core, "finalize_model_grads_func", _timed(core.finalize_model_grads_func, timeline))

    def part_of(function: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            timeline.enter("optimizer")
            result = function(*args, **kwargs)
            if whole:
                timeline.leave("optimizer")
            return result

        return call

    optimizer = engine.optimizer
    for owner in engine.model:
        _replace(stack, owner, "zero_grad_buffer", part_of(owner.zero_grad_buffer, whole=True))
    _replace(stack, optimizer, "zero_grad", part_of(optimizer.zero_grad, whole=True))
    # from here to the end of the step: the norm, the agreement on it, clipping, and the update follow one another
    _replace(stack, optimizer, "prepare_grads", part_of(optimizer.prepare_grads, whole=False))
