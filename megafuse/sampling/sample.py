"""`megafuse sample`: N responses of one source to every prompt, chunk by chunk, each chunk whole or absent."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megafuse.config.base import decisive_settings
from megafuse.config.sample import SampleConfig
from megafuse.data.chunks import ChunkedStage, Record, input_digests, read_raw, recorded_setting
from megafuse.data.render import folded
from megafuse.errors import DataError
from megafuse.parallel.precision import bf16_of
from megafuse.rewards.score import model_fingerprint
from megafuse.sampling.client import ChatClient
from megafuse.sampling.engines import Engine, Generated, Request, ServerEngine, VllmEngine
from megafuse.sampling.registry import DEFAULT, REGISTRY, SamplingParameters, responses_of

# settings that change who works and how fast, and not which responses are asked for
_FREE = ("prompts", "output", "model", "job", "jobs", "chunk", "gpu_memory", "cpu_cache_gib", "base_url",
         "api_key_env", "request_seconds", "retries", "concurrency", "chat_template")  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Where a job stands: chunks done of its own, new tokens a second, seconds left."""

    done: int
    total: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class SampleResult:
    """What a job did: chunks made by it, whether the output is there, counts of the responses on disk."""

    made: int
    complete: bool
    counts: dict[str, int]
    damaged: list[Path]


