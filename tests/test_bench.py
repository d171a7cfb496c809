"""The benchmark measures what it says, and says what got slower."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import memory
from benchmarks.command import main
from benchmarks.compare import compare
from benchmarks.measure import Clock, Operations, interleaved, peak_bytes, ratio
from benchmarks.precisions import differences
from benchmarks.run import measure
from benchmarks.synthetic import GLUE_LENGTHS
from electra_ds.core.errors import ConfigError
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.engine import PretrainingEngine
from tests.helpers import REPOSITORY

CPU = torch.device("cpu")


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "bin" / "bench"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


class Shown(NamedTuple):
    """The exit status and the output of a command that ran in this process."""

    status: int
    stdout: str
    stderr: str


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> Shown:
    """Run the command here, for what measures nothing."""
    status: Any = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code or 0
    return Shown(status, *capsys.readouterr())


def test_every_contestant_has_a_turn_in_every_round_in_changing_order() -> None:
    calls: list[tuple[str, int]] = []
    names = ("a", "b", "c")
    contestants = {name: lambda number, name=name: calls.append((name, number)) for name in names}
    told: list[None] = []
    seconds = interleaved(contestants, 20, Clock(CPU), lambda: told.append(None), calls_a_turn=2)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(names, 20)
    assert len(told) == 21 * 3  # one round warms up
    rounds = [[name for name, _ in calls[first : first + 6 : 2]] for first in range(0, len(calls), 6)]
    assert all(sorted(order) == list(names) for order in rounds)
    assert len(set(map(tuple, rounds))) == 6
    assert [number for name, number in calls if name == "a"] == list(range(42))  # every call gets the next batch


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.2, 5))
def test_a_ratio_is_taken_round_by_round(seconds: list[float], factor: float) -> None:
    """A slow round, in which everything takes longer, does not move it."""
    found = ratio([value * factor for value in seconds], seconds)
    assert found == pytest.approx((factor, factor, factor))


def test_peak_memory_is_what_stands_at_once() -> None:
    size = 4 * 1000 * 1000

    def both() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1  # 2 at once
        del first
        third = second * 2  # 2 at once
        del second, third
        torch.ones(1000, 1000)

    held = torch.ones(1000, 1000)  # stood before
    assert peak_bytes(both, CPU) == pytest.approx(2 * size, rel=1e-5)  # beside it a scalar or two
    del held


def test_operations_are_counted_without_views_and_waits_apart() -> None:
    tensor = torch.ones(4, 4)
    with Operations() as found:
        total = (tensor.t() @ tensor.view(4, 4)).sum()
        assert found.blocking == 0
        total.item()
    assert (found.count, found.blocking) == (3, 1)


def test_the_lengths_of_glue_ascend_within_the_row() -> None:
    assert list(GLUE_LENGTHS) == sorted(GLUE_LENGTHS)
    assert len(GLUE_LENGTHS) == 33
    assert (GLUE_LENGTHS[0], GLUE_LENGTHS[-1]) == (4, 128)


OLD: dict[str, Any] = {
    "made_by": "electra-ds bench",
    "recipe": "tiny",
    "hardware": {"device": "CPU (2 cores)", "cpu": "X", "threads": 1},
    "step_vs_transformers": {"fp32": {"8": {"speed": 2.0, "speed_quartiles": [1.9, 2.1], "peak_step_memory": 0.4}}},
    "step": {
        "fp32": {"8": {"deepspeed": {"operations": 1000, "host_syncs": 0}, "transformers": {"operations": 5000}}},
    },
    "memory": {"measured": {"cpu": {"fp32": {"8": {"measured_bytes": 500, "predicted_bytes": 500}}}}},
    "start_up": {"help_s": 0.2, "help_vs_python": {"speed": 0.1, "speed_quartiles": [0.09, 0.11]}},
}


def changed(*path: str, to: float) -> dict[str, Any]:
    new = copy.deepcopy(OLD)
    place = new
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return new


def slowed(*path: str, to: float, spread: float = 0.01) -> dict[str, Any]:
    new = changed(*path, "speed", to=to)
    place = new
    for key in path:
        place = place[key]
    place["speed_quartiles"] = [to * (1 - spread), to * (1 + spread)]
    return new


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, None),
        (changed("step_vs_transformers", "fp32", "8", "speed", to=1.96), None),  # noise
        (slowed("step_vs_transformers", "fp32", "8", to=1.8), "fp32.8.speed: 2 before, 1.8 now (-10.0%)"),
        (slowed("step_vs_transformers", "fp32", "8", to=1.8, spread=0.2), None),  # the quartiles meet
        (slowed("step_vs_transformers", "fp32", "8", to=3.0), None),
        (slowed("start_up", "help_vs_python", to=0.05), "start_up.help_vs_python.speed: 0.1 before, 0.05 now"),
        (changed("start_up", "help_s", to=9.0), None),  # seconds of two days do not compare
        (changed("step_vs_transformers", "fp32", "8", "peak_step_memory", to=0.42), "peak_step_memory: 0.4 before"),
        (changed("step", "fp32", "8", "deepspeed", "operations", to=1100), "operations: 1000 before, 1100 now"),
        (changed("step", "fp32", "8", "deepspeed", "host_syncs", to=1), "host_syncs: 0 before, 1 now (from none)"),
        (changed("step", "fp32", "8", "transformers", "operations", to=9000), None),  # not ours
        (changed("memory", "measured", "cpu", "fp32", "8", "measured_bytes", to=520), "cpu.fp32.8.measured_bytes: 500"),
        (changed("memory", "measured", "cpu", "fp32", "8", "predicted_bytes", to=900), None),  # a better forecast
    ],
)
def test_what_got_slower_is_named_and_noise_is_not(new: dict[str, Any], expected: str | None) -> None:
    found = compare(OLD, new).slower
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_unlike_results_are_not_compared_and_other_differences_are_told() -> None:
    with pytest.raises(ConfigError, match="no figure in common"):
        compare(OLD, {key: OLD[key] for key in ("recipe", "hardware")})
    with pytest.raises(ConfigError, match="for the recipe tiny, these for mini"):
        compare(OLD, OLD | {"recipe": "mini"})
    found = compare(OLD, {key: OLD[key] for key in ("recipe", "step")} | {"hardware": OLD["hardware"] | {"threads": 2}})
    assert found.slower == []
    assert "start_up.help_vs_python.speed" in found.missing
    assert found.differences == ["threads: 1 before, 2 now"]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_measures_writes_draws_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "new.json", tmp_path / "new.png"
    done = bench(
        "--recipe", "tiny", "--micro-batches", 2, "--rounds", 2, "--dtypes", "fp32", "--json", out,
        "--picture", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    for size in ("2",):
        line = results["step_vs_transformers"]["fp32"][size]
        assert line["speed"] > 0
        assert 0 < line["peak_step_memory"] < 1
        steps = results["step"]["fp32"][size]
        assert steps["deepspeed"]["host_syncs"] == 0
        assert steps["transformers"]["model_flops"] > steps["deepspeed"]["model_flops"]
        low, high = line["speed_quartiles"]
        assert low <= line["speed"] <= high
    assert set(results["parts"]["seconds"]["fp32"]["deepspeed"]) == {
        "generator", "head and sampling", "discriminator", "optimizer",
    }  # fmt: skip
    assert results["mixed_lengths"]["packed_vs_padded_to_row"]["speed"] > 0
    assert results["start_up"]["help_s"] < results["start_up"]["imports_s"]
    assert {"versions", "hardware", "command"} <= set(results)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "One optimiser step" in done.stdout

    worse = tmp_path / "better-before.json"
    line = results["step_vs_transformers"]["fp32"]["2"]
    line["speed"] *= 9
    line["speed_quartiles"] = [value * 9 for value in line["speed_quartiles"]]
    worse.write_text(json.dumps(results))
    compared = shown(capsys, "--from", out, "--compare", worse)
    assert (compared.status, "step_vs_transformers.fp32.2.speed" in compared.stdout) == (1, True)
    assert shown(capsys, "--from", out, "--compare", out).status == 0


@pytest.fixture
def small_text(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the built-in corpus, which takes half a minute to tokenise."""
    monkeypatch.setattr("benchmarks.run._real_text", lambda recipe: contextlib.nullcontext(store))


