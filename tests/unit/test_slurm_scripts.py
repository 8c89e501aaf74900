"""The sbatch scripts, run unmodified, with stand-ins for Slurm, torchrun and megafuse: the command lines they make."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megafuse.cli.bench import CONFIG as BENCH_CONFIG
from megafuse.cli.build import CONFIG as BUILD_CONFIG
from megafuse.cli.main import main
from megafuse.cli.reference import CONFIG as REFERENCE_CONFIG
from megafuse.cli.sample import CONFIG as SAMPLE_CONFIG
from megafuse.cli.score import CONFIG as SCORE_CONFIG
from megafuse.cli.train import CONFIG as TRAIN_CONFIG
from megafuse.config.load import parse
from megafuse.testing.stub_slurm import StubCluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.fixture
def cluster(tmp_path: Path) -> StubCluster:
    return StubCluster(tmp_path, ROOT)


def words(line: str, after: str) -> list[str]:
    """The words behind `after`. The one argument with a space in it is made whole again."""
    return [w.replace("\0", " ") for w in line.replace("hf model", "hf\0model").partition(after)[2].split()]


def test_fusesft(cluster: StubCluster) -> None:
    status, lines, output = cluster.submit("fusesft_llama8b.sh", "--optim.lr", "7e-6")
    assert status == 0, output
    run = cluster.folder / "run"
    build = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert build.inputs == (cluster.folder / "data/a.jsonl.gz", cluster.folder / "data/b.jsonl.gz")
    assert (build.kind, build.resolved_alpha, build.max_length, build.resolved_k) == ("sft", 1e-2, 2048, 4)
    assert build.tokenizer == cluster.folder / "hf model" and build.output == run / "dataset"
    assert words(lines[1], "megafuse convert import") == [str(cluster.folder / "hf model"), str(run / "model")]
    assert lines[2].startswith("srun --nodes=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 ")
    starts = [line for line in lines if line.startswith("torchrun ")]
    assert len(starts) == 2 and starts[0] == starts[1]  # one a node, the same on both
    assert starts[0].startswith(
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=10.1.2.3:"
    )
    assert "--rdzv-id=123456.0.1 -m megafuse train " in starts[0]
    assert "env SAFE=1 EXPORT=unset OMP=8" in lines
    train = parse(TRAIN_CONFIG, words(starts[0], "megafuse train"), prog="", description="")
    assert (train.optim.lr, train.epochs, train.global_batch_size, train.loss.name) == (7e-6, 3, 128, "sft")
    assert train.run_dir == run / "train" and train.model.path == run / "model" and train.data.dataset == build.output
    assert (train.parallel.tensor, train.parallel.pipeline, train.parallel.sequence) == (2, 1, True)
    # the newest finished checkpoint, not the .tmp beside it
    assert lines[-1] == f"megafuse convert export {run}/train/checkpoints/step_00000200 {run}/hf"
    assert "done: " in output


def test_fusepo(cluster: StubCluster) -> None:
    settings = {"TP": "1", "PP": "2", "BUILD": "--min_gap 0.01 --max_gap 0.1", "NPROC": "3", "GETENT_STATUS": "0"}
    status, lines, output = cluster.submit("fusepo_llama8b.sh", "--optim.lr", "8e-7", **settings)
    assert status == 0, output
    run = cluster.folder / "run"
    build = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert (build.kind, build.resolved_alpha, build.max_length) == ("pair", 5e-3, 2048)
    assert (build.min_gap, build.max_gap) == (0.01, 0.1)
    starts = [line for line in lines if line.startswith("torchrun ")][::2]
    assert len(starts) == 2 and all("--nproc-per-node=3 " in s and "--rdzv-endpoint=node7:" in s for s in starts)
    reference = parse(REFERENCE_CONFIG, words(starts[0], "megafuse reference"), prog="", description="")
    train = parse(TRAIN_CONFIG, words(starts[1], "megafuse train"), prog="", description="")
    assert reference.out == run / "reference" == train.reference.path
    # what the cache's key depends on has to be the same on both sides
    assert (reference.model.path, reference.model.precision) == (train.model.path, train.model.precision)
    assert reference.data == train.data and reference.parallel == train.parallel
    assert (train.loss.name, train.loss.beta, train.optim.lr, train.epochs) == ("ln_dpo", 10.0, 8e-7, 1)
    assert (train.parallel.tensor, train.parallel.pipeline, train.parallel.sequence) == (1, 2, False)
    ports = [int(re.search(r"--rdzv-endpoint=\w+:(\d+)", s)[1]) for s in starts]  # type: ignore[index]
    assert ports[0] != ports[1] and all(20000 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        ("llama8b", (5e-6, 8e-7, "ln_dpo", 10.0)),
        ("qwen7b", (2e-6, 3e-7, "dpo", 0.01)),
        ("gemma9b", (2e-6, 5e-7, "dpo", 0.01)),
        ("llama3b", (5e-6, 1e-6, "ln_dpo", 10.0)),
        ("llama1b", (5e-6, 1e-6, "ln_dpo", 10.0)),
    ],
)
def test_fusechat3(cluster: StubCluster, target: str, numbers: tuple[float, float, str, float]) -> None:
    status, lines, output = cluster.submit(f"fusechat3_{target}.sh")
    assert status == 0, output
    run = cluster.folder / "run"
    builds = [words(line, "megafuse build") for line in lines if line.startswith("megafuse build")]
    sft, pairs = (parse(BUILD_CONFIG, line, prog="", description="") for line in builds)
    assert (sft.kind, sft.selection, sft.output) == ("sft", "single_best", run / "sft" / "dataset")
    assert (pairs.kind, pairs.min_gap, pairs.max_gap, pairs.tokenizer) == ("pair", 0.01, 0.1, run / "sft" / "hf")
    starts = [line for line in lines if line.startswith("torchrun ")][::2]
    first, second = (parse(TRAIN_CONFIG, words(starts[i], "megafuse train"), prog="", description="") for i in (0, 2))
    assert (first.optim.lr, second.optim.lr, second.loss.name, second.loss.beta) == numbers
    assert (first.loss.name, first.epochs, second.epochs) == ("sft", 3, 1)
    assert second.model.path == run / "po" / "model" and lines[-1].endswith(f" {run}/po/hf")


def test_bench(cluster: StubCluster) -> None:
    data = str(cluster.folder / "data" / "a.jsonl.gz")
    status, lines, output = cluster.submit(
        "bench.sh", "--sources", "2", "8", DATA=data, MODEL="llama-3.2-1b", TP="4", TRACE="/traces"
    )
    assert status == 0, output
    starts = [line for line in lines if line.startswith("torchrun ")]
    assert len(starts) == 2 and "--nnodes=2 --nproc-per-node=8 " in starts[0]
    config = parse(BENCH_CONFIG, words(starts[0], "megafuse bench"), prog="", description="")
    assert (str(config.model.path), str(config.data.path), config.sources) == ("llama-3.2-1b", data, (2, 8))
    assert config.out == cluster.folder / "run" / "bench-123456.json" and str(config.observe.trace) == "/traces"
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence) == (4, 1, True)


def test_fuserl_of_70b_on_four_nodes(cluster: StubCluster) -> None:
    """The papers' data for FuseRL, the layout that four nodes hold, and nothing else than the presets."""
    env = {"SLURM_JOB_NUM_NODES": "4"}
    status, lines, output = cluster.submit("fuserl_llama70b.sh", "--seed", "3", **env)
    assert status == 0, output
    builds = [words(line, "megafuse build") for line in lines if line.startswith("megafuse build")]
    sft, pairs = (parse(BUILD_CONFIG, line, prog="", description="") for line in builds)
    assert (sft.kind, sft.resolved_alpha, sft.selection, sft.resolved_k) == ("sft", 1e-2, "auto", 4)
    assert (pairs.kind, pairs.resolved_alpha, pairs.min_gap) == ("pair", 5e-3, None)
    starts = [line for line in lines if line.startswith("torchrun ")][::4]
    first, second = (parse(TRAIN_CONFIG, words(starts[i], "megafuse train"), prog="", description="") for i in (0, 2))
    for train in (first, second):
        assert (train.parallel.tensor, train.parallel.pipeline, train.parallel.sequence) == (8, 4, True)
        assert (train.model.recompute, train.global_batch_size, train.seed) == ("full", 128, 3)
    assert (first.loss.name, first.optim.lr, first.epochs) == ("sft", 1e-5, 3)
    assert (second.loss.name, second.loss.beta, second.optim.lr) == ("ln_dpo", 10.0, 5e-7)
    layout = next(line for line in (cluster.folder / "log.config").read_text().splitlines() if "doctor" in line)
    shape = layout.replace(str(cluster.folder / "hf model"), "llama-3.1-70b").split()
    assert "--ranks" in shape and main(shape) == 0


