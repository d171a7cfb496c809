"""The undocumented parts of torch and DeepSpeed that the package uses still exist and behave as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import parameter_offload

from electra_ds.core import compat
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from tests.helpers import builder_for, cpu_plan, imported, model_for, small_recipe

CPU = torch.device("cpu")


def test_a_group_is_added_as_torch_does_it_and_without_its_compiler() -> None:
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(2))
    group = {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5}
    compat.add_param_group(ours, {**group})
    theirs.add_param_group({**group})
    assert ours.param_groups[1] == theirs.param_groups[1]
    code = (
        "import torch; from electra_ds.config.recipe import load_recipe; "
        "from electra_ds.training.optimizer import MasterAdamW; "
        "weight = torch.nn.Parameter(torch.ones(2)); "
        "optimizer = MasterAdamW([('weight', weight)], load_recipe('tiny').optimizer, None); "
        "weight.grad = torch.ones(2); optimizer.step(); assert weight[0] < 1"
    )
    assert imported(code, {"torch._dynamo", "sympy"}) == set()


def test_norms_and_copies_of_several_tensors_are_those_of_each() -> None:
    sources = [torch.randn(3, 4), torch.randn(5)]
    torch.testing.assert_close(compat.norms(sources), torch.stack([source.norm() for source in sources]))
    targets = [torch.zeros_like(source, dtype=torch.bfloat16) for source in sources]
    compat.copy_all(targets, sources)
    assert all(torch.equal(target, source.bfloat16()) for target, source in zip(targets, sources, strict=True))


def test_what_torch_compile_raises_is_a_compiler_error() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    with pytest.raises(compat.compiler_error(), match="no compiler"):
        torch.compile(lambda tensor: tensor + 1, backend=broken, fullgraph=True)(torch.ones(2))


def test_muon_is_imported_without_torchs_compiler() -> None:
    code = "import deepspeed; from electra_ds.core.compat import import_muon; import_muon()"
    muon = "deepspeed.runtime.zero.muon.muon_optimizer"
    assert imported(code, {muon, "torch._dynamo"}) == {muon}


def test_the_collective_that_would_be_compiled_is_known_by_its_name() -> None:
    from deepspeed.ops import __compatible_ops__

    assert "deepspeed_shm_comm" in __compatible_ops__
    compat.leave_out_shared_memory_collective()
    assert __compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_optimizer_has_its_partitions_and_finds_its_moments(store: TokenStore, stage: int) -> None:
    recipe = small_recipe()
    engine = PretrainingEngine(
        model_for(store, recipe), recipe, cpu_plan(recipe, zero_optimization={"stage": stage}), CPU
    )
    zero = engine.optimizer._zero  # type: ignore[union-attr]
    partitions = compat.flat_partitions(zero, stage)
    numbers = sum(parameter.numel() for parameter in model_for(store, recipe).parameters())
    assert sum(flat.numel() for flat in partitions) >= numbers
    assert all({"exp_avg", "exp_avg_sq"} <= zero.optimizer.state[flat].keys() for flat in partitions)
    engine.train_step(builder_for(store, recipe).build(0), 0)
    assert all(zero.optimizer.state[flat]["exp_avg"].any() for flat in partitions)
    engine.close()
    assert not parameter_offload.FWD_MODULE_STACK


def test_what_stage_3_keeps_for_the_process_is_cleared() -> None:
    parameter_offload.FWD_MODULE_STACK.append(object())
    compat.clear_stage3_caches()
    assert not parameter_offload.FWD_MODULE_STACK
