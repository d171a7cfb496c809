"""Model FLOPs against what torch counts, and the table of GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.config.cards import CARDS, find_card, peak_flops
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.pretraining.convert import transformers_config
from electra_ds.pretraining.electra import Electra, encoder_configs
from electra_ds.pretraining.masked_batch import MicroBatch
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.run_time import StepFlops, step_flops
from electra_ds.sweep.sweep_file import load_sweep
from electra_ds.sweep.trials import expand
from tests.helpers import shape_of, small_recipe

VOCABULARY = 403
SIZES = [
    (3, 16, 7, ()),
    (1, 32, 1, ("generator.sharing=tokens",)),
    (2, 8, 16, ("generator.sharing=none", "model.embedding_size=32")),  # no projection in the discriminator
    (2, 24, 5, ("generator.sharing=all", "generator.width_multiplier=1", "generator.depth_multiplier=1")),
    (4, 16, 9, ("model.num_hidden_layers=3", "model.num_attention_heads=2", "generator.depth_multiplier=1")),
    (2, 16, 4, ("model.intermediate_size=48", "model.hidden_dropout_prob=0.1")),
]


def micro_batch(rows: int, length: int, selected: int, *, padded: bool) -> MicroBatch:
    rng = np.random.default_rng(0)
    ids_BT = torch.from_numpy(rng.integers(5, VOCABULARY, (rows, length)))
    chosen_M = torch.from_numpy(np.sort(rng.permutation(rows * length)[:selected]))
    sequences_BT = torch.ones(rows, length, dtype=torch.int32)
    sequences_BT[:, length // 2 :] = 0
    return MicroBatch(
        ids_BT=ids_BT,
        masked_ids_BT=ids_BT.clone(),
        selected_M=chosen_M,
        replaced_M=torch.ones(selected, dtype=torch.bool),
        noise_keys_M=torch.arange(selected, dtype=torch.int32),
        counted_BT=torch.ones_like(ids_BT, dtype=torch.bool),
        sequences_BT=sequences_BT if padded else None,
    )


def product_flops(total: list[int], left: list[int], right: list[int], out_shape: object, **kwargs: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted_step(recipe: Recipe, batch: MicroBatch) -> int:
    """FLOPs that torch sees in a forward and backward pass of our model."""
    model = Electra(recipe, VOCABULARY, 0)
    in_place = {torch.ops.aten.addmm_: product_flops}  # torch's own table does not have it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(batch)
        (output.generator_loss_sum + 50 * output.discriminator_loss_sum).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "length", "selected", "overrides"), SIZES)
def test_a_step_of_our_model_has_the_flops_that_torch_counts(
    rows: int, length: int, selected: int, overrides: tuple[str, ...], padded: bool
) -> None:
    recipe = small_recipe(*overrides)
    expected = step_flops(shape_of(recipe, VOCABULARY), [length] * rows, selected)
    batch = micro_batch(rows, length, selected, padded=padded)
    assert counted_step(recipe, batch) == expected.forward_and_backward


@pytest.mark.parametrize(("rows", "length", "selected", "overrides"), SIZES)
def test_the_forward_pass_of_encoders_and_discriminator_has_the_flops_that_torch_counts(
    rows: int, length: int, selected: int, overrides: tuple[str, ...]
) -> None:
    recipe = small_recipe(*overrides)
    expected = step_flops(shape_of(recipe, VOCABULARY), [length] * rows, selected)
    model = Electra(recipe, VOCABULARY, 0)
    ids_BT = micro_batch(rows, length, selected, padded=False).ids_BT
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.generator(ids_BT, None)
        model.discriminator_head(model.discriminator(ids_BT, None))
    assert counter.get_total_flops() == expected.forward - expected.networks["generator"].head


@pytest.mark.parametrize(("rows", "length", "selected", "overrides"), SIZES)
def test_a_step_of_transformers_has_the_flops_that_torch_counts(
    rows: int, length: int, selected: int, overrides: tuple[str, ...]
) -> None:
    recipe = small_recipe(*overrides)
    generator_config, discriminator_config = encoder_configs(recipe, VOCABULARY, 0)
    generator = ElectraForMaskedLM(eager(transformers_config(generator_config)))
    discriminator = ElectraForPreTraining(eager(transformers_config(discriminator_config)))
    batch = micro_batch(rows, length, selected, padded=False)
    labels_BT = torch.full_like(batch.ids_BT, -100)
    labels_BT.view(-1)[batch.selected_M] = batch.ids_BT.view(-1)[batch.selected_M]
    expected = step_flops(shape_of(recipe, VOCABULARY), [length] * rows, length * rows)
    with FlopCounterMode(display=False) as counter:
        generated = generator(batch.masked_ids_BT, labels=labels_BT)
        judged = discriminator(batch.ids_BT, labels=(labels_BT == -100).long())
        assert counter.get_total_flops() == expected.forward
        (generated.loss + judged.loss).backward()
    assert counter.get_total_flops() == expected.forward_and_backward


def eager(config):  # type: ignore[no-untyped-def]
    config._attn_implementation = "eager"
    return config


def rc2020_small_flops() -> tuple[StepFlops, StepFlops]:
    """(ours, transformers') of a step with 15 % of 128 x 128 positions selected."""
    recipe = load_recipe("rc2020-small", [])
    shape = shape_of(recipe, recipe.tokenizer.vocab_size)
    rows, length = recipe.global_batch_size, recipe.data.sequence_length
    selected = round(recipe.masking.mlm_probability * rows * length)
    lengths_B = [length] * rows
    return step_flops(shape, lengths_B, selected), step_flops(shape, lengths_B, rows * length)


def test_the_step_of_electra_small_is_of_the_size_that_a_count_by_hand_gives() -> None:
    ours, theirs = rc2020_small_flops()
    tokens = 128 * 128
    # 12 layers, each with 4 H^2 + 2 H (4 H) = 12 H^2 weights at H = 256, and 2 x 128 H for attention
    generator, discriminator = ours.networks["generator"], ours.networks["discriminator"]
    assert discriminator.encoder == 2 * tokens * 12 * 12 * 256**2
    assert discriminator.attention == 2 * tokens * 12 * 2 * 128 * 256
    assert generator.encoder == discriminator.encoder / 16
    assert generator.attention == discriminator.attention / 4
    assert generator.head == 2 * 2458 * 128 * (64 + 30522)
    assert ours.forward_and_backward / 1e9 == pytest.approx(1150.6, abs=0.05)
    assert theirs.forward_and_backward / 1e9 == pytest.approx(1477.7, abs=0.05)


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce GTX 1060 6GB"),
        ("GeForce GTX 1080 Ti", "NVIDIA GeForce GTX 1080 Ti"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"),
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-16GB"),
        ("h200", "NVIDIA H200"),
        ("NVIDIA GeForce GTX 1060 3GB", None),
        ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 2060 SUPER", "NVIDIA GeForce RTX 2060 SUPER"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 NVL", None),
        ("CPU (2 cores)", None),
    ],
)
def test_a_card_is_known_by_its_name_and_not_taken_for_its_neighbour(shown: str, name: str | None) -> None:
    card = find_card(shown)
    assert (card and card.name) == name


