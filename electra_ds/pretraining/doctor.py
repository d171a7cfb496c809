"""Check whether this machine can pretrain: findings about its software and hardware, their consequences, and fixes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from electra_ds.config.cards import Hardware, abilities, detect_hardware, unused, without_code
from electra_ds.config.monitors import wandb_login
from electra_ds.core.errors import ElectraError

_OPTIONAL = ("wandb", "tensorboard")
_CHECKPOINTS_BYTES = 2**30  # assumed: three checkpoints of the largest shipped recipe and some text


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only the state `wrong` means that pretraining cannot run."""

    what: str
    found: str
    state: Literal["fine", "note", "wrong"] = "fine"
    meaning: str = ""
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The findings about this machine."""

    can_pretrain: bool
    findings: list[Finding]
    hardware: Hardware


def doctor() -> Diagnosis:
    """Check the packages, the machine and its GPUs, and try a step in each precision."""
    hardware = detect_hardware(_imported("torch"))
    findings = [*check_packages(), *_check_machine(hardware), *check_gpus(hardware), *_check_steps(hardware)]
    return Diagnosis(not any(finding.state == "wrong" for finding in findings), findings, hardware)


def check_packages() -> list[Finding]:
    """Compare the installed packages with the requirements of electra_ds and of its extra `tensorboard`."""
    own = _version("electra_ds")
    if own is None:
        fix = "pip install -e ."
        return [Finding("electra_ds", "not installed", "note", "versions cannot be compared", fix)]
    wanted = map(Requirement, importlib.metadata.requires("electra_ds") or [])
    findings = [
        check_package(item.name, _version(item.name), item.specifier)
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": "tensorboard"})
    ]
    return [Finding("electra_ds", own), *findings]


def check_package(name: str, version: str | None, wanted: SpecifierSet) -> Finding:
    """Return the finding for one package. version: None if it is not installed."""
    if version is not None and wanted.contains(version, prereleases=True):
        return Finding(name, version)
    state: Literal["note", "wrong"] = "note" if name in _OPTIONAL else "wrong"
    meaning = f"only --{name} needs it" if name in _OPTIONAL else "pretraining needs it"
    if version is not None:
        meaning = f"{wanted} is needed"
    return Finding(name, version or "not installed", state, meaning, f"pip install '{name}{wanted}'")


def _check_machine(hardware: Hardware) -> list[Finding]:
    free = shutil.disk_usage(".").free
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    launchers = [name for name in ("torchrun", "deepspeed", "srun") if shutil.which(name, path=path)]
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    full = Finding("disk", f"{free / 1e9:,.1f} GB free here", "note", "checkpoints may not fit; use another --run-dir")
    return [
        Finding("Python", platform.python_version()),
        Finding("torch's CUDA", hardware.cuda or "none (a CPU build)", meaning=" ".join(hardware.architectures)),
        Finding("CPU", f"{cores} cores, {memory / 1e9:,.0f} GB"),
        full if free < _CHECKPOINTS_BYTES else Finding("disk", full.found),
        Finding("launchers", ", ".join(launchers) or "none on the PATH"),
        _check_wandb(),
    ]


def _check_wandb() -> Finding:
    try:
        is_logged_in = wandb_login()
    except (ImportError, ElectraError) as error:
        return Finding("wandb account", "cannot be read", "note", str(error).splitlines()[0])
    if is_logged_in:
        return Finding("wandb account", "logged in")
    return Finding("wandb account", "not logged in", "note", "--wandb offline needs no account", "wandb login")


def check_gpus(hardware: Hardware) -> list[Finding]:
    """Return a finding for each GPU that torch sees, or one for the GPUs that it cannot use."""
    findings = []
    for index, gpu in enumerate(hardware.gpus):
        problem = without_code(gpu, hardware)
        if problem is None:
            findings.append(Finding(f"GPU {index}", str(gpu), meaning=abilities(gpu)))
        else:
            state: Literal["note", "wrong"] = "note" if index else "wrong"  # a single process uses the first GPU
            findings.append(Finding(f"GPU {index}", problem.found, state, problem.meaning, problem.fix))
    if not findings and (problem := unused(hardware)):
        findings.append(Finding("GPU", problem.found, "note", problem.meaning, problem.fix))
    names = ", ".join(gpu.name for gpu in hardware.driver_gpus)
    return findings or [Finding("GPU", names or "none", meaning="training runs on the CPU")]


def _check_steps(hardware: Hardware) -> list[Finding]:
    if any(without_code(gpu, hardware) for gpu in hardware.gpus[:1]):
        return []  # every step would fail, for a reason that is already in the report
    try:  # torch or DeepSpeed may be missing or broken
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars, which --json must not contain
            return importlib.import_module("electra_ds.pretraining.self_test").try_precisions()
    except Exception as error:
        return [failed_step("fp32", error)]


def failed_step(precision: str, error: object) -> Finding:
    """Return the finding for a step that failed. Pretraining cannot run if fp32 fails."""
    state: Literal["note", "wrong"] = "wrong" if precision == "fp32" else "note"
    what = f"{type(error).__name__}: {error}".strip() if isinstance(error, Exception) else str(error)
    return Finding(f"a step in {precision}", "fails", state, what.splitlines()[0])


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: one of its shared libraries cannot be loaded
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
