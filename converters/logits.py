"""The last rung of verification: do the two folders compute the same logits?

Exact weights do not make an exact model: rope scaling, epsilon, windows, caps and ties live in the configuration. So
the checkpoint is loaded into the real megatron-core model, at any layout, and its fp32 logits are compared with
transformers' on random tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.errors import IntegrityError
from megafuse.model.arch import ModelArch, read_arch
from megafuse.parallel.topology import Topology

TOLERANCE = 1e-5  # of the largest logit; rounding in fp32 gives about 1e-6
ROWS = 512  # positions whose logits are compared, the last ones and others spread over the sequence
LEAST_TOKENS, PAST = 256, 16


@dataclass(frozen=True)
class LogitsReport:
    """Largest difference and largest logit over the compared positions of `tokens`; `agree`: share of equal argmax."""

    tokens: int
    difference: float
    largest: float
    agree: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest logit."""
        return self.difference / self.largest


def default_tokens(arch: ModelArch) -> int:
    """A length past the window and past the knee of a rope scaling, where the model has them and allows it."""
    knee = 0.0
    if arch.rope_scaling is not None:
        knee = arch.rope_scaling.original_max_position_embeddings / arch.rope_scaling.high_freq_factor
    wanted = max(LEAST_TOKENS, (arch.window or 0) + PAST, int(knee) + PAST)
    return min(wanted, arch.max_position_embeddings)


def random_tokens(arch: ModelArch, tokens: int, seed: int) -> Tensor:
    """Token ids [min(tokens, what the model allows)] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, arch.vocab_size, (min(tokens, arch.max_position_embeddings),), generator=generator)


def compared_rows(tokens: int) -> Tensor:
    """Positions whose logits are compared. [at most ROWS] int64, rising, the last one among them."""
    spread = torch.linspace(0, tokens - 1, min(tokens, ROWS // 2)).long()
    return torch.cat((spread, torch.arange(max(0, tokens - ROWS // 2), tokens))).unique()


def compare_logits(ckpt: str | Path, hf_dir: str | Path, *, tokens: int | None = None, seed: int = 0) -> LogitsReport:
    """Compare the logits of a checkpoint and a Hugging Face folder, both in fp32, on one random sequence; one process.

    tokens: length of the sequence, at most what the model allows; None: `default_tokens`.
    Raises IntegrityError where they differ by more than `TOLERANCE` of the largest logit.
    """
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.topology import layout, process_groups

    arch, parallel = read_arch(ckpt), ParallelConfig()
    ids = random_tokens(arch, tokens or default_tokens(arch), seed)
    theirs = huggingface_logits(Path(hf_dir), ids)
    settings = ModelConfig(path=Path(ckpt), precision="fp32", attention="sdpa")
    backend = choose_backend(settings, head_dim=arch.head_dim, prefix_sharing=True)
    with process_groups(), layout(parallel) as topology:
        from megafuse.checkpoint.state import load_model

        model = build_model(arch, parallel, topology, backend)
        load_model(model, topology, Path(ckpt))
        ours = mcore_logits(model, topology, arch, parallel, ids)
    assert ours is not None
    report = compare(ours, theirs, len(ids))
    if not report.relative <= TOLERANCE:  # also where it is not a number
        raise IntegrityError(f"{ckpt} and {hf_dir} {describe(report)}")
    return report


def compare(ours: Tensor, theirs: Tensor, tokens: int) -> LogitsReport:
    """How far two sets of logits [rows, vocab] are apart."""
    return LogitsReport(
        tokens,
        float((ours - theirs).abs().max()),
        float(theirs.abs().max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


def describe(report: LogitsReport) -> str:
    """What to say of logits that are too far apart."""
    return (
        f"compute different logits: {report.difference:.3e} apart where the largest is {report.largest:.3e}, "
        f"{report.agree:.1%} of the argmax agree; the weights are equal, the models are not"
    )


def huggingface_logits(hf_dir: Path, ids: Tensor) -> Tensor:
    """transformers' logits of the token ids [t] at `compared_rows`: [rows, vocab] float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(ids[None], logits_to_keep=compared_rows(len(ids))).logits[0].float().cpu()


def mcore_logits(
    model: list[Any], topology: Topology, arch: ModelArch, parallel: ParallelConfig, ids: Tensor
) -> Tensor | None:
    """Logits of the token ids [t] at `compared_rows` through megatron-core at this layout: [rows, vocab] float32.

    `model` holds this rank's bare fp32 chunks. Collective; None on ranks that do not hold the LM head.
    """
    from megafuse.data.rows import build_row, row_shape
    from megafuse.data.shard import local_row
    from megafuse.data.types import Group
    from megafuse.model.build import choose_backend
    from megafuse.training.step import forward_rows

    settings = ModelConfig(path=Path(), precision="fp32", attention="sdpa")
    backend = choose_backend(settings, parallel, head_dim=arch.head_dim, prefix_sharing=True)
    shape = row_shape(parallel, 1, backend)
    multiple = shape.multiple
    tokens = ids.numpy().astype(np.int32)
    none = np.zeros((0, 1), np.int32)
    group = Group(0, "x", tokens[:1], (tokens[1:],), ("x",), np.zeros(1), none, np.zeros(0))
    row = build_row([group], prefix_sharing=False, row_tokens=-(-len(ids) // multiple) * multiple)
    mine = local_row(row, topology.cp_rank, topology.cp_size).to(topology.device)
    restore = torch.argsort(torch.argsort(mine.layout[2], stable=True)) if topology.cp_size > 1 else None
    wanted = compared_rows(len(ids))

    def step(source: Any, chunk: Any) -> tuple[Tensor, Any]:
        item = next(source)
        output = _hidden(chunk, item)
        return output, lambda hidden: (hidden.sum(), torch.zeros((), dtype=torch.int), hidden)

    chunks = [chunk.eval() for chunk in model]
    with torch.no_grad():
        rows = [mine] * shape.count_multiple  # the interleaved schedule takes micro-batches in turns of the stages
        outputs = forward_rows(chunks, rows, step, lengths=[row.tokens.numel()] * len(rows), forward_only=True)
        if not outputs:
            return None
        hidden = outputs[0][:, 0].float()  # [t / cp (/ tp under sequence parallelism), hidden]
        if parallel.sequence:
            hidden = _gather(hidden, topology.tp_group, dim=0)
        if restore is not None:
            hidden = _gather(hidden, topology.cp_group, dim=0)[restore.to(hidden.device)]
        last = chunks[-1]
        tied = arch.tie_word_embeddings
        weight = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
        logits = hidden[wanted.to(hidden.device)] @ weight.float().T
        if topology.tp_size > 1:
            logits = _gather(logits, topology.tp_group, dim=-1)
        logits = logits[:, : arch.vocab_size]
        if arch.final_softcap is not None:
            logits = arch.final_softcap * torch.tanh(logits / arch.final_softcap)
        return logits.cpu()


def _hidden(chunk: Any, row: Any) -> Tensor:
    """GPTModel's forward past the log-prob head that FusionGPT puts on it: hidden states [t / cp, 1, hidden]."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    chunk.rotary_pos_emb.positions = row.positions
    return GPTModel.forward(chunk, row.tokens, row.positions[None], row.layout)


def _gather(part: Tensor, group: Any, *, dim: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
