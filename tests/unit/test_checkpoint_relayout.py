"""The step count of a checkpoint, wherever the layout that wrote it kept it."""

from typing import Any

import pytest
import torch

from megafuse.checkpoint.relayout import complete
from megafuse.errors import IntegrityError

MARK = {"param_state_sharding_type": "fully_reshardable"}
STORED: dict[str, dict[Any, Any]] = {
    "distributed": {"optimizer": {"param_groups": [{"lr": 1.0, "step": 7.0}, {"lr": 1.0, "step": 7.0}]}, **MARK},
    "experts apart": {i: {"optimizer": {"param_groups": [{"step": 7.0}]}, **MARK} for i in (0, 1)},
    "plain fp32": {"state": {"common_step": torch.tensor(7.0)}, "param_groups": [{"lr": 1.0}]},
    "plain bf16": {"optimizer": {"state": {"common_step": torch.tensor(7.0)}, "param_groups": [{}]}},
    "plain, fused": {"state": {}, "param_groups": [{"lr": 1.0, "step": 7}]},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_the_step_count_goes_where_this_optimizer_looks_for_it(stored: dict[Any, Any]) -> None:
    distributed = {"optimizer": {"param_groups": [{"lr": 2.0, "step": 0.0}]}, **MARK}
    state = complete({}, distributed, stored, fused=False)
    assert state["optimizer"]["param_groups"] == [{"lr": 2.0, "step": 7}]
    state = complete({"state": {0: {}}}, {"param_groups": [{"lr": 2.0}]}, stored, fused=False)
    assert (state["param_groups"], state["state"]["common_step"]) == ([{"lr": 2.0}], torch.tensor(7.0))
    state = complete({"state": {0: {}}}, {"param_groups": [{"lr": 2.0}]}, stored, fused=True)
    assert state == {"param_groups": [{"lr": 2.0, "step": 7}], "state": {0: {}}}


@pytest.mark.parametrize("steps", [[], [6.0, 7.0]])
def test_a_checkpoint_without_one_step_count_is_refused(steps: list[float]) -> None:
    stored = {"param_groups": [{"step": step} for step in steps], "state": {}}
    with pytest.raises(IntegrityError, match="step count"):
        complete({"state": {}}, {"param_groups": [{}]}, stored, fused=False)
