"""Verifiers over whole records: which one a prompt needs, and `correct` and `verdict` for each of its responses."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from megafuse.data.chunks import Record
from megafuse.errors import ConfigError, DataError
from megafuse.rewards.code import grade_code, read_tests
from megafuse.rewards.sandbox import Limits, Sandbox
from megafuse.rewards.workers import WorkerPool

Update = dict[str, Any]


def verifier_of(record: Record) -> str:
    """`code` for prompts with tests, `math` for prompts of the domain math with a gold answer, else `none`."""
    if record.get("tests") is not None:
        return "code"
    gold = record.get("gold")
    return "math" if record.get("domain") == "math" and isinstance(gold, str | int | float) else "none"


class Verifier:
    """Grades the responses of records; a context manager, because it keeps processes.

    Args:
        workers: answers or programs graded at a time.
        math_seconds: after which a mathematics answer has no verdict (`correct` null, `verdict` timeout).
        limits: of each program.
        unsafe: run code without a sandbox where there is none.
    """

    def __init__(self, *, workers: int, math_seconds: float, limits: Limits, unsafe: bool = False) -> None:
        self.workers, self.limits, self.unsafe = workers, limits, unsafe
        self._math = WorkerPool("megafuse.rewards.math_worker", workers, math_seconds)
        self._sandbox: Sandbox | None = None

    def prepare(self, records: Sequence[Record]) -> None:
        """Refuse, before anything is graded, what cannot be.

        Raises:
            ConfigError: there are tests and no sandbox, or mathematics and no math-verify.
            DataError: tests of a prompt that are no code, with its prompt_id.
        """
        kinds = {verifier_of(record) for record in records}
        if "math" in kinds:
            try:
                import math_verify  # noqa: F401
            except ImportError:
                raise ConfigError(
                    "mathematics answers are compared with math-verify: pip install -e '.[math]' in the "
                    'repository, or verify = "none"'
                ) from None
        if "code" in kinds:
            self._sandbox = Sandbox(self.limits, unsafe=self.unsafe)
            for record in records:
                if verifier_of(record) == "code":
                    try:
                        read_tests(record["tests"])
                    except DataError as e:
                        raise DataError(f"prompt {record['prompt_id']!r}: {e}") from None

    def __call__(self, records: Sequence[Record]) -> list[list[Update]]:
        """What is to be set in each response of each record; nothing where its prompt cannot be verified."""
        updates: list[list[Update]] = [[{} for _ in r["responses"]] for r in records]
        places = {"math": [], "code": []}  # type: dict[str, list[tuple[int, int]]]
        for i, record in enumerate(records):
            kind = verifier_of(record)
            if kind != "none":
                places[kind] += [(i, j) for j in range(len(record["responses"]))]
        requests = [{"gold": str(records[i]["gold"]), "text": _text(records[i], j)} for i, j in places["math"]]
        for (i, j), found in zip(places["math"], self._math.map(requests)):
            updates[i][j] = _math_update(found)

        def run(place: tuple[int, int]) -> tuple[bool, str]:
            i, j = place
            assert self._sandbox is not None, "prepare() has seen these records"
            return grade_code(self._sandbox, _text(records[i], j), records[i]["tests"])

        if places["code"]:
            with ThreadPoolExecutor(self.workers) as pool:
                for (i, j), (passed, verdict) in zip(places["code"], pool.map(run, places["code"])):
                    updates[i][j] = {"correct": passed, "verdict": verdict}
        return updates

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._math.__exit__(kind, error, trace)


def _text(record: Record, index: int) -> str:
    text = record["responses"][index]["text"]
    assert isinstance(text, str)
    return text


def _math_update(found: Update | None) -> Update:
    if found is None:
        return {"correct": None, "verdict": "timeout"}
    if found["correct"] is None:
        return {"correct": None, "verdict": found["how"]}
    return {"correct": found["correct"], "verdict": "right" if found["correct"] else "wrong"}
