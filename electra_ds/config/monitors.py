"""DeepSpeed's monitor sections: `tensorboard`, `wandb` and `csv_monitor`, with DeepSpeed's own field names.

The sections enable this package's trackers. They are not passed to `deepspeed.initialize`, since DeepSpeed's monitors
would only see the learning rate and the loss scale.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, fields
from typing import Any

from electra_ds.core.errors import ConfigError, did_you_mean

WANDB_MODES = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "off",
}  # fmt: skip
"""The value of `--wandb` for each value of WANDB_MODE."""
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor")


@dataclass(frozen=True)
class FolderMonitor:
    """An enabled `tensorboard` or `csv_monitor` section; it writes into output_path/job_name."""

    output_path: str = ""
    job_name: str = ""


@dataclass(frozen=True)
class WandbMonitor:
    """An enabled `wandb` section."""

    project: str | None = None
    team: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Monitors:
    """The enabled sections; None for one that is absent or off."""

    tensorboard: FolderMonitor | None = None
    wandb: WandbMonitor | None = None
    csv_monitor: FolderMonitor | None = None


def wandb_mode_of_environment() -> str | None:
    """Return the value of `--wandb` that the variable WANDB_MODE stands for; None if it is unset or unknown."""
    return WANDB_MODES.get(os.environ.get("WANDB_MODE", "").strip().lower())


def overruled_wandb_mode(mode: str) -> str | None:
    """Return a note if WANDB_MODE differs from the run's mode, else None."""
    if wandb_mode_of_environment() in (None, mode):
        return None
    whose = "given here, recorded by the run or its default" if mode == "off" else "given here or recorded by the run"
    return f"--wandb {mode}, {whose}, overrides WANDB_MODE={os.environ['WANDB_MODE']}"


def wandb_module() -> Any:
    """Return the package wandb."""
    return importlib.import_module("wandb")  # takes half a second, so only when wandb is used


def wandb_login() -> bool:
    """Return whether wandb finds credentials in the environment, netrc or its settings, without input or network.

    Raises ConfigError if its settings or credentials are invalid.
    """
    wandb = wandb_module()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    except ValueError as error:
        raise ConfigError(
            f"wandb cannot read its settings, such as the variable WANDB_MODE: {error}\nCorrect or unset the variable, "
            f"or train without wandb: --wandb off."
        ) from error
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(f"wandb's credentials cannot be used: {error} Log in again with: wandb login") from error


def parse_monitors(values: dict[str, Any], problems: list[str]) -> Monitors:
    """Return the monitors of a raw DeepSpeed JSON. Errors are added to `problems`."""
    return Monitors(
        tensorboard=_section("tensorboard", FolderMonitor, values, problems),
        wandb=_section("wandb", WandbMonitor, values, problems),
        csv_monitor=_section("csv_monitor", FolderMonitor, values, problems),
    )


def _section(name: str, kind: type, values: dict[str, Any], problems: list[str]) -> Any:
    section = values.get(name, {})
    if not isinstance(section, dict):
        problems.append(f'{name}: must be an object such as {{"enabled": true}}')
        return None
    known = [field.name for field in fields(kind)]
    given = {key: value for key, value in section.items() if value != "auto"}
    enabled = given.pop("enabled", False)
    if not isinstance(enabled, bool):
        problems.append(f"{name}.enabled: {enabled!r} is not true or false")
    for key, value in given.items():
        if key not in known:
            problems.append(f"{name}.{key}: unknown key{did_you_mean(key, ('enabled', *known))}")
        elif not isinstance(value, str) and not (value is None and key in ("team", "group")):
            problems.append(f"{name}.{key}: {value!r} is not of type string")
    return kind(**{key: given[key] for key in known if key in given}) if enabled is True else None
