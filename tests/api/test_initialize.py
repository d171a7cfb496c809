"""DeepSpeed's own engine with a recipe's networks: the losses of electra_ds.pretrain, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import electra_ds
from electra_ds.config.run_directory import read_metrics
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.training.engine import close_deepspeed
from tests.helpers import SMALL, small_recipe

STEPS = ("schedule.total_steps=12", "schedule.warmup_steps=3")


def losses_of(started: electra_ds.api.initialize.Initialized, until: int) -> list[float]:
    engine, losses = started.engine, []
    for micro_batch in started.loader:
        output = engine(**micro_batch)
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
        if engine.global_steps == until:
            break
    return losses


def test_the_networks_are_whole_at_stage_3(store: TokenStore, tmp_path: Path, process_group: Ranks) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    engine = electra_ds.initialize(recipe=small_recipe(*STEPS), store=store, ds_config=config).engine
    expected = electra_ds.build_model(small_recipe(*STEPS), store).discriminator.embeddings.word_embeddings.weight
    table = engine.module.networks()["discriminator"].get_input_embeddings().weight
    assert torch.equal(table, expected)
    close_deepspeed(engine)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_deepspeed_script_has_the_losses_of_a_run_and_resumes_from_deepspeeds_checkpoint(
    store: TokenStore, tmp_path: Path, process_group: Ranks, stage: int
) -> None:
    recipe = small_recipe(*STEPS)
    config = tmp_path / "ds.json"
    config.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    run = electra_ds.pretrain(
        "tiny", data=store.path, ds_config=config, run_dir=tmp_path / "run", overrides=[*SMALL, *STEPS], log_every=1,
        threads=1, eval_windows=8, quiet=True,
    )  # fmt: skip
    expected = [line["loss"] for line in read_metrics(run.path / "metrics.jsonl") if line["kind"] == "train"]
    started = electra_ds.initialize(recipe=recipe, store=store, ds_config=config)
    assert len(started.loader) == 12
    assert losses_of(started, 5) == pytest.approx(expected[:5], rel=1e-5)
    started.engine.save_checkpoint(str(tmp_path / "native"))
    straight = losses_of(started, 12)
    assert straight == pytest.approx(expected[5:], rel=1e-5)
    again = electra_ds.initialize(recipe=recipe, store=store, ds_config=config)
    again.engine.load_checkpoint(str(tmp_path / "native"))
    assert len(again.loader) == 7
    assert losses_of(again, 12) == straight
    assert again.engine.module.num_forward_passes == 12


def test_half_precision_at_stage_0_is_refused(store: TokenStore, tmp_path: Path, process_group: Ranks) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"bf16": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r"DeepSpeed's own bf16 does not work at ZeRO stage 0 .* Use stage 1"):
        electra_ds.initialize(recipe=small_recipe(), store=store, ds_config=config)


def test_gradient_accumulation_takes_the_rows_of_a_step_in_order(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    recipe = small_recipe(*STEPS)
    engine, _, loader, scheduler = electra_ds.initialize(recipe=recipe, store=store, ds_config="cpu", micro_batch=2)
    micro_batches = [next(iter(loader))]
    rows = electra_ds.StoreRows(recipe, store)
    assert torch.equal(micro_batches[0]["input_ids"], torch.stack([rows[row]["input_ids"] for row in range(2)]))
    for index, micro_batch in zip(range(8), loader, strict=False):
        engine.backward(engine(**micro_batch).loss)
        engine.step()
        assert engine.global_steps == (index + 1) // 4
    assert len(loader) == 40
    assert scheduler.get_last_lr()[0] == pytest.approx(2 / 3 * recipe.optimizer.learning_rate)
