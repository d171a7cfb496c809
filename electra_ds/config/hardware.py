"""The GPUs of this machine, and whether the installed torch can use them.

Nothing here imports torch: `electra-ds doctor` must also speak where it is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from packaging.version import Version

from electra_ds.config.cards import DEFAULT_TORCH_CAPABILITY, find_card, lacks, slow_fp16_note
from electra_ds.core.errors import ConfigError

Capability = tuple[int, int]
_CUDA_126 = "https://download.pytorch.org/whl/cu126"
# Of torch's builds only those for CUDA 12.6 have code for Maxwell, Pascal and Volta, and none for what is older. 2.14
# is the last release with such builds, which end at Hopper.
_OLDEST = (5, 0)
_BEYOND_CUDA_126 = (10, 0)
_LAST_WITH_CUDA_126 = Version("2.14.0")
# The oldest driver, by the CUDA that torch was built for (NVIDIA, "CUDA Compatibility", minor version compatibility).
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    """A card that torch sees."""

    name: str
    memory_bytes: int
    capability: Capability

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory_bytes / 2**30:.1f} GiB, compute capability {major}.{minor}"


@dataclass(frozen=True)
class DriverGpu:
    """A card that NVIDIA's driver tells."""

    name: str
    capability: Capability | None
    """None where an old driver does not tell it and the card is not known."""
    driver: str


@dataclass(frozen=True)
class Hardware:
    """The GPUs, and the torch that is to use them."""

    torch: str | None
    """Version with its build, such as 2.13.0+cu130; None where it is missing."""
    cuda: str | None
    """CUDA version that torch was built for."""
    architectures: tuple[str, ...]
    """Those that torch has code for, such as sm_60."""
    gpus: tuple[Gpu, ...]
    driver_gpus: tuple[DriverGpu, ...] = ()
    """Asked for only where torch sees no GPU."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES, None where it is not set."""


class Problem(NamedTuple):
    """What keeps torch from using GPUs, and the command that fixes it."""

    found: str
    meaning: str
    mend: str


