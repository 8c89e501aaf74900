"""RUN/metrics.jsonl: one JSON object per optimizer step, each step exactly once, whatever was killed in between."""

import io
import json
import math
import os
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from megafuse.errors import ConfigError, IntegrityError
from megafuse.observe.manifest import atomic_file

METRICS_FILE = "metrics.jsonl"
REQUIRED = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "prompts",
    "tokens",
    "tokens_computed",
    "tokens_per_second",
    "step_seconds",
)
"""Fields that every record has. `tokens` counts the tokens of the batch's prompts, each once, and of their responses;
`tokens_computed` what went through the model for them, padding included. `tokens_per_second` is of `tokens`."""


class _Sink(Protocol):
    """Where records go beside the file."""

    def log(self, step: int, record: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends one record per optimizer step to RUN/metrics.jsonl, and to TensorBoard and Weights & Biases if asked.

    Opening it cuts the file back to the steps up to `resume_step` (0: start from nothing), and drops a line that a kill
    left unfinished; the lines kept stay byte for byte. A record is complete on disk, as far as a killed process goes,
    when `log` returns. On ranks with `writer=False` every method does nothing and no file is touched.

    Arguments:
        run_dir: the run folder, created if absent.
        resume_step: the step of the checkpoint that training goes on from; the first record must be a later one.
        writer: True on the one rank that writes.
        tensorboard: also write RUN/tensorboard, where steps after `resume_step` of earlier starts are purged.
        wandb: log to Weights & Biases too; a mapping gives keyword arguments for `wandb.init`. The run's id follows
            from the run folder, so that a resumed run goes on in the same place.
    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
        IntegrityError: the file holds something that is not a metrics record; the message names the line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int,
        writer: bool = True,
        tensorboard: bool = True,
        wandb: bool | Mapping[str, Any] = False,
    ) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step is {resume_step}; it is the step of a checkpoint, or 0 for a new run")
        self.path = Path(run_dir) / METRICS_FILE
        self.last_step = resume_step
        self._file: BinaryIO | None = None
        self._sinks: list[_Sink] = []
        if not writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_back(self.path, resume_step)
        if wandb is not False:
            self._sinks.append(_WandbSink(self.path.parent, {} if wandb is True else wandb))
        if tensorboard:
            self._sinks.append(_TensorBoardSink(self.path.parent / "tensorboard", purge_step=resume_step + 1))
        self._file = open(self.path, "ab")  # noqa: SIM115 (held open for the life of the log)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it.

        Values are numbers, strings, booleans, None, or anything with `.item()` (numpy and torch scalars). A float is
        written as its shortest exact decimal, so it reads back bit-equal; NaN and infinity, which JSON lacks, as null,
        their names listed in the record's `nonfinite`.

        Raises ValueError for a missing field (see REQUIRED) or a step that is not later than the last, and TypeError
        for a value of another kind.
        """
        if self._file is None:
            return
        if missing := [name for name in REQUIRED if name not in record]:
            raise ValueError(f"a metrics record lacks {', '.join(missing)}; it has {', '.join(record)}")
        plain = {name: _scalar(name, value) for name, value in record.items()}
        step = plain["step"]
        if not isinstance(step, int) or step <= self.last_step:
            raise ValueError(
                f"step {step!r} is not later than step {self.last_step}: each step is logged once, in order"
            )
        if nonfinite := [
            name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)
        ]:
            plain |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        # One write call of one whole line: a reader that tails the file sees lines, not parts.
        self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.last_step = step
        for sink in self._sinks:
            sink.log(step, plain)

    def amend(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the last record: what a stop left undone at its step, on the way on from it."""
        if self._file is None:
            return
        records = _records(self.path, self.path.read_bytes())
        if not records or records[-1][0]["step"] != self.last_step:
            return
        start = records[-2][1] if len(records) > 1 else 0
        plain = {name: _scalar(name, value) for name, value in values.items()}
        kept = self.path.read_bytes()[:start]
        self._file.close()
        with atomic_file(self.path) as file:
            file.write(kept + json.dumps({**records[-1][0], **plain}, allow_nan=False).encode() + b"\n")
        self._file = open(self.path, "ab")  # noqa: SIM115
        for sink in self._sinks:
            sink.log(self.last_step, plain)

    def sync(self) -> None:
        """Wait until the file is on the disk itself: before a checkpoint is committed, for a cut of power after it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, TensorBoard and Weights & Biases. May be called twice; later `log` calls do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run, in step order. A last line without its line end (still being written) is left out.

    `path` is a metrics.jsonl or a run folder. Values that were not finite are None, and named in `nonfinite`. Raises
    IntegrityError, naming file and line, where the file is absent, a line is not a record, or steps do not increase.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path} does not exist: give a run folder of `megafuse train`, or its file") from None
    return [record for record, _ in _records(path, content)]


def number(record: Mapping[str, Any], name: str) -> float | None:
    """The number that a record has under `name`; None where there is none, or a null."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _records(path: Path, content: bytes) -> list[tuple[dict[str, Any], int]]:
    """(record, byte offset of its end) of every complete line of `content`."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    last = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        if not line.endswith(b"\n"):
            break  # torn: its line end was never written
        end += len(line)
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError) as error:
            what = "has no step" if isinstance(error, KeyError) else "is not a JSON object"
            raise IntegrityError(f"{path}, line {number} {what}: {line[:80]!r}; remove the line or the file") from None
        if not isinstance(step, int) or step <= last:
            raise IntegrityError(
                f"{path}, line {number} is step {step!r} after step {last}: two runs wrote into one folder; "
                "give each its own, or remove the file"
            )
        last = step
        found.append((record, end))
    return found


def _cut_back(path: Path, resume_step: int) -> None:
    """Leave only the complete lines of steps up to `resume_step`; by rename, so that a kill here loses nothing."""
    if not path.exists():
        return
    content = path.read_bytes()
    keep = max((end for record, end in _records(path, content) if record["step"] <= resume_step), default=0)
    if keep < len(content):
        with atomic_file(path) as file:
            file.write(content[:keep])


def _scalar(name: str, value: Any) -> int | float | str | bool | None:
    """`value` as a JSON scalar; numpy and torch scalars by their `item`."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, int | float | str):
        return value
    raise TypeError(f"metric {name!r} is a {type(value).__name__}, {value!r}: log a number, a string or None")


class _TensorBoardSink:
    """RUN/tensorboard. The purge makes viewers forget what an earlier start wrote after the checkpoint."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it costs a second, and only the writer needs it

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        # Old-style scalars: readers of the new style (tensors) do not all obey the purge.
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    """Weights & Biases, with `step` as a logged axis: its own counter cannot go back, which a resumed run must."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError:
            raise ConfigError(
                "observe.wandb asks for Weights & Biases, which is not installed: "
                "run `pip install -e '.[wandb]'` in the repository, or switch observe.wandb off"
            ) from None
        name = str(run_dir.resolve())
        identity = {"id": sha256(name.encode()).hexdigest()[:16], "name": run_dir.resolve().name}
        self._run = wandb.init(**{"dir": name, "resume": "allow", **identity, **settings})
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in record.items() if isinstance(value, int | float)})

    def close(self) -> None:
        self._run.finish()
