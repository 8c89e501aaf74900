"""mcore's GPTModel, fed with packed rows and answering with log-probs of response tokens only."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megafuse.kernels.group_loss import GroupLoss, linear_group_loss
from megafuse.kernels.logprob import linear_logprobs
from megafuse.model.rope import RowRotary

HEAD_WORKSPACE = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes of logits that exist at once, by device. A CPU multiplies 256 MiB of them as fast as a GiB."""


class FusionGPT(GPTModel):
    """A pipeline stage of the target model, or one of its chunks.

    Differences from `GPTModel`: rotary angles follow the row's positions, `attention_mask` carries the row's layout,
    and the LM head runs on the rows that predict a response token instead of on every position. Some models scale what
    the embedding gives, and cap their logits.
    """

    def __init__(
        self,
        *args: Any,
        rotary: RowRotary,
        attention: str,
        true_vocab_size: int,
        final_softcap: float | None = None,
        embedding_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.final_softcap = final_softcap
        if self.pre_process and embedding_scale is not None:
            self.embedding.register_forward_hook(scaled_by(embedding_scale))
        self.rotary_pos_emb = rotary
        self.attention = attention
        self.true_vocab_size = true_vocab_size
        if self.post_process:
            # the module keeps its weight, its name and the hooks that gather parameters; what it computes is ours
            self.output_layer.forward = self._logprobs

    def forward(
        self,
        tokens: Tensor,  # [1, t / cp] int64
        positions: Tensor,  # [t / cp] int64
        layout: Tensor,  # [2 or 3, t] int32: segment and parent of each place, -1 pads; under CP also its owner
        targets: Tensor,  # [n] int64: response tokens that this rank's places predict
        target_rows: Tensor,  # [n] int64: the place among this rank's whose hidden state predicts each target
        groups: GroupLoss | None = None,
    ) -> Any:
        """Log-probs of the targets [n] float32 on the last stage, hidden states [t / cp, 1, h] on the others.

        With `groups`, the last stage takes the loss of the row too: what `linear_group_loss` returns.
        """
        self.rotary_pos_emb.positions = positions
        packed = packed_params(layout) if self.attention == "te" else None
        hidden = super().forward(tokens, positions[None], layout, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return self.output_layer(hidden[:, 0], weight, targets, target_rows, groups)

    def _logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, target_rows: Tensor, groups: GroupLoss | None
    ) -> Any:
        tp = self.pg_collection.tp
        options: dict[str, Any] = {
            "row_index": target_rows,
            "vocab_start": tp.rank() * weight.size(0),
            "tp_group": tp if tp.size() > 1 else None,
            "sequence_parallel": self.config.sequence_parallel,
            "softcap": self.final_softcap,
            "accumulate": "auto",
            "vocab_size": self.true_vocab_size,
            "workspace_bytes": HEAD_WORKSPACE["cuda" if hidden.is_cuda else "cpu"],
        }
        if groups is not None:
            return linear_group_loss(hidden, weight, targets, groups, **options)
        return linear_logprobs(hidden, weight, targets, **options)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """mcore would apply the LM head to every position here; `forward` does it for response targets only."""
        return hidden_states


def scaled_by(scale: float) -> Any:
    """A forward hook that multiplies what a module gives by `scale`, rounded to its dtype as published models do."""
    return lambda module, inputs, output: output * torch.tensor(scale, dtype=output.dtype, device=output.device)


def packed_params(layout: Tensor) -> PackedSeqParams:
    """The row as Transformer Engine knows it: cumulative lengths of unshared sequences, padding as one more."""
    segment = layout[0]
    cuts = (segment[1:] != segment[:-1]).nonzero().flatten() + 1
    ends = torch.tensor([segment.numel()], device=layout.device)
    cu = torch.cat((torch.zeros_like(ends), cuts, ends)).to(torch.int32)
    longest = int((cu[1:] - cu[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest
    )