def test_every_card_is_found_by_the_name_that_it_stands_under() -> None:
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


def test_half_precision_is_as_fast_as_the_card_is() -> None:
    rates = {card.name: [peak_flops(card, name) for name in ("fp32", "fp16", "bf16")] for card in CARDS}
    assert rates["NVIDIA GeForce GTX 1060 6GB"] == [4.4e12, 4.4e12, None]
    assert rates["Tesla P100-PCIE-16GB"] == [9.3e12, 9.3e12, None]
    assert rates["Tesla V100-SXM2-16GB"] == [15.7e12, 125e12, None]
    assert rates["NVIDIA GeForce RTX 3090"] == [35.6e12, 71.2e12, 71.2e12]
    for card in CARDS:
        assert (card.bf16_tflops is None) == (card.capability < (8, 0))
        assert (card.fp16_tflops is None) == (card.capability < (7, 0))
        for name in ("fp16", "bf16"):
            assert peak_flops(card, f"autocast-{name}") == peak_flops(card, name)


def test_the_shipped_comparison_of_objectives_gives_each_the_same_compute() -> None:
    """The compute of a frozen generator's own pretraining is included, and is half of the total."""
    found = {}
    for trial in expand(load_sweep("objectives")):
        recipe = trial.recipe
        if not isinstance(recipe, Recipe):
            continue
        own = [_total_flops(each) for each in (recipe, recipe.first_recipe()) if each is not None]
        found[trial.values["variant"]] = sum(own)
        assert len(own) == 1 or own[1] == pytest.approx(sum(own) / 2, rel=1e-3)
    assert len(found) == 8
    assert [*found.values()] == pytest.approx([found["mlm"]] * 8, rel=1e-3)


def _total_flops(recipe: Recipe) -> float:
    a_step = Objective.of(recipe, recipe.tokenizer.vocab_size).usual_flops()
    assert a_step is not None
    return a_step * recipe.schedule.total_steps
