"""bin/plan: what it predicts, and what it says of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from electra_ds.api.plan import plan
from electra_ds.config.cards import CARDS, Card, find_card, missing_features
from electra_ds.config.deepspeed import default_ds_config, read_deepspeed_json
from electra_ds.config.names import ds_config_names, recipe_names
from electra_ds.config.recipe import load_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.pretraining.memory import Phase, peak_memory
from electra_ds.pretraining.objectives.electra import ElectraObjective
from electra_ds.report.forecast import GIB, Forecast, as_json, forecast, forecast_all, forecasts_table
from electra_ds.sweep.forecast import plan_sweep
from electra_ds.sweep.sweep_file import parse_sweep
from tests import forks
from tests.helpers import REPOSITORY, shape_of
from tests.pretraining.test_pretrain import run
from tests.report.published_runs import evidence, publications

CARD_JSONS = [card.ds_config for card in CARDS if card.ds_config is not None]


def card_of(name: str) -> Card:
    card = find_card(name)
    assert card is not None
    return card


def planned(ds_config: str, *overrides: str, recipe: str = "rc2020-small", **options: Any) -> Forecast:
    options.setdefault("card", find_card(ds_config))
    return forecast(load_recipe(recipe, list(overrides)), read_deepspeed_json(ds_config), ds_config, **options)


def test_the_studys_electra_small_fits_a_gtx_1060_with_the_display_attached() -> None:
    found = planned("gtx1060-6gb")
    assert found.budget_bytes == pytest.approx(5.2 * GIB)
    assert found.needed_bytes < 5.2e9  # in GB too
    assert found.fits
    assert (found.plan.batch.micro_batch_size, found.plan.batch.gradient_accumulation_steps) == (128, 1)
    assert found.plan.precision.name == "fp16"
    assert {feature.what for feature in found.missing} == {"tensor cores", "bf16", "flash attention", "torch.compile"}


@pytest.mark.parametrize("name", CARD_JSONS)
def test_a_cards_json_takes_about_half_of_it(name: str) -> None:
    size = read_deepspeed_json(name)["train_micro_batch_size_per_gpu"]
    assert size & (size - 1) == 0
    assert planned(name, f"global_batch_size={size}").needed_bytes <= 0.55 * card_of(name).usable_gib * GIB
    twice = {"train_micro_batch_size_per_gpu": 2 * size}
    larger = forecast(
        load_recipe("rc2020-small", [f"global_batch_size={2 * size}"]), read_deepspeed_json(name) | twice, name,
        card=card_of(name),
    )  # fmt: skip
    assert larger.needed_bytes > 0.55 * card_of(name).usable_gib * GIB


def test_there_is_a_json_for_each_card_that_people_ask_about() -> None:
    assert set(ds_config_names()) == {*CARD_JSONS, "cpu", "zero1", "zero2", "zero3-offload"}
    for card in CARDS:
        if card.ds_config is not None:
            values = read_deepspeed_json(card.ds_config)
            assert values["zero_optimization"] == {"stage": 0}
            assert ("bf16" in values) == (card.bf16_tflops is not None)


def test_the_page_on_hardware_has_every_card() -> None:
    page = (REPOSITORY / "docs" / "hardware.md").read_text("utf8")
    for card in CARDS:
        major, minor = card.capability
        lacking = ", ".join(feature.what for feature in missing_features(card.name, card.capability)) or "–"
        json_name = f"`{card.ds_config}`" if card.ds_config is not None else "–"
        row = f"| {card.name} | {major}.{minor} | {card.usable_gib:.1f} | {json_name} | {lacking} |"
        assert row in page.splitlines()


def test_parts_add_up_and_the_peak_is_the_fullest_moment() -> None:
    memory = planned("rtx3090-24gb").memory
    for phase in memory.phases.values():
        assert phase.total == sum(getattr(phase, name) for name in Phase._fields)
    assert memory.allocated_bytes == memory.backward.total
    assert memory.backward.activations > memory.head.activations > memory.update.activations == 0
    assert memory.card_bytes > memory.allocated_bytes


def test_sharding_over_ranks_leaves_each_card_less(tmp_path: Path) -> None:
    one, four = (planned("zero1", card=card_of("RTX 3090"), world_size=ranks) for ranks in (1, 4))
    assert four.plan.batch.micro_batch_size == 32
    assert four.memory.update.optimizer == one.memory.update.optimizer // 4
    offloaded = planned("zero3-offload", card=card_of("RTX 3090"), world_size=2).memory
    assert offloaded.update.optimizer == 0
    assert offloaded.host_bytes > 0
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        planned("zero1", card=card_of("RTX 3090"), world_size=3)


def test_a_gtx_16_is_planned_in_fp32_where_the_json_leaves_it_open_and_warned_of_in_fp16() -> None:
    card = card_of("GTX 1660 Ti")
    assert planned("zero1", card=card).plan.precision.name == "fp32"
    fp16 = planned("gtx1060-6gb", card=card)
    fp32 = planned("zero1", card=card)
    assert fp16.time is not None
    assert fp32.time is not None
    assert fp16.time.roofline_s > 3 * fp32.time.roofline_s
    assert "slower than fp32" in fp16.missing[0].consequence
    assert any("fp16 is enabled on NVIDIA GeForce GTX 1660 Ti" in note for note in fp16.plan.notes)
    assert fp32.plan.notes == ('fp16.enabled is "auto", which here means off',)


def test_what_a_card_cannot_do_at_all_is_refused_with_what_it_can() -> None:
    with pytest.raises(ConfigError, match=r"GTX 1060 6GB has no bf16, which rtx3090-24gb asks for. Use fp16"):
        planned("rtx3090-24gb", card=card_of("gtx1060-6gb"))


def test_too_little_memory_is_said_and_the_micro_batch_that_fits_is_named() -> None:
    little = planned("gtx1060-6gb", card=None, memory_gib=1.5)
    assert not little.fits
    assert little.largest is not None
    fitting = little.largest.batch.micro_batch_size
    assert 16 <= fitting < 128
    assert planned("gtx1060-6gb", card=None, memory_gib=0.3).largest is None
    left_open = planned("zero1", card=None, memory_gib=1.5)
    assert left_open.fits
    assert left_open.plan.batch.micro_batch_size < 128


def printed_days(found: Forecast) -> tuple[float, float]:
    """The range as it is printed, rounded."""
    low, high, unit = re.fullmatch(r"([\d.]+)–([\d.]+) (d|h)", str(found.run_time())).groups()  # type: ignore[union-attr]
    return float(low) / {"d": 1, "h": 24}[unit], float(high) / {"d": 1, "h": 24}[unit]


def test_every_published_time_lies_in_the_range_that_is_printed_for_its_card() -> None:
    compared = []
    for each in evidence():
        if each.run.days is not None:
            card = card_of(each.run.card)
            low, high = printed_days(forecast(each.recipe, *default_ds_config(True, card), card=card))
            assert low <= each.run.days <= high, (each.recipe.name, card.name)
            compared.append(each.run.days)
    assert set(compared) == {3.75, 4, 13, 21}


def test_our_predicted_memory_is_below_that_of_published_runs() -> None:
    for publication in publications():
        recipe = load_recipe(publication.recipe, publication.overrides)
        for theirs in publication.memory:
            cut = planned("gtx1080ti-11gb").plan.with_micro_batch(128 // theirs.gradient_accumulation_steps)
            ours = peak_memory(shape_of(recipe, recipe.tokenizer.vocab_size), cut)
            assert ours.card_bytes < theirs.memory_gb * 1e9


def test_the_page_on_performance_sums_up_the_factors_on_cpus_that_were_measured() -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text("utf8")
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    measured = [float(row[3]) for row in rows if len(row) > 5 and row[2] in ("8", "32") and row[4][:2] == "0."]
    measured += [float(row[3].split()[0]) for row in rows if len(row) > 5 and row[1] in ("8", "32")]
    assert len(measured) == 8
    assert f"On CPUs our step was {min(measured):.1f} to {max(measured):.1f} times as fast as transformers'" in page


def test_days_shrink_with_the_card() -> None:
    assert printed_days(planned("h200-141gb"))[1] < printed_days(planned("gtx1060-6gb"))[0]


def command(*arguments: str, status: int = 0) -> str:
    result = run("plan", *arguments, status=status)
    return " ".join((result.stdout if status == 0 else result.stderr).split())


def test_the_command_says_all_of_it() -> None:
    said = command("--recipe", "rc2020-small", "--ds-config", "gtx1060-6gb")
    assert "on NVIDIA GeForce GTX 1060 6GB: fp16, ZeRO stage 0" in said
    assert re.search(r"= \d\.\d\d GiB of 5.20 GiB \(6 GiB less 0.8 for the display and the driver\): fits", said)
    assert "torch.compile: Triton needs 7.0" in said
    for part in Phase._fields:
        assert part in said
    assert "--micro-batch" not in said
    too_small = run("plan", "--ds-config", "gtx1060-6gb", "--memory-gb", "1.5", status=1).stdout
    assert "does not fit. Largest micro-batch that fits: 32 x 4" in " ".join(too_small.split())
    assert "fits." in command("--ds-config", "cpu", "--recipe", "tiny")


def test_without_arguments_the_plan_is_for_what_this_machine_would_run() -> None:
    """A CPU, as far as tests know."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = command()
    assert "tiny with cpu on this machine's CPU: fp32" in said
    assert re.search(r"Time: [\d.]+–[\d.]+ (s|min|h|d) for 12,000 steps. This is 1.2 to 6.0 times the sum", said)
    assert "rc2020-small with rtx3090-24gb on NVIDIA GeForce RTX 3090" in command("--card", "RTX 3090")


