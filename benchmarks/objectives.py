"""A step of each objective beside ELECTRA's, in one process: `python -m benchmarks.objectives [OUT.json]`.

All have the recipe's sizes and the same random text, and take their steps in turn, so that a busy machine slows all of
them alike. The time relative to ELECTRA's step is shown next to the ratio of their FLOPs, which predicts it where
products take the time, and the peak memory of a step next to the memory model's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Clock, interleaved, peak_bytes, ratio
from benchmarks.synthetic import web_text_lengths, write_store
from electra_ds.config.deepspeed import DeepSpeedPlan, resolve
from electra_ds.config.recipe import FastElectraRecipe, Recipe, load_recipe
from electra_ds.core.ranks import join_ranks
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.draw_replacements import draw_replacements
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.objectives.fast_electra import FastElectra

OBJECTIVES = (
    "electra", "electra-15", "fast-electra", "fast-electra-offline", "mlm", "replace-mlm", "all-tokens-mlm",
)  # fmt: skip
BATCHES = 4
DRAWN = ["schedule.total_steps=40", "schedule.warmup_steps=0"]
"""Overrides for the recipe whose replacements are drawn before: fewer steps are drawn, more are not taken."""


def with_replacements(store: TokenStore, arguments: argparse.Namespace, device: torch.device) -> TokenStore:
    """Return a store with the replacements that an untrained generator draws."""
    recipe, plan = resolved(arguments, "fast-electra", DRAWN)
    assert isinstance(recipe, FastElectraRecipe)
    model, out = objective_of(recipe, store.tokenizer).build_model(), store.path.with_name("drawn")
    assert isinstance(model, FastElectra)
    draw_replacements(
        recipe, model, store, out, plan, device, eval_windows=8, sources=["random weights"], progress=lambda steps: None
    )
    return TokenStore(out)


def resolved(arguments: argparse.Namespace, objective: str, more: Sequence[str] = ()) -> tuple[Recipe, DeepSpeedPlan]:
    overrides = [f"global_batch_size={arguments.rows}", *more, *arguments.set]
    recipe = load_recipe({"extends": arguments.recipe, "objective": objective}, overrides)
    precision = {} if arguments.dtype == "fp32" else {arguments.dtype: {"enabled": True}}
    return recipe, resolve(precision, recipe, world_size=1, auto_fp16=False, source="the benchmark")


class Stepper:
    """One objective's engine and its batches."""

    def __init__(self, objective: str, store: TokenStore, arguments: argparse.Namespace, device: torch.device) -> None:
        is_offline = objective == "fast-electra-offline"
        recipe, plan = resolved(arguments, objective, DRAWN if is_offline else ())
        store = with_replacements(store, arguments, device) if is_offline else store
        ranges = split_holdout(store.documents, recipe.data, recipe.seed).train
        builder = BatchBuilder(store, ranges, recipe, recipe.seed)
        self.objective = builder.objective
        self.batches = [builder.build(number) for number in range(BATCHES)]
        self.engine = PretrainingEngine(self.objective.build_model(), recipe, plan, device)
        self.predicted_bytes = self.objective.peak_memory(plan, "cuda" if device.type == "cuda" else "cpu")

    def step(self, number: int) -> None:
        self.engine.train_step(self.batches[number % BATCHES], number)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.set)
    with tempfile.TemporaryDirectory() as folder, join_ranks():
        rng = np.random.default_rng(0)
        lengths = web_text_lengths(200, recipe.data.sequence_length, rng)
        store = write_store(Path(folder) / "store", lengths, recipe.tokenizer.vocab_size, rng)
        steppers = {name: Stepper(name, store, arguments, device) for name in OBJECTIVES}
        contestants = {name: stepper.step for name, stepper in steppers.items()}
        seconds = interleaved(contestants, arguments.rounds, Clock(device), lambda: None)
        found: dict[str, dict[str, Any]] = {}
        for name, stepper in steppers.items():
            flops = [stepper.objective.flops(batch) or 0.0 for batch in stepper.batches]
            predicted = stepper.predicted_bytes
            assert predicted is not None
            found[name] = {
                "step_s": statistics.median(seconds[name]),
                "speed": ratio(seconds["electra"], seconds[name])._asdict(),
                "flops": statistics.mean(flops),
                "peak_step_bytes": peak_bytes(partial(stepper.step, 0), device),
                "predicted_step_bytes": max(predicted.head.total, predicted.backward.total)
                - predicted.update.weights - predicted.update.optimizer,
                "state_bytes": predicted.update.weights + predicted.update.gradients + predicted.update.optimizer,
            }  # fmt: skip
            stepper.engine.close()
    electra = found["electra"]["flops"]
    for each in found.values():
        each["time_to_electra"] = 1 / each["speed"]["median"]
        each["flops_to_electra"] = each["flops"] / electra
    return {
        "recipe": recipe.name,
        "rows": arguments.rows,
        "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "objectives": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="where to write the results, as JSON")
    parser.add_argument("--recipe", default="rc2020-small")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(f"{'objective':21}{'step, s':>9}{'to ELECTRA':>12}{'by FLOPs':>10}{'peak, MiB':>11}{'model':>8}{'state':>8}")
    for name, each in found["objectives"].items():
        mib = [each[key] / 2**20 for key in ("peak_step_bytes", "predicted_step_bytes", "state_bytes")]
        ratios = f"{each['time_to_electra']:12.3f}{each['flops_to_electra']:10.3f}"
        print(f"{name:21}{each['step_s']:9.3f}{ratios}{mib[0]:11.0f}{mib[1]:8.0f}{mib[2]:8.0f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
