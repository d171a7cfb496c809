from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from electra_ds.config import deepspeed as config
from electra_ds.config import deepspeed_keys as keys
from electra_ds.config.deepspeed import read_deepspeed_json, resolve
from electra_ds.config.deepspeed_keys import UNSET_BY_NULL, UNUSED, UNUSED_IN_ZERO, ZERO_OLD_NAMES
from electra_ds.config.deepspeed_sections import (
    CPU_ADAM_DEFAULTS,
    UNUSED_IN_PRECISION,
    ZERO_3_KEYS,
    ZERO_KEYS,
    LossScaling,
)
from electra_ds.config.monitors import MONITOR_SECTIONS, FolderMonitor, Monitors, WandbMonitor
from electra_ds.config.names import ds_config_names
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.pretraining.plain import PlainEngine
from tests.helpers import REPOSITORY, SHARED_DATA, builder_for, model_for, small_recipe


def plan_of(
    values: dict[str, Any], *overrides: str, world_size: int = 1, auto_fp16: bool = False
) -> config.DeepSpeedPlan:
    return resolve(values, small_recipe(*overrides), world_size=world_size, auto_fp16=auto_fp16, source="x.json")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_json_resolves_and_leaves_recipe_owned_keys_out(path: Path) -> None:
    values = read_deepspeed_json(str(path))
    assert read_deepspeed_json(path.stem) == values
    assert path.stem in ds_config_names()
    assert not set(values) & set(keys.OWNED_BY_RECIPE)
    resolve(values, small_recipe("global_batch_size=128"), world_size=1, auto_fp16=True, source=str(path))


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True}}])
def test_deepspeed_itself_accepts_the_resolved_json_and_reads_the_same(precision: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = plan_of(precision | {"train_micro_batch_size_per_gpu": 2})
    for document in (plan.document, plan.engine_config()):
        theirs = DeepSpeedConfig(json.loads(json.dumps(document)))
        assert theirs.train_batch_size == 8
        assert theirs.gradient_accumulation_steps == 4
        assert theirs.gradient_clipping == document["gradient_clipping"]
        assert theirs.zero_config.stage == 0


def test_the_allow_list_knows_every_top_level_key_of_deepspeed() -> None:
    """DeepSpeed ignores unknown top-level keys, so ours must be told apart from theirs by us."""
    import deepspeed.runtime.config as theirs
    from deepspeed.runtime import constants

    source = Path(theirs.__file__).read_text("utf8")
    body = source[source.index("def _initialize_params") : source.index("def _batch_assertion")]
    getters = set(re.findall(r"(get_\w+)\(param_dict", body))
    assert len(getters) > 20
    ours = {*keys.KNOWN, *UNUSED.defaults, *UNUSED.without_effect, "bfloat16"}
    scalars = {
        "TRAIN_BATCH_SIZE", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "GRADIENT_ACCUMULATION_STEPS", "STEPS_PER_PRINT",
        "MANAGED_GRADIENT_ACCUMULATION", "DUMP_STATE", "DISABLE_PYTHON_GC", "DISABLE_ALLGATHER", "FP16", "BFLOAT16",
        "BFLOAT16_OLD", "TORCH_AUTOCAST", "GRADIENT_CLIPPING", "COMMUNICATION_DATA_TYPE", "PRESCALE_GRADIENTS",
        "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE", "GRADIENT_PREDIVIDE_FACTOR", "GRADIENT_ALLREDUCE_OP", "OPTIMIZER",
        "SCHEDULER", "ZERO_ALLOW_UNTESTED_OPTIMIZER", "ZERO_FORCE_DS_CPU_OPTIMIZER", "WALL_CLOCK_BREAKDOWN",
        "MEMORY_BREAKDOWN", "CHECKPOINT", "DATA_TYPES", "DATALOADER_DROP_LAST", "LOG_LEVEL",
        "USE_DATA_BEFORE_EXPERT_PARALLEL",
    }  # fmt: skip
    missing = {getattr(constants, name) for name in scalars} - ours
    assert not missing
    sections = set(re.findall(r"param_dict\.get\('(\w+)'|'(\w+)' in param_dict", source))
    assert {name for pair in sections for name in pair if name} <= ours | {"elasticity"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation: unknown key; did you mean 'zero_optimization'",
        ),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        (
            {"zero_optimization": {"stage": "auto"}},
            "zero_optimization.stage: 'auto' is not one of 0, 1, 2, 3",
        ),
        ({"zero_optimization": {"stage": 7}}, "7 is not one of 0, 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer: DeepSpeed does not offload at stage 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param: DeepSpeed does not offload at stage 2",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size: DeepSpeed 0.19 no longer has"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "offload_optimizer: DeepSpeed does not offload at"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_params": True}}, "cpu_offload_params: DeepSpeed 0.19 no"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "legacy_stage1: DeepSpeed 0.19 no longer has"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "True,"}}, "overlap_comm: 'True,' is text to a JSON"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 0.5}}, "sub_group_size: 0.5 is not a whole number"),
        ({"fp32_allreduce": True}, "fp32_allreduce: DeepSpeed 0.19 no longer has this feature"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: this DeepSpeed feature is not supported"),
        ({"pipeline": {"stages": 2}}, "pipeline: this DeepSpeed feature is not supported"),
        ({"comms_logger": {"enabled": "yes"}}, "comms_logger: this DeepSpeed feature is not supported"),
        ({"train_batch_size": "CONFIG_BATCH_SIZE"}, "'CONFIG_BATCH_SIZE' is a template's placeholder"),
        (
            {"zero_optimization": {"stage": "ZERO_STAGE"}},
            "zero_optimization.stage: 'ZERO_STAGE' is a template's placeholder",
        ),
        ({"wall_clock_breakdown": "False,"}, "wall_clock_breakdown: 'False,' is text to a JSON parser"),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "compute_grad_norm: this DeepSpeed feature",
        ),
        ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed 0.19 no longer has this feature"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp: DeepSpeed 0.19 no longer has this feature"),
        ({"prescale_gradients": True}, "prescale_gradients: this DeepSpeed feature is not supported"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: this DeepSpeed feature is not supported"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint: this DeepSpeed feature is not supported"),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint: this DeepSpeed feature is not supported"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: this DeepSpeed feature"),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}},
            "check_grad_overflow: this DeepSpeed feature",
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": 1}},
            "overlap_com: unknown .*mean 'overlap_comm'",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "weights: this DeepSpeed feature",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer: .*nvme.* is not supported here",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "offload_optimizer: .* without keys of DeepSpeed's own Adam .ratio, super_offload.",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "offload_optimizer: 'cpu' is not",
        ),
        ({"wall_clock_breakdown": None}, "wall_clock_breakdown: None is not of type boolean"),
        ({"zero_optimization": 2}, "zero_optimization: must be an object"),
        (
            {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            "float16 has no working loss scale at stage 1",
        ),
        ({"gradient_clipping": 0.5}, "contradicts the recipe .optimizer.max_grad_norm is 1.0."),
        ({"train_batch_size": 64}, "contradicts the recipe .global_batch_size is 8."),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: 'Lamb'"),
        ({"optimizer": {"type": 3}}, "optimizer.type: 3 is not the recipe's optimizer"),
        ({"optimizer": {"params": {"max_grad_norm": 0.5}}}, "max_grad_norm: 0.5 contradicts the recipe"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode: False contradicts"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "amsgrad: True contradicts"),
        ({"optimizer": {"type": "Adam", "params": 3}}, "optimizer: must be an object with type and params"),
        ({"optimizer": {"type": "Adam", "param": {}}}, "optimizer.param: unknown key"),
        (
            {"scheduler": {"type": "warmuplr"}},
            "warmuplr with these params contradicts the recipe's linear",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1, "warmup_num_steps": "auto"}}},
            "WarmupLR with these params",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 40}}},
            "WarmupLR with these params",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}}, "optimizer.params.lr: '1e-3' contradicts"),
        ({"optimizer": {"params": {"lrr": 1}}}, "optimizer.params.lrr: unknown key"),
        ({"scheduler": {"type": "WarmupCosineLR"}}, "WarmupCosineLR with these params"),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 40}}},
            "DecayLR with these params",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 41, "warmup_type": "linear"}}},
            "warmup_num_steps: 41 contradicts the recipe .schedule.warmup_steps is 40.",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16, bf16: only one precision"),
        ({"fp16": {"enable": True}}, "fp16.enable: unknown key; did you mean 'enabled'"),
        ({"fp16": {"enabled": "yes"}}, "fp16.enabled: 'yes'"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale"),
        ({"fp16": True}, "fp16: must be an object"),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, "torch_autocast.dtype: 'int8'"),
        ({"train_micro_batch_size_per_gpu": 3}, "micro-batch 2 and accumulation|micro-batch 4 and accumulation"),
        ({"train_micro_batch_size_per_gpu": 0}, "not a positive whole number"),
        ({"gradient_accumulation_steps": 3}, "global_batch_size .recipe. is 8"),
        ({"fp16": {"enabled": True, "hysteresis": 2.7}}, "fp16.hysteresis: 2.7: Input should be a valid integer"),
        ({"fp16": {"enabled": True, "initial_scale_power": 300}}, "fp16.initial_scale_power"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "fp16.min_loss_scale"),
        ({"fp16": {"enabled": True, "consecutive_hysteresis": "no"}}, "should be a valid boolean"),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast: this DeepSpeed feature is not supported"),
        ({"steps_per_print": "x"}, "steps_per_print: 'x' is not of type whole number"),
        ({"optimizer": "AdamW"}, "optimizer: must be an object"),
        ({"autotuning": {"enabled": True}}, "autotuning: this DeepSpeed feature is not supported"),
        ({"comet": {"enabled": True}}, "comet: this DeepSpeed feature is not supported"),
        ({"tensorboard": True}, "tensorboard: must be an object"),
        ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled: 'yes' is not true or false"),
        ({"csv_monitor": {"output": "x"}}, "csv_monitor.output: unknown key; did you mean 'output_path'"),
        ({"csv_monitor": {"output_path": None}}, "csv_monitor.output_path: None is not of type string"),
        ({"wandb": {"project": 3}}, "wandb.project: 3 is not of type string"),
    ],
)
def test_each_fault_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"prescale_gradients": False, "gradient_predivide_factor": 1},
            "prescale_gradients, gradient_predivide_factor",
        ),
        ({"autotuning": {"enabled": False, "fast": True}}, "autotuning"),
        ({"elasticity": {"enabled": False}, "amp": False}, "elasticity, amp"),
        ({"curriculum_learning": {"enabled": False}, "sparse_gradients": False}, "curriculum_learning"),
        ({"comms_logger": {"enabled": False, "verbose": True}}, "comms_logger"),
        ({"aio": {"block_size": 1048576, "queue_depth": 8}}, "aio"),
        ({"checkpoint": {"tag_validation": "Warn", "load_universal": False}}, "checkpoint"),
        ({"tensor_parallel": {"autotp_size": 1}, "communication_data_type": None}, "tensor_parallel"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": False}}, "offload_optimizer"),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": -1, "zero_hpz_partition_size": 1}},
            "zero_optimization.mics_shard_size, zero_optimization.zero_hpz_partition_size",
        ),
        ({"zero_optimization": {"stage": 1, "cpu_offload": False, "elastic_checkpoint": False}}, "cpu_offload"),
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True, "load_from_fp32_weights": False}},
            "zero_optimization.elastic_checkpoint, zero_optimization.load_from_fp32_weights",
        ),
        ({"zero_optimization": {"stage": 3, "pipeline_loading_checkpoint": True}}, "pipeline_loading_checkpoint"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_use_pin_memory": True}}, "cpu_offload_use_pin_memory"),
        ({"amp": {"enabled": "auto", "opt_level": "auto"}}, "amp"),
        ({"pipeline": {"stages": "auto", "partition": "best", "seed_layers": False}}, "pipeline"),
        ({"disable_allgather": True, "dataloader_drop_last": True}, "disable_allgather, dataloader_drop_last"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ({"vocabulary_size": 30522, "fp32_allreduce": False}, "vocabulary_size, fp32_allreduce"),
        ({"sequence_parallel_size": 1, "allgather_size": 5e8}, "sequence_parallel_size, allgather_size"),
        ({"comms_logger": {"verbose": True}, "compile": {"deepcompile": False, "double_buffer": True}}, "comms_logger"),
        ({"curriculum_learning": {"enabled": False, "schedule_config": {"difficulty_step": 8}}}, "curriculum_learning"),
        (
            {
                "compression_training": {
                    "weight_quantization": {
                        "shared_parameters": {"enabled": False, "schedule_offset": 0},
                        "different_groups": {"wq1": {"params": {"target_bits": 8}}},
                    }
                }
            },
            "compression_training",
        ),
    ],
)
def test_what_changes_nothing_is_a_note_and_the_plan_is_that_without_it(values: dict[str, Any], named: str) -> None:
    plan = plan_of(values)
    (note,) = plan.notes
    assert note.startswith("left out, because it has no effect here: ")
    assert named in note
    stage = values.get("zero_optimization", {}).get("stage", 0)
    assert plan.document == plan_of({"zero_optimization": {"stage": stage}}).document