def test_a_plan_for_this_cpu_has_the_time_that_a_dry_run_predicts() -> None:
    """Both measure the machine, whose rate varies by less than threefold meanwhile."""
    found = forecast(load_recipe("mini"), {}, "mine", card=None)
    ours = found.run_time()
    theirs = ElectraObjective(found.recipe, found.vocab_size).run_time(
        found.plan, torch.device("cpu"), steps=found.recipe.schedule.total_steps,
        threads=None,
    )  # fmt: skip
    assert ours is not None
    assert theirs is not None
    assert theirs.range_s[0] / 3 < ours.range_s[0] < theirs.range_s[0] * 3
    assert ours.range_s[1] / ours.range_s[0] == pytest.approx(theirs.range_s[1] / theirs.range_s[0])
    low, high = as_json(found)["days"]
    assert 0 < low < high
    assert forecast(load_recipe("mini"), {}, "mine", card=None, memory_gib=8).run_time() is None


def test_a_recipe_too_large_for_a_cards_json_is_planned_for_every_card_with_the_micro_batch_that_fits() -> None:
    found = {each.card: each for each in forecast_all([load_recipe("electra-base")])}
    card = card_of("RTX 3090")
    assert forecast(load_recipe("electra-base"), *default_ds_config(True, card), card=card).fits is False
    assert found[card].fits
    assert str(found[card].plan.batch) == "64 x 4 x 1 rank(s)"
    table = forecasts_table(list(found.values()))
    cells = {row[0]: row[2] for row in table.rows}
    assert (cells["RTX 3090"], cells["RTX 4090"]) == ("64 x 4 *", "64 x 4")


