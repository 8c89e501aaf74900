"""Sampling parameters of source models, as the papers give them.

FuseChat-3.0's table: Gemma, Mistral and Llama at temperature 0.8, top-p 0.95; Qwen (and Qwen-Math) at 0.7, 0.8 and
repetition penalty 1.05; 5 responses an instruction, 8 for coding, 1 for Chinese. FuseRL samples its four sources 5
times by top-p; its table of parameters is not known to us, so those of DeepSeek, and of any unknown source, are our
choice: the first row.
"""

from dataclasses import dataclass

RESPONSES = {"coding": 8, "chinese": 1}
DEFAULT_RESPONSES = 5  # instruction; mathematics is not stated: our choice


@dataclass(frozen=True)
class SamplingParameters:
    """How a source samples; `model` is its name on the hub, for people."""

    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    model: str = ""


def _qwen(model: str) -> SamplingParameters:
    return SamplingParameters(0.7, 0.8, 1.05, model)


REGISTRY: dict[str, SamplingParameters] = {
    "gemma-2-27b": SamplingParameters(model="google/gemma-2-27b-it"),
    "mistral-large-2407": SamplingParameters(model="mistralai/Mistral-Large-Instruct-2407"),
    "llama-3.1-70b": SamplingParameters(model="meta-llama/Llama-3.1-70B-Instruct"),
    "qwen2.5-72b": _qwen("Qwen/Qwen2.5-72B-Instruct"),
    "qwen2.5-math-72b": _qwen("Qwen/Qwen2.5-Math-72B-Instruct"),
    "deepseek-v2-0628": SamplingParameters(model="deepseek-ai/DeepSeek-V2-Chat-0628"),
}
DEFAULT = SamplingParameters()


def responses_of(domain: str) -> int:
    """Responses a prompt of a domain."""
    return RESPONSES.get(domain, DEFAULT_RESPONSES)
