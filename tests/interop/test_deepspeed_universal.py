"""Universal checkpoints: DeepSpeed's ds_to_universal takes our exports, and what it writes comes into a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from electra_ds.core.errors import CheckpointError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.deepspeed_checkpoint import read_deepspeed_checkpoint
from electra_ds.interop.deepspeed_files import find_files
from electra_ds.interop.export_deepspeed import export_deepspeed
from tests.helpers import model_for, small_recipe
from tests.interop.test_deepspeed_checkpoint import (  # noqa: F401
    assert_same,
    assert_same_state,
    brought_in,
    only_checkpoint,
    portable,
)
from tests.interop.test_deepspeed_foreign import (
    EMBEDDINGS,
    assert_frozen_came_in,
    freeze,
    held_trainable,
    trainable_groups,
)
from tests.native_worker import PRECISIONS, STEPS, config, held_by, plain_engine, train

QUICK = ((1, "fp32"), (2, "fp16"), (3, "bf16"))
PLANS = [
    pytest.param(stage, precision, marks=() if (stage, precision) in QUICK else pytest.mark.slow)
    for stage in (1, 2, 3)
    for precision in PRECISIONS
]


@pytest.fixture(autouse=True)
def _ranks(process_group: Ranks, half_on_cpu: None) -> None:
    pass


def convert(folder: Path, *, with_missing_state: bool = False) -> Path:
    """Run DeepSpeed's own script on the one tag of a checkpoint, in this process; returns what it made."""
    tag = (folder / "latest").read_text()
    out = folder / f"{tag}_universal"
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / tag), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=with_missing_state,
        )
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("stage", "precision"), PLANS)
def test_deepspeeds_script_converts_our_export_and_it_comes_back_the_same(
    store: TokenStore,
    portable: Path,  # noqa: F811
    process_group: Ranks,
    tmp_path: Path,
    stage: int,
    precision: str,
) -> None:
    values = config(stage, precision) | {"train_micro_batch_size_per_gpu": 8}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    native = tmp_path / "native"
    export_deepspeed(portable, native, str(tmp_path / "ds.json"), process_group)
    universal = convert(native)
    expected = only_checkpoint(portable)
    if stage < 3:  # DeepSpeed's stage 3 does not give back to the bit what it loads
        loading = json.loads((native / "deepspeed.json").read_text()) | {"checkpoint": {"load_universal": True}}
        with plain_engine(model_for(store, small_recipe()), loading) as engine:
            engine.load_checkpoint(str(native))
            assert engine.global_steps == 40
            assert_same(held_by(engine), expected.tensors)
    back, told = brought_in(universal, store, tmp_path / "run", process_group)
    assert f"universal, from ZeRO stage {stage}, {precision}, 1 rank(s)" in told
    assert "both of AdamW's, complete" in told
    assert_same(back.tensors, expected.tensors)
    assert_same_state(back.state, expected.state)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_foreign_universal_checkpoint_comes_in_with_moments_and_frozen_parameters(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int
) -> None:
    model = model_for(store, small_recipe())
    frozen = {name: dict(model.named_parameters())[name].detach().clone() for name in freeze(model, EMBEDDINGS)}
    with plain_engine(model, config(stage, "fp32"), trainable_groups(model)) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        expected = held_trainable(engine)
    convert(tmp_path / "native", with_missing_state=True)
    (tmp_path / "native" / "latest").unlink()  # it has latest_universal
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group)
    assert f"universal, from ZeRO stage {stage}, fp32" in told
    assert_frozen_came_in(checkpoint, expected, frozen)
    assert (checkpoint.state["step"], checkpoint.state["optimizer"]["taken_steps"]) == (STEPS, STEPS)


def test_in_a_folder_with_both_the_original_is_read_and_a_universal_one_with_a_gap_is_refused(
    store: TokenStore, process_group: Ranks, tmp_path: Path
) -> None:
    with plain_engine(model_for(store, small_recipe()), config(2, "fp32")) as engine:
        train(engine, store, 1)
        engine.save_checkpoint(str(tmp_path))
    universal = convert(tmp_path, with_missing_state=True)
    assert find_files(tmp_path).universal is None
    files = find_files(universal)
    assert files.universal == universal / "zero"
    file = universal / "zero" / "discriminator_head.dense.bias" / "fp32.pt"
    torch.save({"param": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"fp32\.pt does not hold discriminator_head\.dense\.bias with shape"):
        read_deepspeed_checkpoint(files)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"fp32\.pt cannot be read"):
        read_deepspeed_checkpoint(files)
