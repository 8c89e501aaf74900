"""A step computed twice from the same weights gives the same bits, or hardware (or a kernel) cannot be relied on."""

from collections.abc import Callable

import torch

from megafuse.errors import ReplicaError
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine
from megafuse.training.step import Outputs


def refuse_different_replay(
    engine: Engine, topology: Topology, step: int, outputs: Outputs, again: Callable[[], Outputs]
) -> Outputs:
    """Compute forward and backward `again` and compare with `outputs` and the gradients that lie in the buffers.

    No parameter changes in between. Returns the second outputs; the second gradients stay. Collective.

    Raises:
        ReplicaError: on every rank, before any update. It names the ranks whose rows had another loss. A fault of a
            backward alone is in the summed gradients of all data-parallel ranks, and names only those who hold them.
    """
    rows, gradients = _rows(outputs), _gradients(engine)
    outputs = again()
    told = topology.gather_on_rank_zero((rows != _rows(outputs), gradients != _gradients(engine)))

    def refuse() -> None:
        forward = [rank for rank, (loss, _) in enumerate(told or []) if loss]
        backward = [rank for rank, (_, gradient) in enumerate(told or []) if gradient]
        if forward or backward:
            what = f"the losses of ranks {forward}" if forward else f"the gradients that ranks {backward} hold"
            raise ReplicaError(
                f"step {step}: computed twice from the same weights, {what} differ. Exclude those nodes and start "
                "again: the run goes on from its last checkpoint. Where it is every node, a kernel is not "
                "deterministic: set guard.replay_every = 0"
            )

    topology.on_rank_zero(refuse)
    return outputs


def _rows(outputs: Outputs) -> list[bytes]:
    """The bits of the losses and metrics of this rank's rows; nothing but on the last pipeline stage."""
    return [output[name].detach().double().cpu().numpy().tobytes() for output in outputs for name in sorted(output)]


def _gradients(engine: Engine) -> list[int]:
    """The sum of the bits, as integers, of every bucket of gradients: any single flip changes it."""
    buffers = [b for chunk in engine.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sums = [bucket.grad_data.view(torch.int32).sum(dtype=torch.int64) for b in buffers for bucket in b.buckets]
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found
