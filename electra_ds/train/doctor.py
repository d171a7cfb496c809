"""Can this machine pretrain? What is here, what it means, and the command that mends what is wrong.

`gather` looks at the machine; `diagnose` and `judge_trials` turn facts into findings and know no machine.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from electra_ds.config.cards import TRITON_CAPABILITY
from electra_ds.errors import ElectraError
from electra_ds.train.trackers import wandb_login

_SHOWN = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "tensorboard")
_ONLY_WHEN_ASKED_FOR = ("wandb", "tensorboard")
_CUDA_126 = "https://download.pytorch.org/whl/cu126"
_ROOM_BYTES = 2**30  # assumed: three checkpoints of the largest shipped recipe and some text


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What there is to know about a machine."""

    electra_ds: str
    python: str
    requires_python: str
    packages: dict[str, str | None]
    """Installed version by name, None where it is missing."""
    requirements: dict[str, str]
    """Version specifier by name, as pyproject.toml asks; empty where electra_ds itself is not installed."""
    cuda: str | None
    """CUDA version that torch was built for."""
    architectures: tuple[str, ...]
    """Those that torch has code for, such as sm_61."""
    gpus: tuple[Gpu, ...]
    driver_gpus: tuple[str, ...]
    """Names that NVIDIA's driver tells, whether torch sees them or not."""
    cpu_cores: int
    threads: int | None
    memory_bytes: int
    disk_free_bytes: int
    backends: tuple[str, ...]
    launchers: tuple[str, ...]
    wandb_login: bool | None
    """None where it cannot be told."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only `wrong` keeps pretraining from running."""

    what: str
    found: str
    state: Literal["fine", "note", "wrong"] = "fine"
    meaning: str = ""
    mend: str | None = None


def doctor(console: Console, *, as_json: bool) -> int:
    """Print the report; returns the exit status: 0 where pretraining can run here."""
    facts = gather()
    findings = diagnose(facts) + _trials()
    can_pretrain = not any(finding.state == "wrong" for finding in findings)
    if as_json:
        report = {"can_pretrain": can_pretrain, "findings": list(map(asdict, findings)), "facts": asdict(facts)}
        console.print(json.dumps(report, indent=2), highlight=False, markup=False, soft_wrap=True)
    else:
        _print(findings, can_pretrain, console)
    return 0 if can_pretrain else 1


def gather() -> Facts:
    """The facts of this machine. What cannot be imported is missing, not an error."""
    torch = _imported("torch")
    cuda = torch is not None and torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if cuda else []
    distributed = torch.distributed if torch is not None and torch.distributed.is_available() else None
    backends = ("gloo", "nccl") if distributed is not None else ()
    try:
        requires_python = importlib.metadata.metadata("electra_ds")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        requires_python = ""
    requirements = _requirements()
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    return Facts(
        electra_ds=_version("electra_ds") or "not installed",
        python=platform.python_version(),
        requires_python=requires_python,
        packages={name: _version(name) for name in dict.fromkeys((*_SHOWN, *requirements))},
        requirements=requirements,
        cuda=torch.version.cuda if torch is not None else None,
        architectures=tuple(torch.cuda.get_arch_list()) if cuda else (),
        gpus=tuple(Gpu(item.name, item.total_memory, (item.major, item.minor)) for item in devices),
        driver_gpus=_driver_gpus(),
        cpu_cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads() if torch is not None else None,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free_bytes=shutil.disk_usage(".").free,
        backends=tuple(name for name in backends if getattr(distributed, f"is_{name}_available")()),
        launchers=tuple(name for name in ("torchrun", "deepspeed", "srun") if shutil.which(name, path=path)),
        wandb_login=_login(),
    )


def diagnose(facts: Facts) -> list[Finding]:
    """What the facts mean for pretraining."""
    disk = f"{facts.disk_free_bytes / 1e9:,.0f} GB free here"
    return [
        Finding("electra_ds", facts.electra_ds)
        if facts.requirements
        else Finding("electra_ds", facts.electra_ds, "note", "versions cannot be compared", "pip install -e ."),
        _python(facts),
        *(_package(name, version, facts.requirements.get(name, "")) for name, version in facts.packages.items()),
        Finding("torch's CUDA", facts.cuda or "none (a CPU build)", meaning=" ".join(facts.architectures)),
        Finding("CPU", f"{facts.cpu_cores} cores, {facts.threads} threads, {facts.memory_bytes / 1e9:,.0f} GB"),
        Finding("disk", disk)
        if facts.disk_free_bytes >= _ROOM_BYTES
        else Finding("disk", disk, "note", "checkpoints may not fit; choose another place with --run-dir"),
        *_gpus(facts),
        Finding("collectives", ", ".join(facts.backends) or "none", "fine" if facts.backends else "wrong"),
        Finding("launchers", ", ".join(facts.launchers) or "none on the PATH"),
        _wandb(facts),
    ]


def _python(facts: Facts) -> Finding:
    if facts.python in SpecifierSet(facts.requires_python):
        return Finding("Python", facts.python)
    return Finding("Python", facts.python, "wrong", f"{facts.requires_python} is needed", "python3.11 -m venv .venv")


def _package(name: str, version: str | None, specifier: str) -> Finding:
    mend = f"pip install '{name}{specifier}'" if specifier else f"pip install {name}"
    state: Literal["note", "wrong"] = "note" if name in _ONLY_WHEN_ASKED_FOR else "wrong"
    if version is None:
        meaning = f"needed for --{name} only" if state == "note" else "pretraining needs it"
        return Finding(name, "not installed", state, meaning, mend)
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Finding(name, version, state, f"{specifier} is needed", mend)
    return Finding(name, version)


