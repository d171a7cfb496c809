"""GPUs: manufacturers' figures (cards.csv), what each GPU can run, this machine's GPUs, and whether torch can use them.

This module does not import torch: `electra-ds doctor` must also run where torch is missing.
"""

from __future__ import annotations

import csv
import difflib
import importlib.resources
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from electra_ds.config.names import ds_config_names
from electra_ds.core.errors import ConfigError

Capability = tuple[int, int]
TRITON_CAPABILITY = (7, 0)
"""The lowest compute capability that Triton, and thus torch.compile, generates code for."""
BF16_CAPABILITY = (8, 0)
"""The lowest capability with bf16 products; torch emulates them on older GPUs, slower than fp32."""
FLASH_CAPABILITY = (8, 0)
"""The lowest capability for torch's flash attention (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
TENSOR_CORE_CAPABILITY = (7, 0)
DEFAULT_TORCH_CAPABILITY = (7, 5)
"""The lowest capability that torch's default builds have code for; older GPUs need the build for CUDA 12.6."""
_OLDEST = (5, 0)
"""The lowest capability that any current build of torch has code for."""
_DISPLAY_GIB = 0.8  # assumed, for a desktop, a browser and the driver
SHOWN_SHARE = 0.91  # of the memory as sold: the smallest known share, a T4's with error correction (14.6 to 14.7 GiB)
_IGNORED_WORDS = {"nvidia", "geforce", "tesla", "generation"}


@dataclass(frozen=True)
class Card:
    """A row of cards.csv, which gives the sources."""

    name: str
    """The name that `torch.cuda.get_device_name` returns. If two sizes share a name, the size is appended to the larger
    one's."""
    memory_gib: float
    """Advertised memory; the driver shows 1 to 9 % less."""
    capability: Capability
    fp32_tflops: float
    """Rate of the CUDA cores, without TF32, which torch does not use by default."""
    fp16_tflops: float | None
    """Rate of the tensor cores; None if there are none, so that torch computes in fp32."""
    bandwidth_gb_s: float
    """Bandwidth of the card's memory, in 1e9 bytes/s."""
    has_display: bool
    """True if a monitor is usually connected, which takes some of the memory."""
    aliases: tuple[str, ...]
    """Other names, including the name of the DeepSpeed JSON made for the card."""

    @property
    def bf16_tflops(self) -> float | None:
        """The tensor cores' bf16 rate, which equals their fp16 rate; None if the card has no bf16."""
        return self.fp16_tflops if self.capability >= BF16_CAPABILITY else None

    @property
    def usable_gib(self) -> float:
        """The memory that a program can use, with a display connected."""
        return self.memory_gib - _DISPLAY_GIB if self.has_display else self.memory_gib * SHOWN_SHARE

    @property
    def ds_config(self) -> str | None:
        """The name of the shipped DeepSpeed JSON that was made for the card."""
        return next((alias for alias in self.aliases if alias in ds_config_names()), None)


def _read_cards() -> tuple[Card, ...]:
    text = (importlib.resources.files("electra_ds") / "config" / "cards.csv").read_text("utf8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        Card(
            row["name"],
            float(row["memory_gib"]),
            _capability(row["capability"]),
            float(row["fp32_tflops"]),
            float(row["fp16_tflops"]) if row["fp16_tflops"] else None,
            float(row["bandwidth_gb_s"]),
            row["has_display"] == "yes",
            tuple(filter(None, row["aliases"].split("|"))),
        )
        for row in rows
    )


def _capability(text: str) -> Capability:
    major, minor = text.split(".")
    return int(major), int(minor)


CARDS = _read_cards()


def find_card(device_name: str) -> Card | None:
    """Return the card with this name, or None. Case, separators and words such as NVIDIA and GeForce are ignored.

    Every other word must match, since "Ti", "SUPER" or "3GB" denotes a different card.
    """
    wanted = _words(device_name)
    return next((card for card in CARDS if wanted in map(_words, (card.name, *card.aliases))), None)


def cards_like(name: str) -> list[Card]:
    """Return up to five cards whose names contain this name, or else the cards with the most similar names."""
    words, squeezed = _words(name), _squeezed(name)
    by_name = {_squeezed(card.name): card for card in CARDS}
    found = [other for other, card in by_name.items() if words and (words <= _words(card.name) or squeezed in other)]
    return [by_name[other] for other in found[:5] or difflib.get_close_matches(squeezed, by_name, n=5)]


