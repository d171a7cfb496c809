"""Keys of a DeepSpeed JSON that are DeepSpeed's own business: what it reports, and how it manages the process."""

from __future__ import annotations

from typing import Any

HANDED_ON: dict[str, type[Any]] = {
    "disable_python_gc": bool,
    "dump_state": bool,
    "flops_profiler": dict,
    "log_level": str,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "timers": dict,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
}
_JSON_TYPES = {dict: "object", bool: "boolean", int: "whole number", str: "string"}
_FLOPS_PROFILER: dict[str, tuple[type, ...]] = {
    "enabled": (bool,), "recompute_fwd_factor": (int, float), "profile_step": (int,), "module_depth": (int,),
    "top_modules": (int,), "detailed": (bool,), "output_file": (str, type(None)),
}  # fmt: skip
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_LEVEL = "warning"
"""DeepSpeed's own default."""
NEVER = 2**31 - 1
"""The `steps_per_print` of a run whose file does not set it: the progress bar reports, not DeepSpeed."""


def parse_handed_on(values: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return the keys that DeepSpeed gets as they are. Faults are added to `problems`, and keys that will print nothing
    to `notes`."""
    given: dict[str, Any] = {key: values[key] for key in HANDED_ON if values.get(key, "auto") != "auto"}
    before = len(problems)
    for key, value in given.items():
        if type(value) is not HANDED_ON[key]:
            problems.append(f"{key}: {value!r} is not of type {_JSON_TYPES[HANDED_ON[key]]}")
        elif key == "log_level" and value.lower() not in _LOG_LEVELS:
            problems.append(f"log_level: {value!r} is not one of {', '.join(_LOG_LEVELS)}")
        elif key == "steps_per_print" and value < 1:
            problems.append(f"steps_per_print: {value} is not a positive whole number")
    profiler = given.get("flops_profiler")
    for key, value in profiler.items() if isinstance(profiler, dict) else ():
        if key not in _FLOPS_PROFILER:
            problems.append(f"flops_profiler.{key}: unknown key")
        elif value != "auto" and type(value) not in _FLOPS_PROFILER[key]:
            problems.append(f"flops_profiler.{key}: {value!r} is of the wrong type")
    if len(problems) == before:
        _note_what_shows_nothing(given, notes)
    return given


def _note_what_shows_nothing(given: dict[str, Any], notes: list[str]) -> None:
    """DeepSpeed logs these at level "info", and its level is "warning" unless the file says otherwise."""
    throughput = given.get("timers", {}).get("throughput", {})
    asked = {
        "dump_state": given.get("dump_state", False),
        "steps_per_print": given.get("steps_per_print", NEVER) < NEVER,
        "timers": isinstance(throughput, dict) and throughput.get("enabled", False) is True,
    }
    silent = [key for key, is_on in asked.items() if is_on]
    if silent and _LOG_LEVELS.index(given.get("log_level", _LEVEL).lower()) > _LOG_LEVELS.index("info"):
        notes.append(f'{", ".join(silent)}: DeepSpeed prints this only with "log_level": "info" in the file')
    if asked["timers"] and not asked["steps_per_print"]:
        notes.append(
            "timers: DeepSpeed prints the throughput every steps_per_print steps, and the file does not set it"
        )
