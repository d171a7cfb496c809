"""The objectives next to ELECTRA: against references written here, under every plan, resumed, exported and planned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, ElectraForPreTraining

from electra_ds.cli import main
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.batches import objective_of
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.evaluation import load_trained
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch
from electra_ds.pretraining.memory import saved_bytes
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.run_time import step_flops
from tests.helpers import SMALL, builder_for, cpu_plan
from tests.memory_tracking import saved_for_backward
from tests.pretraining.test_flops import product_flops
from tests.pretraining.test_pretrain import final_tensors, train_losses

CPU = torch.device("cpu")
OBJECTIVES = {
    "electra-15": ("electra-15", ()),
    "mlm": ("mlm", ()),
    "mlm of the original's code": ("mlm", ("masking.mask_token_share=0.85", "masking.random_token_share=0")),
    "replace-mlm": ("replace-mlm", ("prediction.loss_weight=2",)),
    "all-tokens-mlm": ("all-tokens-mlm", ()),
    "all-tokens-mlm, separate": ("all-tokens-mlm", ("prediction.copy_loss=separate",)),
    "fast-electra": ("fast-electra", ("temperature.start=3",)),
}
NAMES = list(OBJECTIVES)
_SECTIONS = {
    "electra-15": ("generator.", "discriminator.", "masking."),
    "mlm": ("masking.",),
    "replace-mlm": ("generator.", "masking."),
    "all-tokens-mlm": ("generator.", "masking."),
    "fast-electra": ("generator.", "discriminator.", "masking."),
}
_OF_OBJECTIVES = ("generator.", "discriminator.", "masking.")


def settings_of(name: str, *more: str) -> list[str]:
    objective, own = OBJECTIVES[name]
    shared = [each for each in SMALL if not each.startswith(_OF_OBJECTIVES) or each.startswith(_SECTIONS[objective])]
    return [*shared, *own, *more]


def recipe_of(name: str, *more: str) -> Recipe:
    objective, _ = OBJECTIVES[name]
    return load_recipe({"extends": "tiny", "objective": objective}, settings_of(name, *more))


def first_micro_batch(store: TokenStore, recipe: Recipe) -> tuple[Objective[Any], MaskedBatch, MicroBatch]:
    builder = builder_for(store, recipe)
    batch = builder.build(0)
    assert isinstance(batch, MaskedBatch)
    return builder.objective, batch, batch.micro_batch(0, recipe.global_batch_size, packed=False)


def total(batch: MaskedBatch, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
    terms = batch.loss_terms
    assert set(terms) <= set(losses)  # a frozen generator's loss is computed, but not trained on
    return torch.stack([term.weight / term.divisor * losses[name] for name, term in terms.items()]).sum()


# --- references: dense logits of transformers' own models, and probabilities written out


def attention_of(batch: MaskedBatch) -> torch.Tensor:
    return torch.from_numpy(batch.is_token.astype(np.int64))


def token_logits(exported: Any, ids_BT: torch.Tensor, batch: MaskedBatch) -> torch.Tensor:
    return exported(ids_BT, attention_mask=attention_of(batch)).logits.double()


def reference_losses(
    name: str, objective: Objective[Any], model: Any, batch: MaskedBatch, micro: MicroBatch, samples_M: torch.Tensor
) -> dict[str, float]:
    """Mean losses, token by token, from the definitions alone."""
    exported = {key: each.model for key, each in objective.exports(model).items()}
    ids_BT = torch.from_numpy(batch.ids_BT)
    selected = torch.from_numpy(batch.masks.selected)
    shown_BT = ids_BT.clone()
    shown_BT[torch.from_numpy(batch.masks.masked)] = batch.mask_token_id
    if batch.random_ids_BT is not None:
        random_BT = torch.from_numpy(batch.random_ids_BT)
        shown_BT = torch.where(random_BT >= 0, random_BT, shown_BT)

    def cross_entropies(logits_BTV: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(logits_BTV, -1).gather(-1, ids_BT[..., None]).squeeze(-1)

    if name.startswith("mlm"):
        return {
            "mlm_loss": cross_entropies(token_logits(exported["masked_lm"], shown_BT, batch))[selected].mean().item()
        }
    corrupted_BT = ids_BT.clone()
    corrupted_BT[selected] = samples_M
    generator = cross_entropies(token_logits(exported["generator"], shown_BT, batch))[selected].mean().item()
    losses = {"generator_loss": generator}
    if name in ("electra-15", "fast-electra"):
        logits = exported["discriminator"](corrupted_BT, attention_mask=attention_of(batch)).logits.double()
        labels = (corrupted_BT != ids_BT).double()
        each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        judged = selected if name == "electra-15" else torch.from_numpy(batch.counted_BT)
        return losses | {"discriminator_loss": each[judged].mean().item()}
    logits_BTV = token_logits(exported["encoder"], corrupted_BT, batch)
    if name == "replace-mlm":
        return losses | {"prediction_loss": cross_entropies(logits_BTV)[selected].mean().item()}
    hidden = exported["encoder"].electra(corrupted_BT, attention_mask=attention_of(batch)).last_hidden_state
    copy = torch.sigmoid(model.copy_head(hidden).squeeze(-1).double())
    is_copy = (corrupted_BT == ids_BT).double()
    probability = copy * is_copy + (1 - copy) * torch.exp(-cross_entropies(logits_BTV))
    counted = torch.from_numpy(batch.counted_BT)
    losses["prediction_loss"] = -probability.log()[counted].mean().item()
    if name.endswith("separate"):
        losses["copy_loss"] = functional.binary_cross_entropy(copy[counted], is_copy[counted]).item()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_a_reference_written_from_the_definitions(store: TokenStore, name: str) -> None:
    recipe = recipe_of(name)
    objective, batch, micro = first_micro_batch(store, recipe)
    model = objective.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the symmetric start, where any tokens would do
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        output = model(micro)
        samples_M = getattr(output, "samples_M", torch.empty(0))
        expected = reference_losses(name, objective, model, batch, micro, samples_M)
    terms = batch.loss_terms
    divisors = {"generator_loss": batch.num_selected} | {key: term.divisor for key, term in terms.items()}
    found = {key: (value / divisors[key]).item() for key, value in output.losses.items()}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "separate" not in name])
def test_gradients_are_those_of_finite_differences(store: TokenStore, name: str) -> None:
    """Along random directions through all parameters, with the drawn tokens kept."""
    objective, batch, micro = first_micro_batch(store, recipe_of(name))
    model = objective.build_model().eval()
    samples_M = getattr(model(micro), "samples_M", None)

    def loss() -> torch.Tensor:
        return total(batch, model(micro, samples_M).losses)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters)
    rng, step = torch.Generator().manual_seed(0), 2e-3
    for _ in range(3):
        directions = [
            gradient + gradient.norm() / gradient.numel() ** 0.5 * torch.randn(gradient.shape, generator=rng)
            for gradient in gradients
        ]
        length = torch.stack([each.norm() for each in directions]).norm()
        values = []
        for moved in (step, -2 * step):
            with torch.no_grad():
                torch._foreach_add_(parameters, [each / length for each in directions], alpha=moved)
                values.append(loss().double().item())
        with torch.no_grad():
            torch._foreach_add_(parameters, [each / length for each in directions], alpha=step)
        products = [(gradient.double() * each).sum() for gradient, each in zip(gradients, directions, strict=True)]
        expected = (torch.stack(products).sum() / length).item()
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=0.02)


def test_a_separate_copy_loss_alone_trains_the_probability_to_copy(store: TokenStore) -> None:
    objective, _, micro = first_micro_batch(store, recipe_of("all-tokens-mlm, separate"))
    model = objective.build_model()
    losses = model(micro).losses
    copy_head = [*model.copy_head.parameters()]
    assert torch.autograd.grad(losses["prediction_loss"], copy_head, allow_unused=True) == (None, None)
    weight, bias = torch.autograd.grad(losses["copy_loss"], copy_head)
    assert weight.norm() > 0
    assert bias.norm() > 0


# --- plans, precisions, resuming, export


def run(store: TokenStore, recipe: Recipe, steps: int, **values: Any) -> list[float]:
    builder = builder_for(store, recipe)
    engine = PretrainingEngine(builder.objective.build_model(), recipe, cpu_plan(recipe, **values), CPU)
    try:
        return [engine.train_step(builder.build(step), step)["loss"].item() for step in range(steps)]
    finally:
        engine.close()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", NAMES)
def test_any_batch_plan_gives_the_same_losses_and_bf16_nearly_the_same(store: TokenStore, name: str) -> None:
    recipe = recipe_of(name, "global_batch_size=16")
    whole = run(store, recipe, 12, train_micro_batch_size_per_gpu=16)
    for micro, stage in ((4, 0), (8, 2)):
        cut = run(store, recipe, 12, train_micro_batch_size_per_gpu=micro, zero_optimization={"stage": stage})
        np.testing.assert_allclose(cut, whole, rtol=1e-5)
    half = run(store, recipe, 12, bf16={"enabled": True})
    np.testing.assert_allclose(half, whole, rtol=0.03)  # tokens are drawn anew from rounded logits


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", ["electra-15", "mlm", "replace-mlm", "all-tokens-mlm"])
def test_a_run_learns_resumes_bit_for_bit_and_exports_what_transformers_opens(
    store: TokenStore, tmp_path: Path, process_group: Ranks, name: str, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"extends": "tiny", "objective": OBJECTIVES[name][0]}))
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4}))
    settings = [
        "--recipe", str(recipe), "--ds-config", str(ds_config), "--data", str(store.path), "--threads", "1",
        "--log-every", "5", "--eval-every", "15", "--save-every", "10", "--eval-windows", "16", "--set",
        *settings_of(name, "schedule.total_steps=30", "schedule.warmup_steps=2"),
    ]  # fmt: skip
    main(["pretrain", "--run-dir", str(tmp_path / "straight"), *settings])
    objective = load_trained(tmp_path / "straight").objective
    said = capsys.readouterr().out
    assert "held out at step 30" in said
    for label in objective.metric_labels.values():
        assert label.strip() in said
    main(["pretrain", "--run-dir", str(tmp_path / "resumed"), "--stop-at", "17", *settings])
    main(["pretrain", "--resume", str(tmp_path / "resumed")])
    assert train_losses(tmp_path / "resumed") == train_losses(tmp_path / "straight")
    straight, resumed = final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "resumed")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    losses = [loss for _, loss in train_losses(tmp_path / "straight")]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])

    main(["export", str(tmp_path / "straight")])
    for folder, export in objective.exports(load_trained(tmp_path / "straight").model).items():
        opened = {"ElectraForMaskedLM": AutoModelForMaskedLM, "ElectraForPreTraining": ElectraForPreTraining}
        theirs = opened[export.loaded_by].from_pretrained(tmp_path / "straight" / "export" / folder)
        ids_BT = torch.arange(20)[None]
        torch.testing.assert_close(theirs(ids_BT).logits, export.model(ids_BT).logits)
    assert (tmp_path / "straight" / "curves.png").is_file()


# --- costs


@pytest.mark.parametrize("name", NAMES)
def test_flops_parameters_and_saved_bytes_are_those_of_torch(store: TokenStore, name: str) -> None:
    recipe = recipe_of(name)
    objective = objective_of(recipe, store.tokenizer)
    shape, rows = objective.shape, recipe.global_batch_size
    assert shape is not None
    model = objective.build_model()
    assert sum(objective.parameter_counts().values()) == sum(each.numel() for each in model.parameters())
    micro = objective.longest_micro_batch(rows)
    assert micro is not None
    with saved_for_backward(*model.parameters(), *model.buffers()) as saved:
        output = model(micro)
        loss = torch.stack(list(output.losses.values())).sum()
    kept = sum(storage.nbytes() for storage in saved.values())
    assert saved_bytes(shape, rows, "fp32", "cpu").total == pytest.approx(kept, rel=0.02)
    saved.clear()
    del output, loss
    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        total_loss = [loss for loss in model(micro).losses.values() if loss.requires_grad]
        torch.stack(total_loss).sum().backward()
    expected = step_flops(shape, [shape.length] * rows, shape.selected(rows)).forward_and_backward
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert objective.usual_flops() == expected


def test_a_plan_predicts_memory_and_time_of_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    predicted = {}
    for name in ("electra", "electra-15", "mlm", "replace-mlm", "all-tokens-mlm", "fast-electra"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(json.dumps({"extends": "rc2020-small", "objective": name}))
        main(["plan", "--card", "RTX 3090", "--recipe", str(recipe), "--json"])
        predicted[name] = json.loads(capsys.readouterr().out)
    assert all(found["fits"] for found in predicted.values())
    days = {name: found["days"][0] for name, found in predicted.items()}
    assert days["mlm"] < days["replace-mlm"] < days["all-tokens-mlm"]
    assert days["fast-electra"] < days["electra"] == days["electra-15"] < days["all-tokens-mlm"]
    assert predicted["fast-electra"]["needed_bytes"] < predicted["electra"]["needed_bytes"]


# --- masks of masked language modelling


def test_bert_shows_80_percent_masks_10_percent_random_tokens_and_the_rest_unchanged(store: TokenStore) -> None:
    recipe = recipe_of("mlm", "masking.mlm_probability=0.5")
    builder = builder_for(store, recipe)
    shown = {"mask": 0, "random": 0, "same": 0}
    for step in range(60):
        batch = builder.build(step)
        assert isinstance(batch, MaskedBatch)
        micro = batch.micro_batch(0, recipe.global_batch_size, packed=False)
        seen, original = micro.masked_ids_BT.flatten(), micro.ids_BT.flatten()
        changed = torch.zeros(len(original), dtype=torch.bool).index_fill(0, micro.selected_M, value=True)
        assert torch.equal(seen[~changed], original[~changed])
        assert batch.random_ids_BT is not None
        is_random = (batch.random_ids_BT >= 0).sum()
        shown["mask"] += int((seen[micro.selected_M] == batch.mask_token_id).sum())
        shown["random"] += int(is_random)
        shown["same"] += len(micro.selected_M) - int((seen[micro.selected_M] == batch.mask_token_id).sum()) - is_random
    every = sum(shown.values())
    shares = {key: count / every for key, count in shown.items()}
    assert shares == pytest.approx({"mask": 0.8, "random": 0.1, "same": 0.1}, abs=0.02)


def test_random_tokens_are_uniform_over_the_vocabulary_and_masks_differ_between_steps(store: TokenStore) -> None:
    recipe = recipe_of("mlm", "masking.mask_token_share=0.2", "masking.random_token_share=0.8", "global_batch_size=64")
    builder = builder_for(store, recipe)
    batches = [builder.build(step) for step in range(40)]
    drawn = np.concatenate([b.random_ids_BT[b.random_ids_BT >= 0] for b in batches])  # type: ignore[union-attr]
    counts = np.bincount(drawn, minlength=store.tokenizer.vocab_size)
    assert len(counts) == store.tokenizer.vocab_size
    spread = counts.std() / np.sqrt(counts.mean())  # 1 of independent draws
    assert 0.8 < spread < 1.2
    assert not np.array_equal(batches[0].masks.selected, batches[1].masks.selected)


def test_shares_of_masking_that_exceed_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask_token_share 0\.95 and random_token_share 0\.1 add up to more than 1"):
        recipe_of("mlm", "masking.mask_token_share=0.95")
