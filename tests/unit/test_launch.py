"""`megafuse launch`: what is read from the recipes, what would be submitted, and jobs on this machine."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megafuse.cli.main import main
from megafuse.config.launch import LaunchConfig, SweepConfig
from megafuse.config.load import load, validate
from megafuse.errors import ConfigError
from megafuse.launch.job import job_of, words
from megafuse.launch.plain import Result
from megafuse.launch.recipes import read_recipe, recipes, repository
from megafuse.launch.summary import row_of, write_summary
from megafuse.launch.sweep import begin, point_name, points_of, remember
from megafuse.testing.launch_stand_ins import write_stand_ins

ROOT = Path(__file__).resolve().parents[2]
NEMO = os.environ.get("MEGAFUSE_NEMO_PYTHON") or (sys.executable if find_spec("nemo_run") else "")


def config(**fields: Any) -> LaunchConfig:
    return validate(LaunchConfig, {"recipe": "fusepo_llama8b", "model": "M", "data": ("a", "b"), **fields})


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "DATA", "RUN"):
        monkeypatch.delenv(name, raising=False)


def test_recipes_are_the_scripts_that_sbatch_takes() -> None:
    found = recipes(ROOT)
    assert "fusepo_llama8b" in found and not {"node", "stages", "pipeline", "fusechat3"} & set(found)
    assert all(read_recipe(ROOT, name).variables for name in found)


def test_a_recipe_says_its_options_and_variables() -> None:
    recipe = read_recipe(repository(), "fusepo_llama8b")
    assert recipe.options["gres"] == "gpu:8" and recipe.options["signal"] == "B:USR1@300"
    assert recipe.options["requeue"] is None
    assert {"MODEL", "DATA"} <= set(recipe.required)
    assert any("TP" in name.split() for name in recipe.variables)


def test_an_assignment_with_a_default_is_a_variable_too(tmp_path: Path) -> None:
    script = tmp_path / "mine.sh"
    lines = [
        "#!/bin/sh",
        "#SBATCH --nodes=3",
        "TP=${TP:-4} PP=${PP:-1} # ranks",
        "X=${X:-${Y:-z}}",
        ': "${MODEL:?set MODEL}"',
    ]
    script.write_text("\n".join(lines) + "\n")
    recipe = read_recipe(ROOT, str(script))
    assert recipe.variables == {
        "TP PP": "ranks; default 4 and 1",
        "X": "default ${Y:-z}",
        "MODEL": "set MODEL (required)",
    }
    assert recipe.required == ["MODEL"]


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean fusepo_llama8b"):
        read_recipe(ROOT, "fusepo_lama8b")
    with pytest.raises(ConfigError, match="not for sbatch"):
        read_recipe(ROOT, str(ROOT / "slurm" / "node.sh"))


def test_options_are_the_scripts_own_with_the_changes_asked_for() -> None:
    further = {"partition": "p", "account": "a", "sbatch": ("qos=high", "contiguous")}
    job = job_of(config(nodes=3, gpus_per_node=4, time="1:00:00", **further))
    own = read_recipe(ROOT, "fusepo_llama8b").options
    changed = {"nodes": "3", "gres": "gpu:4", "time": "1:00:00", "partition": "p", "account": "a", "qos": "high",
               "contiguous": None, "output": f"{ROOT}/runs/fusepo-llama8b/%x-%j.out"}  # fmt: skip
    assert job.options == {**own, **changed}
    assert "#SBATCH --nodes=3\n" in job.batch_script and "#SBATCH --contiguous\n" in job.batch_script
    assert "--nodes=3" in job.by_hand and job.by_hand.startswith("MODEL=M DATA='a b' ")


def test_the_recipe_becomes_the_batch_script() -> None:
    job = job_of(config(env=("BUILD=--min_gap 0.01",), settings=("optim.lr=1e-6",), setup="source env/bin/activate"))
    *_, before, last = job.body.splitlines()
    assert before == "source env/bin/activate"
    assert last == f"exec bash {ROOT}/slurm/fusepo_llama8b.sh --optim.lr 1e-6"
    assert "export BUILD='--min_gap 0.01'" in job.body and f"export MEGAFUSE_ROOT={ROOT}" in job.body


def test_settings_become_flags() -> None:
    assert words(("optim.lr=1e-6", "parallel.sequence", "sources=1 2")) == [
        "--optim.lr", "1e-6", "--parallel.sequence", "--sources", "1", "2"]  # fmt: skip
    assert words({"observe.tensorboard": False, "strict": True, "loss.beta": None, "k": [1, 2]}) == [
        "--observe.no_tensorboard", "--strict", "--loss.beta", "None", "--k", "1", "2"]  # fmt: skip


def test_what_the_recipe_requires_is_asked_for_before_anything_is_submitted() -> None:
    with pytest.raises(ConfigError, match=r"needs MODEL, DATA: set --model and --data"):
        job_of(config(model=None, data=()))


def test_a_container_needs_scripts_that_know_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    for name in ("node.sh", "stages.sh", "fusepo_llama8b.sh"):
        (tmp_path / "slurm" / name).write_text("#!/bin/sh\n#SBATCH --nodes=1\n")
    monkeypatch.setattr("megafuse.launch.job.repository", lambda: tmp_path)
    with pytest.raises(ConfigError, match="start nothing in a container"):
        job_of(config(container="i.sqsh"))
    (tmp_path / "slurm" / "stages.sh").write_text('srun --container-image="$IMAGE"\n')
    env = job_of(config(container="i.sqsh", container_mounts=("/a:/a", "/b:/b"))).env
    assert (env["IMAGE"], env["MOUNTS"]) == ("i.sqsh", "/a:/a,/b:/b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env": ("TP",)}, "is not NAME=VALUE"),
        ({"host": "me@login"}, "host and remote_root belong together"),
        ({"host": "login", "remote_root": "/r"}, "must be USER@LOGIN_NODE"),
        ({"host": "a@b", "remote_root": "/r", "via": "plain"}, "needs on = 'slurm' and via = 'nemo-run'"),
        ({"on": "local", "container": "i"}, "inside the container"),
        ({"container_mounts": ("/a:/a",)}, "needs container"),
    ],
)
def test_where_must_make_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_a_misspelled_variable_is_refused() -> None:
    assert job_of(config(env=("NCCL_DEBUG=INFO", "TP=3"))).env["NCCL_DEBUG"] == "INFO"
    with pytest.raises(ConfigError, match=r"no script of recipe fusepo_llama8b reads TPX; did you mean TP\?"):
        job_of(config(env=("TPX=3",)))


def test_without_nemo_run_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    assert main(["launch", "fusepo_llama8b", "--model", "m", "--data", "d", "--run", str(tmp_path / "r")]) == 2
    told = capsys.readouterr().err
    assert "pip install -e '.[launch]'" in told and "--via plain" in told
    assert not (tmp_path / "r").exists()


def test_help_needs_no_nemo_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    assert main(["launch", "--help"]) == 0
    assert "--dry_run" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["slurm", "local"])
def test_a_dry_run_shows_the_script_and_leaves_nothing(where: str, tmp_path: Path, capsys: Any) -> None:
    line = ["launch", "fusepo_llama8b", "--model", "m", "--data", "d", "--run", str(tmp_path / "r"), "--on", where]
    assert main([*line, "--via", "plain", "--nodes", "7", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"exec bash {ROOT}/slurm/fusepo_llama8b.sh" in told and f"export RUN={tmp_path}/r" in told
    assert ("#SBATCH --nodes=7" in told) == (where == "slurm") and ("SLURM_JOB_NUM_NODES=1" in told) == (
        where == "local"
    )
    assert "\n#   MODEL  " in told
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NEMO, reason="no NeMo-Run: set MEGAFUSE_NEMO_PYTHON (scripts/ci_launch.sh)")
def test_nemo_runs_dry_run_shows_its_script_and_leaves_nothing(tmp_path: Path) -> None:
    done = launched(tmp_path, NEMO, "--dry_run", "--nodes", "2", "--time", "1:00:00")
    assert "# Generated by NeMo Run" in done.stdout and "\n#SBATCH --time=1:00:00\n" in done.stdout, done.stderr
    assert "\n#SBATCH --nodes=2\n" in done.stdout and "\n#SBATCH --signal=B:USR1@300\n" in done.stdout
    assert "\n#SBATCH --requeue\n" in done.stdout and "--account" not in done.stdout
    assert f"\nexec bash {ROOT}/slurm/fusepo_llama8b.sh" in done.stdout
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("nemo/experiments/*"))


def launched(folder: Path, python: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`megafuse launch fusepo_llama8b`, with stand-ins that build and train, as another process."""
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "scored.jsonl").touch()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment = {**kept, "PATH": os.pathsep.join([str(write_stand_ins(folder / "bin")), os.environ["PATH"]]),
                   "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(folder / "nemo"), **env}  # fmt: skip
    line = [python, "-m", "megafuse", "launch", "fusepo_llama8b", "--model", str(folder / "hf"), "--data",
            str(folder / "scored.jsonl"), "--run", str(folder / "run"), "--env", "TP=1", "HEALTH=off"]  # fmt: skip
    return subprocess.run([*line, *more], env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


needs_nemo = pytest.mark.skipif(not NEMO, reason="no NeMo-Run: set MEGAFUSE_NEMO_PYTHON (scripts/ci_launch.sh)")


@pytest.mark.parametrize("via", [pytest.param("nemo-run", marks=needs_nemo), "plain"])
def test_a_recipe_runs_on_this_machine(tmp_path: Path, via: str) -> None:
    """Every stage by the unmodified script and node.sh; stand-ins for what they start."""
    python = NEMO if via == "nemo-run" else sys.executable
    done = launched(tmp_path, python, "--on", "local", "--via", via, "--gpus_per_node", "3", "--set", "optim.lr=1e-6")
    assert done.returncode == 0 and "fusepo-llama8b: SUCCEEDED" in done.stdout, done.stdout + done.stderr
    stages = (tmp_path / "run" / "log").read_text().splitlines()
    started = [line for line in stages if line.startswith("torchrun ")]
    assert "--nnodes=1 --nproc-per-node=3" in started[0] and " megafuse reference " in started[0]
    assert " megafuse train " in started[1] and "--optim.lr 1e-6" in started[1]
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("via", [pytest.param("nemo-run", marks=needs_nemo), "plain"])
def test_a_failure_on_this_machine_is_told(tmp_path: Path, via: str) -> None:
    python = NEMO if via == "nemo-run" else sys.executable
    done = launched(tmp_path, python, "--on", "local", "--via", via, FAIL_WITH="4")
    assert done.returncode == 1 and "fusepo-llama8b: FAILED" in done.stdout, done.stdout + done.stderr


# ---- sweeps


def sweep(folder: Path, text: str = "", **fields: Any) -> SweepConfig:
    file = folder / "sweep.toml"
    file.write_text(text)
    plain = {"recipe": "fusepo_llama8b", "run": str(folder / "sweep"), "data": ("d.jsonl",), **fields}
    return validate(SweepConfig, {**({"model": "m"} if "targets" not in fields else {}), **plain})


def test_points_are_every_combination_and_named_by_it(tmp_path: Path) -> None:
    grid = {
        "sources": ((), ("a", "b")),
        "alpha": (5e-3, 1.0),
        "k": (1, 2),
        "loss": ("ln_dpo", "simpo"),
        "target": ("s", "t"),
    }
    found = points_of(sweep(
        tmp_path, grid=grid, losses={"ln_dpo": {"beta": 10}, "simpo": {"beta": 2, "gamma": 0.5}},
        targets={"s": {"model": "S"}, "t": {"model": "T", "env": {"TP": "2"}, "settings": {"optim.lr": 1e-6}}},
    ))  # fmt: skip
    assert len({point.name for point in found}) == 32
    last = found[-1]
    assert last.name == "sources-a+b_alpha-1.0_k-2_loss-simpo_target-t"
    assert last.job.env["BUILD"] == "--include_sources a b --alpha 1.0 --k 2 --kind pair --holdout 0.05"
    assert (last.job.env["LOSS"], last.job.env["BETA"]) == ("simpo", "2.0")
    assert last.job.env["MODEL"] == "T" and last.job.env["TP"] == "2"
    line = " ".join(last.job.arguments)
    assert "--loss.name simpo --loss.beta 2.0 --loss.gamma 0.5" in line and "--loss.beta_kl None" in line
    assert line.endswith("--optim.lr 1e-06")
    assert found[0].name.startswith("sources-all_") and "include_sources" not in found[0].job.env["BUILD"]
    assert last.job.env["RANK_BUILD"] == "--holdout 0.05"


def test_the_kind_of_data_set_follows_the_loss(tmp_path: Path) -> None:
    losses = {"rloo": {"beta_kl": 0.01}, "hot": {"name": "ln_dpo", "beta": 50}}
    found = points_of(
        sweep(tmp_path, grid={"loss": ("rloo", "hot")}, losses=losses, build={"max_prompts": 9}, holdout=0)
    )
    assert found[0].job.env["BUILD"] == "--max_prompts 9 --kind rloo" and found[0].job.env["RANK_BUILD"] == ""
    assert "--loss.name ln_dpo --loss.beta 50.0" in " ".join(found[1].job.arguments)


def test_long_names_stay_apart() -> None:
    names = {point_name({"sources": tuple(f"source-{i}" for i in range(n))}) for n in (30, 31)}
    assert len(names) == 2 and all(len(name) <= 120 for name in names)
    assert point_name({"target": "a/b c"}) == "target-a-b-c" and point_name({}) == "point"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"loss": ("simpo",)}, "losses": {"simpo": {"beta": 2}}}, "losses.simpo: gamma is missing"),
        ({"grid": {"loss": ("ipo",)}}, "grid.loss names 'ipo': no loss"),
        ({"grid": {"loss": ("dpo",)}, "losses": {"dpo": {"betta": 2}}}, "losses.dpo.betta is not a field"),
        ({"grid": {"alpha": (0.1, 0.1)}}, "names a value twice"),
        ({"grid": {"alpha": (-1.0,)}}, "must be above 0"),
        ({"grid": {"k": (0,)}}, "must be at least 1"),
        ({"grid": {"target": ("x",)}, "model": None}, r"there is no table \[targets.x\]"),
        ({"model": None}, "set model, or grid.target"),
        ({"build": {"alpha": 1}}, "build.alpha is set by the sweep itself"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, **fields)