@pytest.mark.parametrize(
    ("env", "kind", "alpha", "loss", "beta"),
    [
        ({}, "pair", 5e-3, "ln_dpo", 10.0),
        ({"LOSS": "dpo"}, "pair", 5e-3, "dpo", 0.01),
        ({"LOSS": "simpo", "BETA": "2", "ARGS": "--loss.gamma 1.6"}, "pair", 1e-3, "simpo", 2.0),
        ({"LOSS": "rloo", "ARGS": "--loss.beta_kl 1e-3"}, "rloo", 5e-3, "rloo", None),
        ({"LOSS": "wrpo", "BETA": "0.02", "BUILD": "--target_source me"}, "wrpo", 1.0, "wrpo", 0.02),
    ],
    ids=lambda value: value.get("LOSS") if isinstance(value, dict) else None,
)
def test_the_loss_is_a_variable(
    cluster: StubCluster, env: dict[str, str], kind: str, alpha: float, loss: str, beta: float | None
) -> None:
    status, lines, output = cluster.submit("fusepo_llama8b.sh", *env.get("ARGS", "").split(), **env)
    assert status == 0, output
    build = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert (build.kind, build.resolved_alpha) == (kind, alpha)
    train = parse(
        TRAIN_CONFIG,
        words([line for line in lines if line.startswith("torchrun")][2], "megafuse train"),
        prog="",
        description="",
    )
    assert (train.loss.name, train.loss.beta) == (loss, beta)


