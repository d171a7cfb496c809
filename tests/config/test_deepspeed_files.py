"""DeepSpeed JSON files of the kinds that circulate: which ones load, with which notes, and why the others are refused.

The files are written for these tests, in the shape that each project's own have: transformers, accelerate,
LLaMA-Factory, LLaVA, DeepSpeedExamples, Megatron-DeepSpeed, and DeepSpeed's documentation of its features.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from electra_ds.cli import main
from electra_ds.config.deepspeed import DeepSpeedPlan, read_deepspeed_json, resolve
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from tests.helpers import REPOSITORY, SMALL, small_recipe

FOLDER = REPOSITORY / "tests" / "deepspeed_files"
SCHEDULER = "sets no numbers, so the recipe's"
FP16_ON, BF16_OFF = 'fp16.enabled is "auto", which here means on', 'bf16.enabled is "auto", which here means off'
FP16_OFF = "another precision is chosen"
NO_EFFECT = "these keys of zero_optimization have no effect"
LEFT_OUT = "left out, because it has no effect here: "

LOADS: dict[str, tuple[int, str, list[str]]] = {
    "accelerate-auto-offload": (3, "fp32", [BF16_OFF, f"{LEFT_OUT}zero_optimization.offload_optimizer"]),
    "accelerate-zero1": (1, "fp16", [SCHEDULER]),
    "accelerate-zero2": (2, "fp16", [SCHEDULER]),
    "accelerate-zero2-offload": (2, "fp16", [SCHEDULER]),
    "accelerate-zero3": (3, "fp16", [SCHEDULER]),
    "accelerate-zero3-offload": (3, "fp16", [SCHEDULER]),
    "autotuning-off": (0, "fp16", [FP16_ON, f"{LEFT_OUT}autotuning"]),
    "commented": (1, "fp16", [FP16_ON]),
    "deepspeed-chat-bf16": (3, "bf16", [f"{LEFT_OUT}prescale_gradients, zero_optimization.offload_optimizer"]),
    "flops-profiler": (0, "fp32", []),
    "llama-factory-z0": (0, "fp16", [f"at stage 0 {NO_EFFECT}: allgather_partitions", FP16_ON, BF16_OFF]),
    "llama-factory-z2": (2, "fp16", [FP16_ON, BF16_OFF]),
    "llama-factory-z2-offload": (2, "fp16", [FP16_ON, BF16_OFF]),
    "llama-factory-z3": (3, "fp16", [FP16_ON, BF16_OFF]),
    "llama-factory-z3-offload": (3, "fp16", [FP16_ON, BF16_OFF]),
    "llama-factory-z3-recompute": (
        3, "fp16",
        [
            FP16_ON, BF16_OFF, "partition_activations has no effect", "contiguous_memory_optimization has no effect",
            "all 2 layers",
        ],
    ),
    "llava-zero2": (2, "fp16", [f"at stage 2 {NO_EFFECT}: sub_group_size", FP16_ON, BF16_OFF]),
    "llava-zero3": (3, "fp16", [FP16_ON, BF16_OFF]),
    "llava-zero3-offload": (3, "bf16", [SCHEDULER, FP16_OFF]),
    "megatron-filled": (
        1, "bf16",
        [f"{LEFT_OUT}prescale_gradients, curriculum_learning, zero_optimization.elastic_checkpoint"],
    ),
    "megatron-zero2-cpu-offload": (
        2, "fp16",
        [
            "zero_optimization.cpu_offload as offload_optimizer",
            f"{LEFT_OUT}zero_optimization.load_from_fp32_weights, zero_optimization.elastic_checkpoint",
        ],
    ),
    "monitors": (0, "fp32", []),
    "opt-bfloat16": (3, "bf16", ["bfloat16 as bf16", f"{LEFT_OUT}zero_optimization.cpu_offload"]),
    "pipeline-defaults": (1, "fp32", [f"{LEFT_OUT}pipeline, data_types, zero_optimization.pipeline_loading"]),
    "torch-autocast": (1, "autocast-bf16", [f"{LEFT_OUT}torch_autocast.lower_precision_safe_modules"]),
    "transformers-amp": (2, "fp16", [FP16_ON, f"{LEFT_OUT}amp, zero_optimization.offload_optimizer"]),
    "transformers-zero1-bf16": (1, "bf16", [SCHEDULER]),
    "transformers-zero2": (2, "fp16", [SCHEDULER, FP16_ON, BF16_OFF]),
    "transformers-zero3": (3, "fp16", [SCHEDULER, FP16_ON, BF16_OFF]),
}  # fmt: skip
"""Stage, precision where "auto" means fp16, and a part of each note, in their order."""

WITH_ITS_RECIPE: dict[str, tuple[list[str], int, list[str]]] = {
    "bing-bert-glue": (
        [
            "global_batch_size=32", "optimizer.learning_rate=3e-5", "optimizer.weight_decay=0",
            "optimizer.bias_correction=false",
        ],
        0, [],
    ),
    "bloom": (["global_batch_size=2048"], 0, []),
    "deepspeed-chat": (
        ["global_batch_size=32"], 2,
        [
            f"at stage 2 {NO_EFFECT}: offload_param, stage3_param_persistence_threshold, stage3_max_live_parameters, "
            "stage3_prefetch_bucket_size, memory_efficient_linear",
            f"{LEFT_OUT}prescale_gradients, hybrid_engine, zero_optimization.offload_optimizer",
        ],
    ),
    "deepspeed-chat-zero3": (
        ["global_batch_size=32"], 3, [f"{LEFT_OUT}prescale_gradients, zero_optimization.offload_optimizer"],
    ),
    "hello-deepspeed": (["optimizer.learning_rate=1e-4"], 1, []),
    "megatron-first-zero": (
        ["global_batch_size=16", "optimizer.learning_rate=0.00015"], 1,
        ["zero_optimization as stage 1", f"{LEFT_OUT}disable_allgather, vocabulary_size"],
    ),
    "megatron-zero2": (
        ["global_batch_size=16", "optimizer.learning_rate=0.00015"], 2,
        ["partition_activations has no effect", "all 2 layers"],
    ),
}  # fmt: skip
"""Files with numbers of their own: the recipe that has them, the stage, and the notes."""

CONTRADICTS = "contradicts the recipe"
GONE = "DeepSpeed 0.19 no longer has"
NOT_HERE = "this DeepSpeed feature is not supported here"
PLACEHOLDER = "is a template's placeholder"
PYTHON = "is text to a JSON parser"
REFUSED: dict[str, list[str]] = {
    "autotuning": [f"autotuning: {NOT_HERE}"],
    "bing-bert-adam": [
        f"prescale_gradients: {NOT_HERE}", f"gradient_predivide_factor: {NOT_HERE}",
        f"train_batch_size: 4096 {CONTRADICTS} (global_batch_size is 8)",
        f"optimizer.params.bias_correction: False {CONTRADICTS}",
    ],
    "bing-bert-glue": [
        f"train_batch_size: 32 {CONTRADICTS}", f"optimizer.params.lr: 3e-05 {CONTRADICTS}",
        f"optimizer.params.weight_decay: 0 {CONTRADICTS}", f"optimizer.params.bias_correction: False {CONTRADICTS}",
    ],
    "bing-bert-lamb": [
        f"sparse_attention: {GONE}", f"train_batch_size: 16384 {CONTRADICTS}",
        "optimizer.type: 'Lamb' is not the recipe's optimizer (Adam or AdamW)",
    ],
    "bing-bert-onebit-adam": [f"train_batch_size: 4096 {CONTRADICTS}", "optimizer.type: 'OneBitAdam' is not"],
    "bing-bert-onebit-lamb": [f"train_batch_size: 65536 {CONTRADICTS}", "optimizer.type: 'OneBitLamb' is not"],
    "bing-bert-zero-one-adam": [f"train_batch_size: 4096 {CONTRADICTS}", "optimizer.type: 'ZeroOneAdam' is not"],
    "bloom": [f"train_batch_size: 2048 {CONTRADICTS}"],
    "cifar": [
        f"train_batch_size: 4 {CONTRADICTS}", f"optimizer.params.betas: [0.8, 0.999] {CONTRADICTS}",
        f"optimizer.params.eps: 1e-08 {CONTRADICTS}", f"optimizer.params.weight_decay: 3e-07 {CONTRADICTS}",
        "scheduler: WarmupLR with these params contradicts",
    ],
    "comms-logger": [f"comms_logger: {NOT_HERE}"],
    "compression": [f"compression_training: {GONE}"],
    "deepspeed-chat": [f"train_batch_size: 32 {CONTRADICTS}"],
    "deepspeed-chat-hybrid": [f"hybrid_engine: {NOT_HERE}", f"train_batch_size: 32 {CONTRADICTS}"],
    "deepspeed-chat-zero3": [f"train_batch_size: 32 {CONTRADICTS}"],
    "elastic": [f"elasticity: {GONE}"],
    "hello-deepspeed": [f"optimizer.params.lr: 0.0001 {CONTRADICTS}"],
    "llama-factory-z2-autotp": [f"tensor_parallel: {NOT_HERE}"],
    "llama-factory-z3-fp8": [
        "fp8: unknown key", f"gradient_clipping: 0.001 {CONTRADICTS}",
    ],
    "llama-factory-z3-partial-offload": [
        "zero_optimization.offload_optimizer: {'device': 'cpu', 'pin_memory': True, 'ratio'",
    ],
    "megatron-curriculum": [f"curriculum_learning: {GONE}"],
    "megatron-data-efficiency": [f"data_efficiency: {NOT_HERE}"],
    "megatron-first-zero": [f"train_batch_size: 16 {CONTRADICTS}", f"optimizer.params.lr: 0.00015 {CONTRADICTS}"],
    "megatron-infinity": [
        "zero_optimization.stage3_param_persitance_threshold: unknown key; did you mean "
        "'stage3_param_persistence_threshold'?",
        "zero_optimization.offload_optimizer: {'device': 'nvme'",
        "train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1 x 1 rank(s) is 4",
    ],
    "megatron-moe": [f"prescale_gradients: {NOT_HERE}", f"train_batch_size: 256 {CONTRADICTS}"],
    "megatron-template": [
        f"train_batch_size: 'CONFIG_BATCH_SIZE,' {PLACEHOLDER}",
        f"train_micro_batch_size_per_gpu: 'CONFIG_MBSIZE,' {PLACEHOLDER}", "steps_per_print: 'LOG_INTERVAL,'",
        f"zero_optimization.stage: 'ZERO_STAGE' {PLACEHOLDER}", f"prescale_gradients: 'PRESCALE_GRAD,' {PLACEHOLDER}",
        f"fp16.enabled: 'CONFIG_FP16_ENABLED,' {PLACEHOLDER}", f"bf16.enabled: 'CONFIG_BF16_ENABLED' {PLACEHOLDER}",
    ],
    "megatron-zero2": [f"train_batch_size: 16 {CONTRADICTS}", f"optimizer.params.lr: 0.00015 {CONTRADICTS}"],
    "mics": [
        f"zero_optimization.mics_shard_size: {GONE}", f"zero_optimization.mics_hierarchical_params_gather: {GONE}",
    ],
    "mixture-of-quantization": [f"quantize_training: {GONE}"],
    "pipeline-parallel": [f"pipeline: {NOT_HERE}", f"train_batch_size: 256 {CONTRADICTS}"],
    "progressive-layer-drop": [f"progressive_layer_drop: {GONE}"],
    "python-literals": [
        f"zero_optimization.overlap_comm: 'True,' {PYTHON}",
        f"zero_optimization.contiguous_gradients: 'True,' {PYTHON}",
        f"zero_optimization.offload_optimizer: 'None' {PYTHON}", f"wall_clock_breakdown: 'False' {PYTHON}",
    ],
    "qanet-one-cycle": [f"train_batch_size: 512 {CONTRADICTS}", "scheduler: OneCycle with these params contradicts"],
    "transformers-fp32-reduction": [f"communication_data_type: {NOT_HERE}"],
    "transformers-zero3-nvme": [
        "zero_optimization.offload_optimizer: {'device': 'nvme'",
        "zero_optimization.offload_param: {'device': 'nvme'",
    ],
    "universal-checkpoint": [f"checkpoint: {NOT_HERE}"],
    "zero-plus-plus": [
        f"zero_optimization.zero_quantized_weights: {NOT_HERE}",
        f"zero_optimization.zero_hpz_partition_size: {NOT_HERE}",
        f"zero_optimization.zero_quantized_gradients: {NOT_HERE}",
    ],
}  # fmt: skip
"""The beginning of each fault with the recipe of the tests; there are no others."""


def plan_of(name: str, *overrides: str) -> DeepSpeedPlan:
    values = read_deepspeed_json(str(FOLDER / f"{name}.json"))
    return resolve(values, small_recipe(*overrides), world_size=1, auto_fp16=True, source=name)


def check(plan: DeepSpeedPlan, stage: int, notes: list[str], *overrides: str) -> None:
    """Check also that DeepSpeed takes the resolved file, and that it resolves to itself."""
    from deepspeed.runtime.config import DeepSpeedConfig

    assert plan.stage == stage
    assert len(plan.notes) == len(notes), plan.notes
    for part, note in zip(notes, plan.notes, strict=True):
        assert part in note
    assert '"auto"' not in json.dumps(plan.document)
    again = resolve(plan.document, small_recipe(*overrides), world_size=1, auto_fp16=True, source="itself")
    assert again.document == plan.document
    for document in (plan.document, plan.engine_config()):
        assert DeepSpeedConfig(json.loads(json.dumps(document))).zero_optimization_stage == stage


def test_each_file_has_one_expectation_and_there_are_many_files() -> None:
    names = {path.stem for path in FOLDER.glob("*.json")}
    assert names == {*LOADS, *REFUSED}
    assert not {*LOADS} & {*REFUSED}
    assert {*WITH_ITS_RECIPE} <= {*REFUSED}  # by another recipe, for their numbers alone
    assert len(names) >= 40


@pytest.mark.parametrize("name", LOADS)
def test_a_file_loads_with_these_notes(name: str) -> None:
    stage, precision, notes = LOADS[name]
    plan = plan_of(name)
    check(plan, stage, notes)
    assert plan.precision.name == precision


@pytest.mark.parametrize("name", WITH_ITS_RECIPE)
def test_a_file_with_numbers_loads_if_the_recipe_has_them(name: str) -> None:
    overrides, stage, notes = WITH_ITS_RECIPE[name]
    check(plan_of(name, *overrides), stage, notes, *overrides)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_for_these_reasons_and_no_others(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(name)
    first, *faults = str(error.value).splitlines()
    assert first == f"{name} cannot be used with recipe tiny:"
    assert len(faults) == len(REFUSED[name]), faults
    for expected in REFUSED[name]:
        assert any(fault.strip().startswith(expected) for fault in faults), faults


@pytest.mark.parametrize(
    "name",
    [
        "accelerate-auto-offload",
        "commented",
        "deepspeed-chat-bf16",
        "llama-factory-z0",
        "llava-zero3-offload",
        "megatron-filled",
    ],
)
def test_a_file_trains_through_the_command(name: str, store: TokenStore, tmp_path: Path) -> None:
    run, printed = tmp_path / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(
            [
                "pretrain", "--ds-config", str(FOLDER / f"{name}.json"), "--data", str(store.path), "--recipe", "tiny",
                "--run-dir", str(run), "--stop-at", "3", "--log-every", "1", "--set", *SMALL,
            ]
        )  # fmt: skip
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf8").splitlines()]
    assert [line["step"] for line in losses if line["kind"] == "train"] == [1, 2, 3]
    said = " ".join(printed.getvalue().split())
    for note in (note for note in LOADS[name][2] if note not in (FP16_ON, BF16_OFF)):
        assert note in said
