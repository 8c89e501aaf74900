"""The last rung of verification: do the two folders compute the same logits?

Exact weights do not make an exact model: rope scaling, epsilon and ties live in the configuration. So the checkpoint is
loaded into the real megatron-core model, and its fp32 logits are compared with transformers' on random tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.errors import IntegrityError
from megafuse.model.arch import read_arch

TOLERANCE = 1e-4  # of the largest logit; rounding in fp32 gives about 1e-6


@dataclass(frozen=True)
class LogitsReport:
    """Largest difference and largest logit over `tokens` positions; `agree` is the share of equal argmax."""

    tokens: int
    difference: float
    largest: float
    agree: float


def compare_logits(ckpt: str | Path, hf_dir: str | Path, *, tokens: int = 256, seed: int = 0) -> LogitsReport:
    """Compare the logits of a checkpoint and a Hugging Face folder, both in fp32, on one random sequence.

    tokens: length of the sequence; longer than the knee of a rope scaling (its original context / high_freq_factor) for
    that to be tested, at most what the model allows. Both models are in memory, one after the other.
    Raises IntegrityError where they differ by more than `TOLERANCE` of the largest logit.
    """
    arch = read_arch(ckpt)
    tokens = min(tokens, arch.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, arch.vocab_size, (tokens,), generator=generator)
    theirs, ours = huggingface_logits(Path(hf_dir), row), mcore_logits(Path(ckpt), row)
    report = LogitsReport(
        tokens,
        float((ours - theirs).abs().max()),
        float(theirs.abs().max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )
    if not report.difference <= TOLERANCE * report.largest:  # also where it is not a number
        raise IntegrityError(
            f"{ckpt} and {hf_dir} compute different logits: {report.difference:.3e} apart where the largest is "
            f"{report.largest:.3e}, {report.agree:.1%} of the argmax agree; the weights are equal, the models are not"
        )
    return report


def huggingface_logits(hf_dir: Path, row: torch.Tensor) -> torch.Tensor:
    """transformers' logits of the token ids `row` [t]: [t, vocab] float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(row[None]).logits[0].float().cpu()


def mcore_logits(ckpt: Path, row: torch.Tensor) -> torch.Tensor:
    """The checkpoint's logits of the token ids `row` [t], through megatron-core in this process: [t, vocab] float32."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megafuse.checkpoint.state import load_model
    from megafuse.model.build import build_model, choose_backend
    from megafuse.parallel.topology import layout, process_groups

    arch, parallel = read_arch(ckpt), ParallelConfig()
    backend = choose_backend(ModelConfig(path=ckpt, precision="fp32", attention="sdpa"), prefix_sharing=True)
    with process_groups(), layout(parallel) as topology, torch.no_grad():
        chunks = build_model(arch, parallel, topology, backend)
        load_model(chunks, topology, ckpt)
        model = chunks[0].eval()
        positions = torch.arange(row.numel(), device=topology.device)
        model.rotary_pos_emb.positions = positions
        one_segment = torch.zeros(2, row.numel(), dtype=torch.int32, device=topology.device)
        # GPTModel's forward, past the log-prob head that FusionGPT puts on it: the last hidden states [t, 1, hidden]
        hidden = GPTModel.forward(model, row[None].to(topology.device), positions[None], one_segment)
        tied = arch.tie_word_embeddings
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        return (hidden[:, 0].float() @ weight.float().T)[:, : arch.vocab_size].cpu()
