"""Checkpoints under attack: killed saves, damaged bytes, poisoned pickles, a full disk, two jobs on one folder."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megafuse.checkpoint import folder as folders
from megafuse.checkpoint.lock import LOCK, STALE_SECONDS, acquire
from megafuse.checkpoint.pickles import refuse_unknown_pickles
from megafuse.checkpoint.space import refuse_full_disk
from megafuse.converters.importer import import_hf
from megafuse.errors import ConfigError, IntegrityError, StorageError
from megafuse.observe.manifest import file_sha256
from megafuse.testing.distributed import run_distributed
from megafuse.testing.faults import find_newest
from megafuse.testing.tiny import write_tiny_llama

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trust")
    import_hf(write_tiny_llama(root / "hf", seed=1, layers=1), root / "model")
    return root / "model"


def save(root: Path, step: int, model: Path, **changes: Any) -> Path:
    folder = folders.begin(root, step)
    (folder / "weights.bin").write_bytes(bytes([step]) * 1000)
    return folders.commit(folder, model, {"step": step}, **{"keep": 2, **changes})


KILLED_IN = ["shutil.copytree", "file_sha256", "write_json_atomic", "sync_path", "os.rename", "atomic_file",
             "shutil.rmtree"]  # fmt: skip


@pytest.mark.parametrize("point", KILLED_IN)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_killed_save_leaves_the_last_complete_checkpoint(
    model: Path, tmp_path: Path, point: str, after: bool
) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        save(root, step, model)
    child = os.fork()
    if child == 0:  # dies inside the third save
        try:
            *module, name = point.split(".")
            owner = getattr(folders, module[0]) if module else folders
            original = getattr(owner, name)

            def fatal(*args: Any, **kwargs: Any) -> Any:
                if after:
                    original(*args, **kwargs)
                elif name == "rmtree":  # in the middle of it
                    (args[0] / "weights.bin").unlink()
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(owner, name, fatal)
            save(root, 3, model)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    steps = folders.complete_steps(root)
    assert 2 in steps and set(steps) <= {1, 2, 3}
    for step in steps:
        folders.read_manifest(root / folders.step_name(step))
    save(root, 4, model)
    assert folders.complete_steps(root)[-1] == 4 and not list(root.glob("*.tmp"))
    assert (root / folders.LATEST).read_text() == "step_00000004\n"


def test_a_folder_that_lost_its_manifest_is_not_in_the_way(model: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, model)
    (tmp_path / folders.step_name(2) / "manifest.json").unlink()
    assert folders.complete_steps(tmp_path) == [1]
    save(tmp_path, 2, model)
    assert folders.complete_steps(tmp_path) == [1, 2] and (tmp_path / "step_00000002.damaged").is_dir()


def test_pruning_keeps_the_newest_and_the_multiples(model: Path, tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, model, keep=2, keep_every=3)
    assert folders.complete_steps(tmp_path) == [3, 6, 7]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tear(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:40])


def unreadable(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe{")


def outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../step_00000001/common.pt"] = manifest["files"]["common.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def swap(folder: Path) -> None:
    """Another checkpoint's shard, of the same size."""
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-8] + bytes(8) if data[-8:] != bytes(8) else data[:-8] + b"\1" * 8)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(shard(f)), "bytes, its manifest says"),
    "flipped bit": (lambda f: flip(shard(f)), "has SHA-256"),
    "flipped bit in hf": (lambda f: flip(f / "hf" / "config.json"), "has SHA-256"),
    "deleted": (lambda f: shard(f).unlink(), "has None bytes"),
    "swapped": (swap, "has SHA-256"),
    "torn manifest": (tear, "not valid JSON"),
    "manifest is no text": (unreadable, "not valid JSON"),
    "path outside": (outside, "outside its folder"),
}


