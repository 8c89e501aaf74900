"""The same training in plain PyTorch: transformers' model in float64, one response at a time, no packing, no Megatron.

Slow and simple on purpose. It shares with the product only the order of the groups and the files; the losses are
written out again from their equations.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from megafuse.config.loss import LossConfig
from megafuse.config.train import TrainConfig
from megafuse.data.dataset import GroupDataset
from megafuse.data.sampler import BatchSampler
from megafuse.data.types import Group


@dataclass(frozen=True)
class OracleStep:
    """Loss and unclipped gradient norm of one optimizer step.

    `magnitude` is the loss with every summand taken by its absolute value: what fp32 errors are relative to. It equals
    the loss except for RLOO's policy gradient, whose summands A_j * log pi(y_j) cancel to a hundredth of their size.
    """

    loss: float
    grad_norm: float
    magnitude: float


class ExactRouter(torch.nn.Module):
    """A top-k router whose softmax stays in the dtype of its input; transformers' own would fall back to fp32."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k
        self.normalised = getattr(router, "norm_topk_prob", True)  # Mixtral always does

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [t, experts], weights [t, k] and numbers [t, k] of the chosen experts."""
        logits = linear(hidden.reshape(-1, hidden.size(-1)), self.weight)
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen


class ExactZeroCentredNorm(torch.nn.Module):
    """Gemma's norm, x / rms(x) * (1 + weight), in the dtype of its input."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def exact_capped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, softcap: float | None = None,
    scaling: float, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the dtype of its input, as transformers calls it; its own softmax would be fp32.

    query: [b, h, t, d]; key, value: [b, g, t, d]; attention_mask: [b, 1, t, t], added -> ([b, t, h, d], None).
    """
    ways = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(ways, dim=1), value.repeat_interleave(ways, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def double_model(hf_folder: Path) -> Any:
    """transformers' model with float64 weights AND float64 arithmetic.

    Its own RMSNorm, router softmax and capped attention would fall back to fp32, and its fast expert products may
    refuse float64.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import eager_mask

    attention = "sdpa"
    if getattr(AutoConfig.from_pretrained(hf_folder), "attn_logit_softcapping", None) is not None:
        attention = "exact_capped"
        AttentionInterface.register(attention, exact_capped_attention)
        AttentionMaskInterface.register(attention, eager_mask)
    model = AutoModelForCausalLM.from_pretrained(
        hf_folder, attn_implementation=attention, experts_implementation="eager"
    ).double()
    for name, module in list(model.named_modules()):
        exact: torch.nn.Module
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # torch gives that row no gradient, though it is a token like any other
        if hasattr(module, "scalar_embed_scale"):  # kept in fp32
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
            continue
        if hasattr(module, "original_inv_freq"):
            # no file has it, and loading left uninitialised memory there where torch had compiled something before
            module.inv_freq = module.original_inv_freq = type(module)(module.config).inv_freq
            continue
        if type(module).__name__ == "Gemma2RMSNorm":
            exact = ExactZeroCentredNorm(module)
        elif type(module).__name__.endswith("RMSNorm"):
            exact = torch.nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon, dtype=torch.float64)
            exact.weight = module.weight
        elif type(module).__name__.endswith("TopKRouter"):
            exact = ExactRouter(module)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, exact)
    return model