def _parts(name: str) -> list[str]:
    return [part for part in re.findall(r"[a-z]+|[0-9]+", name.lower()) if part not in _IGNORED_WORDS]


def _words(name: str) -> frozenset[str]:
    return frozenset(_parts(name))


def _squeezed(name: str) -> str:
    return "".join(_parts(name))


def peak_flops(card: Card, precision: str) -> float | None:
    """Return the peak FLOP/s of matrix products in a precision, named as in `Precision`; None if the card lacks it.

    Without tensor cores fp16 runs at the fp32 rate, because torch makes cuBLAS accumulate in fp32
    (aten/src/ATen/cuda/CUDABlas.cpp), and not at a P100's doubled rate or a GTX 1080 Ti's 1/64 rate.
    """
    tflops = {"fp32": card.fp32_tflops, "fp16": card.fp16_tflops or card.fp32_tflops, "bf16": card.bf16_tflops}
    rate = tflops[precision.removeprefix("autocast-")]
    return None if rate is None else rate * 1e12


def has_slow_fp16(name: str) -> bool:
    """Return whether fp16 products are slower than fp32 (pytorch#121957), as on Turing without tensor cores: GTX 16xx
    and its workstation and laptop variants."""
    return re.search(r"\b(GTX 16\d\d|T[456][05]0|T1[02]00|MX[45]50)\b", name) is not None


def slow_fp16_note(name: str, precision: str) -> str | None:
    """Return a note if the given precision is slow on a card, else None."""
    if not (has_slow_fp16(name) and precision in ("fp16", "autocast-fp16")):
        return None
    return f"fp16 is enabled on {name}, which has no tensor cores, so it is slower than fp32, as in cpu.json"


class Missing(NamedTuple):
    """A feature that a card lacks, and the consequence for training."""

    what: str
    consequence: str


def missing_features(name: str, capability: Capability) -> list[Missing]:
    """Return the features that a card lacks."""
    found = []
    if has_slow_fp16(name):
        found.append(
            Missing("tensor cores", 'fp16 is slower than fp32: use fp32, as in cpu.json, or "enabled": "auto"')
        )
    elif capability < TENSOR_CORE_CAPABILITY:
        found.append(Missing("tensor cores", "fp16 saves memory but little time: its products are computed in fp32"))
    if capability < BF16_CAPABILITY:
        found.append(Missing("bf16", "use fp16, which needs loss scaling, or fp32"))
    if capability < FLASH_CAPABILITY:
        found.append(Missing("flash attention", "the memory-efficient kernel replaces it: the same memory, but slower"))
    if capability < TRITON_CAPABILITY:
        found.append(Missing("torch.compile", "Triton needs 7.0, so the step runs uncompiled"))
    return found


# --- this machine


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
    """Queried only if torch sees no GPU."""
    error: str = ""
    """torch's error message about the driver's GPUs, such as that the driver is too old."""


class Problem(NamedTuple):
    """The reason why torch cannot use a GPU, and the command that fixes it."""

    found: str
    meaning: str
    fix: str


def detect_hardware(torch: Any) -> Hardware:
    """Return the hardware of this machine. torch: the module, or None if it is missing."""
    if torch is None:
        return Hardware(None, None, (), (), driver_gpus())
    if not torch.cuda.is_available():
        gpus = driver_gpus()
        error = _error_of(torch) if gpus and torch.version.cuda else ""
        return Hardware(str(torch.__version__), torch.version.cuda, (), (), gpus, error)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Hardware(
        str(torch.__version__),
        torch.version.cuda,
        tuple(torch.cuda.get_arch_list()),
        tuple(Gpu(item.name, item.total_memory, (item.major, item.minor)) for item in devices),
    )


def _error_of(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).strip().rstrip(".") or type(error).__name__
    return ""


def driver_gpus() -> tuple[DriverGpu, ...]:
    """Return the GPUs that nvidia-smi lists, or none without it. GPUs of unknown compute capability are left out."""
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
    name, _, capability = line.partition(", ")
    if re.fullmatch(r"\d+\.\d+", capability):
        return DriverGpu(name, _capability(capability))
    card = find_card(name)
    return None if card is None else DriverGpu(name, card.capability)


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)(a?)")


