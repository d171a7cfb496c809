"""The GPUs of this machine, and whether the installed torch can use them.

This module does not import torch: `electra-ds doctor` must also run where torch is missing.
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
# Of torch's builds only those for CUDA 12.6 have code for Maxwell, Pascal and Volta, and none for older cards. 2.14 is
# the last release with such a build.
_OLDEST = (5, 0)
_CUDA_126 = "https://download.pytorch.org/whl/cu126"
_LAST_WITH_CUDA_126 = Version("2.14.0")
_NOTHING_VISIBLE = "No CUDA GPUs are available"  # torch's words
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
_DRIVER_ROW = re.compile(r"(?P<name>.+?)(, ((?P<major>\d+)\.(?P<minor>\d+)|\[.*))?")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    memory_bytes: int
    capability: Capability

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory_bytes / 2**30:.1f} GiB, compute capability {major}.{minor}"


class DriverGpu(NamedTuple):
    """A GPU that NVIDIA's driver lists."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a machine and its installation of torch."""

    torch: str | None
    """Version with its build, such as 2.13.0+cu130; None if torch is missing."""
    cuda: str | None
    """CUDA version that torch was built for."""
    architectures: tuple[str, ...]
    """Architectures that torch has code for, such as sm_60."""
    gpus: tuple[Gpu, ...]
    driver_gpus: tuple[DriverGpu, ...] = ()
    """Asked for only if torch sees no GPU."""
    error: str = ""
    """The message with which torch refuses the driver's GPUs, such as that their driver is too old."""


class Problem(NamedTuple):
    """The reason why torch cannot use a GPU, and the command that fixes it."""

    found: str
    meaning: str
    fix: str


def look(torch: Any) -> Hardware:
    """Return the hardware of this machine. torch: the module, or None if it is missing."""
    has_gpu = torch is not None and torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if has_gpu else []
    from_driver = () if devices else driver_gpus()
    return Hardware(
        torch=None if torch is None else str(torch.__version__),
        cuda=None if torch is None else torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if has_gpu else (),
        gpus=tuple(Gpu(item.name, item.total_memory, (item.major, item.minor)) for item in devices),
        driver_gpus=from_driver,
        error=_error_of(torch) if from_driver and torch is not None and torch.version.cuda else "",
    )


def _error_of(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().rstrip(".") or type(error).__name__
    return ""


def driver_gpus() -> tuple[DriverGpu, ...]:
    """Return the GPUs that nvidia-smi lists; none without it. GPUs of unknown compute capability are left out."""
    for fields in ("name,compute_cap", "name"):  # old drivers do not know compute_cap
        try:
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError):
            break
        return tuple(gpu for line in result.stdout.splitlines() if (gpu := _driver_gpu(line)) is not None)
    return ()


def _driver_gpu(line: str) -> DriverGpu | None:
    row = _DRIVER_ROW.fullmatch(line)
    if row is None:
        return None
    if row["major"] is not None:
        return DriverGpu(row["name"], (int(row["major"]), int(row["minor"])))
    card = find_card(row["name"])
    return None if card is None else DriverGpu(row["name"], card.capability)


def without_code(gpu: Gpu, hardware: Hardware) -> Problem | None:
    """Return the problem of a GPU that torch was not compiled for, on which every kernel would fail, else None."""
    architectures = hardware.architectures
    if not any(map(_ARCHITECTURE.fullmatch, architectures)):
        return None  # a build for GPUs of other makers
    if has_code_for(gpu.capability, architectures):
        return None
    compiled = ", ".join(architectures)
    meaning = f"torch {hardware.torch} has no code for it (only for {compiled}), so every step on it would fail"
    if gpu.capability < _OLDEST:
        meaning += ", and so does every newer torch. Train on the CPU"
        return Problem(str(gpu), meaning, "export CUDA_VISIBLE_DEVICES=")
    if gpu.capability < DEFAULT_TORCH_CAPABILITY:
        return Problem(str(gpu), meaning, _install([gpu.capability], hardware))
    # Forced, because pip treats 2.13.0+cu126 as 2.13.0.
    return Problem(str(gpu), meaning, "pip install --upgrade --force-reinstall torch")


