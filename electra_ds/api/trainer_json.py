"""A DeepSpeed JSON in the form that other trainers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from electra_ds.config.deepspeed import read_deepspeed_json
from electra_ds.core.errors import ConfigError

_OF_TRAINER = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def trainer_json(ds_config: str | Path, trainer: Literal["transformers", "accelerate", "lightning"]) -> dict[str, Any]:
    """Return a DeepSpeed JSON in which batch, accumulation and clipping are left to a trainer.

    transformers' Trainer compares them with its own arguments, Accelerate fills them in where the JSON says "auto", and
    Lightning wants them left out. Other keys stay as they are.

    Args:
        ds_config: a shipped DeepSpeed JSON such as `zero2`, or a path.
        trainer: for `TrainingArguments(deepspeed=…)`, `DeepSpeedPlugin(hf_ds_config=…)` or
            `DeepSpeedStrategy(config=…)`.

    Raises:
        ConfigError: the JSON cannot be read, or has half precision at ZeRO stage 0, where DeepSpeed's own fails.

    Examples:
        >>> import electra_ds
        >>> electra_ds.trainer_json("zero2", "lightning")["zero_optimization"]["stage"]
        2
    """
    if trainer not in ("transformers", "accelerate", "lightning"):
        raise ConfigError(f"There is no trainer {trainer!r}; give transformers, accelerate or lightning.")
    config = read_deepspeed_json(str(ds_config))
    sections = {name: config.get(name, {}) for name in ("fp16", "bf16", "zero_optimization")}
    if wrong := [name for name, section in sections.items() if not isinstance(section, dict)]:
        raise ConfigError(f'{ds_config}: {wrong[0]} must be an object, such as {{"enabled": true}}.')
    half = [name for name in ("fp16", "bf16") if sections[name].get("enabled") is True]
    if half and sections["zero_optimization"].get("stage", 0) == 0:
        raise ConfigError(
            f"{ds_config} has {half[0]} at ZeRO stage 0, which only electra_ds.pretrain supports (docs/stage-0.md). "
            f"Use stage 1, or leave the precision to the trainer."
        )
    rest = {name: value for name, value in config.items() if name not in _OF_TRAINER}
    if trainer != "lightning":
        return rest | dict.fromkeys(_OF_TRAINER, "auto")
    return {name: value for name, value in rest.items() if name not in ("fp16", "bf16") or value != {"enabled": "auto"}}