def measured(section: str, recipe: str = "tiny", **settings: Any) -> dict[str, Any]:
    chosen = {"micro_batches": None, "dtypes": ["fp32", "bf16"], "rounds": 1, "steps": 1, "threads": 1} | settings
    return measure(recipe=recipe, sections=[section], console=Console(quiet=True), **chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_the_memory_model_agrees_with_whole_steps_of_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a tenth, which is what a GPU is held to."""
    results = measured("memory", "rc2020-small", micro_batches=[2])
    found = results["memory"]
    assert set(found["measured"]["cpu"]) == {"fp32", "bf16"}
    for dtype, sizes in found["measured"]["cpu"].items():
        values = sizes["2"]
        assert values["predicted_bytes"] == pytest.approx(values["measured_bytes"], rel=0.1), dtype
        assert values["predicted_vs_measured"] == values["predicted_bytes"] / values["measured_bytes"]
    assert found["not_measured"] == {}
    check_shown(capsys, results, tmp_path, "predicted")


def test_a_gpu_is_held_to_the_memory_of_every_card_that_is_not_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, which shows 14.6 of its 16 GiB, without one: torch's answers are made up, so nothing is measured."""
    gpu = torch.device("cuda", 0)
    total = int(14.6 * 2**30)
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total, total))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    chosen, not_measured = memory.cases("rc2020-small", ["fp32", "fp16"], [32], gpu)
    assert [case.ds_config for case in chosen] == [
        "gtx1060-6gb", "gtx1080ti-11gb", "rtx2060-6gb", "p100-16gb", "v100-16gb", "t4-16gb",
    ]  # fmt: skip
    assert {str(case.plan.batch) for case in chosen} == {"128 x 1 x 1 rank(s)"}
    assert set(not_measured) == {"rtx3090-24gb", "a100-40gb", "h200-141gb"}
    for case in (chosen[0], chosen[3]):
        with pytest.raises(RuntimeError, match="out of memory"), memory.limited(gpu, case.limit_bytes):
            raise RuntimeError("out of memory")
    assert fractions == pytest.approx([6 / 14.6, 1, 1, 1])  # and given back
    assert memory.cases("rc2020-small", ["fp32"], [32], gpu)[1]["t4-16gb"].startswith("Tesla T4 has no fp16, or")