def test_keys_of_other_stages_are_one_note_of_their_own() -> None:
    values = {"stage": 2, "sub_group_size": 1e9, "offload_param": {"device": "none"}, "overlap_comm": True}
    plan = plan_of({"zero_optimization": values})
    assert plan.notes == ("at stage 2 these keys of zero_optimization have no effect: sub_group_size, offload_param",)
    assert plan.document == plan_of({"zero_optimization": {"stage": 2, "overlap_comm": True}}).document


@pytest.mark.parametrize(
    "values",
    [
        {"bf16": {"enabled": True, "immediate_grad_update": False}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16}},
        {"fp16": {"enabled": False, "auto_cast": True}, "bf16": {"enabled": True}},
        {"bf16": {"enabled": True, "check_grad_overflow": True, "bf16_optimizer_states": False}},
        {"bf16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
    ],
)
def test_a_precision_section_may_spell_out_defaults_and_a_note_says_what_has_no_effect(values: dict[str, Any]) -> None:
    plan = plan_of(values)
    assert plan.document == plan_of({"bf16": {"enabled": True}}).document
    without_effect = [f"bf16.{key}" for key in values["bf16"] if key != "enabled"]
    said = f"left out, because it has no effect here: {', '.join(without_effect)}"
    assert plan.notes == ((said,) if without_effect else ())


