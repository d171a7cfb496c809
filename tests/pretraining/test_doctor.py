"""The report of doctor on this machine and on others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from packaging.specifiers import SpecifierSet

from electra_ds.config.cards import Gpu, Hardware
from electra_ds.pretraining import self_test
from electra_ds.pretraining.doctor import check_gpus, check_package, check_packages, failed_step
from electra_ds.pretraining.self_test import try_precisions
from tests.helpers import REPOSITORY
from tests.pretraining.test_pretrain import run

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", 24 * 2**30, (8, 6))


def test_a_gpu_that_torch_has_code_for_is_fine() -> None:
    [found] = check_gpus(Hardware("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86"), (RTX_3090,)))
    assert (found.what, found.state, found.fix) == ("GPU 0", "fine", None)
    assert found.found == "NVIDIA GeForce RTX 3090, 24.0 GiB, compute capability 8.6"


@pytest.mark.parametrize(
    ("name", "version", "wanted", "state", "fix"),
    [
        ("deepspeed", "0.19.8", "<0.20,>=0.19.8", "fine", None),
        ("deepspeed", None, "<0.20,>=0.19.8", "wrong", "pip install 'deepspeed<0.20,>=0.19.8'"),
        ("deepspeed", "0.20.1", "<0.20,>=0.19.8", "wrong", "pip install 'deepspeed<0.20,>=0.19.8'"),
        ("torch", "2.4.1+cu121", ">=2.6", "wrong", "pip install 'torch>=2.6'"),
        ("torch", "2.14.0.dev20260101", ">=2.6", "fine", None),
        ("tensorboard", None, ">=2.14", "note", "pip install 'tensorboard>=2.14'"),
        ("wandb", "0.12", ">=0.31", "note", "pip install 'wandb>=0.31'"),
    ],
)
def test_packages_are_compared_with_the_requirements(
    name: str, version: str | None, wanted: str, state: str, fix: str | None
) -> None:
    found = check_package(name, version, SpecifierSet(wanted))
    assert (found.state, found.fix) == (state, fix)


def test_the_packages_of_this_machine_are_those_that_users_need() -> None:
    found = {item.what: item for item in check_packages()}
    assert found["torch"].found == torch.__version__
    assert {"deepspeed", "tensorboard"} <= set(found)
    assert "pytest" not in found
    assert {item.state for item in found.values()} <= {"fine", "note"}


def test_a_step_that_fails_matters_only_in_fp32() -> None:
    assert failed_step("bf16", "x").state == "note"
    found = failed_step("fp32", RuntimeError("no kernel image\nand more"))
    assert (found.state, found.meaning) == ("wrong", "RuntimeError: no kernel image")


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_the_trial_is_a_real_step_in_each_precision() -> None:
    steps = [f"a step in {precision}" for precision in ("fp32", "bf16", "fp16")]
    assert [(item.what, item.found, item.state) for item in try_precisions()] == [
        (what, "works", "fine") for what in steps
    ]


@pytest.mark.usefixtures("process_group", "half_on_cpu")
def test_a_trial_whose_weights_do_not_move_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_STEP", 0)  # where the learning rate is 0
    for item in try_precisions():
        assert item.found == "fails"
        assert "the weights did not move" in item.meaning


@pytest.mark.usefixtures("process_group")
def test_what_a_device_cannot_do_is_told_from_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has fp16")
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs have it
    fp16 = try_precisions()[-1]
    assert (fp16.found, fp16.meaning.split(",")[0]) == ("not on this device", "fp16 needs a GPU")


@pytest.mark.slow
def test_the_command_prints_a_table_or_json_and_says_whether_pretraining_can_run(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    shown = run("doctor", folder=tmp_path, environment=environment)
    assert "Pretraining can run here." in shown.stdout
    assert "a step in fp32" in shown.stdout
    report = json.loads(run("doctor", "--json", folder=tmp_path, environment=environment).stdout)
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