def test_the_table_of_base_and_large_is_what_the_plan_predicts() -> None:
    page = (REPOSITORY / "docs" / "recipes.md").read_text("utf8")
    rows = re.findall(
        r"^\| `(electra-\w+)` \| (\d) x ([^|]+?) \| `([\w-]+)` \| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", page, re.M
    )
    assert len(rows) == 9
    for recipe, ranks, card, ds_config, batch, gib, time in rows:
        found = plan(recipe, card=card, ds_config=ds_config, ranks=int(ranks), micro_batch="auto")
        plan_batch, needed = found.plan.batch, found.needed_bytes
        assert found.fits
        assert needed is not None
        assert batch == f"{plan_batch.micro_batch_size} x {plan_batch.gradient_accumulation_steps}"
        assert (gib, time) == (f"{needed / GIB:.1f}", str(found.run_time()))


@pytest.mark.parametrize("card", ["RTX 4090", "cpu"])
def test_a_plan_includes_the_pretraining_of_the_generator_that_the_recipe_names(card: str) -> None:
    found, first = plan("tiny-two-stage", card=card), plan("tiny-generator", card=card)
    alone = plan("tiny-two-stage", card=card, overrides={"generator.recipe": None})
    assert found.steps() == first.steps() + alone.steps() == 3_500 + 18_000
    assert found.needed_bytes == max(first.needed_bytes, alone.needed_bytes) > alone.needed_bytes
    if card != "cpu":
        low, high = (a + b for a, b in zip(first.run_time().range_s, alone.run_time().range_s, strict=True))
        assert found.run_time().range_s == pytest.approx((low, high))
        assert as_json(found)["days"] == pytest.approx([low / 86_400, high / 86_400])
        assert as_json(found)["generator"]["days"] == as_json(first)["days"]
    said = command("--card", card, "--recipe", "tiny-two-stage")
    assert "for the 3,500 steps of the generator, which is pretrained first, and" in said
    values = {"name": "x", "pretrain": {"recipe": "tiny-two-stage"}}
    table, *_ = plan_sweep(parse_sweep(values), local=True)
    assert "21,500" in table.rows[0]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("RTX4090", "NVIDIA GeForce RTX 4090"), ("rtx-3060ti", "NVIDIA GeForce RTX 3060 Ti"),
        ("RTX 5070 Ti", "NVIDIA GeForce RTX 5070 Ti"), ("A6000", "NVIDIA RTX A6000"), ("RTX A6000", "NVIDIA RTX A6000"),
        ("L4", "NVIDIA L4"), ("L40S", "NVIDIA L40S"), ("a10", "NVIDIA A10"),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation"), ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("RTX 4060 Ti 16 GB", "NVIDIA GeForce RTX 4060 Ti 16GB"), ("B200", "NVIDIA B200"),
    ],
)  # fmt: skip
def test_the_cards_that_people_have_are_planned_without_a_json_however_their_names_are_spelled(
    asked: str, name: str
) -> None:
    assert card_of(asked).name == name
    found = forecast(load_recipe("rc2020-small"), *default_ds_config(True, card_of(asked)), card=card_of(asked))
    assert (found.plan.precision.name, found.fits, found.ds_config) == ("fp16", True, "the default JSON for any GPU")
    assert found.run_time() is not None