def without_code(gpu: Gpu, hardware: Hardware) -> Problem | None:
    """Return the problem of a GPU that torch was not compiled for, on which every kernel would fail, else None."""
    architectures = hardware.architectures
    if not any(map(_ARCHITECTURE.match, architectures)):
        return None  # a build for GPUs of other manufacturers
    if has_code_for(gpu.capability, architectures):
        return None
    compiled = ", ".join(architectures)
    meaning = f"torch {hardware.torch} has no code for it (only for {compiled}), so every step on it would fail"
    if gpu.capability < _OLDEST:
        meaning += ", and no newer torch has any. Train on the CPU"
        return Problem(str(gpu), meaning, "export CUDA_VISIBLE_DEVICES=")
    return Problem(str(gpu), meaning, _install([gpu.capability]))


def has_code_for(capability: Capability, architectures: Iterable[str]) -> bool:
    """Return whether a build of torch for these architectures runs on a GPU.

    Machine code (sm_XY) runs on the same major and an equal or higher minor version, PTX (compute_XY) also on
    everything newer, and code for one architecture alone (sm_XYa) on that one.
    """
    for match in filter(None, map(_ARCHITECTURE.match, architectures)):
        target = int(match[2]), int(match[3])
        if match[4]:
            if capability == target:
                return True
        elif capability >= target and (match[1] == "compute" or capability[0] == target[0]):
            return True
    return False


def unused(hardware: Hardware) -> Problem | None:
    """Return why torch sees none of the GPUs that NVIDIA's driver lists; None if none of them is usable by torch."""
    gpus = [gpu for gpu in hardware.driver_gpus if gpu.capability >= _OLDEST]
    if hardware.gpus or not gpus:
        return None
    found = ", ".join(dict.fromkeys(gpu.name for gpu in gpus))
    install = _install([gpu.capability for gpu in gpus])
    if hardware.torch is None:
        return Problem(found, "cannot be used: torch is not installed", install)
    if hardware.cuda is None:
        return Problem(found, f"cannot be used: torch {hardware.torch} is a build without CUDA", install)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and hardware.error.startswith("No CUDA GPUs are available"):  # torch's words
        meaning = f'cannot be used: CUDA_VISIBLE_DEVICES, which is "{visible}", hides it'
        return Problem(found, meaning, "unset CUDA_VISIBLE_DEVICES")
    meaning = f"cannot be used: torch {hardware.torch} reports: {hardware.error or 'no GPU'}"
    return Problem(found, meaning, "update NVIDIA's driver, or install a torch that it can run: https://pytorch.org")


def _install(capabilities: Iterable[Capability]) -> str:
    """Return the command that installs a build of torch with code for GPUs of these compute capabilities.

    It forces the reinstallation, because pip treats 2.13.0+cu130 as 2.13.0+cu126. Only torch's builds for CUDA 12.6
    have code for Maxwell, Pascal and Volta.
    """
    needs_cuda_126 = min(capabilities) < DEFAULT_TORCH_CAPABILITY
    index = " --index-url https://download.pytorch.org/whl/cu126" if needs_cuda_126 else ""
    return f"pip install --upgrade --force-reinstall torch{index}"


def check_gpu(hardware: Hardware, index: int | None) -> None:
    """Raise ConfigError if torch has no code for a rank's GPU. index: among the visible GPUs; None on a CPU."""
    problem = None if index is None else without_code(hardware.gpus[index], hardware)
    if problem is not None:
        raise ConfigError(f"{problem.found}: {problem.meaning}. To fix it: {problem.fix}")


def cannot_use(hardware: Hardware) -> str:
    """Return the result of `unused` as a sentence without a full stop; empty if there is no problem."""
    problem = unused(hardware)
    return "" if problem is None else f"{problem.found} {problem.meaning} (to fix it: {problem.fix})"


def notes_at_start(hardware: Hardware, index: int | None, precision: str) -> list[str]:
    """Return notes for the user about the run's device. index: as in `check_gpu`."""
    if index is None:
        why = cannot_use(hardware)
        return [f"{why}. Training runs on the CPU"] if why else []
    note = slow_fp16_note(hardware.gpus[index].name, precision)
    return [] if note is None else [note]


def abilities(gpu: Gpu) -> str:
    """Return the features that a GPU lacks, the consequences, and the DeepSpeed JSON shipped for it."""
    missing = [f"no {feature.what}: {feature.consequence}" for feature in missing_features(gpu.name, gpu.capability)]
    card = find_card(gpu.name)
    shipped = [f"use --ds-config {card.ds_config}"] if card is not None and card.ds_config is not None else []
    return "; ".join((missing or ["bf16, tensor cores, flash attention, torch.compile"]) + shipped)