def test_the_defaults_that_may_be_spelled_out_are_deepspeeds_own() -> None:
    import deepspeed.runtime.config as theirs
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    for key, value in UNUSED.defaults.items():
        if isinstance(value, dict) or value is None or key == "sequence_parallel_size":  # DeepSpeed has no constant
            continue
        (name,) = (name for name in dir(constants) if getattr(constants, name) == key and not name.endswith("DEFAULT"))
        default = f"{name}_DEFAULT".replace("PARALLELISM_DEFAULT", "PARALLEL_DEFAULT")
        assert getattr(constants, default) == value, key
    for key, value in UNUSED_IN_ZERO.defaults.items():
        field = DeepSpeedZeroConfig.model_fields[key]
        assert (field.default, type(field.default)) == (value, type(value)), key
    for kind in (DeepSpeedBF16Config, DeepSpeedFP16Config):
        for key in set(UNUSED_IN_PRECISION) & set(kind.model_fields):
            assert kind.model_fields[key].default == UNUSED_IN_PRECISION[key], key
    assert set(UNUSED.removed) == {*theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS, "fp32_allreduce"}
    assert set(UNUSED_IN_ZERO.removed) == {*theirs._REMOVED_ZERO_CONFIG_KEYS, "cpu_offload_params", "legacy_stage1"}
    for key, value in CPU_ADAM_DEFAULTS.items():
        assert DeepSpeedZeroOffloadOptimizerConfig.model_fields[key].default == value, key
    assert set(UNUSED_IN_ZERO.without_effect) <= set(DeepSpeedZeroConfig.model_fields)
    ours = {*ZERO_KEYS, *ZERO_3_KEYS, *UNUSED_IN_ZERO.defaults, *UNUSED_IN_ZERO.removed, *UNUSED_IN_ZERO.without_effect}
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert known <= ours | {"leaf_module"}


