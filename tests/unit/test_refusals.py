"""What cannot train is refused before any process group exists, with the numbers and the fix."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megafuse.bench.shapes import SHAPES
from megafuse.config.loss import LossConfig
from megafuse.config.train import ModelConfig, OverlapConfig, ParallelConfig
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError, DataError
from megafuse.launch.environment import world_from_environment
from megafuse.losses.registry import make_loss
from megafuse.model.arch import ModelArch, read_arch
from megafuse.model.build import choose_attention, choose_backend
from megafuse.parallel.layouts import check_layout, describe, nearest, workable
from megafuse.parallel.policy import Policy, resolve_policy
from megafuse.testing.families import WRITERS
from megafuse.testing.parity import Lab
from megafuse.testing.tiny import write_tiny_dataset
from megafuse.training.run import check_data, train

SMOLLM2 = ModelArch(
    architecture="LlamaForCausalLM", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_heads=9, num_kv_heads=3,
    head_dim=64, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5, rope_scaling=None,
    tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip


MOE = replace(SMOLLM2, num_heads=8, num_kv_heads=4, num_experts=6, experts_per_token=2, moe_ffn_hidden_size=48)
BAD_LAYOUTS = [
    (SMOLLM2, {"tensor": 2}, 2, r"attention heads = 9 is not divisible by parallel.tensor = 2.*1, 3, 9"),
    (SMOLLM2, {"tensor": 9}, 9, r"KV heads = 3 is not divisible by parallel.tensor = 9"),
    (SMOLLM2, {"pipeline": 4}, 4, r"layers = 30 is not divisible by parallel.pipeline = 4"),
    (SMOLLM2, {"tensor": 3, "pipeline": 2}, 8, r"world size 8 is not divisible .* 3 x 2 x 1 = 6"),
    (SMOLLM2, {"context": 4}, 6, r"world size 6 is not divisible .* 1 x 1 x 4 = 4"),
    (SMOLLM2, {"pipeline": 2, "virtual_pipeline": 2}, 2, r"pipeline stage = 15 .*virtual_pipeline = 2; .* 1, 3, 5, 15"),
    (SMOLLM2, {"pipeline": 4, "first_stage_layers": 5}, 4, r"30 - parallel.first_stage_layers 5 leaves 25 for 3 "),
    (SMOLLM2, {"pipeline": 2, "first_stage_layers": 9, "last_stage_layers": 9}, 2, r"leaves 12 for 0 pipeline stages"),
    (
        SMOLLM2,
        {"pipeline": 3, "last_stage_layers": 40},
        3,
        r"last stage have 40 layers, the model has 30; give them fewer",
    ),
    (SMOLLM2, {"expert": 2}, 2, r"LlamaForCausalLM has no experts; set parallel.expert = 1"),
    (MOE, {"expert": 4}, 4, r"experts = 6 is not divisible by parallel.expert = 4"),
    (MOE, {"expert": 3, "tensor": 2, "sequence": True}, 4, r"4 / 1 = 4 is not divisible by parallel.expert = 3"),
    (MOE, {"tensor": 2}, 4, r"has experts, .* parallel.tensor = 2 .* set parallel.sequence = true"),
]


@pytest.mark.parametrize(("arch", "fields", "world", "match"), BAD_LAYOUTS)
def test_a_layout_that_does_not_divide_says_which_number_by_what_and_what_would_do(
    arch: ModelArch, fields: dict[str, int], world: int, match: str
) -> None:
    wanted = ParallelConfig.model_validate(fields)
    with pytest.raises(ConfigError, match=match) as refused:
        check_layout(arch, wanted, world)
    near = nearest(arch, wanted, world)
    check_layout(arch, near, world)
    assert str(refused.value).endswith(f"The nearest layout that works on {world} rank(s): {describe(near)}")


def test_layouts_that_fit_are_let_pass_and_the_nearest_is_near() -> None:
    for fields in ({"tensor": 3, "pipeline": 5}, {"pipeline": 2, "first_stage_layers": 16}, {"context": 15}):
        check_layout(
            SMOLLM2, ParallelConfig.model_validate(fields), 15 if "context" in fields or "tensor" in fields else 2
        )
    assert nearest(SMOLLM2, ParallelConfig(pipeline=4), 6) == ParallelConfig(pipeline=3)
    assert nearest(SMOLLM2, ParallelConfig(tensor=2, sequence=True), 3) == ParallelConfig(tensor=3, sequence=True)
    assert all(ParallelConfig(tensor=t) not in list(workable(SMOLLM2, 6)) for t in (2, 6))


def test_training_refuses_a_layout_before_any_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, 3).prepare()
    monkeypatch.setattr("megafuse.training.run.process_groups", None)  # would raise TypeError if it were reached
    with pytest.raises(ConfigError, match=r"world size 1 .*parallel.tensor x pipeline x context = 1 x 1 x 2"):
        train(lab.config("sft", "x", parallel={"context": 2}))
    with pytest.raises(DataError, match=r"needs \d+ tokens in one row, data.max_group_tokens allows 16"):
        train(lab.config("sft", "y", data={"max_row_tokens": 8, "max_group_tokens": 16}))
    assert not (tmp_path / "runs").exists()  # neither run has claimed its folder


BAD_OVERLAPS = [
    ({"param_gather": True}, {}, "overlap.param_gather = true needs overlap.grad_reduce and optim.distributed"),
    ({"tensor": True}, {"tensor": 2, "sequence": True}, "overlap.tensor = true needs model.layers = 'te'"),
    ({"p2p": True}, {"pipeline": 2}, "overlap.p2p = true needs parallel.virtual_pipeline > 1"),
    ({"p2p": False}, {"pipeline": 2, "virtual_pipeline": 2}, "overlap.p2p = false is wrong with .* on gloo and 2"),
]


@pytest.mark.parametrize(("overlap", "parallel", "match"), BAD_OVERLAPS)
def test_an_overlap_that_cannot_be_says_what_it_needs(overlap: Any, parallel: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve_policy(
            OverlapConfig.model_validate(overlap), ParallelConfig.model_validate(parallel), backend="gloo",
            distributed_optimizer=True, te_layers=False,
        )  # fmt: skip


def test_overlap_defaults_follow_the_backend() -> None:
    def policy(backend: str, distributed: bool = True, **parallel: int) -> Policy:
        return resolve_policy(
            OverlapConfig(),
            ParallelConfig(**parallel),
            backend=backend,
            distributed_optimizer=distributed,
            te_layers=False,
        )

    assert policy("nccl") == Policy(True, True, False, True, True, False)
    assert policy("nccl", False) == Policy(True, False, False, True, True, False)
    assert policy("gloo", pipeline=2, virtual_pipeline=2) == Policy(False, False, True, False, False, False)


def test_virtual_stages_and_uneven_stages_need_a_pipeline() -> None:
    for field in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
        with pytest.raises(ValueError, match=r"parallel.pipeline > 1, got 1"):
            ParallelConfig.model_validate({field: 2})


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match="tensor = 1"):
        ParallelConfig(sequence=True)


def test_wrong_kind_and_wrong_vocabulary(tmp_path: Path) -> None:
    data = GroupDataset(write_tiny_dataset(tmp_path / "sft", "sft", seed=1))
    with pytest.raises(ConfigError, match=r"'dpo' trains on data sets of kind 'pair'.*'sft'.*--kind pair"):
        check_data(data, SMOLLM2, make_loss(LossConfig(name="dpo", beta=0.1)))
    path = tmp_path / "sft" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 50000}))
    with pytest.raises(ConfigError, match=r"vocabulary of 50000, the model has 49152"):
        check_data(GroupDataset(tmp_path / "sft"), SMOLLM2, make_loss(LossConfig(name="sft")))


def test_transformer_engine_is_refused_where_it_cannot_run() -> None:
    chosen = str(choose_backend(ModelConfig(path=Path("x"), precision="bf16"), head_dim=64, prefix_sharing=True))
    assert chosen == "layers torch, attention sdpa, bf16, overlap none"
    with pytest.raises(ConfigError, match="'flex' trains on CUDA only"):
        choose_backend(ModelConfig(path=Path("x"), attention="flex"), head_dim=64, prefix_sharing=True)
    for field in ("layers", "attention"):
        with pytest.raises(ConfigError, match="megafuse doctor"):
            choose_backend(ModelConfig.model_validate({"path": "x", field: "te"}), head_dim=64, prefix_sharing=False)


def test_attention_follows_the_device_and_the_width_of_the_heads() -> None:
    """torch's compiled flex_attention takes no heads below 16 dimensions; what is said of CUDA is asked here."""
    chosen = {(cuda, d): choose_attention("auto", d, cuda=cuda) for cuda in (True, False) for d in (8, 12, 15, 16, 128)}
    assert {where for where, kind in chosen.items() if kind == "flex"} == {(True, 16), (True, 128)}
    assert choose_attention("sdpa", 8, cuda=True) == "sdpa" and choose_attention("flex", 16, cuda=True) == "flex"
    with pytest.raises(ConfigError, match=r"model.attention = 'flex' .* 16 .* have 8 .*use 'sdpa' or 'auto'"):
        choose_attention("flex", 8, cuda=True)


def test_what_is_trained_to_check_cuda_has_heads_that_flex_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megafuse.testing.tiny.has_cuda", lambda: True)
    written = {name: read_arch(write(tmp_path / name, seed=1)) for name, write in WRITERS.items()}
    for name, arch in {**written, **{name: SHAPES[name] for name in ("tiny", "tiny-moe")}}.items():
        assert choose_attention("auto", arch.head_dim, cuda=True) == "flex", name


def test_world_of_torchrun_of_a_slurm_step_and_alone() -> None:
    assert world_from_environment({"RANK": "3", "WORLD_SIZE": "4"}) == {}
    assert world_from_environment({}) == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    world = world_from_environment({**slurm, "SLURM_STEP_NODELIST": "node7"})
    assert world["RANK"] == "5" and world["WORLD_SIZE"] == "16" and world["LOCAL_RANK"] == "1"
    assert world["MASTER_ADDR"] == "node7" and 20000 <= int(world["MASTER_PORT"]) < 30000
    alone = world_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert alone["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in alone
