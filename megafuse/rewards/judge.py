"""A language model on an OpenAI-compatible server as the judge of responses."""

import re
from collections.abc import Sequence
from pathlib import Path

from megafuse.data.chunks import Record
from megafuse.errors import ConfigError
from megafuse.rewards.verify import Update
from megafuse.sampling.client import ChatClient
from megafuse.sampling.threads import in_threads

TEMPLATE = """\
Rate the response of an assistant to the conversation below, for helpfulness, relevance, accuracy, depth and level of
detail, on a scale of 1 to 10. Do not let its length influence you. Give a short explanation, and then the rating in
exactly this form: "Rating: [[5]]".

[Conversation]
{prompt}

[Response]
{response}
"""
_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")


class Judge:
    """Asks for one judgement a response, at temperature 0.

    Raises:
        ConfigError: the template lacks one of its two places.
    """

    def __init__(self, client: ChatClient, model: str, *, workers: int, template: Path | None = None) -> None:
        self.client, self.model, self.workers = client, model, workers
        self.template = TEMPLATE if template is None else template.read_text(encoding="utf-8")
        for place in ("{prompt}", "{response}"):
            if place not in self.template:
                raise ConfigError(f"judge_template: {template} has no {place}")

    def __call__(self, records: Sequence[Record]) -> list[list[Update]]:
        """`reward`, the rating, of each response; null and `unscored` where the judge names none."""
        tasks = [(record, response["text"]) for record in records for response in record["responses"]]
        found = iter(in_threads(lambda task: self._ask(*task), tasks, self.workers))
        return [[next(found) for _ in record["responses"]] for record in records]

    def _ask(self, record: Record, text: str) -> Update:
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
        # one pass, so that a prompt that mentions {response} stays what it is
        parts = re.split(r"(\{prompt\}|\{response\})", self.template)
        question = "".join({"{prompt}": prompt, "{response}": text}.get(part, part) for part in parts)
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        answer = self.client.complete(body)["choices"][0]["message"].get("content") or ""
        ratings = _RATING.findall(answer)
        return {"reward": float(ratings[-1])} if ratings else {"reward": None, "unscored": "no_rating"}