def test_sampling_takes_one_source_a_task(cluster: StubCluster) -> None:
    sources = {"SOURCES": f"gemma-2-27b={cluster.folder}/source other=http://host:8000/v1"}
    env = {"PROMPTS": f"{cluster.folder}/data/*.gz", **sources}
    (cluster.folder / "source").mkdir()
    (cluster.folder / "source" / "config.json").touch()
    found = []
    for task in "01":
        status, lines, output = cluster.submit("sample_sources.sh", "--n", "5", SLURM_ARRAY_TASK_ID=task, **env)
        assert status == 0 and len(lines) == 1, output
        found.append(parse(SAMPLE_CONFIG, words(lines[0], "megafuse sample"), prog="", description=""))
    local, server = found
    assert (local.source, local.engine, local.tensor_parallel, local.n) == ("gemma-2-27b", "vllm", 8, 5)
    assert local.model == cluster.folder / "source" and len(local.prompts) == 2
    assert (server.source, server.engine, server.base_url) == ("other", "server", "http://host:8000/v1")
    assert [c.output.name for c in found] == ["gemma-2-27b.jsonl.gz", "other.jsonl.gz"]


def test_the_restarts_of_sampling_are_counted_by_chunks(cluster: StubCluster) -> None:
    """A task that is stopped at its time limit again and again is requeued for as long as it makes chunks."""
    env = {"PROMPTS": f"{cluster.folder}/data/a.jsonl.gz", "SOURCES": "s=http://h/v1", "SLURM_ARRAY_TASK_ID": "0"}
    (cluster.folder / "bin" / "megafuse").write_text("#!/bin/sh\ncase $* in *--print_config) ;; *) exit 1 ;; esac\n")
    chunks = cluster.folder / "run" / "s.jsonl.gz.chunks"
    chunks.mkdir(parents=True)
    for tries in range(5):
        (chunks / f"{tries:05d}.jsonl").touch()
        assert cluster.submit("sample_sources.sh", **env)[1] == ["requeue"]
    assert [cluster.submit("sample_sources.sh", **env)[1] for _ in range(3)] == [["requeue"], ["requeue"], []]