def test_monitor_sections_have_deepspeeds_own_fields_and_are_not_handed_on() -> None:
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import DeepSpeedConfig

    for theirs, ours in ((CSVConfig, FolderMonitor), (TensorBoardConfig, FolderMonitor), (WandbConfig, WandbMonitor)):
        assert set(theirs.model_fields) == {"enabled", *ours.__dataclass_fields__}
    values = {
        "tensorboard": {"enabled": True, "output_path": "logs/", "job_name": "a"},
        "wandb": {"enabled": True, "group": None, "team": "t", "project": "p"},
        "csv_monitor": {"enabled": False, "job_name": "b"},
    }
    plan = plan_of(values)
    assert plan.monitors == Monitors(FolderMonitor("logs/", "a"), WandbMonitor("p", "t", None))
    assert plan_of({key: {"enabled": "auto"} for key in MONITOR_SECTIONS}).monitors == Monitors()
    assert {key: plan.document[key] for key in values} == values
    assert not set(plan.engine_config()) & set(MONITOR_SECTIONS)
    assert plan_of(plan.document) == plan
    assert not DeepSpeedConfig(plan.engine_config()).monitor_config.enabled


def test_all_faults_are_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        plan_of({"gradient_cliping": 1, "zero_optimization": {"stage": "auto"}, "train_batch_size": 5, "bf16": 3})
    assert all(key in str(error.value) for key in ("gradient_cliping", "stage", "train_batch_size", "bf16"))