def test_a_value_that_the_shell_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a b' has a space"):
        points_of(sweep(tmp_path, grid={"sources": (("a b",),)}))


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    (before,) = points_of(sweep(tmp_path, train={"seed": 1}))
    begin(before, [before])
    begin(before, [before])
    (after,) = points_of(sweep(tmp_path, train={"seed": 2}))
    with pytest.raises(ConfigError, match=r"was begun with arguments = \['--seed', '1'\]"):
        begin(after, [after])


def test_points_share_what_is_finished_and_equal(tmp_path: Path) -> None:
    losses = {"dpo": {"beta": 1}, "ln_dpo": {"beta": 1}}
    points = points_of(sweep(tmp_path, grid={"alpha": (1.0, 2.0), "loss": ("dpo", "ln_dpo")}, losses=losses))
    for name, text in (("dataset", "{}"), ("model", "{}"), ("reference", '{"complete": false}')):
        (points[0].folder / name).mkdir(parents=True)
        (points[0].folder / name / "manifest.json").write_text(text)
    begin(points[1], points)
    assert (points[1].folder / "dataset").resolve() == points[0].folder / "dataset"
    assert not (points[1].folder / "reference").exists()  # unfinished: it grows in place
    begin(points[2], points)  # another alpha: its own data, the same model
    assert not (points[2].folder / "dataset").exists() and (points[2].folder / "model").is_symlink()