@pytest.mark.slow
@pytest.mark.usefixtures("process_group", "small_text")
def test_precisions_give_the_same_curves_and_they_fall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = measured("precisions", micro_batches=[6], steps=64)
    found = results["precisions"]
    assert (found["steps"], found["warmup_steps"], found["window_steps"]) == (64, 6, 10)
    assert found["micro_batch"] == 4  # the largest divisor of 16 that is not above 6
    for curve in found["curves"].values():
        assert [len(curve[name]) for name in ("generator_loss", "discriminator_loss")] == [7, 7]  # the last one of 4
        assert curve["generator_loss"][-1] < curve["generator_loss"][0] - 0.5
        assert curve["skipped_steps"] == 0
    apart = found["difference_from_fp32"]["bf16"]
    assert set(apart) == {"generator_loss", "discriminator_loss"}
    for values in apart.values():
        assert abs(values["mean"]) <= values["largest"] < 0.03
    picture = check_shown(capsys, results, tmp_path, "Losses over 64 steps", "bf16 from fp32")
    assert picture.read_bytes().startswith(b"\x89PNG")


def check_shown(capsys: pytest.CaptureFixture[str], results: dict[str, Any], folder: Path, *words: str) -> Path:
    """That a file of these results is shown with the words; returns their picture."""
    (folder / "new.json").write_text(json.dumps(results))
    done = shown(capsys, "--from", folder / "new.json", "--picture", folder / "new.png")
    assert done.status == ("incomplete" in results), done.stderr
    assert all(word in done.stdout for word in words), done.stdout
    return folder / "new.png"


