"""What doctor makes of machines that are not this one, and of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from electra_ds.config.hardware import Gpu, Hardware
from electra_ds.pretraining import self_test
from electra_ds.pretraining.doctor import Facts, Finding, diagnose, gather, judge_trials, wanted_versions
from electra_ds.pretraining.self_test import try_precisions
from tests.helpers import REPOSITORY
from tests.pretraining.test_pretrain import run

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", 24 * 2**30, (8, 6))
HEALTHY = Facts(
    electra_ds="0.1.0", python="3.12.3", requires_python=">=3.11",
    packages={"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "wandb": "0.31.0", "tensorboard": "2.21.0"},
    requirements={"torch": ">=2.6", "deepspeed": "<0.20,>=0.19.8", "wandb": ">=0.31", "tensorboard": ">=2.14"},
    hardware=Hardware("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86"), (RTX_3090,)), cpu_cores=8, threads=8,
    memory_bytes=32 * 2**30, disk_free_bytes=100 * 2**30, backends=("gloo", "nccl"), launchers=("torchrun",),
    wandb_login=True,
)  # fmt: skip


def finding(what: str, **different: Any) -> Finding:
    [found] = [item for item in diagnose(replace(HEALTHY, **different)) if item.what == what]
    return found


def test_nothing_is_wrong_with_a_healthy_machine() -> None:
    assert {item.state for item in diagnose(HEALTHY)} == {"fine"}
    assert not any(item.mend for item in diagnose(HEALTHY))
    assert finding("GPU 0").found == "NVIDIA GeForce RTX 3090, 24.0 GiB, compute capability 8.6"
    cuda = finding("torch's CUDA")
    assert (cuda.found, cuda.meaning) == ("13.0", "sm_75 sm_80 sm_86")


@pytest.mark.parametrize(
    ("name", "version", "state", "mend"),
    [
        ("deepspeed", None, "wrong", "pip install 'deepspeed<0.20,>=0.19.8'"),
        ("deepspeed", "0.20.1", "wrong", "pip install 'deepspeed<0.20,>=0.19.8'"),
        ("torch", "2.4.1+cu121", "wrong", "pip install 'torch>=2.6'"),
        ("torch", "2.14.0.dev20260101", "fine", None),
        ("tensorboard", None, "note", "pip install 'tensorboard>=2.14'"),
        ("wandb", "0.12", "note", "pip install 'wandb>=0.31'"),
    ],
)
def test_packages_are_held_against_what_is_asked(name: str, version: str | None, state: str, mend: str | None) -> None:
    found = finding(name, packages={**HEALTHY.packages, name: version})
    assert (found.state, found.mend) == (state, mend)


def test_the_rest_of_a_machine() -> None:
    assert finding("Python", python="3.10.4").state == "wrong"
    assert finding("disk", disk_free_bytes=2**20).state == "note"
    assert finding("collectives", backends=()).state == "wrong"
    account = finding("wandb account", wandb_login=False)
    assert (account.state, account.mend) == ("note", "wandb login")
    assert finding("electra_ds", requirements={}).mend == "pip install -e ."


def test_a_step_that_fails_matters_where_it_is_fp32() -> None:
    tried = [("fp32", "works", ""), ("bf16", "fails", "x"), ("fp16", "not on this device", "")]
    states = [item.state for item in judge_trials(tried)]
    assert states == ["fine", "note", "note"]
    assert judge_trials([("fp32", "fails", "no kernel image")])[0].state == "wrong"


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_the_trial_is_a_real_step_in_each_precision() -> None:
    assert [(item.precision, item.result) for item in try_precisions()] == [
        ("fp32", "works"), ("bf16", "works"), ("fp16", "works"),
    ]  # fmt: skip


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_a_trial_whose_weights_do_not_move_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_STEP", 0)  # where the learning rate is 0
    for item in try_precisions():
        assert item.result == "fails"
        assert "the weights did not move" in item.reason


@pytest.mark.usefixtures("process_group")
def test_what_a_device_cannot_do_is_told_from_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has fp16")
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs have it
    fp16 = try_precisions()[-1]
    assert (fp16.result, fp16.reason.split(",")[0]) == ("not on this device", "fp16 needs a GPU")


def test_gather_finds_this_machine() -> None:
    facts = gather()
    assert facts.packages["torch"] == torch.__version__
    assert facts.requirements["deepspeed"] == "<0.20,>=0.19.8"
    assert facts.memory_bytes > 2**28
    assert "gloo" in facts.backends


def test_what_developers_need_is_not_asked_of_users() -> None:
    texts = ["torch>=2.6", 'tensorboard>=2.14; extra == "tensorboard"', 'pytest>=8; extra == "dev"']
    assert wanted_versions(texts) == {"torch": ">=2.6", "tensorboard": ">=2.14"}


def test_the_command_prints_a_table_or_json_and_says_whether_pretraining_can_run(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}
    shown = run("doctor", cwd=tmp_path, env=environment)
    assert "Pretraining can run here." in shown.stdout
    assert "a step in fp32" in shown.stdout
    report = json.loads(run("doctor", "--json", cwd=tmp_path, env=environment).stdout)
    assert report["can_pretrain"] is True
    assert {item["what"]: item["found"] for item in report["findings"]}["a step in fp32"] == "works"
    assert "example" in run("doctor", "--help").stdout


def test_without_deepspeed_it_is_a_finding_and_the_exit_status_1(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.modules['deepspeed'] = None; sys.path.insert(0, {str(REPOSITORY)!r}); "
        "from electra_ds.cli import main; main(['doctor'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "Pretraining cannot run here yet." in result.stdout
    assert "ModuleNotFoundError" in result.stdout
    assert result.stderr == ""