def hf_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by the parameter names of published checkpoints, zeros where there is none.

    A tied output layer has none of its own. transformers 5 keeps all experts of a layer in two tensors, `gate_up_proj`
    [experts, 2 * width, hidden] and `down_proj` [experts, hidden, width]; on disk there are three for each expert.
    """
    parameters = list(model.named_parameters())
    whole = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters}
    return on_disk(whole, mixtral=model.config.model_type == "mixtral")


def on_disk(tensors: dict[str, Tensor], *, mixtral: bool) -> dict[str, Tensor]:
    """Tensors by transformers 5's names in memory -> views of them by their names in files."""
    block = "block_sparse_moe" if mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    result = {}
    for name, tensor in tensors.items():
        layer, fused, kind = name.partition(".mlp.experts.")
        if not fused:
            result[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
            continue
        for expert, part in enumerate(tensor):
            names = (gate, up) if kind == "gate_up_proj" else (down,)
            for half, proj in zip(part.chunk(len(names)), names):
                result[f"{layer}.{block}.experts.{expert}.{proj}.weight"] = half
    return result


def response_logps(model: Any, group: Group) -> Tensor:
    """Sum of log-probs of each response of a group, each with its own copy of the prompt. [n] float64"""
    sums = []
    for response in group.responses:
        ids = torch.from_numpy(np.concatenate((group.prompt, response)).astype(np.int64))[None]
        logps = model(ids).logits[0].log_softmax(-1)
        n = len(response)
        sums.append(logps[-n - 1 : -1].gather(-1, ids[0, -n:, None]).sum())
    return torch.stack(sums)


def group_loss(config: LossConfig, group: Group, logps: Tensor, ref: Tensor, progress: float) -> tuple[Tensor, float]:
    """(loss, magnitude) of one group, from the equations of the papers (FuseRL Eqs. 9-11, DPO, SimPO, RLOO, WRPO)."""
    lengths = group.response_lengths
    h = config.settings()
    beta = h.get("beta", 0.0)
    d = logps - ref
    total, magnitude = torch.zeros((), dtype=torch.float64), 0.0
    for term, weight in zip(group.members, group.weights):
        ids = [int(i) for i in term if i >= 0]
        if config.name == "sft":
            per_token = h["reduction"] == "sequence_mean"
            summands = -logps[ids[:1]] / (lengths[ids[0]] if per_token else 1)
        elif config.name == "rloo":
            summands = _rloo(h, group.rewards[ids], d[ids], logps[ids])
        else:
            w, last = ids[0], ids[-1]
            if config.name == "dpo":
                margin = beta * (d[w] - d[last])
            elif config.name == "ln_dpo":
                margin = beta * (d[w] / lengths[w] - d[last] / lengths[last])
            elif config.name == "simpo":
                margin = beta * (logps[w] / lengths[w] - logps[last] / lengths[last]) - h["gamma"]
            else:  # wrpo: [best source, best own, worst own]
                a = h["alpha_max"] * progress
                margin = beta * (a * d[w] + (1 - a) * d[ids[1]] - d[last])
            smooth = h["label_smoothing"]
            summands = (-(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin))[None]
        total = total + weight * summands.sum()
        magnitude += weight * float(summands.detach().abs().sum())
    return total, magnitude


def _rloo(h: dict[str, Any], rewards: np.ndarray, d: Tensor, logps: Tensor) -> Tensor:
    k = len(rewards)
    shaped = torch.from_numpy(rewards) - h["beta_kl"] * d.detach()
    advantage = torch.stack([shaped[j] - (shaped.sum() - shaped[j]) / (k - 1) for j in range(k)])
    if h["surrogate"] == "clipped_ratio":
        ratio = d.exp()
        clipped = ratio.clamp(1 - h["clip"], 1 + h["clip"])
        return -torch.minimum(ratio * advantage, clipped * advantage) / k
    return -(advantage * logps) / k


def oracle_steps(
    hf_folder: Path, config: TrainConfig, steps: int, *, held_in: torch.dtype = torch.float64
) -> list[OracleStep]:
    """The first `steps` optimizer steps of the run that `config` describes, its model being `hf_folder`.

    held_in: what the weights are rounded to after each update; all arithmetic is in float64. A run in fp32 at a small
        rate does not make Adam's steps as they are: 2e-6 is 16.8 of the ulps of a weight between 1 and 2.
    """
    data = GroupDataset(config.data.dataset)
    sampler = BatchSampler(len(data), config.global_batch_size, config.epochs, config.seed)
    total = min(sampler.total_steps, config.max_steps or sampler.total_steps)
    policy = double_model(hf_folder)
    frozen = copy.deepcopy(policy)
    decayed = [p for p in policy.parameters() if p.ndim > 1]
    others = [p for p in policy.parameters() if p.ndim == 1]
    optim = config.optim
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    results = []
    for step in range(steps):
        groups = [data[int(g)] for g in sampler.batch(step)]
        denominator = float(len(groups))
        if config.loss.reduction == "token_mean":
            denominator = sum(float((g.weights * g.response_lengths[g.members[:, 0]]).sum()) for g in groups)
        adam.zero_grad()
        value = magnitude = 0.0
        for group in groups:
            with torch.no_grad():
                ref = response_logps(frozen, group)
            loss, size = group_loss(config.loss, group, response_logps(policy, group), ref, step / total)
            (loss / denominator).backward()
            value += float(loss.detach()) / denominator
            magnitude += size / denominator
        norm = float(torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters())))
        if 0 < optim.clip_grad < norm + 1e-6:
            for p in policy.parameters():
                p.grad.mul_(optim.clip_grad / (norm + 1e-6))
        for group_ in adam.param_groups:
            group_["lr"] = learning_rate(config, step, total)
        adam.step()
        with torch.no_grad():
            for p in policy.parameters():
                p.copy_(p.to(held_in))
        results.append(OracleStep(value, norm, magnitude))
    return results


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of update `step` (from 0): linear warm-up that ends at the peak, then decay towards `min_lr`."""
    optim = config.optim
    warmup = round(optim.warmup_ratio * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    shift = 1 if warmup else 0
    share = (step + shift - warmup) / (total + shift - warmup)
    curve = 0.5 * (1 + math.cos(math.pi * share)) if optim.schedule == "cosine" else 1 - share
    return optim.min_lr + (optim.lr - optim.min_lr) * curve