def test_auto_and_agreeing_values_are_filled_in() -> None:
    plan = plan_of(
        {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1,
            "gradient_accumulation_steps": 2, "fp16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": "auto"}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_num_steps": 40, "total_num_steps": "auto", "warmup_type": "linear"},
            },
        }
    )  # fmt: skip
    assert plan.batch == config.BatchPlan(4, 2, 1)
    assert plan.precision.name == "fp32"
    assert "auto" not in json.dumps(plan.document)


def test_fp16_auto_means_fp16_on_a_gpu() -> None:
    assert plan_of({"fp16": {"enabled": "auto"}}, auto_fp16=True).precision.name == "fp16"


def test_fp16_auto_gives_way_to_a_precision_that_is_is_precision_chosen() -> None:
    """As in transformers' files with bf16 switched on."""
    values = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}
    for auto_fp16 in (True, False):
        plan = plan_of(values, auto_fp16=auto_fp16)
        assert plan.precision.name == "bf16"
        assert "fp16" not in plan.document
    lone = plan_of({"bf16": {"enabled": "auto"}}, auto_fp16=True)
    assert (lone.precision.name, lone.notes) == ("fp32", ('bf16.enabled is "auto", which here means off',))


def test_what_deepspeed_itself_refuses_is_refused_before_anything_starts() -> None:
    import torch

    from electra_ds.training.engine import check_plan

    plan = plan_of({"timers": {"throughput": {"foo": 1}}})
    with pytest.raises(ConfigError, match=r"(?s)DeepSpeed rejects x\.json.*foo"):
        check_plan(plan, torch.device("cpu"), "x.json")
    check_plan(plan_of({"timers": {"throughput": {"enabled": False}}}), torch.device("cpu"), "x.json")


