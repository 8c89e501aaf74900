"""Several jobs: the same bytes as one, memory and progress as promised, and nothing left of what failed."""

import errno
import filecmp
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megafuse.cli.convert import COMMANDS
from megafuse.converters import dcp_writer, exporter
from megafuse.converters.exporter import export_hf
from megafuse.converters.folders import new_folder
from megafuse.converters.importer import dry_run, import_hf
from megafuse.converters.jobs import Meter, Stopped, run_jobs
from megafuse.converters.safetensors_io import SafetensorsFolder
from megafuse.errors import ConfigError, IntegrityError, StorageError
from megafuse.testing.families import WRITERS, publish

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    folder = tmp_path_factory.mktemp("model") / "hf"
    WRITERS["mixtral"](folder, seed=seed, layers=3, hidden=32, heads=4, kv_heads=2, vocab=53, tied=False)
    return publish(folder, shards=3)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in several checkpoint files, as a large one has."""
    monkeypatch.setattr(dcp_writer, "_SMALLEST_FILE", 30_000)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("convert")]


def assert_same_folder(one: Path, two: Path, but: tuple[str, ...] = ()) -> None:
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file() and p.name not in but)
    others = sorted(p.relative_to(two).as_posix() for p in two.rglob("*") if p.is_file() and p.name not in but)
    assert names == others
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.usefixtures("many_files")
def test_any_number_of_jobs_writes_the_same_bytes(tmp_path: Path, model: Path) -> None:
    import_hf(model, tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.distcp"))) >= 5
    for jobs in (2, 7):
        import_hf(model, tmp_path / "ckpt", jobs=jobs, overwrite=True)
        assert_same_folder(tmp_path / "one", tmp_path / "ckpt", but=("manifest.json",))
        manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "ckpt")]
        assert manifests[0]["files"] == manifests[1]["files"]
        assert manifests[0]["weights_sha256"] == manifests[1]["weights_sha256"]
        export_hf(tmp_path / "ckpt", tmp_path / "back", jobs=jobs, overwrite=True)
        assert_same_folder(model, tmp_path / "back")


@pytest.mark.usefixtures("many_files")
def test_jobs_run_side_by_side(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads meet in their first read, in both directions: one after the other, they would never meet."""
    meeting = threading.Barrier(3, timeout=60)
    met: set[int] = set()

    def together(right):
        def read(self, name, start, stop, out):
            if threading.get_ident() not in met:
                meeting.wait()
                met.add(threading.get_ident())
            right(self, name, start, stop, out)

        return read

    monkeypatch.setattr(SafetensorsFolder, "read", together(SafetensorsFolder.read))
    import_hf(model, tmp_path / "ckpt", jobs=3)
    assert len(met) == 3
    met.clear()
    monkeypatch.setattr(exporter.HashedReads, "read", together(exporter.HashedReads.read))
    export_hf(tmp_path / "ckpt", tmp_path / "back", jobs=3)
    assert len(met) == 3


def test_an_error_in_one_job_ends_all() -> None:
    meter, started, ended = Meter(100), threading.Barrier(3, timeout=20), []

    def endless() -> None:
        started.wait()
        try:
            while True:
                meter.add(1)
                time.sleep(0.001)
        finally:
            ended.append("endless")

    def fails() -> None:
        started.wait()
        raise IntegrityError("the third")

    def never() -> None:
        ended.append("never")

    with pytest.raises(IntegrityError, match="the third"):
        run_jobs([endless, endless, fails, never], 3, meter)
    assert ended == ["endless", "endless"] and not running()
    with pytest.raises(Stopped):
        meter.add(1)
    assert run_jobs([lambda: 1, lambda: 2, lambda: 3], 2, Meter(0)) == [1, 2, 3]


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("jobs", [1, 4])
def test_a_damaged_tensor_leaves_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    import_hf(model, tmp_path / "ckpt")
    right = SafetensorsFolder.read

    def read(self, name, start, stop, out):
        if name == "model.layers.1.block_sparse_moe.experts.2.w2.weight":
            raise IntegrityError(f"{name} is damaged")
        right(self, name, start, stop, out)

    monkeypatch.setattr(SafetensorsFolder, "read", read)
    with pytest.raises(IntegrityError, match=r"experts\.2\.w2\.weight is damaged"):
        import_hf(model, tmp_path / "out", jobs=jobs)
    monkeypatch.undo()
    stored = sorted((tmp_path / "ckpt").glob("*.distcp"))[3]
    (tmp_path / "ckpt" / "manifest.json").unlink()
    os.truncate(stored, stored.stat().st_size // 2)
    with pytest.raises(IntegrityError, match=stored.name):
        export_hf(tmp_path / "ckpt", tmp_path / "out", jobs=jobs)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"] and not running()


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    import_hf(model, tmp_path / "ckpt")
    real, room = os.pwrite, [5]

    def full(fd: int, data: bytes, at: int) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="the disk is full"):
        export_hf(tmp_path / "ckpt", tmp_path / "out", jobs=jobs)
    monkeypatch.undo()
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(StorageError, match=r"needs .* bytes, 1,000 are free"):
        export_hf(tmp_path / "ckpt", tmp_path / "out", jobs=jobs)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


TINY_DISK = """
import sys
from pathlib import Path
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
from megafuse.converters import folders, importer
from megafuse.errors import StorageError
hf, disk, action = sys.argv[1:]
folders.free_bytes = importer.free_bytes = lambda out: 1 << 40  # what another program takes after the question
try:
    import_hf(hf, disk + "/out", jobs=3) if action == "import" else export_hf(hf, disk + "/out", jobs=3)
except StorageError as error:
    print(error)
print(sorted(p.name for p in Path(disk).iterdir()))
"""