def test_the_table(tmp_path: Path) -> None:
    points = points_of(sweep(tmp_path, grid={"alpha": (1.0, 2.0, 3.0)}))
    done, failed, _ = points
    for point in (done, failed):
        begin(point, points)
        (point.folder / "train").mkdir()
    fixed = dict.fromkeys(("grad_norm", "lr", "prompts", "tokens", "tokens_computed", "step_seconds"), 0)
    lines = [
        json.dumps({"step": n, "loss": float(n), "margin": n / 4, "tokens_per_second": n * 10.0, **fixed})
        for n in range(1, 22)
    ]
    (done.folder / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (done.folder / "eval").mkdir()
    (done.folder / "eval" / "accuracy.json").write_text('{"intra": 0.625, "cross": {"accuracy": 0.5}}')
    (failed.folder / "train" / "outcome.json").write_text('{"code": 86, "reason": "loss is NaN"}')
    (failed.folder / "train" / "heartbeat.json").write_text('{"step": 4, "total": 9}')
    remember(failed, "FAILED (86)", "")
    rows = [row_of(point) for point in points]
    assert rows[0].loss == pytest.approx(16.5) and rows[0].margin == pytest.approx(16.5 / 4)  # steps 12 to 21
    assert rows[0].tokens_per_second == pytest.approx(115.0) and rows[0].steps == 21  # median of steps 2 to 21
    assert [row.status for row in rows] == [
        "done", "failed (86), step 4 of 9: loss is NaN (exit code 86)", "not begun"]  # fmt: skip
    write_summary(tmp_path, rows)
    markdown = (tmp_path / "summary.md").read_text().splitlines()
    assert markdown[0].startswith("| point | steps | loss |")
    assert markdown[2].startswith("| alpha-1.0 | 21 | 16.5000 | 4.1250 | 62.5 | 50.0 | 115 | done |")
    table = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert table[0]["alpha"] == "1.0" and float(table[0]["intra"]) == 0.625 and table[2]["loss"] == ""
    assert json.loads((tmp_path / "summary.json").read_text())[0]["settings"] == {"alpha": 1.0}


def test_a_sweep_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    begun: list[str] = []

    def start(jobs: Any, config: Any, *, quiet: bool) -> list[Result]:
        for job in jobs:
            begun.append(job.name)
            if job.name != "k-2" or begun.count("k-2") > 1:
                (Path(job.run) / "eval").mkdir()
                (Path(job.run) / "eval" / "accuracy.json").write_text("{}")
        return [Result(job.name, "SUCCEEDED" if job.name != "k-2" else "FAILED (1)") for job in jobs]

    monkeypatch.setattr("megafuse.cli.launch_sweep.start", start)
    file = tmp_path / "s.toml"
    file.write_text(
        f'recipe = "fusepo_llama8b"\nrun = "{tmp_path}/sweep"\ndata = ["d"]\nmodel = "m"\n[grid]\nk = [1, 2, 3]\n'
    )
    assert main(["launch", "sweep", str(file), "--on", "local"]) == 1
    assert begun == ["k-1", "k-2", "k-3"]
    main(["launch", "sweep", str(file), "--on", "local"])
    assert begun[3:] == ["k-2"]
    assert main(["launch", "sweep", str(file), "--on", "local"]) == 0 and len(begun) == 4
    assert "3 points, 0 to start" in capsys.readouterr().out


def test_the_example_is_a_sweep() -> None:
    config = load(SweepConfig, ROOT / "examples" / "sweep.toml")
    assert len(points_of(config)) == 8
