"""The memory model and the back-off on a GPU, held to the memory of smaller cards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Case, card_case, is_as_large, limited, measure_case
from benchmarks.synthetic import write_store
from electra_ds.config.cards import find_card
from electra_ds.config.deepspeed import DeepSpeedPlan, resolve
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import Ranges, TokenStore
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.memory import CONTEXT_BYTES, peak_memory
from electra_ds.pretraining.prepare import fitting_plan
from electra_ds.training.engine import has_bf16
from tests.helpers import shape_of, small_recipe
from tests.pretraining.test_pretrain import train_losses
from tests.training.test_out_of_memory import micro, train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]

RECIPE = load_recipe("rc2020-small")
VOCAB_SIZE = RECIPE.tokenizer.vocab_size
# Twelve layers of rc2020-small's width without dropout, so that two cuts of a batch have the same losses.
SIZES = (
    "global_batch_size=128", "data.sequence_length=128", "model.embedding_size=128", "model.hidden_size=256",
    "model.num_hidden_layers=12", "model.intermediate_size=1024", "generator.width_multiplier=0.25",
    "generator.depth_multiplier=1",
)  # fmt: skip


def long_texts(folder: Path, vocab_size: int) -> TokenStore:
    """Random tokens that fill every row."""
    return write_store(folder, np.full(500, 600), vocab_size, np.random.default_rng(0))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[MaskedBatch]:
    store = long_texts(tmp_path_factory.mktemp("stores") / "long", VOCAB_SIZE)
    builder = BatchBuilder(store, Ranges(store.documents[:-1], store.documents[1:]), RECIPE, RECIPE.seed)
    return [builder.build(step) for step in range(memory.STEPS)]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def plan_of(recipe: Recipe, precision: str, **values: object) -> DeepSpeedPlan:
    section: dict[str, object] = {} if precision == "fp32" else {precision: {"enabled": True}}
    return resolve({**section, **values}, recipe, world_size=1, auto_fp16=False, source="test")


@pytest.mark.parametrize(("ds_config", "gib"), [("gtx1060-6gb", 6), ("gtx1080ti-11gb", 11), ("t4-16gb", 16)])
def test_the_shipped_json_trains_in_its_cards_memory_as_predicted(
    ds_config: str, gib: int, batches: list[MaskedBatch], device: torch.device
) -> None:
    card = find_card(ds_config)
    assert card is not None
    assert card.memory_gib == gib
    if not is_as_large(device, card):
        pytest.skip(f"needs a GPU of {gib} GiB")
    case = card_case(card, RECIPE, device)
    assert case.plan.batch.micro_batch_size == RECIPE.global_batch_size == 128
    found = measure_case(case, batches, device, lambda: None)
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)
    assert found["reserved_bytes"] + CONTEXT_BYTES <= card.usable_gib * 2**30


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_peak_of_a_real_step_is_within_a_tenth_of_the_models(
    precision: str, size: int, batches: list[MaskedBatch], device: torch.device
) -> None:
    if precision == "bf16" and not has_bf16(device):
        pytest.skip("this GPU has no bf16")
    plan = plan_of(RECIPE, precision).with_micro_batch(size)
    if peak_memory(shape_of(RECIPE, VOCAB_SIZE), plan).card_bytes > torch.cuda.mem_get_info(device)[1]:
        pytest.skip("this GPU is too small")
    found = measure_case(Case("test", RECIPE, plan), batches, device, lambda: None)
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)


def between(recipe: Recipe, vocab_size: int, plan: DeepSpeedPlan) -> float:
    """A memory in which half of the plan's micro-batch fits, the allocator's waste included, and the whole does not."""
    size = plan.batch.micro_batch_size
    shape = shape_of(recipe, vocab_size)
    half, whole = (peak_memory(shape, plan.with_micro_batch(rows)).allocated_bytes for rows in (size // 2, size))
    assert 1.25 * half < (half + whole) / 2 < 0.85 * whole
    return (half + whole) / 2


def test_a_run_whose_memory_runs_out_goes_on_with_the_losses_of_the_smaller_plan(
    process_group: Ranks, tmp_path: Path, device: torch.device
) -> None:
    store = long_texts(tmp_path / "store", 400)
    recipe = small_recipe(*SIZES)
    with limited(device, between(recipe, 400, plan_of(recipe, "fp32"))):
        path = train(store, tmp_path / "backed-off", process_group, micro(128), *SIZES)
    size = json.loads((path / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"]
    assert size < 128
    planned = train(store, tmp_path / "planned", process_group, micro(size), *SIZES)
    losses, expected = train_losses(path), train_losses(planned)
    assert [step for step, _ in losses] == [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], rel=1e-3)


def test_the_micro_batch_that_is_found_to_fit_trains(
    process_group: Ranks, batches: list[MaskedBatch], device: torch.device
) -> None:
    plan = plan_of(RECIPE, "fp16")
    limit = between(RECIPE, VOCAB_SIZE, plan)
    with limited(device, limit):
        fitting = fitting_plan(RECIPE, VOCAB_SIZE, plan, device, process_group)
    assert 1 < fitting.batch.micro_batch_size < 128
    found = measure_case(Case("test", RECIPE, fitting, limit), batches, device, lambda: None)
    assert found["reserved_bytes"] <= limit
