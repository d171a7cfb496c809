"""GPUs that are not here, as doctor reports them and as a run treats them when it starts."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from torch.torch_version import TorchVersion

from electra_ds.cli import main
from electra_ds.config import cards
from electra_ds.config.cards import CARDS, Gpu, abilities, detect_hardware, has_code_for, missing_features
from electra_ds.config.names import ds_config_names
from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.core.terminal import log_shown_on
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining import doctor, prepare
from electra_ds.pretraining.doctor import Finding, check_gpus
from electra_ds.training.prepare import plan_new
from tests.helpers import REPOSITORY, small_recipe

CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
NEWEST = "pip install --upgrade --force-reinstall torch"
NEWEST_126 = f"{NEWEST} --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Card:
    name: str
    memory_gib: float
    capability: tuple[int, int]


GTX_1060 = Card("NVIDIA GeForce GTX 1060 6GB", 5.9, (6, 1))
V100 = Card("Tesla V100-SXM2-16GB", 15.8, (7, 0))
RTX_2060 = Card("NVIDIA GeForce RTX 2060", 5.8, (7, 5))
GTX_1660_TI = Card("NVIDIA GeForce GTX 1660 Ti", 5.8, (7, 5))
RTX_3090 = Card("NVIDIA GeForce RTX 3090", 23.7, (8, 6))
H100 = Card("NVIDIA H100 80GB HBM3", 79.2, (9, 0))
RTX_5090 = Card("NVIDIA GeForce RTX 5090", 31.4, (12, 0))
K80 = Card("Tesla K80", 11.2, (3, 7))


class Machine:
    """Puts cards, a build of torch and a driver in place of this machine's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch = monkeypatch
        self._script = folder / "bin" / "nvidia-smi"
        self.asked = folder / "asked"
        self._script.parent.mkdir()
        monkeypatch.setenv("PATH", str(self._script.parent), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(cards, "ds_config_names", lambda: ["cpu", "gtx1060-6gb", "rtx3090-24gb"])
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        self.refuses("No CUDA GPUs are available")
        self.driver("exit 9")

    def torch(self, version: str, *cards: Card) -> None:
        """A build such as 2.13.0+cu130, and the cards that it sees."""
        build = version.partition("+")[2]
        of_build: dict[str, tuple[str | None, tuple[str, ...]]] = {
            "cu126": ("12.6", CUDA_126), "cu130": ("13.0", CUDA_130), "cpu": (None, ()),
            "rocm7.1": (None, ("gfx90a", "gfx942")),
        }  # fmt: skip
        cuda, architectures = of_build[build]
        fakes = {
            "is_available": lambda: bool(cards),
            "device_count": lambda: len(cards),
            "get_arch_list": lambda: list(architectures),
            "get_device_name": lambda device=0: cards[torch.device(device).index or 0].name,
            "get_device_capability": lambda device=0: cards[torch.device(device).index or 0].capability,
            "get_device_properties": lambda index: SimpleNamespace(
                name=cards[index].name, total_memory=int(cards[index].memory_gib * 2**30),
                major=cards[index].capability[0], minor=cards[index].capability[1],
            ),
        }  # fmt: skip
        for name, fake in fakes.items():
            self._patch.setattr(torch.cuda, name, fake)
        self._patch.setattr(torch.version, "cuda", cuda)
        self._patch.setattr(torch, "__version__", TorchVersion(version))

    def refuses(self, message: str) -> None:
        """Let torch.cuda.init fail with a message."""

        def fail() -> None:
            raise RuntimeError(message)

        self._patch.setattr(torch.cuda, "init", fail)

    def driver(self, script: str) -> None:
        """What nvidia-smi does, in shell."""
        self._script.write_text(f'#!/bin/sh\necho "$2" >> {self.asked}\n{script}\n')
        self._script.chmod(0o755)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture
def start(process_group: Ranks, tmp_path: Path) -> Callable[..., list[str]]:
    """A new run up to where its data would be built; returns the notes that it would show."""

    def plan(json: str = '{"train_micro_batch_size_per_gpu": 8}') -> list[str]:
        path = tmp_path / "ds.json"
        path.write_text(json)
        options = PretrainOptions(ds_config=str(path))
        return list(plan_new(options, small_recipe(), RunDirectory(tmp_path / "run"), process_group).notes)

    return plan


def gpu_findings() -> list[Finding]:
    return check_gpus(detect_hardware(torch))


PASCAL = "NVIDIA GeForce GTX 1060 6GB, 5.9 GiB, compute capability 6.1"
NO_CODE_130 = (
    "has no code for it (only for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, compute_120), "
    "so every step on it would fail"
)
NO_CODE_126 = (
    "torch 2.13.0+cu126 has no code for it (only for sm_50, sm_60, sm_70, sm_75, sm_80, sm_86, sm_90), "
    "so every step on it would fail"
)


@pytest.mark.parametrize(
    ("version", "card", "found", "meaning", "fix"),
    [
        (
            "2.13.0+cu130", GTX_1060, PASCAL, f"torch 2.13.0+cu130 {NO_CODE_130}",
            NEWEST_126,
        ),
        (
            "2.13.0+cu130", V100, "Tesla V100-SXM2-16GB, 15.8 GiB, compute capability 7.0",
            f"torch 2.13.0+cu130 {NO_CODE_130}", NEWEST_126,
        ),
        (
            "2.13.0+cu126", RTX_5090, "NVIDIA GeForce RTX 5090, 31.4 GiB, compute capability 12.0", NO_CODE_126,
            NEWEST,
        ),
        (
            "2.13.0+cu126", K80, "Tesla K80, 11.2 GiB, compute capability 3.7",
            f"{NO_CODE_126}, and no newer torch has any. Train on the CPU", "export CUDA_VISIBLE_DEVICES=",
        ),
    ],
)  # fmt: skip
def test_a_card_without_code_in_torch_is_told_by_doctor_and_refused_at_start_in_the_same_words(
    machine: Machine, start: Callable[..., list[str]], version: str, card: Card, found: str, meaning: str, fix: str
) -> None:
    machine.torch(version, card)
    assert gpu_findings() == [Finding("GPU 0", found, "wrong", meaning, fix)]
    with pytest.raises(ConfigError) as error:
        start()
    assert str(error.value) == f"{found}: {meaning}. To fix it: {fix}"
    assert not machine.asked.exists()


FP16_COMPUTED_IN_FP32 = "no tensor cores: fp16 saves memory but little time: its products are computed in fp32"
NO_BF16 = "no bf16: use fp16, which needs loss scaling, or fp32"
NO_FLASH = "no flash attention: the memory-efficient kernel replaces it: the same memory, but slower"
NO_COMPILE = "no torch.compile: Triton needs 7.0, so the step runs uncompiled"
ALL = "bf16, tensor cores, flash attention, torch.compile"


@pytest.mark.parametrize(
    ("version", "card", "meaning"),
    [
        (
            "2.13.0+cu126", GTX_1060,
            f"{FP16_COMPUTED_IN_FP32}; {NO_BF16}; {NO_FLASH}; {NO_COMPILE}; use --ds-config gtx1060-6gb",
        ),
        ("2.13.0+cu126", V100, f"{NO_BF16}; {NO_FLASH}"),
        ("2.13.0+cu130", RTX_2060, f"{NO_BF16}; {NO_FLASH}"),
        (
            "2.13.0+cu130", GTX_1660_TI,
            'no tensor cores: fp16 is slower than fp32: use fp32, as in cpu.json, or "enabled": "auto"; '
            f"{NO_BF16}; {NO_FLASH}",
        ),
        ("2.13.0+cu130", RTX_3090, f"{ALL}; use --ds-config rtx3090-24gb"),
        ("2.13.0+cu130", H100, ALL),
        ("2.13.0+cu126", H100, ALL),
    ],
)  # fmt: skip
def test_what_a_card_lacks_is_told_by_doctor_and_keeps_no_run_from_starting(
    machine: Machine, start: Callable[..., list[str]], version: str, card: Card, meaning: str
) -> None:
    machine.torch(version, card)
    capability = ".".join(map(str, card.capability))
    found = f"{card.name}, {card.memory_gib} GiB, compute capability {capability}"
    assert gpu_findings() == [Finding("GPU 0", found, "fine", meaning)]
    assert start() == []
    assert not machine.asked.exists()  # the driver is asked only where torch sees no GPU


def test_what_a_whole_card_has_is_what_the_others_lack() -> None:
    assert set(ALL.split(", ")) == {feature.what for feature in missing_features("NVIDIA GeForce GTX 1060 6GB", (6, 1))}


def test_every_json_that_ships_for_a_card_is_offered_for_it() -> None:
    offered = [abilities(Gpu(card.name, 2**34, card.capability)) for card in CARDS]
    for name in ds_config_names():
        of_cards = [name in card.aliases for card in CARDS]
        assert [meaning.endswith(f"; use --ds-config {name}") for meaning in offered] == of_cards


def test_an_old_card_beside_a_good_one_keeps_nobody_from_training(
    machine: Machine, start: Callable[..., list[str]]
) -> None:
    machine.torch("2.13.0+cu130", RTX_3090, GTX_1060)
    assert [finding.state for finding in gpu_findings()] == ["fine", "note"]
    assert start() == []


def test_a_build_for_other_makers_cards_is_not_judged(machine: Machine, start: Callable[..., list[str]]) -> None:
    machine.torch("2.13.0+rocm7.1", Card("AMD Instinct MI300X", 192, (9, 4)))
    assert gpu_findings()[0].state == "fine"
    assert start() == []


def test_doctor_prints_the_sentence_and_tries_no_step_that_must_fail(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.torch("2.13.0+cu130", GTX_1060)
    monkeypatch.setattr(doctor, "wandb_login", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    [row] = [line.split(maxsplit=3) for line in shown.splitlines() if "GPU 0  " in line]
    assert row[:3] == ["✗", "GPU", "0"]
    assert row[3].rstrip() == f"{PASCAL}  (torch 2.13.0+cu130 {NO_CODE_130})"
    assert f"\nTo fix GPU 0: {NEWEST_126}\n" in shown
    assert "a step in" not in shown
    assert shown.endswith("Pretraining cannot run here yet.\n")


def test_a_machine_without_any_gpu(machine: Machine, start: Callable[..., list[str]]) -> None:
    machine.torch("2.13.0+cpu")
    assert gpu_findings() == [Finding("GPU", "none", meaning="training runs on the CPU")]
    assert start() == []
    machine.torch("2.13.0+cu130")
    assert start() == []


UPDATE = "update NVIDIA's driver, or install a torch that it can run: https://pytorch.org"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)"
HIDDEN = "CUDA_VISIBLE_DEVICES, which is"


@pytest.mark.parametrize(
    ("version", "visible", "error", "row", "meaning", "fix"),
    [
        (
            "2.13.0+cpu", None, "", "NVIDIA GeForce RTX 3090, 8.6", "torch 2.13.0+cpu is a build without CUDA",
            NEWEST,
        ),
        (
            "2.13.0+cpu", None, "", "NVIDIA GeForce GTX 1070, 6.1", "torch 2.13.0+cpu is a build without CUDA",
            NEWEST_126,
        ),
        (
            "2.13.0+cu130", None, f"{TOO_OLD}.", "NVIDIA GeForce RTX 3090, 8.6",
            f"torch 2.13.0+cu130 reports: {TOO_OLD}", UPDATE,
        ),
        (
            "2.13.0+cu130", "", "No CUDA GPUs are available", "Tesla T4, 7.5", f'{HIDDEN} "", hides it',
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "2.13.0+cu130", "1", "No CUDA GPUs are available", "Tesla T4, 7.5", f'{HIDDEN} "1", hides it',
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            "2.13.0+cu130", "0", "CUDA unknown error", "Tesla T4, 7.5",
            "torch 2.13.0+cu130 reports: CUDA unknown error", UPDATE,
        ),
    ],
)  # fmt: skip
def test_a_card_that_torch_cannot_use_is_reported_with_the_fix_and_training_runs_on_the_cpu(
    machine: Machine, start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch,
    version: str, visible: str | None, error: str, row: str, meaning: str, fix: str,
) -> None:  # fmt: skip
    machine.torch(version)
    machine.driver(f"printf '{row}\\n'")
    machine.refuses(error)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = row.split(",")[0]
    assert gpu_findings() == [Finding("GPU", found, "note", f"cannot be used: {meaning}", fix)]
    machine.asked.unlink()
    assert start() == [f"{found} cannot be used: {meaning} (to fix it: {fix}). Training runs on the CPU"]
    assert machine.asked.read_text().count("\n") == 1


def test_a_card_too_old_for_any_torch_is_passed_over(machine: Machine, start: Callable[..., list[str]]) -> None:
    machine.torch("2.13.0+cu126")
    machine.driver("echo Tesla K80, 3.7")
    assert gpu_findings() == [Finding("GPU", "Tesla K80", meaning="training runs on the CPU")]
    assert start() == []


def test_a_driver_that_does_not_tell_the_compute_capability_is_asked_without(machine: Machine) -> None:
    machine.torch("2.13.0+cpu")
    machine.driver('case "$1" in *compute_cap*) exit 2;; esac; echo NVIDIA GeForce GTX 1060 6GB')
    [gpu] = detect_hardware(torch).driver_gpus
    assert gpu == ("NVIDIA GeForce GTX 1060 6GB", (6, 1))
    machine.driver("echo a driver in distress")
    assert detect_hardware(torch).driver_gpus == ()


def test_without_torch_the_driver_is_believed(machine: Machine) -> None:
    machine.driver("echo Tesla T4, 7.5")
    problem = cards.unused(detect_hardware(None))
    assert problem is not None
    assert (problem.meaning, problem.fix) == (
        "cannot be used: torch is not installed", NEWEST,
    )  # fmt: skip


def test_fp16_that_only_the_unused_card_could_run_is_refused_with_the_fix(
    machine: Machine, start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs have it
    machine.torch("2.13.0+cpu")
    unused = (
        "NVIDIA GeForce GTX 1060 6GB cannot be used: torch 2.13.0+cpu is a build without CUDA "
        f"(to fix it: {NEWEST_126}). "
    )
    for driver, said in (("echo NVIDIA GeForce GTX 1060 6GB, 6.1", unused), ("exit 9", "")):
        machine.driver(driver)
        with pytest.raises(ConfigError) as error:
            start('{"fp16": {"enabled": true}}')
        assert str(error.value) == (
            f"fp16 needs a GPU, and this machine has none that torch can use. {said}"
            "On a CPU, use ds_configs/cpu.json, or bf16 instead of fp16."
        )


@pytest.mark.usefixtures("half_on_cpu")
def test_fp16_that_slows_a_gtx_16_down_runs_with_a_note(machine: Machine, start: Callable[..., list[str]]) -> None:
    machine.torch("2.13.0+cu130", GTX_1660_TI)
    note = (
        "fp16 is enabled on NVIDIA GeForce GTX 1660 Ti, which has no tensor cores, so it is slower than fp32, "
        "as in cpu.json"
    )
    assert start('{"fp16": {"enabled": true}}') == [note]
    assert start('{"torch_autocast": {"enabled": true, "dtype": "float16"}}') == [note]
    assert start('{"fp16": {"enabled": "auto"}}') == ['fp16.enabled is "auto", which here means off']
    machine.torch("2.13.0+cu126", GTX_1060)
    assert start('{"fp16": {"enabled": true}}') == []


def test_the_note_is_shown_before_training_and_on_resume(
    machine: Machine, process_group: Ranks, store: TokenStore, tmp_path: Path
) -> None:
    machine.torch("2.13.0+cpu")
    machine.driver("echo NVIDIA GeForce RTX 3090, 8.6")
    recipe, run, options = small_recipe(), RunDirectory(tmp_path / "run"), PretrainOptions(ds_config="cpu")
    plan = plan_new(options, recipe, run, process_group)
    job = prepare.prepare_new(options, recipe, plan, store, run, process_group)
    with run.locked():
        run.write_record(recipe, plan, job.record)
    resumed = prepare.plan_resume(PretrainOptions(), run, process_group)
    for again in (job, prepare.prepare_resume(PretrainOptions(), resumed, run, process_group)):
        shown = io.StringIO()
        with log_shown_on(Console(file=shown)):
            prepare.announce(again)
        assert (
            "\nNote: NVIDIA GeForce RTX 3090 cannot be used: torch 2.13.0+cpu is a build without CUDA "
            f"(to fix it: {NEWEST}). Training runs on the CPU.\n"
        ) in shown.getvalue()


def test_a_run_does_not_continue_where_torch_has_no_code_for_the_card(
    machine: Machine, process_group: Ranks, store: TokenStore, tmp_path: Path
) -> None:
    machine.torch("2.13.0+cpu")
    recipe, run, options = small_recipe(), RunDirectory(tmp_path / "run"), PretrainOptions(ds_config="cpu")
    plan = plan_new(options, recipe, run, process_group)
    with run.locked():
        run.write_record(recipe, plan, prepare.prepare_new(options, recipe, plan, store, run, process_group).record)
    machine.torch("2.13.0+cu130", GTX_1060)
    with pytest.raises(ConfigError, match=r"torch 2\.13\.0\+cu130 has no code for it"):
        prepare.plan_resume(PretrainOptions(), run, process_group)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((6, 1), ("sm_60",), True),  # machine code runs on a later minor version
        ((6, 0), ("sm_61",), False),
        ((8, 9), ("sm_80", "sm_86"), True),
        ((12, 1), ("sm_120",), True),
        ((10, 0), ("sm_90",), False),
        ((12, 0), ("compute_90",), True),  # PTX is compiled by the driver
        ((9, 0), ("sm_90a",), True),
        ((8, 0), (), False),
    ],
)
def test_which_code_runs_on_which_card(capability: tuple[int, int], architectures: tuple[str, ...], runs: bool) -> None:
    assert has_code_for(capability, architectures) is runs


@pytest.mark.gpu
def test_torch_agrees_that_it_has_code_for_this_card() -> None:
    torch.zeros(2, device="cuda").add(1).sum().item()
    assert has_code_for(torch.cuda.get_device_capability(), tuple(torch.cuda.get_arch_list()))


@pytest.mark.parametrize(
    ("answer", "installed"),
    [
        ("6.1", "torch==2.13.0+cu126"),
        ("8.6\n7.0", "torch==2.13.0+cu126"),  # the older of two cards decides
        ("7.5", "torch==2.13.0"),
        ("12.0", "torch==2.13.0"),
        ('Field "compute_cap" is not a valid field to query.', "torch==2.13.0"),
        (None, "torch==2.13.0+cpu"),
    ],
)
def test_make_install_takes_the_torch_that_has_code_for_the_card(
    answer: str | None, installed: str, tmp_path: Path
) -> None:
    """The Makefile's own rule, with a driver that answers so and a pip that says what it is asked for."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n" if answer is not None else "#!/bin/sh\nexit 9\n")
    driver.chmod(0o755)
    (tmp_path / "venv").mkdir()
    result = subprocess.run(
        ["make", "-f", str(REPOSITORY / "Makefile"), "install", "PYTHON=true", f"VENV={tmp_path}/venv", "PIP=echo pip"],
        cwd=REPOSITORY, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    [version] = re.findall(r"^torch==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    asked = [line for line in result.stdout.splitlines() if line.startswith("pip install") and "torch==" in line]
    assert [re.findall(r"torch==\S+", line) for line in asked] == [[installed.replace("2.13.0", version)]]
    assert ("cu126" in installed) == ("--index-url https://download.pytorch.org/whl/cu126" in asked[0])
