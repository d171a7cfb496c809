"""The `activation_checkpointing` section of a DeepSpeed JSON.

DeepSpeed reads it for models that call its own `deepspeed.checkpointing`. Ours calls torch's, so of the section's keys
the number of layers has a meaning here, and the switches of DeepSpeed's implementation have none.
"""

from __future__ import annotations

from typing import Any

from electra_ds.core.errors import did_you_mean

_COUNT = "number_checkpoints"
_FOR_MODEL_PARALLELISM = ("partition_activations", "contiguous_memory_optimization")
"""Without model parallelism DeepSpeed itself partitions nothing, and it lays out only what it has partitioned."""
_SWITCHES = (*_FOR_MODEL_PARALLELISM, "cpu_checkpointing", "synchronize_checkpoint_boundary", "profile")


def parse_activations(values: dict[str, Any], num_layers: int, problems: list[str], notes: list[str]) -> int:
    """Return how many layers of each encoder are computed again in the backward pass: 0 without the section, or if
    everything in it is off, and all of them if it has no number. Faults are added to `problems`, and what was decided
    here to `notes`.

    num_layers: of the discriminator, which has no fewer than the generator.
    """
    name = "activation_checkpointing"
    section = values.get(name)
    if name not in values:
        return 0
    if section == "auto":
        section = {}
    if not isinstance(section, dict):
        problems.append(f'{name}: must be an object such as {{"{_COUNT}": {num_layers}}}')
        return 0
    _check_switches(name, section, problems, notes)
    count = section.get(_COUNT)
    if count == 0 or (section and all(value in (None, False) for value in section.values())):
        notes.append(f"{name} is off, so no layer is computed again in the backward pass")
        return 0
    if count in (None, "auto"):  # null is DeepSpeed's own default
        notes.append(f"{name} names no number, so all {num_layers} layers are computed again in the backward pass")
        return num_layers
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        problems.append(
            f"{name}.{_COUNT}: {count!r} is not a positive whole number; to compute no layer again, remove the section"
        )
        return 0
    if count > num_layers:
        notes.append(f"{name}.{_COUNT} is {count}, which means all of the recipe's {num_layers}")
    return min(count, num_layers)


def _check_switches(name: str, section: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    for key, value in section.items():
        if key not in (_COUNT, *_SWITCHES):
            problems.append(f"{name}.{key}: unknown key{did_you_mean(key, (_COUNT, *_SWITCHES))}")
        elif key in _SWITCHES and value not in (True, False, None, "auto"):
            problems.append(f"{name}.{key}: {value!r} is not true or false")
        elif key in _FOR_MODEL_PARALLELISM and value is True:
            notes.append(f"{name}.{key} has no effect, since no model is split over ranks here")
        elif key in _SWITCHES and value is True:
            problems.append(f"{name}.{key}: is not supported here; remove it")
