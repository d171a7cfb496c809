"""What `bin/bench` measures, as one JSON document."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import checkpoints, memory, precisions
from benchmarks.contestants import Contestant, Ours, PaddedBatch, Transformers
from benchmarks.measure import (
    Clock,
    Operations,
    graph_bytes,
    host_waits,
    interleaved,
    matrix_product_rate,
    peak_bytes,
    ratio,
)
from benchmarks.synthetic import glue_lengths, web_text_lengths, write_store
from electra_ds.config.deepspeed import DeepSpeedPlan, resolve
from electra_ds.config.deepspeed_sections import precision_section
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.data.token_store import Ranges, TokenStore
from electra_ds.model.heads import column_keys, sample_tokens
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.engine import PretrainingEngine, check_compile
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.masking import Masks
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.pretraining.run_time import step_flops
from electra_ds.training.engine import check_plan, wants_fp16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DOCUMENTS = 20_000
_DATA_ROUNDS, _DATA_CALLS = 15, 4
_START_ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """What to time, and how long."""

    recipe: str
    micro_batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: int
    steps: int
    """Of the section `precisions`."""
    sections: tuple[str, ...]
    device: torch.device


class Suite:
    """Runs the sections, telling `begin(name, turns)` and `turn()` how far it is."""

    def __init__(self, settings: Settings, begin: Callable[[str, int], None], turn: Callable[[], None]) -> None:
        self.settings, self.begin, self.turn = settings, begin, turn
        self.device = settings.device
        self.clock = Clock(settings.device)
        self.calls_a_turn = 10 if settings.device.type == "cuda" else 1
        self.recipe = load_recipe(settings.recipe)
        self.vocab_size = self.recipe.tokenizer.vocab_size
        for dtype in settings.dtypes:
            check_plan(self._plan(self.recipe, dtype), self.device, "what the benchmark asks of it")

    def run(self, results: dict[str, Any], corpus: TokenStore | None = None) -> None:
        """Put the results into `results`: of `memory` and `precisions` as they come, other sections when they are done.

        corpus: real text under the recipe's tokenizer, for `precisions`, since random tokens cannot be learned.
        """
        with tempfile.TemporaryDirectory(prefix="electra-ds-bench-") as folder:
            rng = np.random.default_rng(0)
            self.web = write_store(Path(folder) / "web", self._web_lengths(rng), self.vocab_size, rng)
            self.glue = write_store(Path(folder) / "glue", glue_lengths(_DOCUMENTS, rng), self.vocab_size, rng)
            sections = {
                "step": self.steps, "parts": self.parts, "mixed": self.mixed_lengths, "data": self.data_path,
                "startup": self.start_up,
            }  # fmt: skip
            for name, section in sections.items():
                if name in self.settings.sections:
                    results |= section()
            if "memory" in self.settings.sections:
                self.memory(results)
            if "checkpoints" in self.settings.sections:
                checkpoints.measure(
                    results, partial(self._plan, dtype="fp32"), self.device, Path(folder), self.settings.rounds,
                    self.begin, self.turn,
                )  # fmt: skip
            if "precisions" in self.settings.sections:
                assert corpus is not None
                self.precisions(results, corpus)

    def _web_lengths(self, rng: np.random.Generator) -> np.ndarray:
        return web_text_lengths(_DOCUMENTS, self.recipe.data.sequence_length, rng)

    # --- whole steps

    def steps(self) -> dict[str, Any]:
        """Every contestant at every micro-batch, all dtypes interleaved."""
        sections = ("step", "step_vs_transformers", "compiled_vs_transformers", "deepspeed_vs_plain")
        results: dict[str, Any] = {name: {} for name in sections}
        peaks = {dtype: matrix_product_rate(self.device, DTYPES[dtype]) for dtype in self.settings.dtypes}
        results["matrix_product_tflops"] = {dtype: round(peak / 1e12, 3) for dtype, peak in peaks.items()}
        for size in self.settings.micro_batches:
            recipe = self._recipe(size)
            batches = self._batches(self.web, recipe)
            with self._contestants(recipe, self.settings.dtypes, others=True) as contestants:
                graphs = {
                    name: graph_bytes(partial(contestant.step, batches[0], 1), self.device)
                    for name, contestant in contestants.items()
                    if name.startswith("compiled")
                }
                turns = len(contestants) * (self.settings.rounds + 1)
                self.begin(f"steps of {size} x {recipe.data.sequence_length}", turns)
                seconds = interleaved(
                    {name: self._stepping(contestant, batches) for name, contestant in contestants.items()},
                    self.settings.rounds, self.clock, self.turn, self.calls_a_turn,
                )  # fmt: skip
                found = {
                    name: self._measured(name, contestant, batches[0], seconds[name], peaks[name.split()[1]])
                    for name, contestant in contestants.items()
                }
            for name, held in graphs.items():
                found[name]["peak_step_bytes"] += held
            self._compare(results, str(size), found, seconds)
        return results

    def _measured(
        self, name: str, contestant: Contestant, batch: Any, seconds: list[float], peak: float
    ) -> dict[str, Any]:
        who, _ = name.split()
        shape = ElectraObjective.of(self.recipe, self.vocab_size).shape
        if who == "transformers":
            flops = step_flops(shape, batch.lengths_B, int(batch.lengths_B.sum())).forward_and_backward
        else:
            flops = step_flops(shape, batch.lengths_B, batch.num_selected).forward_and_backward
        median = float(np.median(seconds))
        step = partial(contestant.step, batch, 1)
        counted = {}
        if who != "compiled":  # whose operations are kernels of its own
            with Operations() as operations:
                step()
            counted = {"operations": operations.count, "host_syncs": operations.blocking}
        if self.device.type == "cuda":
            counted["host_syncs"] = host_waits(step)
        return counted | {
            "seconds": median,
            "tokens_per_s": batch.num_tokens / median,
            "peak_step_bytes": peak_bytes(step, self.device),
            "model_flops": flops,
            "mfu_of_measured_peak": flops / median / peak,
        }

    @staticmethod
    def _compare(
        results: dict[str, Any], size: str, found: dict[str, dict[str, Any]], seconds: dict[str, list[float]]
    ) -> None:
        for name, values in found.items():
            who, dtype = name.split()
            results["step"].setdefault(dtype, {}).setdefault(size, {})[who] = values
            if who == "transformers":
                continue
            theirs = found[f"transformers {dtype}"]
            line: dict[str, Any] = ratio(seconds[f"transformers {dtype}"], seconds[name]).figure()
            line["peak_step_memory"] = values["peak_step_bytes"] / theirs["peak_step_bytes"]
            if dtype != "fp32" and "transformers fp32" in found:
                line["speed_vs_fp32"] = ratio(seconds["transformers fp32"], seconds[name]).median
            if who == "deepspeed":
                results["step_vs_transformers"].setdefault(dtype, {})[size] = line
            if who == "compiled":
                results["compiled_vs_transformers"].setdefault(dtype, {})[size] = line
            if who == "plain":
                speed = ratio(seconds[name], seconds[f"deepspeed {dtype}"])
                results["deepspeed_vs_plain"].setdefault(dtype, {})[size] = speed.figure()

    # --- parts

    def parts(self) -> dict[str, Any]:
        """Seconds of each part alone, at the smallest micro-batch, beside the building of its batch, and how many times
        as fast as transformers' part it is."""
        size = min(self.settings.micro_batches)
        recipe = self._recipe(size)
        builder = self._builder(self.web, recipe)
        batch: Any = builder.build(0)
        results: dict[str, Any] = {}
        speeds: dict[str, Any] = {}
        for dtype in self.settings.dtypes:
            with self._contestants(recipe, (dtype,)) as contestants:
                timed: dict[str, Callable[[int], object]] = {
                    f"{name.split()[0]}/{part}": _ignoring_number(function)
                    for name, contestant in contestants.items()
                    for part, function in contestant.parts(batch).items()
                }
                timed["data/batch"] = lambda number: builder.build(number).micro_batch(0, size)
                timed["sampling/alone"] = self._sampling(batch)
                self.begin(f"parts of a step, {dtype}", len(timed) * (self.settings.rounds + 1))
                seconds = interleaved(timed, self.settings.rounds, self.clock, self.turn, self.calls_a_turn)
            for name, values in seconds.items():
                who, part = name.split("/")
                results.setdefault(dtype, {}).setdefault(who, {})[part] = float(np.median(values))
                if who == "transformers":
                    speed = ratio(values, seconds[f"deepspeed/{part}"])
                    speeds.setdefault(dtype, {})[part] = speed.figure()
        return {"parts": {"micro_batch": size, "seconds": results, "deepspeed_vs_transformers": speeds}}

    # --- sequences of mixed length

    def mixed_lengths(self) -> dict[str, Any]:
        """Our step on sequences as long as GLUE's inputs: packed, padded to the row, padded to the longest of the
        batch; and transformers' on the last."""
        size = max(self.settings.micro_batches)
        dtype = self.settings.dtypes[0]
        recipe = self._recipe(size, "data.holdout_by=document")
        batches = self._batches(self.glue, recipe)
        layouts: dict[str, Callable[[MaskedBatch], MaskedBatch]] = {
            "packed": lambda batch: batch,
            "padded_to_row": lambda batch: _padded(batch),
            "padded_to_longest": lambda batch: _padded(_cut_to_longest(batch)),
        }
        with self._contestants(recipe, (dtype,)) as contestants:
            ours, theirs = contestants[f"deepspeed {dtype}"], contestants[f"transformers {dtype}"]
            timed = {
                name: self._stepping(ours, [layout(batch) for batch in batches]) for name, layout in layouts.items()
            }
            timed["transformers"] = self._stepping(theirs, [_cut_to_longest(batch) for batch in batches])
            self.begin(f"sequences of mixed length, {size} a step", len(timed) * (self.settings.rounds + 1))
            seconds = interleaved(timed, self.settings.rounds, self.clock, self.turn, self.calls_a_turn)
        real = float(np.mean([batch.num_tokens for batch in batches]))
        results: dict[str, Any] = {
            "dtype": dtype,
            "micro_batch": size,
            "mean_tokens": real / size,
            "real_tokens_per_s": {name: real / float(np.median(values)) for name, values in seconds.items()},
        }
        for name in ("padded_to_row", "padded_to_longest", "transformers"):
            results[f"packed_vs_{name}"] = ratio(seconds[name], seconds["packed"]).figure()
        return {"mixed_lengths": results, "unpadded": self._unpadded(dtype)}

    def _unpadded(self, dtype: str) -> dict[str, Any]:
        """The same on text without padding, where packing has nothing to do and must cost nothing."""
        size = min(self.settings.micro_batches)
        recipe = self._recipe(size, "data.segments=one")  # of which a long document fills every row
        batches = self._batches(self.web, recipe)
        with self._contestants(recipe, (dtype,)) as contestants:
            ours = contestants[f"deepspeed {dtype}"]
            timed = {
                "packed": self._stepping(ours, batches),
                "padded_to_row": self._stepping(ours, [_padded(batch) for batch in batches]),
            }
            rounds = 3 * self.settings.rounds  # the ratio is 1 but for noise
            self.begin(f"text without padding, {size} a step", len(timed) * (rounds + 1))
            seconds = interleaved(timed, rounds, self.clock, self.turn, self.calls_a_turn)
        return {"packed_vs_padded_to_row": ratio(seconds["padded_to_row"], seconds["packed"]).figure()}

    # --- the data path

    def data_path(self) -> dict[str, Any]:
        """Batches of the recipe's size from web text on one core, beside a plain copy of the batch."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        recipes = {"windows": "rc2020-small", "two_segments": "electra-small"}
        results = {name: self._data_path_of(name, load_recipe(recipe)) for name, recipe in recipes.items()}
        torch.set_num_threads(threads)
        return {"data_path": results}

    def _data_path_of(self, name: str, recipe: Recipe) -> dict[str, Any]:
        builder = self._builder(self.web, recipe)
        rows = recipe.global_batch_size
        copied = builder.build(0).micro_batch(0, rows).ids_BT.numpy()
        timed: dict[str, Callable[[int], object]] = {
            "batch": lambda number: builder.build(number).micro_batch(0, rows),
            "copy": lambda number: copied.copy(),
        }
        self.begin(f"data path, {name}", len(timed) * (_DATA_ROUNDS + 1))
        seconds = interleaved(timed, _DATA_ROUNDS, Clock(torch.device("cpu")), self.turn, _DATA_CALLS)
        tokens = rows * recipe.data.sequence_length
        return {
            "tokens_per_s": tokens / float(np.median(seconds["batch"])),
            "best_tokens_per_s": tokens / min(seconds["batch"]),
            "copy_tokens_per_s": tokens / float(np.median(seconds["copy"])),
            "batch_vs_copy": ratio(seconds["copy"], seconds["batch"]).figure(),
        }

    # --- start-up

    def start_up(self) -> dict[str, Any]:
        """Wall-clock seconds of `pretrain --help`, of the imports that a run needs, and of Python alone."""
        commands = {
            "help": [sys.executable, "-m", "electra_ds", "pretrain", "--help"],
            "imports": [sys.executable, "-c", "import electra_ds.pretraining.prepare"],
            "python": [sys.executable, "-c", "pass"],
        }
        self.begin("start-up", _START_ROUNDS * len(commands))
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(_START_ROUNDS):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                found[name].append(time.perf_counter() - started)
                self.turn()
        results: dict[str, Any] = {f"{name}_s": min(seconds) for name, seconds in found.items()}
        for name in ("help", "imports"):
            results[f"{name}_vs_python"] = ratio(found["python"], found[name]).figure()
        return {"start_up": results}

    # --- the memory model

    def memory(self, results: dict[str, Any]) -> None:
        """Predicted and measured memory of a step, by DeepSpeed JSON."""
        settings = self.settings
        chosen, not_measured = memory.cases(settings.recipe, settings.dtypes, settings.micro_batches, self.device)
        results["memory"] = {"steps": memory.STEPS, "measured": {}, "not_measured": not_measured}
        self.begin("memory, predicted and measured", len(chosen) * memory.STEPS)
        batches_of = partial(self._batches, self.web)
        memory.measure_cases(chosen, batches_of, self.device, self.turn, results["memory"])

    # --- precisions

    def precisions(self, results: dict[str, Any], corpus: TokenStore) -> None:
        """Loss curves at stage 0 by precision, and how far they are from fp32's."""
        recipe = precisions.shortened(self.settings.recipe, self.settings.steps)
        at_once = max(self.settings.micro_batches)
        whole = self._plan(recipe, "fp32")
        size = next(cut.micro_batch_size for cut in whole.batch.alternatives() if cut.micro_batch_size <= at_once)
        curves: dict[str, Any] = {}
        found: dict[str, Any] = {
            "steps": self.settings.steps, "warmup_steps": recipe.schedule.warmup_steps,
            "window_steps": precisions.WINDOW_STEPS, "micro_batch": size, "corpus_tokens": corpus.info.num_tokens,
            "curves": curves, "difference_from_fp32": {},
        }  # fmt: skip
        results["precisions"] = found
        for dtype in sorted(self.settings.dtypes, key=lambda dtype: dtype != "fp32"):
            self.begin(f"losses in {dtype}", self.settings.steps)
            curve = curves[dtype] = {}
            plan = self._plan(recipe, dtype).with_micro_batch(size)
            precisions.train(recipe, plan, corpus, self.device, self.turn, curve)
            if dtype != "fp32" and "fp32" in curves:
                found["difference_from_fp32"][dtype] = precisions.differences(curve, curves["fp32"])

    # --- what they share

    def _recipe(self, size: int, *overrides: str) -> Recipe:
        fixed = (f"global_batch_size={size}", "schedule.warmup_steps=0", "schedule.total_steps=1000000")
        return load_recipe(self.settings.recipe, [*fixed, *overrides])

    @staticmethod
    def _builder(store: TokenStore, recipe: Recipe) -> BatchBuilder:
        return BatchBuilder(store, Ranges(store.documents[:-1], store.documents[1:]), recipe, recipe.seed)

    def _batches(self, store: TokenStore, recipe: Recipe) -> list[Any]:
        builder = self._builder(store, recipe)
        return [builder.build(step) for step in range(8)]

    def _sampling(self, batch: Any) -> Callable[[int], object]:
        """Drawing the micro-batch's samples from given probabilities."""
        keys_M = batch.micro_batch(0, len(batch.ids_BT)).noise_keys_M.to(self.device)
        columns_V = column_keys(self.vocab_size).to(self.device)
        weights_MV = torch.softmax(torch.randn(len(keys_M), self.vocab_size, device=self.device), dim=-1)
        return lambda number: sample_tokens(weights_MV, keys_M, columns_V)

    def _plan(self, recipe: Recipe, dtype: str) -> DeepSpeedPlan:
        values = {"train_micro_batch_size_per_gpu": recipe.global_batch_size} | precision_section(dtype)
        return resolve(
            values, recipe, world_size=1, auto_fp16=wants_fp16(self.device), source="bench"
        )  # fmt: skip

    @staticmethod
    def _stepping(contestant: Contestant, batches: Sequence[Any]) -> Callable[[int], None]:
        return lambda number: contestant.step(batches[number % len(batches)], number)

    @contextmanager
    def _contestants(
        self, recipe: Recipe, dtypes: Sequence[str], *, others: bool = False
    ) -> Iterator[dict[str, Contestant]]:
        """By "who dtype": transformers and our DeepSpeed engine, and of `others` the plain and the compiled one."""
        found: dict[str, Contestant] = {}
        try:
            for dtype in dtypes:
                found |= self._of_dtype(recipe, dtype, others=others)
            yield found
        finally:
            for contestant in found.values():
                contestant.close()

    def _of_dtype(self, recipe: Recipe, dtype: str, *, others: bool) -> dict[str, Contestant]:
        plan = self._plan(recipe, dtype)

        def model() -> Electra:
            return Electra(recipe, self.vocab_size, 0)

        found: dict[str, Contestant] = {
            f"transformers {dtype}": Transformers(recipe, self.vocab_size, 0, DTYPES[dtype], self.device),
            f"deepspeed {dtype}": Ours(PretrainingEngine(model(), recipe, plan, self.device)),
        }
        if others and check_compile("auto", self.device, plan):
            found[f"compiled {dtype}"] = Ours(PretrainingEngine(model(), recipe, plan, self.device, "auto"))
        if others and dtype == "fp32":
            plain = PlainEngine(model(), recipe, recipe.global_batch_size, self.device, fused=True)
            found[f"plain {dtype}"] = Ours(plain)
        return found


def _ignoring_number(function: Callable[[], None]) -> Callable[[int], None]:
    return lambda number: function()


def _padded(batch: MaskedBatch) -> PaddedBatch:
    return PaddedBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})


def _cut_to_longest(batch: MaskedBatch) -> MaskedBatch:
    longest = int(batch.lengths_B.max())

    def cut(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[:, :longest])

    assert batch.noise_keys_BT is not None
    return replace(
        batch,
        ids_BT=cut(batch.ids_BT),
        masks=Masks(*map(cut, batch.masks)),
        counted_BT=cut(batch.counted_BT),
        noise_keys_BT=cut(batch.noise_keys_BT),
        second_segment_BT=None if batch.second_segment_BT is None else cut(batch.second_segment_BT),
    )
