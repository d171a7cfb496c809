"""How a DeepSpeed JSON may be spelled: comments, whole numbers as floats, older names, and what was left unfilled.

The result has one name and one form for each thing, so that the rules about values need not know the other spellings.
"""

from __future__ import annotations

import re
from typing import Any

from electra_ds.config.inert import is_off
from electra_ds.config.monitors import MONITOR_SECTIONS

_COMMENTS = ("_", "//", "#")
"""Prefixes of keys that are meant as comments. DeepSpeed ignores such keys at the top level."""
_PYTHON = re.compile("(True|False|None),?")
"""HJSON, which DeepSpeed reads, takes a bare word up to the end of its line for text, the comma included."""
_PLACEHOLDER = re.compile("[A-Z][A-Z0-9]*(_[A-Z0-9]+)+,?")
"""Such as CONFIG_BATCH_SIZE and ZERO_STAGE in Megatron-DeepSpeed's templates, whose scripts fill them in."""
UNSET_BY_NULL = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "log_level",
    "bf16",
)  # fmt: skip
"""Keys that DeepSpeed treats as absent if they are null."""
_FREE_TEXT = (*MONITOR_SECTIONS, "flops_profiler")
ZERO_OLD_NAMES = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Switches that DeepSpeed calls deprecated and reads as the newer key."""
ZERO_SHORT_NAMES = (
    "gather_16bit_weights_on_model_save", "prefetch_bucket_size", "param_persistence_threshold",
    "model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
"""Names that DeepSpeed also takes with `stage3_` in front of them."""


def is_comment(key: str) -> bool:
    """Return whether a key is a comment, meant only for readers."""
    return key.startswith(_COMMENTS)


def as_read(values: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return the mapping without comments and under today's names, as DeepSpeed reads it.

    What cannot be read is left out and added to `problems`; older names are added to `notes`.
    """
    values = _plain(values, "", problems)
    values = {key: value for key, value in values.items() if value is not None or key not in UNSET_BY_NULL}
    renamed: list[str] = []
    _rename_bf16(values, problems, renamed)
    _rename_zero(values, problems, renamed)
    if renamed:
        notes.append(f"read as DeepSpeed reads older names: {', '.join(renamed)}")
    return values


def _plain(value: Any, place: str, problems: list[str]) -> Any:
    if isinstance(value, dict):
        result = {}
        for key, each in value.items():
            inner = f"{place}.{key}" if place else key
            if is_comment(key):
                continue
            if isinstance(each, str) and (fault := _fault_of_text(each, inner)):
                problems.append(f"{inner}: {fault}")
            else:
                result[key] = _plain(each, inner, problems)
        return result
    if isinstance(value, list):
        return [_plain(each, place, problems) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fault_of_text(text: str, place: str) -> str | None:
    if _PYTHON.fullmatch(text):
        return f"{text!r} is text to a JSON parser; write true, false or null, in lower case and without quotes"
    if _PLACEHOLDER.fullmatch(text) and place.partition(".")[0] not in _FREE_TEXT:
        return f"{text!r} is a placeholder of a template; put a value in its place"
    return None


def _rename_bf16(values: dict[str, Any], problems: list[str], renamed: list[str]) -> None:
    if "bfloat16" not in values:
        return
    section = values.pop("bfloat16")
    if "bf16" not in values:
        values["bf16"] = section
        renamed.append("bfloat16 as bf16")
    elif not is_off(section) and section != values["bf16"]:
        problems.append("bfloat16: is the old name of bf16, which is given too; keep only bf16")


def _rename_zero(values: dict[str, Any], problems: list[str], renamed: list[str]) -> None:
    name = "zero_optimization"
    section = values.get(name)
    if isinstance(section, bool):
        section = values[name] = {"stage": int(section)}
        renamed.append(f"{name}: {str(bool(section['stage'])).lower()} as stage {section['stage']}")
        if section["stage"] and "allgather_size" in values:
            section["allgather_bucket_size"] = values.pop("allgather_size")
    if not isinstance(section, dict):
        return
    for short in ZERO_SHORT_NAMES:
        if short in section:
            section.setdefault(f"stage3_{short}", section.pop(short))
    for old, new in ZERO_OLD_NAMES.items():
        if section.get(old) is not True:  # spelled out as off, or faulty
            continue
        del section[old]
        if section.get(new) is not None:
            problems.append(f"{name}.{old}: is the old name of {new}, which is given too; keep only {new}")
            continue
        section[new] = {"device": "cpu"} if new.startswith("offload") else True
        renamed.append(f"{name}.{old} as {new}")
