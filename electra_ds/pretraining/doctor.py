"""Can this machine pretrain? What is here, what it means, and the command that fixes what is wrong.

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
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from electra_ds.config.hardware import Gpu, Hardware, abilities, look, unused, without_code
from electra_ds.config.monitors import wandb_login
from electra_ds.core.errors import ElectraError
from electra_ds.core.terminal import say_command

_SHOWN = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "tensorboard")
_ONLY_WHEN_ASKED_FOR = ("wandb", "tensorboard")
_ROOM_BYTES = 2**30  # assumed: three checkpoints of the largest shipped recipe and some text


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
    hardware: Hardware
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
    findings = diagnose(facts) + _trials(facts.hardware)
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
        hardware=look(torch),
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
    hardware = facts.hardware
    disk = f"{facts.disk_free_bytes / 1e9:,.0f} GB free here"
    return [
        Finding("electra_ds", facts.electra_ds)
        if facts.requirements
        else Finding("electra_ds", facts.electra_ds, "note", "versions cannot be compared", "pip install -e ."),
        _python(facts),
        *(_package(name, version, facts.requirements.get(name, "")) for name, version in facts.packages.items()),
        Finding("torch's CUDA", hardware.cuda or "none (a CPU build)", meaning=" ".join(hardware.architectures)),
        Finding("CPU", f"{facts.cpu_cores} cores, {facts.threads} threads, {facts.memory_bytes / 1e9:,.0f} GB"),
        Finding("disk", disk)
        if facts.disk_free_bytes >= _ROOM_BYTES
        else Finding("disk", disk, "note", "checkpoints may not fit; choose another place with --run-dir"),
        *_gpus(hardware),
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


def _gpus(hardware: Hardware) -> list[Finding]:
    if hardware.gpus:
        return [_gpu(index, gpu, hardware) for index, gpu in enumerate(hardware.gpus)]
    problem = unused(hardware)
    if problem is not None:
        return [Finding("GPU", problem.found, "note", problem.meaning, problem.mend)]
    names = ", ".join(gpu.name for gpu in hardware.driver_gpus)
    return [Finding("GPU", names or "none", meaning="training runs on the CPU")]


def _gpu(index: int, gpu: Gpu, hardware: Hardware) -> Finding:
    problem = without_code(gpu, hardware)
    if problem is None:
        return Finding(f"GPU {index}", str(gpu), meaning=abilities(gpu))
    state: Literal["note", "wrong"] = "note" if index else "wrong"  # a single process takes the first
    return Finding(f"GPU {index}", problem.found, state, problem.meaning, problem.mend)


def judge_trials(trials: list[tuple[str, str, str]]) -> list[Finding]:
    """(precision, result, reason) of each step that was tried. Without fp32 nothing can be trusted."""
    findings = []
    for precision, result, reason in trials:
        state: Literal["fine", "note", "wrong"] = "fine" if result == "works" else "note"
        if result == "fails" and precision == "fp32":
            state = "wrong"
        findings.append(Finding(f"a step in {precision}", result, state, reason))
    return findings


def _trials(hardware: Hardware) -> list[Finding]:
    if any(without_code(gpu, hardware) for gpu in hardware.gpus[:1]):
        return []  # they would run on that card, and why they fail is told already
    try:  # torch or DeepSpeed may be missing or broken, which is what a doctor is asked about
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars, which --json must not hold
            trials = importlib.import_module("electra_ds.pretraining.self_test").try_precisions()
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
            say_command(console, f"To fix {finding.what}:", finding.mend)
    status = "[green]Pretraining can run here.[/]" if can_pretrain else "[red]Pretraining cannot run here yet.[/]"
    console.print(status, highlight=False)


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


def _login() -> bool | None:
    try:
        return wandb_login()
    except (ImportError, ElectraError):
        return None
