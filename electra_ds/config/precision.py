"""The `fp16`, `bf16` and `torch_autocast` sections of a DeepSpeed JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from electra_ds.core.errors import did_you_mean

PRECISION_KEYS = {
    "fp16": {
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    },
    "bf16": {"enabled"},
    "torch_autocast": {"enabled", "dtype"},
}  # fmt: skip
_WITHOUT_EFFECT: dict[str, Any] = {
    "auto_cast": False, "fp16_master_weights_and_grads": False, "check_grad_overflow": True,
    "immediate_grad_update": False, "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False,
    "lower_precision_safe_modules": None,
}  # fmt: skip
"""With DeepSpeed's defaults, which may be spelled out."""


@dataclass(frozen=True)
class LossScaling:
    """DeepSpeed's dynamic loss scaling, its names and its defaults."""

    initial_scale: float = 2.0**16
    is_dynamic: bool = True
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows that are needed to halve the scale."""
    consecutive_hysteresis: bool = False
    """Whether a good step restores the hysteresis."""
    min_scale: float = 1.0


@dataclass(frozen=True)
class Precision:
    """`fp16` and `bf16`: half weights with fp32 masters. `autocast-…`: torch.autocast over fp32 weights."""

    name: Literal["fp32", "bf16", "fp16", "autocast-bf16", "autocast-fp16"]
    loss_scaling: LossScaling | None = None


def precision_section(name: str) -> dict[str, Any]:
    """What a DeepSpeed JSON says for fp32, which is nothing, bf16 or fp16."""
    return {} if name == "fp32" else {name: {"enabled": True}}


def parse_precision(
    values: dict[str, Any], stage: int, auto_fp16: bool, problems: list[str], notes: list[str]
) -> Precision | None:
    """The one precision that is enabled. What is wrong is added to `problems`, what was decided here to `notes`."""
    enabled: list[str] = []
    without_scale: list[str] = []
    before = len(problems)
    for name, known in PRECISION_KEYS.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            problems.append(f'{name}: must be an object such as {{"enabled": true}}')
            continue
        is_on = section.get("enabled", False) is not False
        for key in section:
            if key in _WITHOUT_EFFECT:
                if is_on and section[key] not in ("auto", None, _WITHOUT_EFFECT[key]):
                    problems.append(f"{name}.{key}: is not supported here; remove it")
            elif name == "bf16" and key in PRECISION_KEYS["fp16"] - known:
                without_scale += [f"bf16.{key}"] if section.get("enabled") is True else []
            elif key not in known:
                problems.append(f"{name}.{key}: unknown key{did_you_mean(key, known)}")
        on = section.get("enabled", False)
        if on == "auto":
            on = name == "fp16" and auto_fp16 and not _chosen(values)
            meant = "on" if on else "off, since another precision is chosen" if _chosen(values) else "off"
            notes.append(f'{name}.enabled is "auto", which here means {meant}')
        if not isinstance(on, bool):
            problems.append(f'{name}.enabled: {on!r} is not true, false or "auto"')
        elif on:
            enabled.append(name)
    if without_scale:
        notes.append(f"bf16 has no loss scale, so these are left out: {', '.join(without_scale)}")
    if len(enabled) > 1:
        problems.append(f"{', '.join(enabled)}: only one precision can be enabled")
    if len(problems) > before:
        return None
    if not enabled:
        return Precision("fp32")
    section = values[enabled[0]]
    if enabled[0] == "bf16":
        return Precision("bf16")
    if enabled[0] == "torch_autocast":
        return _autocast_precision(section, stage, problems)
    return Precision("fp16", _loss_scaling(section, problems))


def _chosen(values: dict[str, Any]) -> bool:
    """Whether a precision is switched on outright; "auto" is transformers' convention for "as the user says"."""
    sections = (values.get(name) for name in PRECISION_KEYS)
    return any(isinstance(section, dict) and section.get("enabled") is True for section in sections)


def _autocast_precision(section: dict[str, Any], stage: int, problems: list[str]) -> Precision | None:
    dtype = str(section.get("dtype", "bfloat16")).removeprefix("torch.")
    if dtype in ("bfloat16", "bf16"):
        return Precision("autocast-bf16")
    if dtype in ("float16", "fp16", "half"):
        if stage:
            problems.append(
                f"torch_autocast: float16 has no working loss scale at stage {stage}; take fp16 or bfloat16"
            )
        return Precision("autocast-fp16", LossScaling())
    problems.append(f"torch_autocast.dtype: {section['dtype']!r} is not bfloat16 or float16")
    return None


def _loss_scaling(section: dict[str, Any], problems: list[str]) -> LossScaling:
    defaults = LossScaling()

    def number(key: str, default: float, lowest: float, highest: float, *, whole: bool) -> float:
        value = section.get(key, default)
        if value == "auto":
            return default
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
            kind = "whole number" if whole else "number"
            problems.append(f"fp16.{key}: {value!r} is not a {kind} from {lowest:g} to {highest:g}")
            return default
        return value

    consecutive = section.get("consecutive_hysteresis", False)
    if not isinstance(consecutive, bool):
        problems.append(f"fp16.consecutive_hysteresis: {consecutive!r} is not true or false")
        consecutive = False
    static = number("loss_scale", 0, 0, 2.0**100, whole=False)
    return LossScaling(
        initial_scale=static or 2.0 ** number("initial_scale_power", 16, 0, 100, whole=True),
        is_dynamic=not static,
        window=int(number("loss_scale_window", defaults.window, 1, 1e9, whole=True)),
        hysteresis=int(number("hysteresis", defaults.hysteresis, 1, 1e9, whole=True)),
        consecutive_hysteresis=consecutive,
        min_scale=number("min_loss_scale", defaults.min_scale, 2.0**-24, 2.0**100, whole=False),
    )