def has_code_for(capability: Capability, architectures: Iterable[str]) -> bool:
    """Return whether a build of torch for these architectures runs on a GPU.

    Machine code (sm_XY, sm_XYf) runs within its major version from its minor version on, PTX (compute_XY) on
    everything newer, and sm_90a only on 9.0.
    """
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


def unused(hardware: Hardware) -> Problem | None:
    """Return why torch sees none of the GPUs that NVIDIA's driver lists; None if it lists none that torch could use."""
    gpus = [gpu for gpu in hardware.driver_gpus if gpu.capability >= _OLDEST]
    if hardware.gpus or not gpus:
        return None
    found = ", ".join(dict.fromkeys(gpu.name for gpu in gpus))
    install = _install([gpu.capability for gpu in gpus], hardware)
    if hardware.torch is None:
        return Problem(found, "cannot be used: torch is not installed", install)
    if hardware.cuda is None:
        return Problem(found, f"cannot be used: torch {hardware.torch} is a build without CUDA", install)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and hardware.error.startswith(_NOTHING_VISIBLE):
        meaning = f'cannot be used: CUDA_VISIBLE_DEVICES, which is "{visible}", hides it'
        return Problem(found, meaning, "unset CUDA_VISIBLE_DEVICES")
    meaning = f"cannot be used: torch {hardware.torch} reports: {hardware.error or 'no GPU'}"
    return Problem(found, meaning, "update NVIDIA's driver, or install a torch that it can run: https://pytorch.org")


def _install(capabilities: list[Capability], hardware: Hardware) -> str:
    """Return the command that installs a build of torch with code for GPUs of these compute capabilities."""
    installed = None if hardware.torch is None else Version(Version(hardware.torch).base_version)
    if min(capabilities) < DEFAULT_TORCH_CAPABILITY:
        version = min(installed or _LAST_WITH_CUDA_126, _LAST_WITH_CUDA_126)
        # With its build, because pip treats an installed 2.13.0+cu130 as 2.13.0.
        return f"pip install torch=={version}+cu126 --index-url {_CUDA_126}"
    return "pip install --force-reinstall torch" + ("" if installed is None else f"=={installed}")


def check_gpu(hardware: Hardware, index: int | None) -> None:
    """Raise ConfigError if torch has no code for a rank's GPU. index: among the visible GPUs, None on a CPU."""
    problem = None if index is None else without_code(hardware.gpus[index], hardware)
    if problem is not None:
        raise ConfigError(f"{problem.found}: {problem.meaning}. To fix it: {problem.fix}")


def cannot_use(hardware: Hardware) -> str:
    """Return the problem of `unused` as a sentence without its full stop; empty if there is none."""
    problem = unused(hardware)
    return "" if problem is None else f"{problem.found} {problem.meaning} (to fix it: {problem.fix})"


def notes_at_start(hardware: Hardware, index: int | None, precision: str) -> list[str]:
    """Return notes for the user on the device of a run. index: as in `check_gpu`."""
    if index is None:
        why = cannot_use(hardware)
        return [f"{why}. Training runs on the CPU"] if why else []
    note = slow_fp16_note(hardware.gpus[index].name, precision)
    return [] if note is None else [note]


def abilities(gpu: Gpu) -> str:
    """Return what a GPU lacks with the consequences, and the DeepSpeed JSON that is shipped for it."""
    missing = [f"no {lack.what}: {lack.consequence}" for lack in lacks(gpu.name, gpu.capability)]
    card = find_card(gpu.name)
    shipped = [f"take --ds-config {card.ds_config}"] if card is not None and card.ds_config is not None else []
    return "; ".join((missing or ["bf16, tensor cores, flash attention, torch.compile"]) + shipped)
