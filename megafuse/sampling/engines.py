"""What generates: vLLM in this process, or a server. Both take requests with their own seeds and give texts."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megafuse.data.chat import lead_of, load_tokenizer
from megafuse.data.render import render
from megafuse.errors import ConfigError, DataError
from megafuse.sampling.client import ChatClient, ServerError
from megafuse.sampling.registry import SamplingParameters
from megafuse.sampling.threads import in_threads

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Request:
    """One response to make."""

    prompt_id: str
    messages: Messages
    seed: int


@dataclass(frozen=True)
class Generated:
    """One response: its text, why it ended (stop, length, ...), and its tokens where the engine says."""

    text: str
    finish_reason: str
    tokens: int


class Engine(Protocol):
    """Makes a batch of responses, in the order of the requests."""

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """The response to each request."""
        ...


def prompt_tokens(tokenizer: Any, prompt_id: str, messages: Messages, room: int) -> list[int]:
    """The ids of a prompt through the chat template, with BOS from the template alone.

    Raises:
        ConfigError: it starts with two BOS tokens.
        DataError: the template refuses it, or it leaves no room for a response; with its prompt_id.
    """
    try:
        text = render(tokenizer, messages, generate=True)
    except DataError as e:
        raise DataError(f"prompt {prompt_id!r}: {e}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ConfigError(
            f"prompt {prompt_id!r} starts with two BOS tokens ({tokenizer.bos_token!r}): the chat template writes it "
            "and the prompt's text (or the template again) has it too. Give a repaired one: chat_template = PATH"
        )
    if len(ids) >= room:
        raise DataError(
            f"prompt {prompt_id!r} has {len(ids)} tokens, max_model_len is {room}: raise it, or filter the prompts"
        )
    return ids


class VllmEngine:
    """vLLM, offline, in this process.

    Raises:
        ConfigError: vLLM is not installed, or the folder has no tokenizer or chat template.
    """

    def __init__(
        self,
        folder: Path,
        parameters: SamplingParameters,
        *,
        max_tokens: int,
        max_model_len: int,
        tensor_parallel: int,
        dtype: str,
        gpu_memory: float,
        cpu_cache_gib: int,
        chat_template: Path | None = None,
    ) -> None:
        self.parameters, self.max_tokens, self.max_model_len = parameters, max_tokens, max_model_len
        self.tokenizer = load_tokenizer(folder, chat_template)  # before minutes are spent on weights
        self.lead = lead_of(self.tokenizer)
        if tensor_parallel == 1:
            # one process: it dies with us, and its batches do not depend on when a message arrives
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_cache_gib))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import torch
            from vllm import LLM
        except ImportError as e:
            raise ConfigError(
                f'engine = "vllm" needs vLLM, and {sys.executable} has none that works ({e}): pip install -e '
                "'.[vllm]' (in the repository, with an environment of its own), or engine = \"server\""
            ) from None
        self.llm = LLM(
            str(folder),
            dtype=dtype,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=gpu_memory,
            trust_remote_code=False,
            disable_log_stats=True,
            enforce_eager=not torch.cuda.is_available(),  # compiling for a CPU takes longer than it saves
            seed=0,
        )

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse prompts that cannot be sampled, before any is. Raises what `prompt_tokens` raises."""
        for request in requests:
            prompt_tokens(self.tokenizer, request.prompt_id, request.messages, self.max_model_len)

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """All requests as one batch; nothing is cached from earlier ones, so that it does not matter what they were."""
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": prompt_tokens(self.tokenizer, r.prompt_id, r.messages, self.max_model_len)}
            for r in requests
        ]
        given = self.parameters
        sampling = [
            SamplingParams(
                temperature=given.temperature,
                top_p=given.top_p,
                repetition_penalty=given.repetition_penalty,
                max_tokens=min(self.max_tokens, self.max_model_len - len(prompt["prompt_token_ids"])),
                seed=request.seed,
            )
            for request, prompt in zip(requests, prompts)
        ]
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        first = [output.outputs[0] for output in outputs]
        return [
            Generated(o.text.removeprefix(self.lead), o.finish_reason or "unknown", len(o.token_ids)) for o in first
        ]


class ServerEngine:
    """An OpenAI-compatible server; it applies its own chat template."""

    def __init__(
        self, client: ChatClient, model: str, parameters: SamplingParameters, *, max_tokens: int, concurrency: int
    ) -> None:
        self.client, self.model, self.parameters = client, model, parameters
        self.max_tokens, self.concurrency = max_tokens, concurrency

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """One call a request, `concurrency` at a time. Raises ServerError."""
        return in_threads(self._one, requests, self.concurrency)

    def _one(self, request: Request) -> Generated:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": self.parameters.temperature,
            "top_p": self.parameters.top_p,
            "max_tokens": self.max_tokens,
            "seed": request.seed,
        }
        if self.parameters.repetition_penalty != 1:  # not of OpenAI's own interface: only where it is wanted
            body["repetition_penalty"] = self.parameters.repetition_penalty
        answer = self.client.complete(body)
        choice = answer["choices"][0]
        text = (choice.get("message") or {}).get("content")
        if not isinstance(text, str):
            raise ServerError(
                f"{self.client.url}: an answer without text to prompt {request.prompt_id!r}: {choice!r:.200}"
            )
        tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
        whole = re.sub("[\ud800-\udfff]", "\ufffd", text)  # a server that cuts an emoji sends half of it: no text
        return Generated(whole, choice.get("finish_reason") or "unknown", int(tokens))