def test_precision_is_not_handed_to_deepspeed_at_stage_0() -> None:
    plan = plan_of({"fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 4}}, auto_fp16=True)
    assert plan.precision.loss_scaling == LossScaling(initial_scale=4096.0, hysteresis=4)
    assert plan.document["fp16"]["enabled"] is True
    assert "fp16" not in plan.engine_config()
    assert plan.engine_config()["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip at 1.0


def test_a_resolved_json_resolves_to_itself() -> None:
    plan = plan_of({"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}})
    assert plan_of(plan.document) == plan


@given(
    micro=st.one_of(st.just("auto"), st.integers(1, 70)),
    accumulation=st.one_of(st.just("auto"), st.integers(1, 70)),
    global_batch=st.integers(1, 64),
    world_size=st.integers(1, 5),
)
def test_a_batch_plan_is_exact_or_refused(micro: Any, accumulation: Any, global_batch: int, world_size: int) -> None:
    values = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    try:
        batch = plan_of(values, f"global_batch_size={global_batch}", world_size=world_size).batch
    except ConfigError:
        return
    assert batch.micro_batch_size * batch.gradient_accumulation_steps * world_size == global_batch
    assert accumulation in ("auto", batch.gradient_accumulation_steps)


COMMENTED = """
{
    // half precision
    "bf16": {"enabled": true,},
    "zero_optimization": {"stage": 1, "overlap_comm": true,}, # everything on one card
    /* seldom
       looked at */
    "train_micro_batch_size_per_gpu": 4,
}
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_comments_trailing_commas_and_a_byte_order_mark_are_read_as_deepspeed_reads_them(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(COMMENTED, encoding)
    assert read_deepspeed_json(str(path)) == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "train_micro_batch_size_per_gpu": 4,
    }


@pytest.mark.parametrize(
    "path",
    [
        *(
            REPOSITORY / "tests" / "deepspeed_files" / f"{name}.json"
            for name in ("commented", "accelerate-zero3-offload")
        ),
        *sorted((SHARED_DATA / "reported" / "09-json").glob("*.json")),
    ],
    ids=lambda path: path.stem,
)
def test_json_files_as_people_write_them_resolve(path: Path) -> None:
    resolve(read_deepspeed_json(str(path)), small_recipe(), world_size=1, auto_fp16=False, source=path.name)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1, "a": 2}', '{"a": 1, // b\n "a": 2,}'])
def test_a_broken_json_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        read_deepspeed_json(str(path))


def test_a_missing_json_file_says_where_to_look() -> None:
    with pytest.raises(ConfigError, match="ds_configs/"):
        read_deepspeed_json("nowhere.json")


def test_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"a100-40gb, cpu, gtx1060-6gb, .*did you mean 'gtx1060-6gb'"):
        read_deepspeed_json("gtx1060")


# --- spellings


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ({"_comment": "b", "//": "c", "bf16": {"_note": 1, "enabled": True}}, {"bf16": {"enabled": True}}),
        ({"#zero": {"stage": 9}, "zero_optimization": {"stage": 1, "_stage": 2}}, {"zero_optimization": {"stage": 1}}),
        (
            {
                "train_micro_batch_size_per_gpu": 4.0, "gradient_accumulation_steps": 2.0, "steps_per_print": 1e5,
                "zero_optimization": {"stage": 2.0, "reduce_bucket_size": 2e8}, "train_batch_size": 8.0,
                "fp16": {"enabled": True, "initial_scale_power": 12.0, "hysteresis": 2.0, "loss_scale_window": 1e3},
                "flops_profiler": {"profile_step": 5.0},
            },
            {
                "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "steps_per_print": 100_000,
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 200_000_000}, "train_batch_size": 8,
                "fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 2, "loss_scale_window": 1000},
                "flops_profiler": {"profile_step": 5},
            },
        ),
        (dict.fromkeys(UNSET_BY_NULL), {}),
        ({"bf16": None, "zero_optimization": {"stage": 3, "overlap_comm": None}}, {"zero_optimization": {"stage": 3}}),
    ],
)  # fmt: skip
def test_comments_whole_floats_and_nulls_change_nothing(spelled: dict[str, Any], plain: dict[str, Any]) -> None:
    assert plan_of(spelled) == plan_of(plain)


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}, "bfloat16 as bf16"),
        ({"bf16": None, "bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}, "bfloat16 as bf16"),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}, "zero_optimization as stage 1"),
        ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}, "zero_optimization as stage 0"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.cpu_offload as offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "zero_optimization.cpu_offload_param as offload_param",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
            "as stage3_gather_16bit_weights_on_model_save",
        ),
    ],
)
def test_an_older_name_is_read_as_deepspeed_reads_it_and_a_note_says_so(
    old: dict[str, Any], new: dict[str, Any], note: str
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = plan_of(old)
    assert plan.document == plan_of(new).document
    assert note in plan.notes[0]
    theirs, expected = (DeepSpeedConfig(values | {"train_batch_size": 8}) for values in (old, new))
    assert theirs.bfloat16_config == expected.bfloat16_config
    zero, expected_zero = (
        each.zero_config.model_dump(exclude={"allgather_bucket_size"}) for each in (theirs, expected)
    )
    assert {key: zero[key] for key in zero if key not in ZERO_OLD_NAMES} == {
        key: expected_zero[key] for key in expected_zero if key not in ZERO_OLD_NAMES
    }


def test_deepspeed_too_reads_null_as_an_absent_key() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig(dict.fromkeys(UNSET_BY_NULL) | {"train_batch_size": 8})
    assert (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == (8, 1)
    assert (theirs.steps_per_print, theirs.log_level, theirs.bfloat16_config.enabled) == (None, None, False)


def test_every_old_name_is_one_that_deepspeed_takes() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for old, new in ZERO_OLD_NAMES.items():
        extra = DeepSpeedZeroConfig.model_fields[old].json_schema_extra
        assert isinstance(extra, dict)
        assert new.endswith(str(extra["new_param"]))


def test_a_comment_may_stand_in_a_file_as_often_as_its_author_likes(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"_comment": "a", "_comment": "b", "//": 1, "//": 2, "bf16": {"enabled": true}}')
    assert plan_of(read_deepspeed_json(str(path))) == plan_of({"bf16": {"enabled": True}})


@pytest.mark.parametrize("kind", ["Adam", "adam", "AdamW", "adamw", "ADAMW", "auto"])
def test_the_optimizer_type_is_read_in_any_case_as_by_deepspeed(kind: str) -> None:
    params = {
        "lr": 0.001, "betas": "auto", "torch_adam": False, "adam_w_mode": True, "amsgrad": False, "max_grad_norm": 1,
        "fp32_optimizer_states": True, "foreach": None,
    }  # fmt: skip
    plan = plan_of({"optimizer": {"type": kind, "params": params, "legacy_fusion": False}})
    assert plan == plan_of({})


@pytest.mark.parametrize(
    "section",
    [
        {"optimizer": {"type": "Lamb", "params": {"lr": 11e-3, "max_coeff": 0.3, "min_coeff": 0.01}}},
        {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 23000, "cuda_aware": False}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.004, "decay_step_size": 1000}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1, "warmup_num_steps": 9}}},
    ],
)
def test_a_refused_optimizer_or_scheduler_is_one_fault(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(section)
    assert len(str(error.value).splitlines()) == 2, error.value


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR"])
@pytest.mark.parametrize(
    "default", [{"warmup_min_lr": 0}, {"last_batch_iteration": -1}, {"warmup_min_lr": 0.0, "warmup_type": "linear"}]
)
def test_a_default_next_to_auto_leaves_the_schedule_to_the_recipe(kind: str, default: dict[str, Any]) -> None:
    plan = plan_of({"scheduler": {"type": kind, "params": {"warmup_num_steps": "auto"} | default}})
    assert plan.notes == (f"scheduler {kind} sets no numbers, so the recipe's linear schedule is used",)


# --- ZeRO


JSON_FILES = [
    *sorted((REPOSITORY / "ds_configs").glob("*.json")),
    *sorted((REPOSITORY / "tests/deepspeed_files").glob("transformers-zero[23].json")),
]


@pytest.mark.usefixtures("process_group", "half_on_cpu")
@pytest.mark.parametrize("auto_fp16", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("path", JSON_FILES, ids=lambda path: path.stem)
def test_every_json_runs_three_steps(store: TokenStore, path: Path, auto_fp16: bool) -> None:
    """Ours and those of transformers' documentation, unchanged. As on a GPU, "auto" means fp16; that a CPU computes it
    is the one thing mapped here."""
    recipe = small_recipe("global_batch_size=64")
    plan = resolve(read_deepspeed_json(str(path)), recipe, world_size=1, auto_fp16=auto_fp16, source=path.name)
    assert "auto" not in json.dumps(plan.document)
    plain = PlainEngine(model_for(store, recipe), recipe, 64, torch.device("cpu"))
    engine = PretrainingEngine(model_for(store, recipe), recipe, plan, torch.device("cpu"))
    builder = builder_for(store, recipe)
    for step in range(3):
        expected, samples = plain.train_step(builder.build(step), step)
        pieces = torch.cat(samples).split(selected_per_micro_batch(builder.build(step), plan.batch.micro_batch_size))
        found = engine.train_step(builder.build(step), step, pieces)
        assert found["loss"].item() == pytest.approx(
            expected["loss"].item(), rel=1e-5 if plan.precision.name == "fp32" else 4e-3
        )
    engine.close()


def selected_per_micro_batch(batch: MaskedBatch, size: int) -> list[int]:
    return batch.masks.selected.sum(axis=1).reshape(-1, size).sum(axis=1).tolist()


def test_buffers_are_small_unless_the_file_says_otherwise() -> None:
    for stage in (1, 2, 3):
        section = plan_of({"zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"}}).document
        assert section["zero_optimization"]["reduce_bucket_size"] == 10_000_000  # DeepSpeed's own is 500,000,000
    given = plan_of({"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8}}).document
    assert given["zero_optimization"]["reduce_bucket_size"] == 2e8


def test_every_key_that_we_let_through_is_known_to_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(fields) | {field.alias for field in fields.values()} >= ZERO_KEYS | ZERO_3_KEYS


def test_precision_is_deepspeeds_own_business_at_stages_1_to_3_but_for_autocast() -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 12}, "zero_optimization": {"stage": 2}}
    config = plan_of(fp16, auto_fp16=True).engine_config()
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 12}
    assert config["gradient_clipping"] == 1.0
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 2}}
    assert "torch_autocast" not in plan_of(autocast).engine_config()


def test_a_scheduler_that_leaves_its_numbers_open_stands_for_the_recipes_and_that_is_said() -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}}
    assert "the recipe's linear schedule is used" in plan_of({"scheduler": scheduler}).notes[0]
    assert "which here means off" in plan_of({"fp16": {"enabled": "auto"}}).notes[0]