def test_score(cluster: StubCluster) -> None:
    env = {"RESPONSES": f"{cluster.folder}/data/*.gz", "PROMPTS": f"{cluster.folder}/data/a.jsonl.gz"}
    model = {"REWARD_MODEL": str(cluster.folder / "hf model")}
    status, lines, output = cluster.submit("score.sh", "--batch_tokens", "32768", **env, **model)
    assert status == 0, output
    starts = [line for line in lines if line.startswith("torchrun ")]
    assert len(starts) == 2 and "--nnodes=2 --nproc-per-node=8 " in starts[0]
    config = parse(SCORE_CONFIG, words(starts[0], "megafuse score"), prog="", description="")
    assert (config.reward, config.model, config.batch_tokens) == ("armorm", cluster.folder / "hf model", 32768)
    assert len(config.inputs) == 2 and config.prompts == cluster.folder / "data" / "a.jsonl.gz"
    assert config.output == cluster.folder / "run" / "scored.jsonl.gz"


def test_data_and_reference_apart_are_what_training_finds(cluster: StubCluster) -> None:
    status, lines, output = cluster.submit("build.sh", "--max_prompts", "9")
    assert status == 0 and len(lines) == 1, output
    apart = parse(BUILD_CONFIG, words(lines[0], "megafuse build"), prog="", description="")
    assert (apart.kind, apart.resolved_alpha, apart.max_prompts) == ("pair", 5e-3, 9)
    status, lines, output = cluster.submit("reference.sh")
    assert status == 0, output
    assert [line.split()[0] for line in lines[:2]] == ["megafuse", "srun"] and "convert import" in lines[0]
    found = parse(REFERENCE_CONFIG, words(lines[2], "megafuse reference"), prog="", description="")
    assert found.data.dataset == apart.output and found.out == cluster.folder / "run" / "reference"
    status, lines, output = cluster.submit("fusepo_llama8b.sh")
    assert status == 0, output
    assert not any("build" in line or "import" in line or "megafuse reference" in line for line in lines)
    train = parse(TRAIN_CONFIG, words(lines[1], "megafuse train"), prog="", description="")
    assert train.reference.path == found.out and train.data == found.data and train.parallel == found.parallel


def test_convert(cluster: StubCluster) -> None:
    env = {"SRC": str(cluster.folder / "hf model"), "DST": str(cluster.folder / "ckpt")}
    status, lines, output = cluster.submit("convert.sh", "--block_mb", "32", **env)
    assert status == 0, output
    assert lines[0].startswith("megafuse convert import ") and lines[0].endswith("ckpt --block_mb 32")
    assert lines[1].endswith("ckpt --upto bits") and "convert verify" in lines[1]
    for step in ("step_00000100", "step_00000200", "step_00000300.tmp"):
        (cluster.folder / "train" / "checkpoints" / step).mkdir(parents=True)
        (cluster.folder / "train" / "checkpoints" / step / "manifest.json").touch()
    env = {"ACTION": "export", "SRC": str(cluster.folder / "train"), "DST": str(cluster.folder / "out"), "UPTO": "none"}
    status, lines, output = cluster.submit("convert.sh", **env)
    newest = cluster.folder / "train" / "checkpoints" / "step_00000200"
    assert (status, lines) == (0, [f"megafuse convert export {newest} {cluster.folder}/out"]), output
    assert cluster.submit("convert.sh", **env)[1] == []  # there already


def test_a_container_holds_every_command(cluster: StubCluster) -> None:
    env = {"IMAGE": "/images/megafuse.sqsh", "MOUNTS": "/models:/models"}
    status, lines, output = cluster.submit("fusesft_llama8b.sh", **env)
    assert status == 0, output
    run = cluster.folder / "run"
    inside = f"--container-mounts={ROOT}:{ROOT},{run}:{run},/models:/models"
    calls = [line for line in lines if line.startswith("srun ")]
    assert len(calls) >= 6 and all("--container-image=/images/megafuse.sqsh" in c and inside in c for c in calls)
    work = [i for i, line in enumerate(lines) if line.startswith("megafuse ")]
    assert len(work) == 3 and all(lines[i - 1].startswith("srun --nodes=1 --ntasks=1 --overlap ") for i in work)
    (cluster.folder / "bin" / "getent").write_text("#!/bin/sh\nexit 9\n")  # the address is found outside
    assert any("--rdzv-endpoint=10.1.2.3:" in line for line in lines)


