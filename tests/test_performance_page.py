"""The numbers in docs/performance.md, made anew from the code that they are about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from electra_ds.config.cards import Card, find_card, peak_flops
from electra_ds.config.deepspeed import resolve
from electra_ds.config.recipe import load_recipe
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.run_time import SLOWER, StepFlops, step_flops, step_time, time_of_steps
from tests.helpers import REPOSITORY, shape_of
from tests.report.published_runs import evidence

RECIPE = load_recipe("rc2020-small", [])
VOCABULARY = RECIPE.tokenizer.vocab_size
ROWS, LENGTH = RECIPE.global_batch_size, RECIPE.data.sequence_length
SHAPE = shape_of(RECIPE, VOCABULARY)
OURS = step_flops(SHAPE, [LENGTH] * ROWS, round(RECIPE.masking.mlm_probability * ROWS * LENGTH))
THEIRS = step_flops(SHAPE, [LENGTH] * ROWS, LENGTH * ROWS)
TEXT = (REPOSITORY / "docs" / "performance.md").read_text("utf8")
PROSE = " ".join(TEXT.split())
DAY_S = 86_400
FP16 = resolve({"fp16": {"enabled": True}}, RECIPE, world_size=1, auto_fp16=True, source="fp16")
LAYOUTS = ("padded_to_row", "padded_to_longest", "transformers")


def table(*header: str) -> list[list[str]]:
    """Cells of the page's table whose header begins so."""
    found: list[list[str]] = []
    inside = False
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and tuple(cells[: len(header)]) == header:
            inside = True
        elif inside and not line.startswith("|"):
            break
        elif inside and not line.startswith("| ---"):
            found.append(cells)
    return found


def days(step_s: float) -> float:
    return step_s * RECIPE.schedule.total_steps / DAY_S


def card_and_peak(name: str) -> tuple[Card, float]:
    card = find_card(name)
    assert card is not None
    peak = peak_flops(card, "fp16")
    assert peak is not None
    return card, peak


def floor_days(name: str) -> float:
    return days(OURS.forward_and_backward / card_and_peak(name)[1])


def test_the_flops_by_part_are_those_that_the_code_counts() -> None:
    def row(name: str, part: Callable[[StepFlops], int]) -> list[str]:
        return [name, *(f"{3 * part(flops) / 1e9:.1f}" for flops in (OURS, THEIRS))]

    expected = [
        row(f"{network}, {part}", lambda flops, network=network, part=part: getattr(flops.networks[network], part))
        for network in ("generator", "discriminator")
        for part in ("encoder", "attention", "head")
    ]
    expected.append(
        row("embedding projections", lambda flops: sum(each.projection for each in flops.networks.values()))
    )
    expected.append(["all", *(f"{flops.forward_and_backward / 1e9:.1f}" for flops in (OURS, THEIRS))])
    assert table("part", "ours") == expected
    assert f"{OURS.forward_and_backward * RECIPE.schedule.total_steps / 1e18:.3f} EFLOP" in PROSE


def test_the_floors_are_those_of_the_flops_and_the_cards() -> None:
    parameters = sum(parameter.numel() for parameter in Electra(RECIPE, VOCABULARY, 0).parameters())
    # Of a parameter: the half weight read by both passes and written (6), the half gradient written, read for the norm
    # and read for the update (6), master weight and two moments in fp32 read and written (24).
    traffic_bytes = 4 * 1.47 * 2**30 + 36 * parameters
    assert f"{parameters / 1e6:.1f} M parameters: {traffic_bytes / 1e9:.1f} GB a step" in PROSE
    rows = table("card", "peak, TFLOP/s")
    assert len(rows) == 6
    for row in rows:
        card, peak = card_and_peak(row[0])
        floor = floor_days(row[0])
        traffic = days(traffic_bytes / (card.bandwidth_gb_s * 1e9))
        assert row[1:] == [f"{peak / 1e12:g}", f"{floor:.3g}", f"{floor / 0.35:.3g}", f"{traffic:.2g}"]


