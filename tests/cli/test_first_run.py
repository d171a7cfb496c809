"""A command that is given little: defaults by the hardware, --dry-run, --seed, and the question before years."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from electra_ds.api.launch import check_run_time
from electra_ds.api.pretrain import default_recipe, pretrain
from electra_ds.cli import build_parser, main
from electra_ds.config.cards import CARDS
from electra_ds.config.deepspeed import default_ds_config, resolve
from electra_ds.config.names import ds_config_names
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import load_recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.pretraining.run_time import (
    YEAR_S,
    RunTime,
    cpu_time,
    finetuning_time,
    shortest_s,
)
from electra_ds.sweep.options import KINDS
from electra_ds.training.callbacks import Callback, Progress
from electra_ds.training.engine import wants_fp16
from tests.finetune_runs import tiny_electra, write_glue
from tests.helpers import SMALL, cpu_plan, small_recipe, write_corpus

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "device", lambda launch: CPU)  # as on a machine without a GPU


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What a command says, on one line."""
    found = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as leaving:
        found = int(leaving.code or 0)
    said = capsys.readouterr()
    assert found == status, said
    return " ".join((said.out if status == 0 else said.err).split())


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


# --- defaults


def test_without_a_gpu_pretraining_is_tiny_and_with_one_the_studys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer(capsys, "pretrain", "--dry-run")
    assert said.startswith("tiny: ")
    assert "12,000 steps" in said
    assert "tiny is the default recipe without a GPU" in said
    assert "without --ds-config this run uses cpu" in said
    assert "default: rc2020-small with a GPU, tiny without" in answer(capsys, "pretrain", "--help")
    monkeypatch.setattr(devices, "device", lambda launch: torch.device("cuda", 0))
    assert default_recipe() == "rc2020-small"


def test_a_recipe_that_is_given_is_not_called_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "pretrain", "--dry-run", "--recipe", "mini", "--ds-config", "zero1")
    assert "default" not in said
    assert "without --ds-config" not in said


def test_the_default_json_is_that_of_the_card_or_fits_any(process_group: Ranks) -> None:
    recipe = load_recipe("rc2020-small")
    for card in (*CARDS, None):
        values, name = default_ds_config(True, card)
        assert (name in ds_config_names()) == (card is not None and card.ds_config is not None)
        plan = resolve(values, recipe, world_size=1, auto_fp16=True, source=name)
        assert plan.stage == 0
    assert default_ds_config(False, None)[1] == "cpu"


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain"], ["finetune", "--model", "x"], ["plan"], ["checkpoint", "import", "x", "--run-dir", "y"],
        ["export", "x", "--to", "deepspeed"],
    ],
)  # fmt: skip
def test_no_command_demands_a_deepspeed_json(arguments: list[str]) -> None:
    assert build_parser().parse_args(arguments).ds_config is None


def test_a_sweep_of_pretrainings_needs_no_deepspeed_json_and_its_cost_is_told(
    capsys: pytest.CaptureFixture[str], store: TokenStore
) -> None:
    Path("mine.yaml").write_text(f"name: x\npretrain: {{recipe: tiny, data: {store.path}, seeds: [0, 1]}}\n")
    said = answer(capsys, "sweep", "mine.yaml", "--dry-run")
    assert "2 trials" in said
    assert re.search(r"In total .+ with \d+ at once", said)
    Path("dry.yaml").write_text("name: x\npretrain: {recipe: tiny, dry_run: true}\n")
    refused = answer(capsys, "sweep", "dry.yaml", "--dry-run", status=2)
    assert "dry_run: is the sweep's to set; give the sweep itself --dry-run" in refused


# --- --seed


def test_both_commands_take_a_seed_and_it_is_the_recipes(capsys: pytest.CaptureFixture[str], store: TokenStore) -> None:
    for name, kind in KINDS.items():
        model = ["--model", "x", "--task", "rte"] if name == "finetune" else []
        for given, is_right in (
            (["--seed", "3"], True), (["--seed", "3", "--set", "seed=3"], True), (["--set", "seed=4"], True),
            (["--seed", "3", "--set", "seed=4"], False), (["--seed", "0", "--set", "seed=1"], False),
        ):  # fmt: skip
            options = kind.parsed(build_parser().parse_args([name, *model, *given]))
            if is_right:
                options.check()
            else:
                with pytest.raises(ConfigError, match=r"--seed \d and --set seed=\d differ"):
                    options.check()
    for given in (["--seed", "3"], ["--set", "seed=3"]):
        options = PretrainOptions.parsed(build_parser().parse_args(["pretrain", *given]))
        recipe = load_recipe("tiny", options.recipe_overrides())
        assert recipe.seed == 3
    for name in ("pretrain", "finetune"):
        assert "--seed" in answer(capsys, name, "--resume", "runs/x", "--seed", "0", status=2)


