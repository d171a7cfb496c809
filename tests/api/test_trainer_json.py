"""One DeepSpeed JSON for every trainer: what each of them refuses in the original, and takes once it is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import electra_ds
from electra_ds import ElectraForJointPreTraining, StoreRows
from electra_ds.core.compat import leave_out_shared_memory_collective
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from tests.helpers import small_recipe


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    leave_out_shared_memory_collective()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8, "gradient_clipping": 3.0,
        "zero_optimization": {"stage": 2},
    }))  # fmt: skip
    return path


@pytest.mark.slow
def test_transformers_compares_batch_and_clipping_with_its_own(
    original: Path, store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)

    def finalized(config: Any) -> dict[str, Any]:
        arguments = TrainingArguments(tmp_path / "out", deepspeed=config, use_cpu=True, **model.training_arguments())
        plugin = arguments.deepspeed_plugin.hf_ds_config
        plugin.trainer_config_finalize(arguments, model, 10)
        return dict(plugin.config)

    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu=4 vs"):
        finalized(str(original))
    found = finalized(electra_ds.trainer_json(original, "transformers"))
    assert found["gradient_accumulation_steps"] == 1
    assert found["zero_optimization"] == {"stage": 2}


def test_accelerate_compares_batch_and_clipping_with_its_own(original: Path) -> None:
    def processed(config: dict[str, Any]) -> dict[str, Any]:
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        plugin.deepspeed_config_process(
            train_micro_batch_size_per_gpu=2, train_batch_size=4, gradient_accumulation_steps=2, gradient_clipping=1.0
        )
        return dict(plugin.deepspeed_config)

    with pytest.raises(ValueError, match="ds gradient_accumulation_steps=8 vs arg gradient_accumulation_steps=2"):
        processed(json.loads(original.read_text()))
    found = processed(electra_ds.trainer_json(original, "accelerate"))
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (2, 1.0)
    assert found["zero_optimization"]["stage"] == 2


def test_lightning_refuses_accumulation_and_writes_it_itself(original: Path) -> None:
    def formatted(config: Any) -> dict[str, Any]:
        strategy = DeepSpeedStrategy(config=config)
        module = lightning.LightningModule()
        module.trainer = lightning.Trainer(
            accelerator="cpu",
            accumulate_grad_batches=3,
            gradient_clip_val=1.5,
            logger=False,
            enable_checkpointing=False,
        )  # fmt: skip
        module.trainer._data_connector.attach_data(module, train_dataloaders=DataLoader(range(4), 2))
        strategy._lightning_module = module
        strategy._format_config()
        assert isinstance(strategy.config, dict)
        return strategy.config

    with pytest.raises(MisconfigurationException, match="Do not set `gradient_accumulation_steps`"):
        formatted(json.loads(original.read_text()))
    found = formatted(electra_ds.trainer_json(original, "lightning"))
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (3, 1.5)
    assert found["zero_optimization"] == {"stage": 2}


def test_half_precision_at_stage_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16 at ZeRO stage 0, which only electra_ds\.pretrain supports"):
        electra_ds.trainer_json("gtx1060-6gb", "transformers")


@pytest.mark.gpu
def test_lightning_trains_under_its_deepspeed_strategy(store: TokenStore, tmp_path: Path) -> None:
    recipe = small_recipe("schedule.total_steps=6")

    class Pretraining(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model.train()(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.model.make_optimizer()

    strategy = DeepSpeedStrategy(config=electra_ds.trainer_json("zero2", "lightning"))
    trainer = lightning.Trainer(
        max_steps=6, strategy=strategy, devices=1, precision="bf16-mixed", logger=False, default_root_dir=tmp_path
    )
    trainer.fit(Pretraining(), DataLoader(StoreRows(recipe, store), recipe.global_batch_size))
    assert trainer.global_step == 6
