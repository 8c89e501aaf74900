"""Copies of a parameter on data-parallel ranks are equal in every bit, or hardware (or a bug) has changed one."""

from collections import Counter

import torch
import torch.distributed as dist

from megafuse.errors import ReplicaError
from megafuse.parallel.topology import Topology
from megafuse.training.optim import Engine


def refuse_different_replicas(engine: Engine, topology: Topology, step: int) -> None:
    """Compare a checksum of every parameter over the data-parallel (and context-parallel) ranks. Collective.

    The sum of a parameter's bits as integers: any single flip changes it. Experts that are spread over these ranks
    (`parallel.expert` > 1) have no copies there and are left out. With the distributed optimizer each update gathers
    the parameters anew from their owners: a flip in an owner's shard is then everywhere, and no comparison can see it.

    Raises:
        ReplicaError: on every rank; names the parameters, and the ranks that differ from most others.
    """
    engine.sync_params()
    names, sums = [], []
    for chunk in engine.bare:
        for name, param in chunk.named_parameters():
            if getattr(param, "allreduce", True):
                bits = param.detach().view(torch.int16 if param.element_size() == 2 else torch.int32)
                names.append(name)
                sums.append(bits.sum(dtype=torch.int64))
    mine = torch.stack(sums)
    size = dist.get_world_size(topology.dp_group)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=topology.dp_group)
    table = torch.stack(gathered).tolist()  # [ranks of the group, parameters]
    problems = []
    for name, column in zip(names, zip(*table)):
        usual, count = Counter(column).most_common(1)[0]
        if count < size:
            odd = [dist.get_global_rank(topology.dp_group, i) for i, value in enumerate(column) if value != usual]
            problems.append(f"{name} (ranks {odd if 2 * count > size else 'in no majority'})")
    told = topology.gather_on_rank_zero(problems)

    def refuse() -> None:
        found = sorted({problem for problems in told or [] for problem in problems})
        if found:
            raise ReplicaError(
                f"step {step}: copies of {len(found)} parameters differ between data-parallel ranks: "
                f"{', '.join(found[:5])}. Exclude those nodes and start again: the run goes on from its last checkpoint"
            )

    topology.on_rank_zero(refuse)