def test_a_card_needs_no_json_and_no_recipe() -> None:
    said = command("--card", "RTX4090")
    assert "rc2020-small with the default JSON for any GPU on NVIDIA GeForce RTX 4090: fp16" in said
    assert re.search(r"Time: [\d.]+–[\d.]+ (h|d) for 1,000,000 steps. The roofline of a step is", said)


def test_every_name_means_one_card() -> None:
    for card in CARDS:
        assert all(find_card(name) is card for name in (card.name, *card.aliases))
    assert find_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None


@pytest.mark.parametrize(
    ("name", "fp32", "half", "bandwidth"),
    [  # as NVIDIA's white papers print them, and for the last three its data sheets
        ("RTX 2080 Ti", 13.4, 53.8, 616), ("RTX 3080", 29.8, 59.5, 760), ("RTX 3090", 35.6, 71, 936),
        ("RTX 4090", 82.6, 165.2, 1008), ("RTX 5090", 104.8, 209.5, 1792), ("A10", 31.2, 125, 600),
        ("L40S", 91.6, 362.05, 864), ("RTX A6000", 38.7, 154.8, 768),
    ],
)  # fmt: skip
def test_rates_are_those_that_the_maker_prints(name: str, fp32: float, half: float, bandwidth: float) -> None:
    card = card_of(name)
    assert (card.fp32_tflops, card.fp16_tflops) == pytest.approx((fp32, half), rel=4e-3)
    assert card.bandwidth_gb_s == pytest.approx(bandwidth, rel=1e-3)
    assert card.bf16_tflops == (card.fp16_tflops if card.capability >= (8, 0) else None)