def test_damage_is_found_by_all_ranks_and_an_older_checkpoint_is_used(model: Path, tmp_path: Path) -> None:
    roots, stricts = [], []
    for name, (damage, _) in DAMAGES.items():
        for strict in (False, True):
            root = tmp_path / f"{name}-{strict}"
            for step in (1, 2):
                shutil.copytree(model, root / folders.step_name(step))
                manifest = json.loads((root / folders.step_name(step) / "manifest.json").read_text())
                (root / folders.step_name(step) / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
            damage(root / folders.step_name(2))
            roots.append(root)
            stricts.append(strict)
    alone = tmp_path / "alone"
    shutil.copytree(model, alone / folders.step_name(1))
    flip(shard(alone / folders.step_name(1)))
    first, second = run_distributed(find_newest, 2, [*roots, alone, tmp_path / "empty"], [*stricts, False, True])
    for (name, (_, message)), loose, strict in zip(DAMAGES.items(), first[0::2], first[1::2]):
        assert loose["found"] == folders.step_name(1), name
        assert "step_00000002.damaged" in loose["said"] and message in loose["said"], (name, loose)
        assert strict["found"] is None and message in strict["error"] and not strict["said"], (name, strict)
    assert "none of the 1 checkpoints" in first[-2]["error"]
    assert first[-1] == {"found": None, "error": "", "said": ""}
    assert [(s["found"], s["error"]) for s in second] == [(s["found"], s["error"]) for s in first]


class Poison:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def poison_metadata(folder: Path, canary: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"x": Poison(canary)}))


def poison_common(folder: Path, canary: Path) -> None:
    torch.save({"x": Poison(canary)}, folder / "common.pt")


def poison_object(folder: Path, canary: Path) -> None:
    """An object beside the tensors, as the states of random generators are."""
    dcp.save({"weight": torch.zeros(3), "rng": Poison(canary)}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("poison", [poison_metadata, poison_common, poison_object])
def test_no_pickle_runs(model: Path, tmp_path: Path, poison: Callable[[Path, Path], None]) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(model, folder)
    refuse_unknown_pickles(folder)
    poison(folder, canary)
    canary.unlink(missing_ok=True)
    with pytest.raises(IntegrityError, match="do not trust"):
        refuse_unknown_pickles(folder)
    assert not canary.exists()


def test_a_hash_is_of_the_bytes(model: Path) -> None:
    manifest = folders.read_manifest(model)
    assert all(known["sha256"] == file_sha256(model / name) for name, known in manifest["files"].items())


def test_a_full_disk_is_told_in_bytes(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path / "checkpoints", 1)
    with pytest.raises(StorageError, match=r"needs 1,152,921,504,606,846,976 bytes, the file system has [\d,]+; free"):
        refuse_full_disk(tmp_path / "checkpoints", 1 << 60)


def test_a_second_job_is_refused(tmp_path: Path) -> None:
    with acquire(tmp_path, {"SLURM_JOB_ID": "7"}) as lock:
        lock.touch()
        host = socket.gethostname()
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on host {host}, Slurm job 7"):
            acquire(tmp_path, {})
        with pytest.raises(ConfigError):  # the same job and the same start
            acquire(tmp_path, {"SLURM_JOB_ID": "7"})
        again = acquire(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})  # the job itself, requeued
    assert (tmp_path / LOCK).exists()  # what the first one released was no longer its own
    again.release()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_dead_owner_is_taken_over(tmp_path: Path) -> None:
    code = "import sys, pathlib; from megafuse.checkpoint.lock import acquire; acquire(pathlib.Path(sys.argv[1]), {})"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / LOCK).exists()
    acquire(tmp_path, {})
    owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**owner, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="on host elsewhere"):
        acquire(tmp_path, {})
    old = (tmp_path / LOCK).stat().st_mtime - STALE_SECONDS - 60
    os.utime(tmp_path / LOCK, (old, old))
    with contextlib.closing(_Released(acquire(tmp_path, {}))):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()


class _Released:
    def __init__(self, lock: Any) -> None:
        self.close = lock.release
