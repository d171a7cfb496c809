"""The memory model beside what torch's allocator tells of real steps: the section `memory`.

On a GPU a step is held to the memory of the card that its DeepSpeed JSON was made for. On a CPU, whose memory cannot be
held, the model's CPU form is measured with ds_configs/cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.measure import peak_bytes
from electra_ds.config.cards import CARDS, SHOWN_SHARE, Card
from electra_ds.config.deepspeed import DeepSpeedPlan, read_deepspeed_json, resolve, with_micro_batch
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.memory import peak_memory
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.prepare import kernels_of
from electra_ds.training.engine import wants_fp16

STEPS = 3
_ACCUMULATION_ON_CPU = 2  # the second micro-batch meets the gradients of the first, and a third would meet no more


class Case(NamedTuple):
    """A recipe under one DeepSpeed JSON."""

    ds_config: str
    recipe: Recipe
    plan: DeepSpeedPlan
    limit_bytes: float | None = None
    """Of a GPU, what torch's allocator may take; None for all there is."""


def cases(
    recipe_name: str, dtypes: Sequence[str], micro_batches: Sequence[int], device: torch.device
) -> tuple[list[Case], dict[str, str]]:
    """What can be measured on the device, and why the rest cannot."""
    if device.type == "cuda":
        return _on_gpu(load_recipe(recipe_name), dtypes, device)
    found = []
    for dtype in dtypes:
        for size in micro_batches:
            recipe = load_recipe(recipe_name, [f"global_batch_size={size * _ACCUMULATION_ON_CPU}"])
            values = with_micro_batch(read_deepspeed_json("cpu"), size) | precision_section(dtype)
            plan = resolve(values, recipe, world_size=1, auto_fp16=False, source="cpu")
            found.append(Case("cpu", recipe, plan))
    return found, {}


def _on_gpu(recipe: Recipe, dtypes: Sequence[str], device: torch.device) -> tuple[list[Case], dict[str, str]]:
    """The recipe's whole global batch under each JSON that was made for a card."""
    found, not_measured = [], {}
    for card in CARDS:
        if card.ds_config is None:
            continue
        try:
            case = card_case(card, recipe, device)
        except ConfigError as error:
            not_measured[card.ds_config] = str(error)
            continue
        if not is_as_large(device, card):
            not_measured[card.ds_config] = f"{devices.device_name(device)} has less memory than {card.name}"
        elif case.plan.precision.name not in dtypes:
            reason = f"{devices.device_name(device)} has no {case.plan.precision.name}, or --dtypes leaves it out"
            not_measured[card.ds_config] = reason
        else:
            found.append(case)
    return found, not_measured


def card_case(card: Card, recipe: Recipe, device: torch.device) -> Case:
    """The recipe under the JSON made for the card, in the card's memory. Raises ConfigError if the two disagree."""
    assert card.ds_config is not None
    plan = resolve(
        read_deepspeed_json(card.ds_config), recipe, world_size=1, auto_fp16=wants_fp16(device),
        source=card.ds_config,
    )  # fmt: skip
    return Case(card.ds_config, recipe, plan, card.memory_gib * 2**30)


def is_as_large(device: torch.device, card: Card) -> bool:
    """Whether a GPU has the memory of this card."""
    return torch.cuda.mem_get_info(device)[1] >= SHOWN_SHARE * card.memory_gib * 2**30


def measure_cases(
    chosen: Sequence[Case],
    batches_of: Callable[[Recipe], Sequence[MaskedBatch]],
    device: torch.device,
    turn: Callable[[], None],
    results: dict[str, Any],
) -> None:
    """Fill in `results["measured"]`, by JSON, precision and micro-batch; what runs out of memory is told apart."""
    for case in chosen:
        batches = batches_of(case.recipe)[:STEPS]
        precision, size = case.plan.precision.name, str(case.plan.batch.micro_batch_size)
        try:
            found = measure_case(case, batches, device, turn)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            results["not_measured"][case.ds_config] = f"{precision}, {size} rows ran out of memory: {error}"
            continue
        results["measured"].setdefault(case.ds_config, {}).setdefault(precision, {})[size] = found


def measure_case(
    case: Case, batches: Sequence[MaskedBatch], device: torch.device, turn: Callable[[], None]
) -> dict[str, Any]:
    """Predicted and measured peak, in bytes, of making the engine and taking a step with each of the batches.

    On a GPU also what torch's allocator held of the card, and what the card lost beside it, before and after: the CUDA
    context with its kernels, and other programs, where any run.
    """
    vocab_size = case.recipe.tokenizer.vocab_size

    def run() -> None:
        engine = PretrainingEngine(Electra(case.recipe, vocab_size, 0), case.recipe, case.plan, device)
        try:
            for number, batch in enumerate(batches):
                engine.train_step(batch, number)
                turn()
        finally:
            engine.close()

    predicted = peak_memory(ElectraObjective.of(case.recipe, vocab_size).shape, case.plan, kernels_of(device))
    if device.type == "cuda":
        with limited(device, case.limit_bytes):
            found = _gpu_bytes(run, device)
    else:
        found = {"measured_bytes": peak_bytes(run, device)}
    ratio = predicted.allocated_bytes / found["measured_bytes"]
    return {"predicted_bytes": predicted.allocated_bytes, **found, "predicted_vs_measured": ratio}


@contextmanager
def limited(device: torch.device, number_bytes: float | None) -> Iterator[None]:
    """While it lasts, torch's allocator takes no more of the GPU than so much."""
    devices.release_memory(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (number_bytes or total) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        devices.release_memory(device)


def _gpu_bytes(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats(device)
    before = _beside_allocator_bytes(device)
    run()
    torch.cuda.synchronize(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {
        "measured_bytes": allocated,
        "reserved_bytes": reserved,
        "fragmentation": reserved / allocated - 1,
        "context_bytes_before": before,
        "context_bytes": _beside_allocator_bytes(device),
    }


def _beside_allocator_bytes(device: torch.device) -> int:
    """What is taken of the GPU, and not by torch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