@pytest.mark.slow
def test_the_table_has_every_card_and_every_recipe_of_electra() -> None:
    said = json.loads(command("--all", "--json"))
    assert {(row["card"], row["recipe"]) for row in said} == {
        (card.name, name) for card in CARDS for name in recipe_names() if load_recipe(name).objective == "electra"
    }
    large = ("-base", "-large", "++")
    assert all(row["fits"] for row in said if not row["recipe"].endswith(large))
    assert any(row["fits"] for row in said if row["recipe"] == "electra-large")
    assert {row["ds_config"] for row in said} == {*CARD_JSONS, "the default JSON for any GPU"}
    assert {row["precision"] for row in said if row["card"].startswith("NVIDIA GeForce GTX 16")} == {"fp32"}
    shown = forks.run("plan", "--all", environment={"COLUMNS": "100"}).stdout  # 80 columns break the longest names
    assert all(card.name.removeprefix("NVIDIA ").removeprefix("GeForce ") in shown for card in CARDS)


def test_the_examples_of_help_work() -> None:
    lines = run("plan", "--help").stdout.splitlines()
    examples = [re.split(r"\s{2,}", line.strip())[0] for line in lines if line.startswith(f"  {REPOSITORY}/bin/plan")]
    assert len(examples) >= 6
    for example in examples:
        assert "GiB" in command(*shlex.split(example)[1:])


def test_layers_that_are_computed_again_take_less_memory_and_more_time() -> None:
    recipe = load_recipe("rc2020-small", [])
    found = []
    for layers in (None, 6, 12):
        values = read_deepspeed_json("gtx1060-6gb")
        if layers is not None:
            values = values | {"activation_checkpointing": {"number_checkpoints": layers}}
        found.append(forecast(recipe, values, "mine", card=card_of("gtx1060-6gb")))
    needed = [item.needed_bytes for item in found]
    seconds = [item.time.roofline_s for item in found if item.time is not None]
    assert needed == sorted(needed, reverse=True)
    assert seconds[2] / seconds[0] == pytest.approx(1.37)
    assert (seconds[1] / seconds[0] - 1) * 2 == pytest.approx(0.37)


def test_json_has_every_number() -> None:
    row = json.loads(command("--ds-config", "v100-16gb", "--json"))
    assert row["needed_bytes"] <= row["usable_bytes"]
    assert row["memory_bytes"]["backward"]["at_once"] == row["allocated_bytes"]
    assert row["step_s"]["products_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ds-config", "zero1"), "No card 'zero1' is known. "),
        (("--card", "RTX 4090 Ti"), "'NVIDIA GeForce RTX 4090'"),
        (("--card", "L4OS"), "No card 'L4OS' is known. The nearest names are 'NVIDIA L40S', 'NVIDIA L4'. "),
        (("--card", "4080"), "nearest names are 'NVIDIA GeForce RTX 4080', 'NVIDIA GeForce RTX 4080 SUPER'. "),
        (("--card", "abacus"), f"Give a known one as --card ({REPOSITORY}/bin/plan --all lists them)"),
        (("--card", "gtx1060"), "The nearest names are 'NVIDIA GeForce GTX 1060 6GB'. "),
        (("--ds-config", "gtx1060-6gb", "--vocab-size", "9" * 400), "is not a positive whole number"),
        (("--ds-config", "gtx1060-6gb", "--card", "GTX 1060"), "The nearest names are 'NVIDIA GeForce GTX 1060 6GB'. "),
        (("--all", "--set", "seed=3"), "name the one that --set changes with --recipe"),
        (("--ds-config", "gtx1060-6gb", "--micro-batch", "0"), "'0' is not a positive whole number"),
        (("--ds-config", "gtx1060-6gb", "--micro-batch", "3"), "train_micro_batch_size_per_gpu 3 x"),
        (("--ds-config", "gtx1060-6gb", "--card", "T4", "--memory-gb", "8"), "not allowed with argument"),
        (("--ds-config", "gtx1060-6gb", "--memory-gb", "lots"), "'lots' is not a number of GiB"),
        (("--ds-config", "gtx1060-6gb", "--memory-gb", "nan"), "'nan' is not a number of GiB"),
        (("--all", "--card", "T4"), "--all shows each card alone with its own JSON"),
        (("--ds-config", "gtx1060-6gb", "--set", "model.hidden=3"), "model.hidden"),
        (("--ds-config", "gtx1060-6gb", "--ranks", "7"), "cannot be split over 7 ranks"),
    ],
)
def test_bad_arguments_are_answered_in_one_sentence(arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in command(*arguments, status=2)
