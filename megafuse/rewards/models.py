"""Reward models over records: conversations through the model's own chat template, batched by length."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafuse.data.chat import load_tokenizer
from megafuse.data.chunks import Record
from megafuse.data.render import folded, render
from megafuse.errors import ConfigError, DataError
from megafuse.rewards.armorm import ArmoRM, load_whole
from megafuse.rewards.batches import by_length, padded, unused_id
from megafuse.rewards.verify import Update


class Classifier:
    """Any `AutoModelForSequenceClassification` with one output.

    Raises:
        ConfigError: it has several outputs, lacks weights of its own (of the head, say, where the folder holds a
            language model), or cannot be loaded without remote code.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification

        settings = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
        self.model = load_whole(AutoModelForSequenceClassification, folder, **settings)
        self.model.to(device).eval()
        if self.model.config.num_labels != 1:
            raise ConfigError(f"model: {folder} has {self.model.config.num_labels} outputs; a reward model has 1")
        self.vocab_size = int(self.model.get_input_embeddings().num_embeddings)

    def score(self, ids: Tensor, mask: Tensor, pad_id: int) -> Tensor:
        """Scores [n] float32 of right-padded sequences [n, t]."""
        self.model.config.pad_token_id = pad_id  # the classifiers of decoders look for it to find the last token
        scores: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return scores


class RewardModel:
    """Scores every response of records.

    Args:
        kind: armorm or classifier.
        folder: Hugging Face folder, tokenizer and chat template included.
        batch_tokens: padded tokens of a batch.
        max_length: tokens of a conversation; a longer one has no score (`verdict` too_long), it is never cut.
        dtype: of the weights.
        device: where it runs.
        fold_system: a system message becomes the beginning of the first user message.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has embeddings, and what the models raise.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        batch_tokens: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        fold_system: bool = False,
    ) -> None:
        self.folder, self.batch_tokens, self.max_length, self.device = folder, batch_tokens, max_length, device
        self.fold_system = fold_system
        self.tokenizer: Any = load_tokenizer(folder, may_lose_text=True)
        self.model: ArmoRM | Classifier
        if kind == "armorm":
            self.model = ArmoRM(folder, self.tokenizer, dtype=dtype, device=device)
        else:
            self.model = Classifier(folder, dtype=dtype, device=device)
        if len(self.tokenizer) > self.model.vocab_size:
            raise ConfigError(
                f"model: the tokenizer in {folder} has {len(self.tokenizer)} tokens and the model "
                f"{self.model.vocab_size} embeddings: they belong to different models"
            )

    def tokens(self, record: Record, index: int) -> list[int]:
        """The conversation that ends with response `index`, as token ids; BOS comes from the template alone."""
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        answer = {"role": "assistant", "content": record["responses"][index]["text"]}
        if self.fold_system:
            messages = folded(messages)
        try:
            text = render(self.tokenizer, [*messages, answer], generate=False)
        except DataError as e:
            raise DataError(f"prompt {record['prompt_id']!r}: {e}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def __call__(self, records: Sequence[Record]) -> list[list[Update]]:
        """`reward` of each response of each record, or null and a verdict.

        Raises:
            DataError: a score is NaN or infinite, with its prompt and source.
        """
        updates: list[list[Update]] = [[{} for _ in r["responses"]] for r in records]
        places: list[tuple[int, int]] = []
        sequences: list[list[int]] = []
        for i, record in enumerate(records):
            for j, response in enumerate(record["responses"]):
                ids = self.tokens(record, j) if response["text"].strip() else []
                if not ids or len(ids) > self.max_length:
                    updates[i][j] = {"reward": None, "unscored": "too_long" if ids else "empty_text"}
                    continue
                places.append((i, j))
                sequences.append(ids)
        for batch in by_length([len(s) for s in sequences], self.batch_tokens):
            for n, score in zip(batch, self._scores([sequences[n] for n in batch])):
                i, j = places[n]
                if not math.isfinite(score):
                    source, prompt_id = records[i]["responses"][j]["source"], records[i]["prompt_id"]
                    raise DataError(
                        f"{self.folder} gives {score} to a response of {source!r} to prompt {prompt_id!r}; nothing of "
                        "this chunk is kept. A model in float16 overflows: use bfloat16 or float32"
                    )
                updates[i][j] = {"reward": score}
        return updates

    @torch.inference_mode()
    def _scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        pad = unused_id(sequences, self.tokenizer.pad_token_id, self.model.vocab_size)
        ids, mask, lengths = padded(sequences, pad, self.device)
        if isinstance(self.model, ArmoRM):
            scores = self.model.score(ids, mask, lengths)
        else:
            scores = self.model.score(ids, mask, pad)
        return [float(s) for s in scores]
