"""DeepSpeed's monitor sections: `tensorboard`, `wandb` and `csv_monitor`, with DeepSpeed's own field names.

They switch on this project's writers. DeepSpeed's monitors would see the learning rate and the loss scale alone, so
the sections are not handed on to `deepspeed.initialize`.
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
"""What the values of WANDB_MODE mean for `--wandb`."""
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor")


@dataclass(frozen=True)
class FolderMonitor:
    """A `tensorboard` or `csv_monitor` section that is enabled; it writes into output_path/job_name."""

    output_path: str = ""
    job_name: str = ""


@dataclass(frozen=True)
class WandbMonitor:
    """A `wandb` section that is enabled."""

    project: str | None = None
    team: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Monitors:
    """The sections that are enabled; None where one is absent or off."""

    tensorboard: FolderMonitor | None = None
    wandb: WandbMonitor | None = None
    csv_monitor: FolderMonitor | None = None


def wandb_mode_of_environment() -> str | None:
    """Return the `--wandb` that wandb's own variable WANDB_MODE asks for, None where it is not set or is unknown."""
    return WANDB_MODES.get(os.environ.get("WANDB_MODE", "").strip().lower())


def overruled_wandb_mode(mode: str) -> str | None:
    """Return a note if WANDB_MODE asks for a mode other than the run's, else None."""
    if wandb_mode_of_environment() in (None, mode):
        return None
    whose = "given here, recorded by the run or its default" if mode == "off" else "given here or recorded by the run"
    return f"--wandb {mode}, {whose}, wins over WANDB_MODE={os.environ['WANDB_MODE']}"


def wandb_module() -> Any:
    """Return the package wandb."""
    return importlib.import_module("wandb")  # half a second's import, for those who asked for it


def wandb_login() -> bool:
    """Return whether wandb has credentials, by its own rules: environment, netrc, settings.

    It needs no input and no network. Raises ConfigError if there are some that cannot be right.
    """
    wandb = wandb_module()
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
    except ValueError as error:
        raise ConfigError(
            f"wandb cannot read its settings, such as the variable WANDB_MODE: {error}\nCorrect or unset the variable, "
            f"or train without wandb by --wandb off."
        ) from error
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(f"wandb's credentials cannot be used: {error} Log in anew with: wandb login") from error


def parse_monitors(values: dict[str, Any], problems: list[str]) -> Monitors:
    """The monitors of a raw DeepSpeed JSON. What is wrong is added to `problems`."""
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
        elif isinstance(value, str) and "\0" in value:
            problems.append(f"{name}.{key}: {value!r} holds a NUL")
    return kind(**{key: given[key] for key in known if key in given}) if enabled is True else None