def seed_of(seed: int, source: str, prompt_id: str, number: int) -> int:
    """The seed of one response, 31 bits: the same in every run, whatever else is sampled with it."""
    digest = hashlib.sha256(f"{seed}:{source}:{prompt_id}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def parameters_of(config: SampleConfig) -> SamplingParameters:
    """The source's row of the registry, with what the configuration says instead."""
    given = {name: getattr(config, name) for name in ("temperature", "top_p", "repetition_penalty")}
    return replace(REGISTRY.get(config.source, DEFAULT), **{k: v for k, v in given.items() if v is not None})


def read_prompts(config: SampleConfig) -> list[Record]:
    """The prompts of all files, without the responses that some bring along.

    Raises:
        DataError: bad lines, a prompt_id twice, nothing of the domains.
    """
    records: dict[str, Record] = {}
    for path in config.prompts:
        for record in read_raw(path, "prompts", replaced=()):
            if config.domains and record.get("domain") not in config.domains:
                continue
            if record["prompt_id"] in records:
                raise DataError(f"{path}: prompt_id {record['prompt_id']!r} is in an earlier file too")
            records[record["prompt_id"]] = {k: v for k, v in record.items() if k != "responses"}
    if not records:
        raise DataError(
            f"no prompts in {', '.join(map(str, config.prompts))}" + (" of the domains" * bool(config.domains))
        )
    return list(records.values())


def sample(
    config: SampleConfig, progress: Callable[[Speed], None] | None = None, engine: Engine | None = None
) -> SampleResult:
    """Sample what is not sampled yet.

    Args:
        config: the whole description.
        progress: called after each chunk.
        engine: instead of the one that the configuration describes.

    Raises:
        ConfigError: the engine or the model cannot be used.
        DataError: bad prompts, another run's chunks, two jobs on one chunk. Finished chunks are kept.
        ServerError: the server gave up. Finished chunks are kept.
    """
    config = _settled(config)
    records = read_prompts(config)
    stage = ChunkedStage(
        config.output, _identity(config), records, chunk=config.chunk, job=config.job, jobs=config.jobs
    )
    todo = stage.pending()
    made = 0
    if todo:
        with stage.claim(todo[0]):  # before weights are loaded
            engine = engine or make_engine(config)
            if isinstance(engine, VllmEngine):
                engine.check([_request(config, record, 0) for i in todo for record in stage.part(i)])
        made = _sample(config, stage, todo, engine, progress)
    rows = [row for i in range(stage.count) for row in stage.rows(i) or []]
    counts = Counter(prompts=len(rows))
    for response in (r for row in rows for r in row["responses"]):
        counts["responses"] += 1
        counts[f"finish_reason.{response['finish_reason']}"] += 1
        counts["empty"] += not response["text"].strip()
    found = dict(sorted(counts.items()))
    complete = stage.finish({"counts": found, "config": config.model_dump(mode="json")})
    return SampleResult(made, complete, found, stage.damaged)


def _sample(
    config: SampleConfig,
    stage: ChunkedStage,
    todo: Sequence[int],
    engine: Engine,
    progress: Callable[[Speed], None] | None,
) -> int:
    """Make the chunks; how many were not made by others meanwhile."""
    started, tokens, made = time.monotonic(), 0, 0
    for n, index in enumerate(todo, 1):
        part = stage.part(index)
        with stage.claim(index):
            if stage.rows(index) is None:  # a job of another division of the work may have made it
                requests = [_request(config, r, i) for r in part for i in range(_responses(config, r))]
                generated = engine.generate(requests)
                found = iter(generated)
                rows = [_row(config, r, [next(found) for _ in range(_responses(config, r))]) for r in part]
                stage.write(index, rows)
                tokens += sum(g.tokens for g in generated)
                made += 1
        if progress is not None:
            seconds = time.monotonic() - started
            progress(Speed(n, len(todo), tokens / seconds, seconds / n * (len(todo) - n)))
    return made


def make_engine(config: SampleConfig) -> Engine:
    """The engine of the configuration. Raises ConfigError where it cannot be used."""
    parameters = parameters_of(config)
    if config.engine == "server":
        client = ChatClient(
            config.base_url, api_key_env=config.api_key_env, timeout=config.request_seconds, retries=config.retries
        )
        return ServerEngine(
            client, _model_name(config), parameters, max_tokens=config.max_tokens, concurrency=config.concurrency
        )
    assert config.model is not None, "SampleConfig requires it"
    return VllmEngine(
        config.model,
        parameters,
        max_tokens=config.max_tokens,
        max_model_len=config.max_model_len,
        tensor_parallel=config.tensor_parallel,
        dtype=config.dtype,
        gpu_memory=config.gpu_memory,
        cpu_cache_gib=config.cpu_cache_gib,
        chat_template=config.chat_template,
    )


def _settled(config: SampleConfig) -> SampleConfig:
    """`config` with the `dtype` that vLLM gets here; that of the chunks that are there already."""
    if config.dtype != "auto" or config.engine != "vllm":
        return config
    dtype = recorded_setting(config.output, "dtype")
    if dtype is None:
        # as vLLM does: its engine may be forked from here, which a CUDA context does not survive
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        import torch

        emulated = not torch.cuda.is_available() and not bf16_of(torch.device("cpu")).native
        dtype = "float32" if emulated else "auto"
    return config.model_copy(update={"dtype": dtype})


def _identity(config: SampleConfig) -> dict[str, Any]:
    settings = decisive_settings(config, leave_out=_FREE, later=("system_messages",))
    folder = config.model if config.engine == "vllm" else None
    return {
        "inputs": input_digests(config.prompts),
        "settings": {**settings, **asdict(parameters_of(config)), "model_name": _model_name(config)},
        "model": model_fingerprint(folder) if folder and folder.is_dir() else None,
        "chat_template": input_digests([config.chat_template]) if config.chat_template else None,
    }


def _model_name(config: SampleConfig) -> str:
    return config.model_name or (config.model.name if config.model else config.source)


def _responses(config: SampleConfig, record: Record) -> int:
    return config.n or responses_of(record.get("domain") or "unknown")


def _request(config: SampleConfig, record: Record, number: int) -> Request:
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if config.system_messages == "first_user_turn":
        messages = folded(messages)
    return Request(record["prompt_id"], messages, seed_of(config.seed, config.source, record["prompt_id"], number))


def _row(config: SampleConfig, record: Record, generated: Sequence[Generated]) -> Record:
    model = _model_name(config)
    responses = [
        {"source": config.source, "model": model, "text": g.text, "finish_reason": g.finish_reason} for g in generated
    ]
    return {**record, "responses": responses}
