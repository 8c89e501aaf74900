"""What each communication backend may overlap: one table, resolved once a run.

`gloo` overlaps nothing that would gain anything on a CPU, and two of mcore's defaults are wrong on it: outputs of a
stage must not be freed while gloo still reads them, and batched point-to-point calls between two ranks that are both
neighbours of each other are matched in the wrong order (seen: gradients 39 times too large).
"""

from dataclasses import dataclass
from typing import Any

from megafuse.config.train import OverlapConfig, ParallelConfig
from megafuse.errors import ConfigError


@dataclass(frozen=True)
class Policy:
    """The switches of one run, under mcore's names."""

    overlap_grad_reduce: bool
    overlap_param_gather: bool
    overlap_p2p_comm: bool
    batch_p2p_comm: bool
    deallocate_pipeline_outputs: bool
    tp_comm_overlap: bool

    def __str__(self) -> str:
        named = {"grad reduce": self.overlap_grad_reduce, "param gather": self.overlap_param_gather}
        named |= {"p2p": self.overlap_p2p_comm, "tensor": self.tp_comm_overlap}
        return "overlap " + (", ".join(name for name, on in named.items() if on) or "none")


# backend -> switch -> default
TABLE: dict[str, dict[str, bool]] = {
    "gloo": {"grad_reduce": False, "param_gather": False, "tensor": False, "deallocate": False},
    "nccl": {"grad_reduce": True, "param_gather": True, "tensor": False, "deallocate": True},
}


def resolve_policy(
    overlap: OverlapConfig, parallel: ParallelConfig, *, backend: str, distributed_optimizer: bool, te_layers: bool
) -> Policy:
    """The switches for `backend` (`gloo` or `nccl`): what the user set, else the table.

    Raises:
        ConfigError: a switch is asked for that this layout or backend cannot have, naming what it needs.
    """
    table = TABLE[backend]
    reduce = table["grad_reduce"] if overlap.grad_reduce is None else overlap.grad_reduce
    gather = overlap.param_gather
    if gather is None:
        gather = table["param_gather"] and reduce and distributed_optimizer
    tensor = table["tensor"] if overlap.tensor is None else overlap.tensor
    interleaved = parallel.virtual_pipeline > 1
    p2p = interleaved if overlap.p2p is None else overlap.p2p
    needs: list[tuple[Any, bool, str]] = [
        (
            "param_gather",
            gather and not (reduce and distributed_optimizer),
            "overlap.grad_reduce and optim.distributed",
        ),
        (
            "tensor",
            tensor and not (te_layers and parallel.sequence),
            "model.layers = 'te' and parallel.sequence = true",
        ),
        ("p2p", p2p and not interleaved, "parallel.virtual_pipeline > 1"),
    ]
    for name, broken, need in needs:
        if broken:
            raise ConfigError(f"overlap.{name} = true needs {need}")
    if interleaved and not p2p and (backend == "gloo" or parallel.pipeline == 2):
        raise ConfigError(
            f"overlap.p2p = false is wrong with parallel.virtual_pipeline = {parallel.virtual_pipeline} on {backend} "
            f"and {parallel.pipeline} stages: batched messages between two neighbours get mixed up; leave it unset"
        )
    return Policy(
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather,
        overlap_p2p_comm=p2p,
        batch_p2p_comm=not p2p,
        deallocate_pipeline_outputs=table["deallocate"],
        tp_comm_overlap=tensor,
    )
