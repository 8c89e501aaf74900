"""Model FLOPs of a step from what it really computes, and the published peak of a device: together, MFU.

A multiply and an add count as two. For one decoder layer of width h, ffn f, n query and k key/value heads of size d:

    linear weights   W = h*(n + 2k)*d + n*d*h + 3*h*f      (q k v, output, gate up down)
                     with E experts of width e, c of them a token: 3*h*e*c + h*E (the router) in place of 3*h*f
    forward          2 * W            a computed token     and  4*d*n  an attended (query, key) pair
    LM head          2 * h * V        a row of logits: only rows that predict a response token, each once
    backward         twice the forward: one product for the input's gradient, one for the weight's

so a step costs 6*L*W*tokens + 12*d*n*pairs + 6*h*V*head_rows, with the pairs of all L layers: the accounting of PaLM
(appendix B), with the pairs of the real mask in place of S^2. A layer with a sliding window (Gemma 2, Mistral) has the
pairs that its window admits and no others, so layers may differ. Computed tokens and pairs, not padding: prefix sharing
lowers the FLOPs and the time alike, so MFU stays comparable; so it is with windows, as far as the kernel skips what
they hide (`flex` skips whole blocks, `sdpa` nothing). Recomputation is not counted (that would be HFU); norms, softmax
and the embedding look-up are left out, as everywhere.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from megafuse.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megafuse.model.arch import ModelArch


def flops_per_token(arch: "ModelArch") -> int:
    """Forward FLOPs of one token in all linear layers but the LM head; of experts, those that the token is sent to."""
    query_key_value = arch.hidden_size * (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    output = arch.num_heads * arch.head_dim * arch.hidden_size
    return 2 * arch.num_layers * (query_key_value + output + _mlp_weights(arch))


def _mlp_weights(arch: "ModelArch") -> int:
    """Weights of one layer's MLP that a token meets: all of a gated MLP, or the router and the chosen experts."""
    if arch.num_experts is None:
        return 3 * arch.hidden_size * arch.ffn_hidden_size
    if arch.experts_per_token is None or arch.moe_ffn_hidden_size is None:
        raise ConfigError(
            f"a model with num_experts = {arch.num_experts} needs experts_per_token and moe_ffn_hidden_size, got "
            f"{arch.experts_per_token} and {arch.moe_ffn_hidden_size}; read the architecture with read_arch"
        )
    experts = arch.experts_per_token * 3 * arch.hidden_size * arch.moe_ffn_hidden_size
    return experts + arch.hidden_size * arch.num_experts


def flops_per_pair(arch: "ModelArch") -> int:
    """Forward FLOPs of one attended (query, key) pair of one layer: its score and its weighted value."""
    return 4 * arch.num_heads * arch.head_dim


def flops_per_head_row(arch: "ModelArch") -> int:
    """Forward FLOPs of one row of logits."""
    return 2 * arch.hidden_size * arch.vocab_size


def model_flops(arch: "ModelArch", tokens: int, head_rows: int, pairs: int, backward: bool = True) -> int:
    """FLOPs that the model asks for, forward and (unless `backward` is False) backward. Exact integers.

    Arguments:
        arch: sizes of the model (gated MLP, or experts that are gated MLPs).
        tokens: tokens computed, padding excluded; a shared prompt once.
        head_rows: distinct rows of logits.
        pairs: (query, key) pairs that the attention masks admit, summed over rows AND layers (see `layer_pairs`).
        backward: False for a forward-only pass, such as the reference model's.
    """
    forward = tokens * flops_per_token(arch) + pairs * flops_per_pair(arch) + head_rows * flops_per_head_row(arch)
    return 3 * forward if backward else forward


def group_pairs(
    prompt_length: int, response_lengths: Iterable[int], prefix_sharing: bool, window: int | None = None
) -> int:
    """Attended (query, key) pairs of one prompt group in one layer: causal, a response sees the prompt and itself only.

    A query at position p (a response continues its prompt's positions) sees min(p + 1, window) keys, so the first n
    positions see T(n) = m(m+1)/2 + (n-m)*window pairs, m = min(n, window), and n(n+1)/2 without a window. With P
    prompt tokens and responses of R_i: T(P) + sum_i (T(P+R_i) - T(P)) where the prompt is shared, and sum_i T(P+R_i)
    where each response carries its own copy.
    """
    lengths = np.asarray(list(response_lengths), dtype=np.int64)
    offsets = np.array([0, len(lengths)])
    return int(_pairs(np.array([prompt_length]), lengths, offsets, prefix_sharing, window)[0])


