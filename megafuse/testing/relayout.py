"""Load a checkpoint at any layout, look at what it computes there, and save it again from there."""

from pathlib import Path
from typing import Any

import numpy as np


def next_token_logps(checkpoint: Path, parallel: dict[str, Any], tokens: list[int], resave: Path | None) -> list[float]:
    """Log-probs of `tokens[1:]`, each given those before it, in fp32 at the layout `parallel` of the joined world.

    With `resave`, the weights are also loaded in bf16 and saved from this layout by mcore, as a checkpoint below
    that folder. Every rank gets the log-probs.
    """
    import torch

    from megafuse.checkpoint import folder as checkpoints
    from megafuse.checkpoint.state import load_model, model_state, save_state
    from megafuse.config.train import ModelConfig, ParallelConfig
    from megafuse.data.rows import Row, build_row, row_shape
    from megafuse.data.shard import local_row
    from megafuse.data.types import Group
    from megafuse.model.arch import read_arch
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.topology import layout
    from megafuse.training.step import forward_rows, run_model

    config = ParallelConfig(**parallel)
    arch = read_arch(checkpoint)
    ids = np.array(tokens, dtype=np.int32)
    group = Group(0, "x", ids[:1], (ids[1:],), ("x",), np.zeros(1), np.zeros((0, 1), np.int32), np.zeros(0))
    fp32, bf16 = (
        choose_backend(
            ModelConfig(path=checkpoint, layers="torch", attention="sdpa", precision=p),
            config,
            head_dim=arch.head_dim,
            prefix_sharing=True,
        )
        for p in ("fp32", "bf16")
    )
    shape = row_shape(config, 1, fp32)
    row = build_row([group], prefix_sharing=True, row_tokens=-(-len(ids) // shape.multiple) * shape.multiple)

    def step(source: Any, model: Any) -> tuple[Any, Any]:
        item: Row = next(source)
        return run_model(model, item), lambda logps: (logps.sum(), torch.zeros((), dtype=torch.int), logps)

    with layout(config) as topology, torch.no_grad():
        model = build_model(arch, config, topology, fp32)
        load_model(model, topology, checkpoint)
        rows = [local_row(row, topology.cp_rank, topology.cp_size)] * shape.count_multiple
        outputs = forward_rows(model, rows, step, lengths=[row.tokens.numel()] * len(rows), forward_only=True)
        logps = topology.from_last_stage([float(x) for x in outputs[0]] if outputs else None)
        if resave is not None:
            del model
            model = build_model(arch, config, topology, bf16)
            load_model(model, topology, checkpoint)
            folder = topology.on_rank_zero(lambda: checkpoints.begin(resave, 1))
            metadata = {"singleton_local_shards": False}
            save_state({**model_state(model, topology), "content_metadata": metadata}, folder)
            topology.barrier()
            facts = {"step": 1, "optimizer": False}
            topology.on_rank_zero(lambda: checkpoints.commit(folder, checkpoint, facts, keep=1))
        return logps
