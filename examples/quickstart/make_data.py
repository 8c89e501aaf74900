"""Makes `data.jsonl.gz`: samples answers to `prompts.py` from four sources and scores them with `rules.py`.

    python make_data.py --smollm2 SMOLLM2_HF_FOLDER --qwen QWEN_HF_FOLDER --work work.jsonl --out data.jsonl.gz

Both folders come from `megafuse.converters.gguf.gguf_to_hf`. Every finished (prompt, source) is one line of the work
file, so a killed run goes on where it stopped; `--only SOURCE` with a work file of its own lets several run at once
(put the files together with cat). The random numbers of a response depend on (seed, prompt, source, index)
only, not on what else is in the batch.
"""

import argparse
import gzip
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prompts import SEED, examples, make_prompts
from rules import reward
from transformers import AutoModelForCausalLM, AutoTokenizer

RESPONSES = 4
MAX_NEW_TOKENS = 56
PROMPTS_AT_ONCE = 12


@dataclass(frozen=True)
class Source:
    """One source: a model, and how it is asked. `shots` worked examples stand before the question."""

    name: str
    model: str
    folder: str
    shots: int
    system: str | None
    temperature: float
    top_k: int


CAREFUL = "You are a careful assistant. You give short answers and follow every instruction exactly."
SOURCES = (
    Source("smollm2", "SmolLM2-135M-Instruct", "smollm2", 0, CAREFUL, 0.9, 50),
    Source("smollm2-examples", "SmolLM2-135M-Instruct", "smollm2", 2, CAREFUL, 0.9, 50),
    Source("qwen-coder", "Qwen2.5-Coder-0.5B-Instruct", "qwen", 0, CAREFUL, 1.1, 50),
    Source("qwen-coder-examples", "Qwen2.5-Coder-0.5B-Instruct", "qwen", 1, None, 1.0, 20),
)


@torch.inference_mode()
def sample(
    model: Any, tokenizer: Any, chats: Sequence[Sequence[dict[str, str]]], seeds: Sequence[str], source: Source
) -> list[list[tuple[str, str]]]:
    """RESPONSES answers to each chat, as (text, finish_reason); row r of chat c draws from its own generator.

    Each prompt is run once and its KV cache repeated; rows leave the batch when half of them have finished.
    Sampling is top-k at a temperature by the Gumbel trick: argmax(logits / T + Gumbel noise).
    """
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    rows = len(chats) * RESPONSES
    mask = batch.attention_mask
    out = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(RESPONSES, 0)
    cache.batch_repeat_interleave(RESPONSES)
    mask = mask.repeat_interleave(RESPONSES, 0)
    generators = [
        torch.Generator().manual_seed(random.Random(f"{seed} {r}").getrandbits(60))
        for seed in seeds
        for r in range(RESPONSES)
    ]
    tokens: list[list[int]] = [[] for _ in range(rows)]
    alive = list(range(rows))  # batch position -> row
    for step in range(MAX_NEW_TOKENS):
        values, indices = torch.topk(logits.float() / source.temperature, source.top_k)
        uniform = torch.stack([torch.rand(source.top_k, generator=generators[row]) for row in alive])
        choice = (values - torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))).argmax(1, keepdim=True)
        new = indices.gather(1, choice)[:, 0]
        for position, row in enumerate(alive):
            if not tokens[row] or tokens[row][-1] != tokenizer.eos_token_id:
                tokens[row].append(int(new[position]))
        going = [p for p, row in enumerate(alive) if tokens[row][-1] != tokenizer.eos_token_id]
        if not going or step == MAX_NEW_TOKENS - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        if len(going) <= len(alive) / 2:
            keep = torch.tensor(going)
            cache.batch_select_indices(keep)
            mask, new, alive = mask[keep], new[keep], [alive[p] for p in going]
        position_ids = mask.sum(1, keepdim=True) - 1
        out = model(
            input_ids=new[:, None],
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    answers = [_finish(tokenizer, row) for row in tokens]
    return [answers[i : i + RESPONSES] for i in range(0, rows, RESPONSES)]


def _finish(tokenizer: Any, tokens: list[int]) -> tuple[str, str]:
    stopped = tokens[-1] == tokenizer.eos_token_id
    return tokenizer.decode(tokens, skip_special_tokens=True).strip(), "stop" if stopped else "length"


def chat_of(prompt: dict[str, Any], source: Source) -> list[dict[str, str]]:
    """What `source` is shown for `prompt`; only the last message is in the data set."""
    system = [{"role": "system", "content": source.system}] if source.system else []
    return [*system, *examples(prompt, source.shots), {"role": "user", "content": prompt["prompt"]}]


def sample_source(source: Source, folder: Path, prompts: list[dict[str, Any]], work: Path) -> None:
    """Append the missing (prompt, source) lines of one source to the work file."""
    done = {line["prompt_id"] for line in read_lines(work) if line["source"] == source.name}
    # Chats of like length together: less padding.
    left = sorted((p for p in prompts if p["prompt_id"] not in done), key=lambda p: len(str(chat_of(p, source))))
    if not left:
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for start in range(0, len(left), PROMPTS_AT_ONCE):
        part = left[start : start + PROMPTS_AT_ONCE]
        seeds = [f"{SEED} {p['prompt_id']} {source.name}" for p in part]
        answers = sample(model, tokenizer, [chat_of(p, source) for p in part], seeds, source)
        with work.open("a") as file:
            for prompt, found in zip(part, answers):
                line = {"prompt_id": prompt["prompt_id"], "source": source.name, "answers": found}
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{source.name}: {len(done) + start + len(part)} of {len(prompts)}", flush=True)


def read_lines(work: Path) -> list[dict[str, Any]]:
    """The work file's whole lines; a last line cut by a kill is dropped, and cut off the file."""
    if not work.exists():
        return []
    raw = work.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        work.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def assemble(prompts: list[dict[str, Any]], work: Path, out: Path) -> None:
    """Score the work file's answers and write the data set, sorted by prompt_id, with no time stamp inside."""
    answers = {(line["prompt_id"], line["source"]): line["answers"] for line in read_lines(work)}
    lines = []
    for prompt in sorted(prompts, key=lambda p: p["prompt_id"]):
        rules = prompt["meta"]["rules"]
        responses = [
            {
                "source": source.name,
                "model": source.model,
                "text": text,
                "reward": reward(rules, text, finish),
                "finish_reason": finish,
            }
            for source in SOURCES
            for text, finish in answers[prompt["prompt_id"], source.name]
        ]
        lines.append(json.dumps({**prompt, "responses": responses}, ensure_ascii=False) + "\n")
    out.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))


def main() -> None:
    """Sample what is missing, then write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--qwen", type=Path, required=True, help="Hugging Face folder of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--work", type=Path, default=Path("work.jsonl"), help="finished answers, appended to")
    parser.add_argument("--out", type=Path, default=Path("data.jsonl.gz"))
    parser.add_argument("--only", action="append", help="sample this source only, and write no data set; repeatable")
    parser.add_argument("--limit", type=int, help="only the first so many prompts (for a look)")
    args = parser.parse_args()
    prompts = make_prompts()[: args.limit]
    for source in SOURCES:
        if args.only and source.name not in args.only:
            continue
        sample_source(source, args.smollm2 if source.folder == "smollm2" else args.qwen, prompts, args.work)
    if not args.only:
        assemble(prompts, args.work, args.out)


if __name__ == "__main__":
    main()