@pytest.mark.parametrize("given", ["SOURCES", "RESPONSES", "DATA"])
def test_the_chain_begins_with_what_is_given(cluster: StubCluster, given: str) -> None:
    data = str(cluster.folder / "data" / "a.jsonl.gz")
    env = {"PROMPTS": data, "SOURCES": "a=/a b=/b"} if given == "SOURCES" else {given: data}
    status, lines, output = cluster.run_here("pipeline.sh", "--time=9", NODES="4", SFT_BUILD="--k 2", **env)
    assert status == 0, output
    names = ["sample", "score", "convert", "build_sft", "build_po", "fusesft", "reference", "fusepo", "export"]
    names = names[{"SOURCES": 0, "RESPONSES": 1, "DATA": 2}[given] :]
    ids = {name: str(101 + i) for i, name in enumerate(names)}
    assert [line for line in output.splitlines() if " " in line][: len(names)] == [f"{n} {i}" for n, i in ids.items()]
    waits = {
        "score": "sample", "build_sft": "score", "build_po": "score", "fusesft": "convert build_sft",
        "reference": "fusesft build_po", "fusepo": "reference", "export": "fusepo",
    }  # fmt: skip
    for name, line in zip(names, lines):
        before = [ids[n] for n in waits.get(name, "").split() if n in ids]
        wanted = f"--dependency=afterok:{':'.join(before)} --kill-on-invalid-dep=yes " if before else ""
        assert f"sbatch --parsable {wanted}--time=9 " in line, line
        assert ("-N 4" in line) == (name in ("fusesft", "reference", "fusepo"))
    of = dict(zip(names, lines))
    work = cluster.folder / "run"
    assert of["fusesft"].startswith(f"RUN={work}/fusesft MODEL={cluster.folder}/hf model DATA=")
    assert "BUILD=--k 2 " in of["fusesft"] and "BUILD=--k 2 " in of["build_sft"] and "BUILD= " in of["fusepo"]
    assert of["fusepo"].startswith(f"RUN={work}/fusepo MODEL={work}/fusesft/hf DATA=")
    assert f"DATA={data if given == 'DATA' else f'{work}/scored.jsonl.gz'} " in of["build_po"]
    if given == "SOURCES":
        assert of["sample"].endswith("--array=0-1 slurm/sample_sources.sh")


def test_a_sweep_is_a_chain_for_each_number_of_sources(cluster: StubCluster) -> None:
    data = str(cluster.folder / "data" / "a.jsonl.gz")
    status, lines, output = cluster.run_here("sweep_sources.sh", DATA=data, SOURCES="a b c", PO_BUILD="--min_gap 0.1")
    assert status == 0, output
    builds = [line for line in lines if line.endswith("slurm/build.sh")]
    found = [re.search(r"RUN=\S*/run/(\S+) .* BUILD=(.*) sbatch", line).groups() for line in builds]  # type: ignore
    sources = ["a", "a b", "a b c"]
    assert found == [
        (f"k{k}/{stage}", f"{gap} --include_sources {taken}")
        for k, taken in enumerate(sources, 1)
        for stage, gap in (("fusesft", ""), ("fusepo", "--min_gap 0.1"))
    ]
    assert "k3 fusepo " in output


@pytest.mark.parametrize("script", ["fusesft_llama8b.sh", "fusepo_llama8b.sh"])
def test_submitted_again_it_does_only_what_is_missing(cluster: StubCluster, script: str) -> None:
    assert cluster.submit(script)[0] == 0
    status, lines, output = cluster.submit(script)
    assert (status, lines) == (0, []), output
    shutil.rmtree(cluster.folder / "run" / "hf")
    status, lines, output = cluster.submit(script, SLURM_RESTART_COUNT="2")
    assert status == 0, output
    assert [line.split()[0] for line in lines] == ["srun", "torchrun", "env", "torchrun", "env", "megafuse"]
    assert "megafuse train" in lines[1] and "--rdzv-id=123456.2.1 " in lines[1]


def test_the_exit_status_of_the_step_is_that_of_the_job(cluster: StubCluster) -> None:
    status, lines, _ = cluster.submit("fusesft_llama8b.sh", FAIL="86")
    assert status == 86 and "requeue" not in lines
    assert not any("export" in line for line in lines)