@pytest.mark.parametrize("action", ["import", "export"])
def test_a_real_disk_that_fills_up(tmp_path: Path, model: Path, action: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=100k none {disk} && exec"
    allowed = (
        shutil.which("unshare")
        and subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} true"], capture_output=True).returncode == 0
    )
    if not allowed:
        pytest.skip("no disk of its own can be mounted here (unshare -rm)")
    source = model
    if action == "export":
        import_hf(model, tmp_path / "ckpt")
        source = tmp_path / "ckpt"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} "$0" -c "$1" "$2" "$3" "$4"',
         sys.executable, TINY_DISK, str(source), str(disk), action],
        capture_output=True, text=True, env=ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    assert "the disk is full, nothing was left behind" in said and left == "[]"


def test_progress_counts_every_byte_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], many_files: None
) -> None:
    told: list[tuple[int, int]] = []
    report = import_hf(model, tmp_path / "ckpt", jobs=3, show=lambda *now: told.append(now))
    assert told[0] == (0, report.bytes) and told[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    told.clear()
    export_hf(tmp_path / "ckpt", tmp_path / "back", jobs=3, show=lambda *now: told.append(now))
    assert told[0] == (0, report.bytes) and told[-1] == (report.bytes, report.bytes)
    for name, settings in (("import", {"hf_dir": model}), ("export", {"ckpt": tmp_path / "ckpt"})):
        command, run = COMMANDS[name]
        assert run(command(**settings, out=tmp_path / f"by-{name}", jobs=2)) == 0
        said = capsys.readouterr()
        assert f"{name}, MB  0/1" in said.err and "1/1 (100.0%)" in said.err and "MB/s" in said.err
        assert "MB/s" not in said.out.splitlines()[-1]


def test_settings_that_cannot_be(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="jobs = 0 must be at least 1"):
        import_hf(model, tmp_path / "no", jobs=0)
    with pytest.raises(ConfigError, match="block_mb = 0 must be at least 1"):
        import_hf(model, tmp_path / "no", block_mb=0)
    one, four = (dry_run(model, tmp_path / "no", jobs=jobs).peak_rss_mib for jobs in (1, 4))
    assert four - one == 3 * 2 * 64
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from megafuse.converters import dcp_writer, jobs
from megafuse.converters.exporter import export_hf
from megafuse.converters.importer import import_hf
dcp_writer._SMALLEST_FILE = 30_000
add = jobs.Meter.add
def slowly(self, count):
    print("block", flush=True)
    time.sleep(0.02)
    add(self, count)
jobs.Meter.add = slowly
action, source, out = sys.argv[1:]
import_hf(source, out, jobs=3, overwrite=True) if action == "import" else export_hf(source, out, jobs=3, overwrite=True)
"""


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(("action", "before"), [("import", False), ("export", True)])
def test_killed_at_any_moment_it_is_absent_or_whole(tmp_path: Path, model: Path, action: str, before: bool) -> None:
    """`before`: there is an older folder, which may be there or away, but not in part."""
    import_hf(model, tmp_path / "ckpt")
    convert, source = (import_hf, model) if action == "import" else (export_hf, tmp_path / "ckpt")
    convert(source, tmp_path / "wanted")
    out = tmp_path / "place" / "out"
    older = Path(shutil.copytree(model, out)) if before else None
    if older:
        (out / "older.txt").write_text("older")
    kept = shutil.copytree(out, tmp_path / "kept") if older else None
    ends = []
    out.parent.mkdir(exist_ok=True)
    for blocks in (1, 2 + os.urandom(1)[0] % 40, 2 + os.urandom(1)[0] % 80):
        command = [sys.executable, "-c", SLOW, action, str(source), str(out)]
        with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(blocks):
                process.stdout.readline()
            process.kill()
        beside = [p.name for p in out.parent.iterdir() if p != out]
        assert sum(".tmp-" in name for name in beside) <= 1, "of the run before this one nothing is left"
        ends.append((blocks, out.exists(), beside))
        if out.exists():
            wanted = kept if kept and (out / "older.txt").exists() else tmp_path / "wanted"
            assert_same_folder(wanted, out, but=("manifest.json",))
    print(ends)
    assert any(beside for _, _, beside in ends), "no run was killed while it wrote"
    convert(source, out, overwrite=True, jobs=2)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert_same_folder(tmp_path / "wanted", out, but=("manifest.json",))


def test_what_lives_beside_is_left_alone(tmp_path: Path) -> None:
    """A folder that another process works in, and names that only look alike."""
    dead = tmp_path / f"out.tmp-{'0' * 32}"
    alike = [tmp_path / "out.tmp-notes", tmp_path / f"other.tmp-{'0' * 32}", tmp_path / f"out.tmp-x{'0' * 32}"]
    for folder in (dead, *alike):
        folder.mkdir()
    code = (
        "import sys; from megafuse.converters.folders import new_folder\n"
        "with new_folder(sys.argv[1], overwrite=False, inputs=()) as work: (work / '.metadata').write_text('2')"
    )
    with new_folder(tmp_path / "out", overwrite=True, inputs=()) as first:
        assert not dead.exists() and all(folder.is_dir() for folder in alike)
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, env=ENV)
        assert first.is_dir() and (tmp_path / "out" / ".metadata").read_text() == "2"
        (first / ".metadata").write_text("1")
    assert (tmp_path / "out" / ".metadata").read_text() == "1"
    (tmp_path / "out" / ".metadata").unlink()
    with pytest.raises(ConfigError, match="exists"), new_folder(tmp_path / "out", overwrite=False, inputs=()):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, env=ENV)
    assert (tmp_path / "out" / ".metadata").read_text() == "2", "who was faster is not replaced unasked"
    assert sorted(tmp_path.iterdir()) == sorted([*alike, tmp_path / "out"])