def look(torch: Any) -> Hardware:
    """The hardware of this machine. torch: the module, or None where it is missing."""
    cuda = torch is not None and torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if cuda else []
    return Hardware(
        torch=None if torch is None else str(torch.__version__),
        cuda=None if torch is None else torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if cuda else (),
        gpus=tuple(Gpu(item.name, item.total_memory, (item.major, item.minor)) for item in devices),
        driver_gpus=() if devices else driver_gpus(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def without_code(gpu: Gpu, hardware: Hardware) -> Problem | None:
    """The problem of a card for which torch was not compiled, where every kernel fails with "no kernel image"."""
    architectures = hardware.architectures
    if not any(map(_ARCHITECTURE.fullmatch, architectures)):
        return None  # a build for other makers' cards, or one that does not tell
    if has_code_for(gpu.capability, architectures):
        return None
    compiled = ", ".join(architectures)
    meaning = f"torch {hardware.torch} has no code for it (only for {compiled}), so every step on it would fail"
    if gpu.capability < _OLDEST:
        meaning += "; no newer torch has, which leaves the CPU"
        return Problem(str(gpu), meaning, "export CUDA_VISIBLE_DEVICES=")
    if gpu.capability < DEFAULT_TORCH_CAPABILITY:
        return Problem(str(gpu), meaning, _install_cuda_126(hardware))
    # Forced, since pip takes 2.13.0+cu126 for as good as 2.13.0.
    return Problem(str(gpu), meaning, "pip install --upgrade --force-reinstall torch")


def unused(hardware: Hardware) -> Problem | None:
    """Why torch sees none of the cards that NVIDIA's driver tells; None where it tells none that torch could use."""
    cards = [gpu for gpu in hardware.driver_gpus if gpu.capability is None or gpu.capability >= _OLDEST]
    if hardware.gpus or not cards:
        return None
    found = ", ".join(dict.fromkeys(gpu.name for gpu in cards))
    if hardware.torch is None:
        return Problem(found, "cannot be used: torch is not installed", _install(hardware))
    if hardware.cuda is None:
        return Problem(found, f"cannot be used: torch {hardware.torch} is a build without CUDA", _install(hardware))
    if _hides(hardware.visible_devices, len(hardware.driver_gpus)):
        meaning = f'cannot be used: CUDA_VISIBLE_DEVICES, which is "{hardware.visible_devices}", hides it'
        return Problem(found, meaning, "unset CUDA_VISIBLE_DEVICES")
    driver, needed = hardware.driver_gpus[0].driver, _OLDEST_DRIVER.get(_major(hardware.cuda), 0)
    if _major(driver) < needed:
        meaning = f"cannot be used: its driver {driver} is too old for torch {hardware.torch}, which needs {needed}"
        if _major(driver) >= _OLDEST_DRIVER[12] and _takes_cuda_126(hardware):
            return Problem(found, meaning, _install_cuda_126(hardware))
        return Problem(found, meaning, "install a newer driver from https://www.nvidia.com/drivers")
    meaning = f"cannot be used: torch {hardware.torch} does not reach it; the command shows why"
    return Problem(found, meaning, "python -c 'import torch; torch.cuda.init()'")


def check_gpu(hardware: Hardware, index: int | None) -> None:
    """Raise ConfigError if torch has no code for a rank's GPU. index: among the visible ones, None on a CPU."""
    problem = None if index is None else without_code(hardware.gpus[index], hardware)
    if problem is not None:
        raise ConfigError(f"{problem.found}: {problem.meaning}. To fix it: {problem.mend}")


def cannot_use(hardware: Hardware) -> str:
    """`unused` in words without the last stop; empty where there is nothing to tell."""
    problem = unused(hardware)
    return "" if problem is None else f"{problem.found} {problem.meaning} (to fix it: {problem.mend})"


def notes_at_start(hardware: Hardware, index: int | None, precision: str) -> list[str]:
    """What a user should know of the device that a run takes; index as in `check_gpu`."""
    if index is None:
        why = cannot_use(hardware)
        return [f"{why}. Training runs on the CPU"] if why else []
    gpu = hardware.gpus[index]
    note = slow_fp16_note(gpu.name, precision)
    return [] if note is None else [note]


def abilities(gpu: Gpu) -> str:
    """What a card lacks and what follows from it, and the DeepSpeed JSON that ships for it."""
    missing = [f"no {lack.what}: {lack.consequence}" for lack in lacks(gpu.name, gpu.capability)]
    card = find_card(gpu.name)
    made_for_it = [card.ds_config] if card is not None and card.ds_config is not None else []
    told = missing or ["bf16, tensor cores, flash attention, torch.compile"]
    return "; ".join(told + [f"take --ds-config {name}" for name in made_for_it])


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def has_code_for(capability: Capability, architectures: Iterable[str]) -> bool:
    """Whether a build for these architectures runs on a card: machine code runs within its major version from its
    minor version on (so does sm_100f), PTX (compute_XY) on everything newer, and sm_90a on 9.0 alone."""
    for architecture in architectures:
        match = _ARCHITECTURE.fullmatch(architecture)
        if match is None:
            continue
        kind, target = match[1], (int(match[2]), int(match[3]))
        if match[4] == "a":
            runs = capability == target
        elif kind == "compute":
            runs = capability >= target
        else:
            runs = capability[0] == target[0] and capability >= target
        if runs:
            return True
    return False


def _install(hardware: Hardware) -> str:
    """The command for a build of torch that has code for the driver's cards and that the driver can run."""
    if _takes_cuda_126(hardware):
        return _install_cuda_126(hardware)
    version = "" if hardware.torch is None else f"=={Version(hardware.torch).base_version}"
    return f"pip install --force-reinstall torch{version}"


def _takes_cuda_126(hardware: Hardware) -> bool:
    """Whether the driver's cards need a build for CUDA 12.6, or can run it and their driver needs it."""
    capabilities = [gpu.capability for gpu in hardware.driver_gpus if gpu.capability is not None]
    if any(capability >= _BEYOND_CUDA_126 for capability in capabilities):
        return False
    only = any(_OLDEST <= capability < DEFAULT_TORCH_CAPABILITY for capability in capabilities)
    return only or _OLDEST_DRIVER[12] <= _major(hardware.driver_gpus[0].driver) < _OLDEST_DRIVER[13]


def _install_cuda_126(hardware: Hardware) -> str:
    # With its build, since pip takes an installed 2.13.0+cu130 for the 2.13.0 that is asked for.
    installed = _LAST_WITH_CUDA_126 if hardware.torch is None else Version(hardware.torch)
    version = min(Version(installed.base_version), _LAST_WITH_CUDA_126)
    return f"pip install torch=={version}+cu126 --index-url {_CUDA_126}"


def _hides(visible_devices: str | None, count: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU: CUDA reads it up to the first entry that names none."""
    if visible_devices is None:
        return False
    first = visible_devices.split(",")[0].strip()
    return not (first.startswith(("GPU-", "MIG-")) or (first.isdigit() and int(first) < count))


def _major(version: str) -> int:
    return int(version.split(".")[0])


def driver_gpus() -> tuple[DriverGpu, ...]:
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # old drivers do not know compute_cap
        try:
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError):
            break
        rows = map(_DRIVER_ROW.fullmatch, result.stdout.splitlines())
        return tuple(_driver_gpu(row) for row in rows if row is not None)
    return ()


_DRIVER_ROW = re.compile(r"(?P<name>.+?), (?P<driver>\d+(\.\d+)*)(, ((?P<major>\d+)\.(?P<minor>\d+)|.*))?")


def _driver_gpu(row: re.Match[str]) -> DriverGpu:
    if row["major"] is not None:
        return DriverGpu(row["name"], (int(row["major"]), int(row["minor"])), row["driver"])
    card = find_card(row["name"])
    return DriverGpu(row["name"], None if card is None else card.capability, row["driver"])
