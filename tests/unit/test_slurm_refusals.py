"""Bad input: refused by every Slurm script before any step begins, with what to set."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megafuse.testing.stub_slurm import StubCluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.fixture
def cluster(tmp_path: Path) -> StubCluster:
    return StubCluster(tmp_path, ROOT)


TRAINING = [path.name for path in SCRIPTS if re.match(r"fuse.*_.*\.sh", path.name)]
NOWHERE = "/nowhere/x"


def refusals() -> Iterator[tuple[str, dict[str, str], str]]:
    """Script, environment that is wrong in one thing, what is said: every script, each kind of bad input."""
    for name in TRAINING:
        yield name, {"MODEL": ""}, "set MODEL to the Hugging Face folder of the target model"
        yield name, {"DATA": ""}, "set DATA to the scored answers"
        yield name, {"MODEL": NOWHERE}, f"refused: MODEL {NOWHERE} has no config.json: set MODEL"
        yield name, {"DATA": NOWHERE}, f"refused: DATA {NOWHERE} is not there: set DATA"
        yield name, {"TP": "5"}, "do not divide the 32 GPUs of 4 nodes; set TP, PP or CP, or sbatch -N"
        yield name, {"NPROC": "9"}, "NPROC 9, but Slurm gives 8 GPUs a node: set NPROC, or sbatch --gres=gpu:9"
        yield name, {"BAD_LAYOUT": "2"}, "refused: this layout of MODEL"
        yield name, {"BAD_CONFIG": "2"}, "refused: the arguments of megafuse train (see above)"
        if name != "fusesft_llama8b.sh":
            yield name, {"LOSS": "ppo"}, "refused: LOSS ppo: set it to one of sft ln_dpo dpo simpo rloo wrpo"
            yield name, {"LOSS": "simpo", "BETA": ""}, "set BETA" if "fusechat3" not in name else ""
    sources = {"SLURM_ARRAY_TASK_ID": "0", "PROMPTS": "{data}", "SOURCES": "a={model}"}
    score = {"RESPONSES": "{data}", "REWARD_MODEL": "{model}"}
    convert = {"SRC": "{model}", "DST": "{run}/ckpt"}
    reference = {"DATASET": "{set}", "TP": "1"}
    cases: dict[str, list[tuple[dict[str, str], str]]] = {
        "sample_sources.sh": [
            ({"PROMPTS": ""}, "set PROMPTS to the prompts"),
            ({"SOURCES": ""}, "set SOURCES to NAME=FOLDER"),
            ({"PROMPTS": NOWHERE}, f"refused: PROMPTS {NOWHERE} is not there: set PROMPTS"),
            ({"SOURCES": f"a={NOWHERE}"}, f"refused: SOURCES: {NOWHERE} has no config.json: set"),
            ({"SOURCES": "a"}, "refused: SOURCES: a is not NAME=FOLDER or NAME=URL"),
            ({"SLURM_ARRAY_TASK_ID": "1"}, "refused: task 1 of 1 SOURCES: sbatch --array=0-0"),
            ({"SLURM_ARRAY_TASK_ID": ""}, "refused: task none of 1 SOURCES: sbatch --array=0-0"),
            ({"TP": "9"}, "refused: TP 9, but Slurm gives 8 GPUs: set TP, or sbatch --gres=gpu:N"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse sample"),
        ],
        "score.sh": [
            ({"RESPONSES": ""}, "set RESPONSES to the responses of all sources"),
            ({"RESPONSES": NOWHERE}, f"refused: RESPONSES {NOWHERE} is not there: set RESPONSES"),
            ({"PROMPTS": NOWHERE}, f"refused: PROMPTS {NOWHERE} is not there: set PROMPTS"),
            ({"REWARD_MODEL": NOWHERE}, f"refused: REWARD_MODEL '{NOWHERE}' has no config.json: set REWARD_MODEL"),
            ({"NPROC": "9"}, "NPROC 9, but Slurm gives 8 GPUs"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse score"),
        ],
        "build.sh": [
            ({"MODEL": NOWHERE}, f"refused: MODEL {NOWHERE} has no config.json: set MODEL"),
            ({"DATA": NOWHERE}, f"refused: DATA {NOWHERE} is not there: set DATA"),
            ({"LOSS": "ppo"}, "refused: LOSS ppo: set it to one of"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse build"),
        ],
        "reference.sh": [
            ({"MODEL": NOWHERE}, f"refused: MODEL {NOWHERE} has no config.json: set MODEL"),
            ({"DATASET": NOWHERE}, f"refused: DATASET {NOWHERE} is no data set: set DATASET"),
            ({"DATASET": ""}, "/run/dataset is no data set: set DATASET"),
            ({"TP": "5"}, "do not divide the 32 GPUs of 4 nodes; set TP"),
            ({"BAD_LAYOUT": "2"}, "refused: this layout of MODEL"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse reference"),
        ],
        "convert.sh": [
            ({"SRC": ""}, "set SRC to a Hugging Face folder"),
            ({"DST": ""}, "set DST to the folder that is made"),
            ({"SRC": NOWHERE}, f"refused: SRC {NOWHERE} has no config.json: set SRC"),
            ({"ACTION": "export"}, "has no manifest.json: set SRC to what ACTION=export begins with"),
            ({"ACTION": "move"}, "refused: ACTION move: set it to import, export or verify"),
            ({"ACTION": "verify"}, "is not there: set DST to what SRC is compared with"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse convert"),
        ],
        "bench.sh": [
            ({"DATA": ""}, "set DATA to scored answers"),
            ({"DATA": NOWHERE}, f"refused: DATA {NOWHERE} is not there: set DATA"),
            ({"TP": "5"}, "do not divide the 32 GPUs of 4 nodes; set TP"),
            ({"BAD_LAYOUT": "2"}, "refused: this layout of MODEL"),
            ({"BAD_CONFIG": "2"}, "refused: the arguments of megafuse bench"),
        ],
    }  # fmt: skip
    good = {"sample_sources.sh": sources, "score.sh": score, "convert.sh": convert, "reference.sh": reference}
    for name, bad in cases.items():
        for env, message in bad:
            yield name, {**good.get(name, {}), **env}, message


@pytest.mark.parametrize(("script", "env", "message"), [case for case in refusals() if case[2]])
def test_every_script_refuses_bad_input(cluster: StubCluster, script: str, env: dict[str, str], message: str) -> None:
    """Before any step begins, with what to set. Without the one wrong thing the script works: see the tests above."""
    (cluster.folder / "set").mkdir()
    (cluster.folder / "set" / "manifest.json").touch()
    cluster.env["DATA"] = str(cluster.folder / "data" / "a.jsonl.gz")
    place = {"data": cluster.folder / "data" / "a.jsonl.gz", "model": cluster.folder / "hf model"}
    (cluster.folder / "plain").symlink_to(place["model"])  # SOURCES are words
    if script == "sample_sources.sh":
        place["model"] = cluster.folder / "plain"
    filled = {k: v.format(**place, set=cluster.folder / "set", run=cluster.folder) for k, v in env.items()}
    status, lines, output = cluster.submit(script, **{"SLURM_JOB_NUM_NODES": "4", **filled})
    assert (status in (1, 2), lines) == (True, []) and message in output, output


@pytest.mark.parametrize(
    ("script", "env", "message"),
    [
        ("pipeline.sh", {"MODEL": ""}, "set MODEL to the Hugging Face folder"),
        ("pipeline.sh", {"MODEL": NOWHERE, "DATA": "x"}, f"MODEL {NOWHERE} has no config.json: set MODEL"),
        ("pipeline.sh", {}, "nothing to begin with: set PROMPTS and SOURCES, or RESPONSES, or DATA"),
        ("pipeline.sh", {"PROMPTS": "x"}, "nothing to begin with: set PROMPTS and SOURCES"),
        ("pipeline.sh", {"DATA": NOWHERE}, f"{NOWHERE} is not there: set DATA, RESPONSES or PROMPTS"),
        ("sweep_sources.sh", {}, "set DATA to the scored answers"),
        ("sweep_sources.sh", {"DATA": "x"}, "set SOURCES to names of sources in DATA"),
        ("sweep_sources.sh", {"DATA": NOWHERE, "SOURCES": "a"}, f"{NOWHERE} is not there: set DATA"),
    ],
)
def test_a_chain_that_cannot_work_is_not_submitted(
    cluster: StubCluster, script: str, env: dict[str, str], message: str
) -> None:
    status, lines, output = cluster.run_here(script, **env)
    assert status in (1, 2) and not lines and message in output