def _wandb(facts: Facts) -> Finding:
    if facts.wandb_login:
        return Finding("wandb account", "logged in")
    if facts.packages.get("wandb") is None:
        return Finding("wandb account", "wandb is not installed", "note")
    return Finding("wandb account", "not logged in", "note", "--wandb offline works without", "wandb login")


def _gpus(facts: Facts) -> list[Finding]:
    if facts.gpus:
        return [_gpu(index, gpu, facts) for index, gpu in enumerate(facts.gpus)]
    if not facts.driver_gpus:
        return [Finding("GPU", "none", meaning="training runs on the CPU; take --ds-config cpu")]
    if facts.cuda is None:
        mend = f"pip install --force-reinstall torch=={_public(facts)}"
        return [Finding("GPU", ", ".join(facts.driver_gpus), "note", "torch is a CPU build and cannot use it", mend)]
    meaning = f"torch's CUDA {facts.cuda} cannot use it: the driver may be too old, or CUDA_VISIBLE_DEVICES hides it"
    return [Finding("GPU", ", ".join(facts.driver_gpus), "note", meaning, "nvidia-smi")]


def _gpu(index: int, gpu: Gpu, facts: Facts) -> Finding:
    major, minor = gpu.capability
    found = f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, compute capability {major}.{minor}"
    if not has_code_for(gpu.capability, facts.architectures):
        meaning = f"torch has no code for it (it has {' '.join(facts.architectures)}), and every step on it would fail"
        if (5, 0) <= gpu.capability < (7, 5):  # the builds for CUDA 12.6 are the last for Maxwell, Pascal and Volta
            mend = f"pip install torch=={_public(facts)} --index-url {_CUDA_126}"
        else:
            mend = "pip install --upgrade torch" if gpu.capability >= (7, 5) else "export CUDA_VISIBLE_DEVICES="
        return Finding(f"GPU {index}", found, "wrong", meaning, mend)
    has_tensor_cores = gpu.capability >= (7, 0) and "GTX 16" not in gpu.name  # Turing's smaller chips have none
    bf16 = "bf16 in hardware" if gpu.capability >= (8, 0) else "no bf16 in hardware: take fp16 or fp32"
    fp16 = "fp16 on tensor cores" if has_tensor_cores else "no tensor cores: fp16 saves memory, hardly time"
    compiles = "torch.compile" if gpu.capability >= TRITON_CAPABILITY else "no torch.compile (Triton needs 7.0)"
    return Finding(f"GPU {index}", found, meaning=f"{bf16}; {fp16}; {compiles}")


def has_code_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a build for these architectures runs on a card: machine code runs within its major version from its
    minor version on, PTX (compute_XY) on everything newer, and sm_90a on 9.0 alone."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, target = match[1], (int(match[2]), int(match[3]))
        if match[4]:
            runs = capability == target
        elif kind == "compute":
            runs = capability >= target
        else:
            runs = capability[0] == target[0] and capability >= target
        if runs:
            return True
    return False


def judge_trials(trials: list[tuple[str, str, str]]) -> list[Finding]:
    """(precision, result, reason) of each step that was tried. Without fp32 nothing can be trusted."""
    findings = []
    for precision, result, reason in trials:
        state: Literal["fine", "note", "wrong"] = "fine"
        if result == "fails":
            state = "wrong" if precision == "fp32" else "note"
        findings.append(Finding(f"a step in {precision}", result, state, reason))
    return findings


def _trials() -> list[Finding]:
    try:  # torch or DeepSpeed may be missing or broken, which is what a doctor is asked about
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars, which --json must not hold
            trials = importlib.import_module("electra_ds.train.trial").try_precisions()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return judge_trials([("fp32", "fails", reason)])
    return judge_trials([(trial.precision, trial.result, trial.reason) for trial in trials])


def _print(findings: list[Finding], can_pretrain: bool, console: Console) -> None:
    signs = {"fine": Text("✓", "green"), "note": Text("–", "yellow"), "wrong": Text("✗", "red")}
    table = Table(show_header=False, box=None, padding=(0, 1))
    for finding in findings:
        text = finding.found + (f"  ({finding.meaning})" if finding.meaning else "")
        table.add_row(signs[finding.state], finding.what, Text(text))
    console.print(table, highlight=False)
    console.print()
    for finding in findings:
        if finding.mend is not None:
            console.print(f"To mend {finding.what}: {finding.mend}", highlight=False, markup=False, soft_wrap=True)
    verdict = "[green]Pretraining can run here.[/]" if can_pretrain else "[red]Pretraining cannot run here yet.[/]"
    console.print(verdict, highlight=False)


def _public(facts: Facts) -> str:
    """torch's version without the build: 2.13.0 of 2.13.0+cpu."""
    return (facts.packages.get("torch") or "").split("+")[0]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library of it does not load
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    try:
        return wanted_versions(importlib.metadata.requires("electra_ds") or [])
    except importlib.metadata.PackageNotFoundError:
        return {}


def wanted_versions(requirements: list[str]) -> dict[str, str]:
    """Specifier by name of what everyone needs and what the extra `tensorboard` adds, from a package's metadata."""
    wanted = map(Requirement, requirements)
    return {
        item.name: str(item.specifier)
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": "tensorboard"})
    }


def _driver_gpus() -> tuple[str, ...]:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in result.stdout.splitlines() if line.strip())


def _login() -> bool | None:
    try:
        return wandb_login()
    except (ImportError, ElectraError):
        return None