def test_shares_of_the_peak_and_predictions_follow_from_what_stands_beside_them() -> None:
    rows = table("card", "published, days")
    assert [row[0] for row in rows] == [row[0] for row in table("card", "peak, TFLOP/s")]
    for name, published, share, roofline_ms, predicted in rows:
        expected = "–" if published == "–" else f"{100 * floor_days(name) / float(published.split()[0]):.1f} %"
        assert share == expected, name
        time = step_time(SHAPE, FP16, card_and_peak(name)[0])
        assert time is not None
        assert roofline_ms == f"{time.roofline_s * 1e3:.3g}"
        span = time_of_steps(time, RECIPE.schedule.total_steps)
        assert span is not None
        low, high = span.range_s[0] / 86_400, span.range_s[1] / 86_400
        assert predicted == f"{low:.2g} to {high:.2g}", name
        if published != "–":
            assert low <= float(published.split()[0]) <= high, name
    low, high = SLOWER
    assert f"times {low} to {high}" in PROSE


def test_the_range_is_that_of_all_published_runs_over_our_roofline_and_the_page_has_each() -> None:
    found = sorted(evidence(), key=lambda each: each.factor)
    assert (math.floor(10 * found[0].factor) / 10, math.ceil(10 * found[-1].factor) / 10) == SLOWER
    assert table("published", "tokens") == [
        [
            each.publication.short, str(each.recipe.data.sequence_length), each.run.card, each.run.precision,
            f"{1e3 * each.step_s:,.0f}", each.precision, f"{1e3 * each.time.roofline_s:,.0f}", f"{each.factor:.2f}",
        ]
        for each in found
    ]  # fmt: skip


RESULTS: dict[str, Any] = json.loads((REPOSITORY / "benchmarks" / "results" / "cpu-1-thread.json").read_text("utf8"))


def ratio(values: dict[str, Any]) -> str:
    low, high = values["speed_quartiles"]
    return f"{values['speed']:.2f} ({low:.2f} to {high:.2f})"


def test_what_was_measured_is_what_the_benchmark_wrote() -> None:
    rows = []
    for dtype, sizes in RESULTS["step_vs_transformers"].items():
        for size, values in sizes.items():
            steps = RESULTS["step"][dtype][size]
            beside_fp32 = f"{values['speed_vs_fp32']:.2f}" if "speed_vs_fp32" in values else "–"
            shares = (f"{steps[who]['mfu_of_measured_peak']:.0%}" for who in ("deepspeed", "transformers"))
            rows.append([size, dtype, ratio(values), f"{values['peak_step_memory']:.2f}", beside_fp32, *shares])
    assert table("rows", "dtype") == rows

    parts = RESULTS["parts"]["deepspeed_vs_transformers"]
    assert table("part", "fp32") == [[part, *(ratio(parts[dtype][part]) for dtype in parts)] for part in parts["fp32"]]

    mixed, engines = RESULTS["mixed_lengths"], RESULTS["deepspeed_vs_plain"]["fp32"]
    measured = [*engines.values(), *(mixed[f"packed_vs_{name}"] for name in LAYOUTS)]
    measured.append(RESULTS["unpadded"]["packed_vs_padded_to_row"])
    assert [row[1] for row in table("what", "ratio")] == [ratio(values) for values in measured]
    for name in ("windows", "two_segments"):
        assert f"{RESULTS['data_path'][name]['tokens_per_s'] / 1e6:.1f} M" in PROSE


def test_what_checkpoints_cost_is_what_the_benchmark_wrote() -> None:
    path = REPOSITORY / "benchmarks" / "results" / "cpu-checkpoints.json"
    measured = json.loads(path.read_text("utf8"))["checkpoints"]
    costs, ratios = [], []
    for model, found in measured.items():
        seconds = {name: f"{value:.2f}" for name, value in found["seconds"].items()}
        name = f"{model}, {found['parameters'] / 1e6:.1f} M parameters"
        ours = [f"{found['bytes'] / 1e9:.2f}", *(seconds[key] for key in ("stall", "save", "load"))]
        theirs = [
            f"{found['deepspeed_bytes'] / 1e9:.2f}",
            *(seconds[f"deepspeed_{key}"] for key in ("save", "save", "load")),
        ]
        costs += [[name, "electra_ds", *ours], [name, "DeepSpeed", *theirs]]
        ratios.append([name, *(ratio(found[f"{key}_vs_deepspeed"]) for key in ("stall", "save", "load"))])
    assert table("model", "written by") == costs
    assert table("model", "training waits") == ratios
