"""What cannot train is refused before any process group exists, with the numbers and the fix."""

import json
from pathlib import Path

import pytest

from megafuse.config.loss import LossConfig
from megafuse.config.train import ModelConfig, ParallelConfig
from megafuse.data.dataset import GroupDataset
from megafuse.errors import ConfigError
from megafuse.launch.environment import world_from_environment
from megafuse.losses.registry import make_loss
from megafuse.model.arch import ModelArch
from megafuse.model.build import check_divides, choose_backend
from megafuse.parallel.topology import check_layout
from megafuse.testing.tiny import write_tiny_dataset
from megafuse.training.run import check_data

SMOLLM2 = ModelArch(
    architecture="LlamaForCausalLM", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_heads=9, num_kv_heads=3,
    head_dim=64, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5, rope_scaling=None,
    tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip


def test_a_layout_that_does_not_divide_says_which_number_by_what() -> None:
    check_divides(SMOLLM2, ParallelConfig(tensor=3, pipeline=5))
    with pytest.raises(ConfigError, match=r"attention heads = 9 is not divisible by parallel.tensor = 2.*1, 3, 9"):
        check_divides(SMOLLM2, ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match=r"KV heads = 3 is not divisible by parallel.tensor = 9"):
        check_divides(SMOLLM2, ParallelConfig(tensor=9))
    with pytest.raises(ConfigError, match=r"layers = 30 is not divisible by parallel.pipeline = 4"):
        check_divides(SMOLLM2, ParallelConfig(pipeline=4))
    with pytest.raises(ConfigError, match=r"world size 6 is not divisible .* 2 x 2 = 4"):
        check_layout(ParallelConfig(tensor=2, pipeline=2), 6)


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
    assert str(choose_backend(ModelConfig(path=Path("x")), prefix_sharing=True)) == "layers torch, attention sdpa, bf16"
    for field in ("layers", "attention"):
        with pytest.raises(ConfigError, match="megafuse doctor"):
            choose_backend(ModelConfig.model_validate({"path": "x", field: "te"}), prefix_sharing=False)


def test_world_of_torchrun_of_a_slurm_step_and_alone() -> None:
    assert world_from_environment({"RANK": "3", "WORLD_SIZE": "4"}) == {}
    assert world_from_environment({}) == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    world = world_from_environment({**slurm, "SLURM_STEP_NODELIST": "node7"})
    assert world["RANK"] == "5" and world["WORLD_SIZE"] == "16" and world["LOCAL_RANK"] == "1"
    assert world["MASTER_ADDR"] == "node7" and 20000 <= int(world["MASTER_PORT"]) < 30000
    alone = world_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert alone["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in alone
