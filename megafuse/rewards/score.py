"""`megafuse score`: verifier and reward for every response, chunk by chunk, each chunk whole or absent."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafuse.config.base import decisive_settings
from megafuse.config.score import ScoreConfig
from megafuse.data.chunks import ChunkedStage, Record, input_digests, recorded_setting
from megafuse.errors import ConfigError
from megafuse.observe.manifest import atomic_file
from megafuse.parallel.precision import bf16_of
from megafuse.rewards.join import join
from megafuse.rewards.sandbox import Limits
from megafuse.rewards.verify import Update, Verifier

if TYPE_CHECKING:
    import torch

Scorer = Callable[[Sequence[Record]], list[list[Update]]]
Progress = Callable[[int, int], None]
# settings that change who works and how fast, and not what comes out
_FREE = ("inputs", "output", "prompts", "model", "job", "jobs", "workers", "device", "retries", "request_seconds",
         "api_key_env", "chunk", "judge_template")  # fmt: skip


@dataclass(frozen=True)
class ScoreResult:
    """What a job did: chunks made by it, whether the output is there, counts of the whole output where it is."""

    made: int
    complete: bool
    counts: dict[str, int]
    damaged: list[Path]


def score(config: ScoreConfig, progress: Progress | None = None) -> ScoreResult:
    """Score what is not scored yet.

    Args:
        config: the whole description.
        progress: called with (chunks done, chunks of this job) after each chunk.

    Raises:
        ConfigError: a verifier or reward model cannot be used.
        DataError: bad input, a NaN score, another run's chunks, two jobs on one chunk. Finished chunks are kept.
    """
    config = _settled(config)
    replaced = () if config.reward == "keep" else ("reward",)
    records = join(config.inputs, config.prompts, replaced=replaced)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    job, jobs = config.job * ranks + rank, config.jobs * ranks
    stage = ChunkedStage(config.output, _identity(config), records, chunk=config.chunk, job=job, jobs=jobs)
    todo = stage.pending()
    made = 0
    if todo:
        with contextlib.ExitStack() as stack:
            stack.enter_context(stage.claim(todo[0]))  # before a model is loaded
            scorers = _scorers(config, records, stack)
            for n, index in enumerate(todo):
                with contextlib.nullcontext() if n == 0 else stage.claim(index):
                    if stage.rows(index) is None:  # a job of another division of the work may have made it
                        stage.write(index, _scored(config, stage.part(index), scorers))
                        made += 1
                if progress is not None:
                    progress(n + 1, len(todo))
    rows = [row for i in range(stage.count) for row in stage.rows(i) or []]
    counts = dict(sorted(_counts(rows).items()))
    complete = stage.finish({"counts": counts, "config": config.model_dump(mode="json")})
    if complete and config.compare:
        _write_disagreements(config, records, rows)
    return ScoreResult(made, complete, counts, stage.damaged)


def _settled(config: ScoreConfig) -> ScoreConfig:
    """`config` with the `dtype` of a reward model that runs here; that of the chunks that are there already."""
    if config.dtype != "auto" or config.reward not in ("armorm", "classifier"):
        return config
    dtype = recorded_setting(config.output, "dtype") or _native(_device(config.device))
    return config.model_copy(update={"dtype": dtype})


def _native(device: "torch.device") -> str:
    return "bfloat16" if device.type == "cuda" and bf16_of(device).native else "float32"


def _device(name: str) -> "torch.device":
    """The torch device of that name, `auto` resolved. Raises ConfigError where it cannot be used."""
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: this torch is built without CUDA
        there = ", ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"device = {name!r} cannot be used ({reason}); there is {there}") from None
    return device


def _identity(config: ScoreConfig) -> dict[str, Any]:
    paths = [*config.inputs, *([config.prompts] if config.prompts else [])]
    settings = decisive_settings(config, leave_out=_FREE, later=("system_messages",))
    return {
        "inputs": input_digests(paths),
        "settings": settings,
        "model": model_fingerprint(config.model)
        if config.model and config.reward in ("armorm", "classifier")
        else None,
        "judge_template": input_digests([config.judge_template]) if config.judge_template else None,
    }


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder's small files, and names and sizes of its large ones: 16 GB would take minutes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        if size < 1 << 24:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _scorers(config: ScoreConfig, records: Sequence[Record], stack: contextlib.ExitStack) -> list[Scorer]:
    scorers: list[Scorer] = []
    if config.verify == "auto":
        limits = Limits(seconds=config.code_seconds, memory_bytes=config.code_memory)
        verifier = Verifier(
            workers=config.workers, math_seconds=config.math_seconds, limits=limits, unsafe=config.unsafe_no_sandbox
        )
        verifier.prepare(records)
        scorers.append(stack.enter_context(verifier))
    if config.reward in ("armorm", "classifier"):
        scorers.append(_reward_model(config))
    elif config.reward == "judge":
        from megafuse.rewards.judge import Judge
        from megafuse.sampling.client import ChatClient

        client = ChatClient(
            config.base_url, api_key_env=config.api_key_env, timeout=config.request_seconds, retries=config.retries
        )
        scorers.append(Judge(client, config.judge_model, workers=config.workers, template=config.judge_template))
    return scorers


def _reward_model(config: ScoreConfig) -> Scorer:
    import torch

    from megafuse.rewards.models import RewardModel

    assert config.model is not None, "ScoreConfig requires it"
    device = _device(config.device)
    dtype = config.dtype if config.dtype != "auto" else _native(device)  # chunks of before it was resolved say auto
    return RewardModel(
        config.reward,
        config.model,
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        dtype=getattr(torch, dtype),
        device=device,
        fold_system=config.system_messages == "first_user_turn",
    )


def _scored(config: ScoreConfig, part: Sequence[Record], scorers: Sequence[Scorer]) -> list[Record]:
    """The records with what the scorers say set in each response; nothing else of a record changes."""
    rows = [{**record, "responses": [dict(r) for r in record["responses"]]} for record in part]
    for scorer in scorers:
        for row, updates in zip(rows, scorer(part)):
            for response, update in zip(row["responses"], updates):
                response.update(update)
    if config.reward == "correct":
        for row in rows:
            for response in row["responses"]:
                correct = response.get("correct")
                response["reward"] = None if correct is None else float(correct)
    return rows


def _counts(rows: Sequence[Record]) -> Counter[str]:
    counts: Counter[str] = Counter(prompts=len(rows))
    for response in _responses(rows):
        counts["responses"] += 1
        counts[f"correct.{json.dumps(response.get('correct'))}"] += 1
        counts["rewarded" if response.get("reward") is not None else "without_reward"] += 1
        for key in ("verdict", "unscored"):
            if key in response:
                counts[f"{key}.{response[key]}"] += 1
    return counts


def _responses(rows: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield from row["responses"]


def _write_disagreements(config: ScoreConfig, records: Sequence[Record], rows: Sequence[Record]) -> None:
    """Every response that had another `correct`, as `{prompt_id, source, gold, given, found, verdict, text}`."""
    path = config.output.with_name(f"{config.output.name}.disagreements.jsonl")
    with atomic_file(path) as file:
        for record, row in zip(records, rows):
            for old, new in zip(record["responses"], row["responses"]):
                if old.get("correct") != new.get("correct"):
                    line = {
                        "prompt_id": row["prompt_id"],
                        "source": new["source"],
                        "gold": row.get("gold"),
                        "given": old.get("correct"),
                        "found": new.get("correct"),
                        "verdict": new.get("verdict"),
                        "text": new["text"],
                    }
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