@pytest.mark.parametrize(("code", "state"), [("85", "RUNNING"), ("1", "RUNNING"), ("143", "CANCELLED")])
def test_a_stopped_or_crashed_step_is_requeued_and_a_cancelled_job_never(
    cluster: StubCluster, code: str, state: str
) -> None:
    for tries in (1, 2, 3, 4):
        status, lines, output = cluster.submit("fusesft_llama8b.sh", FAIL=code, JOB_STATE=state)
        again = state == "RUNNING" and tries < 4
        assert ("requeue" in lines) == again, output
        assert (f"requeue, try {tries} of 3 from" in output) == again
    assert status == int(code) and ("3 restarts brought nothing new" in output) == (state == "RUNNING")


def test_without_a_checkpoint_nothing_is_exported(cluster: StubCluster) -> None:
    (cluster.folder / "bin" / "torchrun").write_text("#!/bin/sh\n")
    status, lines, output = cluster.submit("fusesft_llama8b.sh")
    assert status != 0 and "no checkpoint in " in output
    assert not any("export" in line for line in lines)


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"MODEL": ""}, 1, "set MODEL to the Hugging Face folder"),
        ({"MODEL": "/nowhere"}, 2, "refused: MODEL /nowhere has no config.json"),
        ({"DATA": ""}, 1, "set DATA to the scored answers"),
        ({"DATA": "/nowhere/*.jsonl"}, 2, "refused: DATA /nowhere/*.jsonl is not there"),
        ({"SLURM_SUBMIT_DIR": ""}, 1, "submit this file with sbatch"),
        ({"TP": "3"}, 2, "TP 3 x PP 1 x CP 1 = 3 ranks do not divide the 16 GPUs of 2 nodes; set TP, PP or CP"),
        ({"BAD_CONFIG": "2"}, 2, "refused: the arguments of megafuse train"),
        ({"BAD_LAYOUT": "2"}, 2, "refused: this layout of MODEL"),
        ({"NPROC": "9"}, 2, "NPROC 9, but Slurm gives 8 GPUs a node: set NPROC, or sbatch --gres=gpu:9"),
        ({"SLURM_GPUS_ON_NODE": ""}, 2, "Slurm gives this job no GPUs: sbatch --gres=gpu:8, or set NPROC"),
        ({"FAKE_GPUS": "7"}, 71, "7 of 8 GPUs answer"),
        ({"FAKE_ERRORS": "4"}, 71, "1 GPUs have uncorrected memory errors"),
        ({"FAKE_APPS": "4711"}, 71, "1 processes are on these GPUs already"),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(
    cluster: StubCluster, env: dict[str, str], code: int, message: str
) -> None:
    status, lines, output = cluster.submit("fusesft_llama8b.sh", **env)
    assert (status, lines) == (code, []) and message in output
    if "FAKE_GPUS" in env or "FAKE_APPS" in env:
        assert cluster.submit("fusesft_llama8b.sh", **{**env, "HEALTH": "off"})[0] == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_and_name_no_site(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert not re.search(r"#SBATCH\s+(--account|--partition|-A\b|-p\b|--qos|--mail)", text)
    if "#SBATCH" in text:
        assert "set -euo pipefail" in text and path.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["fusesft_llama8b", "fusepo_llama8b"])
def test_presets_hold_the_papers_numbers(name: str) -> None:
    preset = str(ROOT / "megafuse" / "config" / "presets" / f"{name}.toml")
    config = parse(
        TRAIN_CONFIG,
        [preset, "--run_dir", "r", "--model.path", "m", "--data.dataset", "d"],
        prog="",
        description="",
    )
    assert (config.global_batch_size, config.optim.schedule, config.optim.warmup_ratio) == (128, "cosine", 0.1)
    if name.startswith("fusesft"):
        assert (config.optim.lr, config.epochs, config.loss.name) == (1e-5, 3, "sft")
    else:
        assert config.optim.lr in (3e-7, 5e-7, 6e-7, 8e-7, 1e-6)
        assert (config.loss.name, config.loss.beta) == ("ln_dpo", 10.0)