def layer_pairs(
    arch: "ModelArch",
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
    offsets: np.ndarray,
    prefix_sharing: bool,
) -> np.ndarray:
    """Attended pairs of every group, summed over the layers of `arch`, each with its window, int64 [groups].

    prompt_lengths [groups]; the responses of group g are response_lengths[offsets[g] : offsets[g + 1]].
    """
    windowed = len(arch.window_layers) if arch.window is not None else 0
    lengths = (prompt_lengths, response_lengths, offsets, prefix_sharing)
    pairs = (arch.num_layers - windowed) * _pairs(*lengths, None)
    return pairs + windowed * _pairs(*lengths, arch.window) if windowed else pairs


def _pairs(
    prompts: np.ndarray, responses: np.ndarray, offsets: np.ndarray, prefix_sharing: bool, window: int | None
) -> np.ndarray:
    def first(positions: np.ndarray) -> np.ndarray:
        full = positions if window is None else np.minimum(positions, window)
        return full * (full + 1) // 2 + (positions - full) * (window or 0)

    prompts, counts = prompts.astype(np.int64), np.diff(offsets)
    whole = first(np.repeat(prompts, counts) + responses)
    totals = np.diff(np.concatenate(([0], np.cumsum(whole)))[offsets])
    return totals - (counts - 1) * first(prompts) if prefix_sharing else totals


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the part of the devices' dense peak that `flops` in `seconds` comes to, 0 to 1.

    `peak` is FLOP/s of ONE device; None (an unknown device, a CPU) gives None. Raises ConfigError for a peak, number of
    devices or time that is not positive.
    """
    if peak is None:
        return None
    if not (peak > 0 and devices > 0 and seconds > 0):
        raise ConfigError(
            f"MFU needs positive numbers, not peak {peak} FLOP/s, {devices} devices, {seconds} s; "
            "set observe.peak_tflops to the dense peak of one device"
        )
    return flops / (seconds * devices * peak)


# Dense BF16/FP16 tensor-core TFLOP/s as the makers publish them (half of the figure "with sparsity"). First match wins.
# The name is what torch.cuda.get_device_name() gives, e.g. "NVIDIA H100 80GB HBM3" for the SXM module.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB[23]00\b", 2500),
    (r"\bB[23]00\b", 2250),
    (r"\bB100\b", 1750),
    (r"\bH[12]00\b.*\bNVL\b", 835),
    (r"\bH[18]00\b.*\bPCIe\b", 756),
    (r"\bG?H[128]00\b", 989),
    (r"\bH20\b", 148),
    (r"\bA[18]00\b", 312),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165),
    (r"\bA10\b", 125),
    (r"\bRTX A6000\b", 154.8),
    (r"\bL40S\b", 362),
    (r"\bL40\b", 181),
    (r"\bL20\b", 119.5),
    (r"\bL4\b", 121),
    (r"\bMI300X\b|\bMI325X\b", 1307),
    (r"\bMI250X\b", 191.5),  # torch sees each of the two dies of a module as a device
)


def run_peak_flops(peak_tflops: float | None, device: "torch.device", precision: str) -> float | None:
    """The peak that a run's MFU is taken of, FLOP/s of one device: what its user gave, else the device's, by its name.

    None on a CPU and on a device that is not listed.
    """
    if peak_tflops:
        return peak_tflops * 1e12
    if device.type != "cuda":
        return None
    import torch

    return device_peak_flops(torch.cuda.get_device_name(), precision)


def device_peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None where it is not known (CPUs, unlisted GPUs, slices, other dtypes).

    Arguments:
        device_name: `torch.cuda.get_device_name()`.
        dtype: the compute type: `bf16`, `fp16`, or torch's names for them, with or without `torch.`; others give None,
            since what the tensor cores then run (FP32, TF32, FP8) is a setting that the name does not tell.
    """
    # A MIG slice has a fraction of the device that it is named after.
    half = str(dtype).removeprefix("torch.") in ("bf16", "bfloat16", "fp16", "float16")
    if not half or re.search(r"\bMIG\b", device_name):
        return None
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_name.replace("-", " "), re.IGNORECASE):
            return tflops * 1e12
    return None
