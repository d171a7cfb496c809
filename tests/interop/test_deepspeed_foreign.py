"""Foreign DeepSpeed checkpoints with frozen parameters and other optimizers: what can be imported is, and the reason
given for what cannot is the true one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from electra_ds.core.errors import CheckpointError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.deepspeed_checkpoint import OptimizerGroup, names_of_groups, read_deepspeed_checkpoint
from electra_ds.interop.deepspeed_files import find_files
from electra_ds.interop.import_deepspeed import import_deepspeed
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.engine import close_deepspeed
from electra_ds.training.optimizer import parameter_groups
from tests.helpers import model_for, small_recipe
from tests.interop.test_deepspeed_checkpoint import brought_in, new_job, only_checkpoint
from tests.native_worker import config, held_by, plain_engine, train

EMBEDDINGS = "discriminator.embeddings."
TABLE = f"{EMBEDDINGS}position_embeddings.weight"


@pytest.fixture(autouse=True)
def _ranks(process_group: Ranks, half_on_cpu: None) -> None:
    pass


def freeze(model: nn.Module, prefix: str) -> list[str]:
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    assert names
    return names


def trainable_groups(model: nn.Module) -> Any:
    return parameter_groups([(name, p) for name, p in model.named_parameters() if p.requires_grad], 0.01)


def held_trainable(engine: Any) -> dict[str, torch.Tensor]:
    """What `held_by` finds, of the parameters that the engine trains."""
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    module = engine.module
    named = [(name, parameter) for name, parameter in module.named_parameters() if name not in frozen]
    module.named_parameters = lambda: iter(named)
    try:
        return held_by(engine)
    finally:
        del module.named_parameters


def assert_frozen_came_in(
    checkpoint: Checkpoint, expected: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor]
) -> None:
    """expected: of what was trained; frozen: by name, as the engine was given them."""
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensors[name], tensor), name
    for name, tensor in frozen.items():
        assert torch.equal(checkpoint.tensors[f"master/{name}"], tensor), name
        assert not checkpoint.tensors[f"exp_avg/{name}"].any(), name
        assert not checkpoint.tensors[f"exp_avg_sq/{name}"].any(), name
    assert len(checkpoint.tensors) == len(expected) + 3 * len(frozen)


@pytest.mark.parametrize(
    ("stage", "precision", "prefix"),
    [
        (0, "fp32", EMBEDDINGS), (0, "fp16", EMBEDDINGS), (0, "bf16", "discriminator.layers.1."), (1, "fp32", TABLE),
        (1, "bf16", EMBEDDINGS), (2, "fp32", EMBEDDINGS), (2, "fp16", "discriminator.layers.0."),
        (3, "fp32", EMBEDDINGS), (3, "bf16", "discriminator.layers.0."),
    ],
)  # fmt: skip
def test_frozen_parameters_come_in_and_the_others_keep_their_moments(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, precision: str, prefix: str
) -> None:
    model = model_for(store, small_recipe())
    names = freeze(model, prefix)
    frozen = {name: dict(model.named_parameters())[name].detach().clone() for name in names}
    if precision != "fp32":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        frozen = {name: tensor.to(dtype).float() for name, tensor in frozen.items()}
    with plain_engine(model, config(stage, precision), trainable_groups(model)) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        expected = held_trainable(engine)
    (tmp_path / "run").mkdir()
    native = read_deepspeed_checkpoint(find_files(tmp_path / "native"), [prefix])
    told = import_deepspeed(native, new_job(store, tmp_path / "run", process_group), None)
    assert_frozen_came_in(only_checkpoint(tmp_path / "run"), expected, frozen)
    assert f"{len(names)} of its tensors were frozen and are trained from now on: {names[0]}" in told
    assert f"the other {len(names)} were frozen or had no gradient yet, and start at zero" in told


@pytest.mark.parametrize("stage", [0, 2])
def test_frozen_parameters_that_are_in_the_optimizers_groups_do_no_harm(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int
) -> None:
    model = model_for(store, small_recipe())
    frozen = {name: dict(model.named_parameters())[name].detach().clone() for name in freeze(model, EMBEDDINGS)}
    with plain_engine(model, config(stage, "fp32"), [{"params": list(model.parameters())}]) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        expected = held_trainable(engine)
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group)
    assert_frozen_came_in(checkpoint, expected, frozen)
    assert "were frozen or had no gradient yet, and start at zero" in told


def test_stage_0_that_leaves_open_what_was_frozen_takes_it_from_the_user(
    store: TokenStore, process_group: Ranks, tmp_path: Path
) -> None:
    model = model_for(store, small_recipe())
    prefix = "discriminator.layers.0."  # of the same shapes as discriminator.layers.1.
    frozen = {name: dict(model.named_parameters())[name].detach().clone() for name in freeze(model, prefix)}
    with plain_engine(model, config(0, "fp32"), trainable_groups(model)) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        expected = held_trainable(engine)
    _, told = brought_in(tmp_path / "native", store, tmp_path / "open", process_group)
    assert "moments  none, so AdamW's start at zero" in told
    assert "fit; if parameters were frozen there, name them with --frozen" in told
    (tmp_path / "run").mkdir()
    native = read_deepspeed_checkpoint(find_files(tmp_path / "native"), [prefix])
    import_deepspeed(native, new_job(store, tmp_path / "run", process_group), None)
    assert_frozen_came_in(only_checkpoint(tmp_path / "run"), expected, frozen)


def group(*sizes: int) -> OptimizerGroup:
    """A group without masters."""
    return OptimizerGroup([{"exp_avg": torch.zeros(size), "exp_avg_sq": torch.zeros(size)} for size in sizes])


def flat_group(size: int) -> OptimizerGroup:
    return OptimizerGroup([{"master": torch.zeros(size)}], is_flat=True)


def test_a_usual_way_to_group_parameters_is_taken_only_if_no_other_fits() -> None:
    weights = {name: torch.zeros(3) for name in ("a.weight", "a.bias", "b.weight", "b.bias")}
    assert names_of_groups(weights, [group(3, 3, 3, 3)]) == [tuple(weights)]
    assert names_of_groups(weights, [group(3, 3, 3), group(3)]) is None
    norms = {"a.weight": torch.zeros(2), "LayerNorm.weight": torch.zeros(3), "a.bias": torch.zeros(3)}
    assert names_of_groups(norms, [group(2), group(3, 3)]) == [("a.weight",), ("LayerNorm.weight", "a.bias")]
    assert names_of_groups(norms, [flat_group(2), flat_group(6)]) == [("a.weight",), ("LayerNorm.weight", "a.bias")]
    networks = {"gen.weight": torch.zeros(3), "disc.weight": torch.zeros(3), "disc.bias": torch.zeros(2)}
    assert names_of_groups(networks, [group(3, 2), group(3)]) == [("disc.weight", "disc.bias"), ("gen.weight",)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


class Lion(torch.optim.Optimizer):
    """Keeps one moment, under Adam's name for its first."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-4, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moment = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                    parameter.sub_(group["lr"] * moment.lerp(parameter.grad, 0.1).sign())
                    moment.lerp_(parameter.grad, 0.01)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (sgd, "kept nothing"),
        (momentum, "kept momentum_buffer"),
        (Lion, "kept exp_avg"),
        (adagrad, "kept sum"),
    ],
)
def test_the_reason_for_missing_moments_is_the_optimizer_where_it_was_not_adam(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, make: Callable[[Any], Any], reason: str
) -> None:
    model = model_for(store, small_recipe())
    values = config(stage, "fp32") | {"zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(model.parameters()), config=values, dist_init_required=False
    )
    try:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
    finally:
        close_deepspeed(engine)
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group)
    assert f"Note: its optimizer {reason}, not Adam's exp_avg and exp_avg_sq." in told
    assert "usual ways" not in told
    assert "moments  none, so AdamW's start at zero" in told
    assert "correct Adam's bias" not in told
    assert checkpoint.state["optimizer"]["taken_steps"] == 0
    assert not any(checkpoint.tensors[name].any() for name in checkpoint.tensors if name.startswith("exp_avg"))


def test_stage_3_needs_every_ranks_slice_of_a_frozen_parameter(
    store: TokenStore, process_group: Ranks, tmp_path: Path
) -> None:
    model = model_for(store, small_recipe())
    freeze(model, TABLE)
    with plain_engine(model, config(3, "fp32"), trainable_groups(model)) as engine:
        train(engine, store, 1)
        engine.save_checkpoint(str(tmp_path / "native"))
        engine.save_checkpoint(str(tmp_path / "without"), exclude_frozen_parameters=True)
    files = find_files(tmp_path / "native")
    assert TABLE in read_deepspeed_checkpoint(files).frozen
    for file in files.optimizer.values():
        (files.folder / file.name.replace("pp_rank_0", "pp_rank_1")).write_bytes(file.read_bytes())
    (file,) = files.model.values()
    content = torch.load(file, weights_only=False)
    torch.save(content | {"dp_world_size": 2}, file)
    with pytest.raises(CheckpointError, match=r"model_states\.pt of these ranks: 0\. Copy"):
        read_deepspeed_checkpoint(find_files(tmp_path / "native"))
    with pytest.raises(CheckpointError, match=f"{TABLE} is missing"):
        brought_in(tmp_path / "without", store, tmp_path / "run", process_group)
