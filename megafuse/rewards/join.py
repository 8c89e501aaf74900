"""Files of responses, one a source, joined by prompt: what a verifier and a reward model work on."""

from collections.abc import Collection, Sequence
from pathlib import Path

from megafuse.data.chunks import Record, read_raw
from megafuse.errors import DataError


def _question(record: Record) -> object:
    return record.get("messages") or [{"role": "user", "content": record.get("prompt")}]


def join(paths: Sequence[Path], prompts: Path | None = None, *, replaced: Collection[str] = ()) -> list[Record]:
    """One record a prompt with the responses of all files, in the order of the first file (or of `prompts`).

    replaced: keys of the responses that are given new values; all other numbers must be finite (`read_raw`).

    Raises:
        DataError: bad lines; a prompt_id that means another prompt in another file; a file that shares no prompt with
            the others, or has one that `prompts` has not; the same source in two files.
    """
    joined: dict[str, Record] = {}
    home: dict[str, Path] = {}
    if prompts is not None:
        for record in read_raw(prompts, "prompts", replaced=replaced):
            joined[record["prompt_id"]] = {**record, "responses": []}
            home[record["prompt_id"]] = prompts
    for number, path in enumerate(paths):
        shared = False
        for record in read_raw(path, "responses", replaced=replaced):
            name = record["prompt_id"]
            first = joined.get(name)
            if first is None:
                if prompts is not None:
                    raise DataError(f"{path} has responses to prompt {name!r}, which is not in {prompts}")
                joined[name], home[name] = {**record, "responses": list(record["responses"])}, path
                continue
            shared = True
            _add(first, record, home[name], path)
        if number and not shared:
            raise DataError(f"{path} shares no prompt with {paths[0]}: these are responses to other prompts")
    records = [record for record in joined.values() if record["responses"]]
    if not records:
        raise DataError(f"{', '.join(map(str, paths))}: no responses")
    return records


def _add(first: Record, record: Record, home: Path, path: Path) -> None:
    name = record["prompt_id"]
    if _question(first) != _question(record):
        raise DataError(
            f"prompt {name!r} of {path} is not the prompt of that name in {home}: these are responses to other prompts"
        )
    twice = {r["source"] for r in first["responses"]} & {r["source"] for r in record["responses"]}
    if twice:
        raise DataError(f"{path} has responses of source {min(twice)!r} to prompt {name!r}, as an earlier file has")
    first["responses"].extend(record["responses"])