def test_differences_of_curves_are_those_of_the_last_half_and_nothing_is_made_of_what_is_not_finite() -> None:
    reference = {"generator_loss": [9.0, 4.0, 2.0, 1.0], "discriminator_loss": [1.0, 1.0, 1.0, 1.0]}
    other = {"generator_loss": [1.0, 1.0, 2.2, 0.9], "discriminator_loss": [1.0, 1.0, None, 1.0]}
    found = differences(other, reference)
    assert found["generator_loss"] == pytest.approx({"largest": 0.1, "mean": 0.0})  # +10 % and -10 %
    assert found["discriminator_loss"] == {"largest": None, "mean": None}


@pytest.mark.usefixtures("process_group", "small_text")
def test_an_interruption_keeps_the_curves_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = PretrainingEngine.train_step, [0]

    def interrupted(self: PretrainingEngine, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 33:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(PretrainingEngine, "train_step", interrupted)
    results = measured("precisions", steps=20)
    assert results["incomplete"] == "interrupted"
    curves = results["precisions"]["curves"]
    assert {dtype: len(curve["generator_loss"]) for dtype, curve in curves.items()} == {"fp32": 2, "bf16": 1}
    assert results["precisions"]["difference_from_fp32"] == {}
    check_shown(capsys, results, tmp_path, "Incomplete: interrupted")


def test_curves_have_nothing_to_compare_and_that_is_told_before_they_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({key: OLD[key] for key in ("recipe", "hardware")} | {"made_by": "electra-ds bench"} | {
        "precisions": {"curves": {}},
    }))  # fmt: skip
    done = shown(capsys, "--recipe", "tiny", "--sections", "precisions", "--compare", old)
    assert done.status == 2
    assert "has nothing to compare of the sections precisions" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "nowhere.json"], "nowhere.json is not a result of"),
        (["--json", "."], "that is a folder"),
        (["--picture", "x.pdf"], "call it x.png"),
        (["--from", "x.json", "--rounds", "3"], "--rounds cannot be given with it"),
        (["--json", "no/folder/x.json"], "there is no folder no/folder"),
        (["--recipe", "tinny"], "did you mean 'tiny'"),
        (["--rounds", "0"], "'0' is not a positive whole number"),
        (["--sections", "steps"], "invalid choice: 'steps'"),
        (["--steps", "9"], "--steps is for the section precisions"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = shown(capsys, *arguments)
    assert done.status == 2
    assert message in done.stderr


def test_a_dtype_without_hardware_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs have it
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        measure(
            recipe="tiny", micro_batches=None, dtypes=["fp32", "fp16"], rounds=1, steps=1, sections=["startup"],
            threads=1, console=Console(quiet=True),
        )  # fmt: skip


WHOLE = OLD | {"made_by": "electra-ds bench"}


@pytest.mark.parametrize(
    "damage",
    [
        "[" * 100_000,
        "[1]",
        "null",
        json.dumps({"made_by": "electra-ds bench"}),
        json.dumps(WHOLE | {"step": None}),
        json.dumps(WHOLE | {"start_up": {}}),
        json.dumps(WHOLE | {"hardware": []}),
        json.dumps(changed("step_vs_transformers", "fp32", "8", "speed", to=float("nan"))),
        json.dumps(changed("step_vs_transformers", "fp32", "8", "speed_quartiles", to=1.0)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(damage)
    with pytest.raises(SystemExit) as stopped:
        main(["--from", str(tmp_path / "x.json"), "--compare", str(tmp_path / "x.json")])
    assert stopped.value.code == 2
    assert "is not a" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_results_that_cannot_be_written_are_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    source = REPOSITORY / "benchmarks" / "results" / "cpu-1-thread.json"
    with pytest.raises(SystemExit):
        main(["--from", str(source), "--json", "/dev/full"])
    assert "Cannot write the results: [Errno 28]" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_measures_on_a_gpu_compiled_steps_too(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = bench("--micro-batches", 16, "--rounds", 2, "--json", out)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    for dtype, sizes in results["step_vs_transformers"].items():
        assert sizes["16"]["speed"] > 1, dtype
        assert results["step"][dtype]["16"]["deepspeed"]["host_syncs"] == 0
    if torch.cuda.get_device_capability() >= (7, 0):
        assert results["compiled_vs_transformers"]
