"""Speed and memory of conversion, next to `cp` on the same disk in the same run.

    python bench/convert.py WORK_FOLDER [--gigabytes 10] [--block-mb 64] [--jobs 1 2]

Makes a random bf16 Llama folder of that size (1B shapes, as many layers as it takes, files of 2 GB), then times, each
in a fresh process, interpreter start and fsync included, with cold files where the system lets go of them:

    cp        cp -r of the folder, and sync
    import    Hugging Face folder -> checkpoint, at each number of jobs
    export    checkpoint -> Hugging Face folder, the same

compares the first folder with the last byte by byte, writes bench/results/convert.json, and deletes all it made.
Targets at 10 GB or more: import >= 0.30 and export >= 0.35 of cp, peak memory <= 320 MiB + jobs x 2 blocks. cp is timed
before and after the others: where the two differ, the machine was not quiet, and shares are of the faster one.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megafuse.converters.safetensors_io import INDEX, make_header
from megafuse.observe.manifest import utc_now, versions, write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench/results/convert.json"
VOCAB, HIDDEN, FFN, HEADS, KV, HEAD_DIM = 128256, 2048, 8192, 32, 8, 64
FILE_BYTES, CHUNK = 2_000_000_000, 16 << 20
CONVERT = """
import sys, json
from megafuse.converters.{module} import {function}
done = {function}(sys.argv[1], sys.argv[2], block_mb=int(sys.argv[3]), jobs=int(sys.argv[4]))
print(json.dumps([done.peak_rss_mib, done.weights_sha256]))
"""
TARGETS = {"import": 0.30, "export": 0.35}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of its layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {f"{p}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        found |= {f"{p}self_attn.{n}_proj.weight": (h * HEAD_DIM, HIDDEN) for n, h in zip("qkv", (HEADS, KV, KV))}
        found |= {f"{p}mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
        found |= {f"{p}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM), f"{p}mlp.down_proj.weight": (HIDDEN, FFN)}
    return found | {"model.norm.weight": (HIDDEN,)}


def write_model(folder: Path, gigabytes: float) -> int:
    """A random folder of about that size; returns the bytes of its weights."""
    layer = 2 * (sum(np.prod(s) for s in shapes(2).values()) - sum(np.prod(s) for s in shapes(1).values()))
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCAB * HIDDEN) / float(layer)))
    folder.mkdir(parents=True)
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(layers).items():
        if size > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, "BF16", shape))
        size += 2 * int(np.prod(shape))
    weight_map: dict[str, str] = {}
    rng, total = np.random.default_rng(), 0
    for i, entries in enumerate(files):
        header = make_header(entries, {"format": "pt"})
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in entries}
        with (folder / name).open("wb") as out:
            out.write(header.encoded())
            for start in range(0, header.data_bytes, CHUNK):
                out.write(rng.bytes(min(CHUNK, header.data_bytes - start)))
        total += header.data_bytes
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def cold(folder: Path) -> None:
    """Ask the system to forget the files of `folder`."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path) -> tuple[float, str]:
    """(seconds, output) of a command that reads `source`, what it wrote being on the disk."""
    cold(source)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    os.sync()
    return time.monotonic() - began, done.stdout


def same(one: Path, two: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return names == sorted(p.name for p in two.iterdir()) and not any(filecmp.cmpfiles(one, two, names, False)[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet, on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--block-mb", type=int, default=64)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        facts = measure(args.folder, args.gigabytes, args.block_mb, args.jobs)
    finally:
        shutil.rmtree(args.folder)
    write_json_atomic(OUT, facts)
    print(json.dumps(facts, indent=1))
    return 0 if facts["identical"] and facts["memory_ok"] else 1


def measure(work: Path, gigabytes: float, block_mb: int, jobs: list[int]) -> dict[str, Any]:
    """All figures of one run."""
    hf, ckpt, back = work / "hf", work / "ckpt", work / "back"
    size = write_model(hf, gigabytes)
    copies, runs, digests, identical = [copied(hf, work / "copy")], [], set(), True
    for count in jobs:
        run: dict[str, Any] = {"jobs": count, "memory_bound_mib": 320 + count * 2 * block_mb}
        for name, module, function, source, out in (
            ("import", "importer", "import_hf", hf, ckpt), ("export", "exporter", "export_hf", ckpt, back),
        ):  # fmt: skip
            code = CONVERT.format(module=module, function=function)
            command = [sys.executable, "-c", code, str(source), str(out), str(block_mb), str(count)]
            seconds, said = timed(command, source)
            peak, digest = json.loads(said)
            digests.add(digest)
            run[name] = {"seconds": seconds, "mb_per_second": size / 1e6 / seconds, "peak_rss_mib": peak}
        shutil.rmtree(ckpt)
        identical &= same(hf, back)
        shutil.rmtree(back)
        runs.append(run)
        copies.append(copied(hf, work / "copy"))
    for run in runs:
        run["share_of_cp"] = {name: min(copies) / run[name]["seconds"] for name in TARGETS}
        run["targets_met"] = {name: run["share_of_cp"][name] >= share for name, share in TARGETS.items()}
        run["memory_ok"] = all(run[name]["peak_rss_mib"] <= run["memory_bound_mib"] for name in TARGETS)
    return {
        "created": utc_now(),
        "versions": versions(),
        "device": f"{cpu_name()}, {os.cpu_count()} CPUs, {shutil.disk_usage(work).total / 1e9:.0f} GB disk",
        "bytes": size,
        "block_mb": block_mb,
        "load": os.getloadavg(),
        "cp": {"seconds": copies, "mb_per_second": [size / 1e6 / seconds for seconds in copies]},
        "runs": runs,
        "targets": TARGETS,
        "memory_ok": all(run["memory_ok"] for run in runs),
        "identical": identical and len(digests) == 1,
    }


def copied(source: Path, out: Path) -> float:
    """Seconds of `cp -r` and sync."""
    seconds, _ = timed(["cp", "-r", str(source), str(out)], source)
    shutil.rmtree(out)
    os.sync()
    return seconds


def cpu_name() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    raise SystemExit(main())
