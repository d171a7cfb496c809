"""Optimizers of one's own: the same step and the same checkpoints as the built-in one, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_ds_cloze.lion import Lion

import electra_ds
from electra_ds import Run, UpdateRule
from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.config.sections import OptimizerSection
from electra_ds.core.errors import ConfigError, PluginError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.training.optimizer import MasterAdamW
from tests.helpers import SMALL, small_recipe

STEPS = ("schedule.total_steps=10", "schedule.warmup_steps=2")
LION = "electra_ds_cloze.lion:Lion"
SAME = "tests.training.test_update_rules:TheSame"


class TheSame(UpdateRule):
    """AdamW with bias correction, written apart (Loshchilov and Hutter 2019, algorithm 2)."""

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *,
        learning_rate: float, betas: tuple[float, float], weight_decay: float, step: torch.Tensor,
    ) -> None:  # fmt: skip
        first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
        second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        correction = torch.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        unbiased = second.sqrt() + self.section.epsilon * torch.sqrt(1 - betas[1] ** step)
        weight.mul_(1 - learning_rate * weight_decay)
        weight.sub_(learning_rate * correction * first / unbiased)


def json_of(stage: int, run: Path, **more: Any) -> str:
    """A DeepSpeed JSON; stage 3 keeps weights and optimizer on the host."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    path = run.with_suffix(".json")
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero} | more))
    return str(path)


def pretrain(store: TokenStore, run: Path, stage: int, rule: str, *overrides: str, **more: Any) -> Run:
    return electra_ds.pretrain(
        "tiny", data=store.path, ds_config=json_of(stage, run), run_dir=run, threads=1, quiet=True,
        log_every=1, eval_windows=16, overrides=[*SMALL, *STEPS, f"optimizer.rule={rule}", *overrides], **more,
    )  # fmt: skip


def losses(run: Run) -> list[float]:
    found = run.metrics.query("kind == 'train'")
    return [float(value) for value in found["generator_loss"] + found["discriminator_loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rule_that_is_adamw_trains_as_adamw_does(
    stage: int, store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    """Clipping, schedule, weight decay and the generator's own rates included."""
    own = ("generator.learning_rate=1e-3", "generator.beta1=0.8", "optimizer.max_grad_norm=0.5")
    expected = pretrain(store, tmp_path / "built-in", stage, "adamw", *own)
    found = pretrain(store, tmp_path / "own", stage, SAME, *own)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "continued"), [(0, 0), (0, 2), (2, 2), (1, 0), (2, 3)])
def test_a_run_with_a_rule_is_resumed_at_every_stage(
    begun: int, continued: int, store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    whole = losses(pretrain(store, tmp_path / "whole", begun, LION, "optimizer.learning_rate=3e-4"))
    run = pretrain(store, tmp_path / "run", begun, LION, "optimizer.learning_rate=3e-4", stop_at=4)
    run.resume(quiet=True, ds_config=json_of(continued, tmp_path / "continued"))
    found = losses(run)
    if begun == continued:
        assert found == whole
    assert found == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_finite_change_nothing(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(dtype))
    section = OptimizerSection(learning_rate=0.01, rule=LION)
    optimizer = MasterAdamW([("weight", weight)], section, LossScaling(initial_scale=4.0, is_dynamic=True))

    def stepped(gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        weight.grad = gradient.to(dtype)
        optimizer.set_learning_rate(lambda ends: 0.01)
        optimizer.step()
        return optimizer.snapshot()

    before = stepped(torch.ones(3, 4))
    after = stepped(torch.full((3, 4), float("inf")))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert optimizer.counters()["taken_steps"] == 1
    moved = stepped(torch.ones(3, 4))
    assert not torch.equal(moved["master/weight"], after["master/weight"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_rule_trains_in_half_precision_as_in_fp32(
    stage: int, store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    whole = losses(pretrain(store, tmp_path / "fp32", stage, LION, "optimizer.learning_rate=3e-4"))
    half = electra_ds.pretrain(
        "tiny", data=store.path, ds_config=json_of(stage, tmp_path / "bf16", bf16={"enabled": True}), threads=1,
        run_dir=tmp_path / "run", quiet=True, log_every=1, eval_windows=16,
        overrides=[*SMALL, *STEPS, f"optimizer.rule={LION}", "optimizer.learning_rate=3e-4"],
    )  # fmt: skip
    assert losses(half) == pytest.approx(whole, rel=0.02)
    assert losses(half) != whole


def test_frozen_parameters_stay_as_they_are() -> None:
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MasterAdamW([("a", frozen), ("b", weight)], OptimizerSection(learning_rate=0.1, rule=LION), None)
    optimizer.set_learning_rate(lambda ends: 0.1)
    optimizer.step()  # no gradient counts as 0: only the decay moves the weight
    assert torch.equal(frozen, torch.ones(3))
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 1 - 0.1 * 0.01))


def test_a_json_that_names_adamw_does_not_fit_a_rule(store: TokenStore, tmp_path: Path, process_group: Ranks) -> None:
    config = json_of(1, tmp_path / "adamw", optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    with pytest.raises(ConfigError, match=r"optimizer\.rule is electra_ds_cloze.*remove the section"):
        electra_ds.pretrain(
            "tiny", data=store.path, ds_config=config, run_dir=tmp_path / "run", quiet=True,
            overrides=[*SMALL, *STEPS, f"optimizer.rule={LION}"],
        )  # fmt: skip


def test_lion_moves_every_weight_by_the_learning_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = MasterAdamW([("a.bias", weight)], OptimizerSection(learning_rate=0.1, rule=LION), None)
    weight.grad = torch.tensor([1e-6, -3.0, 20.0, 0.0])
    optimizer.set_learning_rate(lambda ends: 0.1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1, -0.1, 0.0]))
    assert issubclass(Lion, UpdateRule)


def test_a_rule_that_cannot_be_used_is_refused_before_anything_is_written(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    with pytest.raises(PluginError, match="There is no optimizer 'loin'"):
        pretrain(store, tmp_path / "run", 0, "loin")
    assert not (tmp_path / "run").exists()
    run = pretrain(store, tmp_path / "lion", 0, LION, stop_at=1)
    with pytest.raises(ConfigError, match=r"A run with optimizer\.rule=electra_ds_cloze.* cannot be exported"):
        electra_ds.export(run, to="deepspeed", out=tmp_path / "native")
    recipe = small_recipe(f"optimizer.rule={LION}")
    model = electra_ds.ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
    with pytest.raises(ConfigError, match=r"is supported only by electra_ds\.pretrain"):
        model.make_optimizer()