# --- --dry-run


def test_a_dry_run_without_a_store_says_what_would_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", documents=5)
    before = files()
    said = answer(
        capsys, "pretrain", "--recipe", "tiny", "--corpus", "corpus", "--run-dir", "mine", "--dry-run",
        "--micro-batch", "4", "--seed", "3",
    )  # fmt: skip
    for part in (
        "discriminator 0.35 M, generator 0.06 M parameters", "12,000 steps of 16 x 32 tokens",
        "stores/corpus-byte-level-bpe-4096-", "this would first build the token store",
        "micro-batch x accumulation = 4 x 4 x 1 rank", "run directory: mine", "time: ", "nothing was written",
    ):  # fmt: skip
        assert part in said
    assert files() == before


def test_a_dry_run_on_a_store_reads_it_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], store: TokenStore
) -> None:
    arguments = ("pretrain", "--recipe", "tiny", "--data", store.path, "--dry-run", "--set", *SMALL)
    said = answer(capsys, *arguments)
    assert f"{store.info.num_tokens:,} tokens" in said
    assert "held out" in said
    assert "time: " in said
    assert files() == set()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("--corpus", "nowhere"), "nowhere"),
        (("--data", "nowhere"), "nowhere"),
        (("--tokenizer", "./nowhere.json"), "nowhere.json"),
        (("--run-dir", "taken"), "already holds a run"),
        (("--micro-batch", "3"), "train_micro_batch_size_per_gpu 3"),
        (("--stop-at", "12001"), "--stop-at 12001 is beyond"),
        (("--init-from", "./nowhere"), "nowhere"),
        (("--wandb-group", "x"), "wandb is off"),
    ],
)
def test_a_dry_run_makes_the_checks_of_a_run(
    given: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/run.json").write_text("{}")
    before = files()
    assert complaint in answer(capsys, "pretrain", "--recipe", "tiny", "--dry-run", *given, status=2)
    assert files() == before


def test_a_dry_run_of_a_finetuning_reads_its_examples_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, data = tiny_electra(tmp_path / "model"), write_glue(tmp_path / "glue")
    capsys.readouterr()
    before = files()
    given = ("finetune", "--model", model, "--task", "sst-2", "--data-dir", data, "--set", "data.max_length=32")
    said = answer(capsys, *given, "--dry-run", "--seed", "5")
    for part in ("recipe rc2020, seed 5", "64 training inputs", "6 steps of 32", "run directory: runs/sst-2", "time: "):
        assert part in said
    assert files() == before
    assert "takes 64 tokens" in answer(capsys, *given[:-2], "--dry-run", status=2)


# --- years

LONG, SHORT = RunTime.between(0.4 * YEAR_S, 1.6 * YEAR_S), RunTime.between(20 * 86_400, 60 * 86_400)


def test_a_run_that_may_take_years_is_refused(process_group: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"predicted to take 0.4–1.6 years .* add --yes"):
        check_run_time(PretrainOptions(), lambda: LONG, process_group)


@pytest.mark.parametrize(
    ("given", "time"), [({}, SHORT), ({}, None), ({"yes": True}, LONG), ({"time_limit": 60.0}, LONG)]
)
def test_weeks_are_not_refused_nor_is_a_run_that_ends_or_was_confirmed(
    process_group: Ranks, given: dict[str, Any], time: RunTime | None
) -> None:
    check_run_time(PretrainOptions(**given), lambda: time, process_group)


def test_a_million_steps_on_a_slow_cpu_are_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A thousand times the study's steps, which is years on any CPU."""
    write_corpus(tmp_path / "corpus", documents=5)
    before = files()
    given = ("pretrain", "--recipe", "rc2020-small", "--corpus", "corpus", "--set", "schedule.total_steps=1e9")
    refused = answer(capsys, *given, status=2)
    assert "years on this machine. Choose a smaller recipe or model, or fewer steps" in refused
    assert "--yes" in refused
    assert files() == before
    assert "starts only with --yes" in answer(capsys, *given, "--dry-run")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_studys_recipe_is_not_refused_on_any_known_card(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_name", lambda device: card.name)
    recipe = load_recipe("rc2020-small")
    values, name = default_ds_config(True, card)
    plan = resolve(values, recipe, world_size=1, auto_fp16=wants_fp16(torch.device("cuda")), source=name)
    time = ElectraObjective(recipe, 30_522).run_time(plan, torch.device("cuda"), steps=1_000_000, threads=None)
    assert time is not None
    assert time.range_s[0] <= time.range_s[1]
    assert not time.may_take_years
    endless = ElectraObjective(recipe, 30_522).run_time(plan, torch.device("cuda"), steps=10**11, threads=None)
    assert endless is not None
    assert endless.may_take_years


def test_an_unknown_gpus_time_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_name", lambda device: "NVIDIA Unheard-of 9000")
    recipe = small_recipe()
    plan = resolve({}, recipe, world_size=1, auto_fp16=False, source="x")
    cuda = torch.device("cuda")
    assert ElectraObjective(recipe, 400).run_time(plan, cuda, steps=10**9, threads=None) is None
    assert finetuning_time(10**8, 12, 4096, plan, cuda, steps=10**9, threads=1) is None


def test_time_on_a_cpu_grows_with_flops_and_operations_and_shrinks_with_ranks() -> None:
    """Each call measures the rates anew, which vary by less than this."""
    one, ten, two_ranks = cpu_time(1e12, 0, 1), cpu_time(1e13, 0, 1), cpu_time(1e13, 0, 1, world_size=2)
    assert 3 < ten.range_s[0] / one.range_s[0] < 30
    assert 0.6 < ten.range_s[0] / two_ranks.range_s[0] < 6
    assert one.range_s[0] < one.range_s[1]
    assert 3 < cpu_time(0, 1e6, 1).range_s[0] / cpu_time(0, 1e5, 1).range_s[0] < 30


def test_the_machine_is_measured_only_for_a_run_that_may_take_a_year(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr("electra_ds.pretraining.run_time.cpu_rates", lambda threads: measured.append(1) or (1e11, 1e-5))
    assert not cpu_time(1e15, 1e6, 1).may_take_years
    assert measured == []
    assert not cpu_time(1e17, 0, 1).may_take_years  # which a slow CPU would not finish in one
    assert cpu_time(1e19, 0, 1).may_take_years
    assert cpu_time(0, 1e12, 1).may_take_years
    assert len(measured) == 3


def test_times_of_calls_that_other_programs_delayed_do_not_count() -> None:
    delays = itertools.chain([0.02, 0.02, 0.02], itertools.repeat(0))
    assert shortest_s(lambda: time.sleep(next(delays))) < 0.01


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("overrides", [(), ("global_batch_size=2", "model.num_hidden_layers=1")], ids=["small", "tiny"])
def test_the_predicted_time_on_a_cpu_contains_that_of_a_small_model(
    overrides: tuple[str, ...], tmp_path: Path, store: TokenStore
) -> None:
    """Both times are the shortest of several, and are measured up to three times, since other programs delay them."""
    assert any(is_predicted(overrides, tmp_path / str(attempt), store) for attempt in range(3))


def is_predicted(overrides: tuple[str, ...], folder: Path, store: TokenStore) -> bool:
    times: list[float] = []

    class Clock(Callback):
        def on_report(self, progress: Progress, summary: str) -> None:
            times.append(time.perf_counter())

    recipe = small_recipe("schedule.total_steps=40", "schedule.warmup_steps=4", *overrides)
    pretrain(
        recipe, ds_config="cpu", data=store.path, run_dir=folder, threads=1, log_every=1,
        eval_windows=8, callbacks=[Clock()], quiet=True,
    )  # fmt: skip
    shortest = min(after - before for before, after in itertools.pairwise(times))
    vocab_size = store.tokenizer.vocab_size
    found = ElectraObjective(recipe, vocab_size).run_time(cpu_plan(recipe), torch.device("cpu"), steps=1, threads=1)
    assert found is not None
    return found.range_s[0] < shortest < found.range_s[1]
