"""A name stands for one quantity in the progress line, the evaluation, the summary, metrics.jsonl and the curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from electra_ds import cli
from electra_ds.config.run_directory import read_metrics
from electra_ds.data.token_store import TokenStore
from tests.helpers import SMALL


def test_every_number_that_a_run_shows_is_the_one_that_its_name_has_in_the_metrics(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    cli.main([
        "pretrain", "--ds-config", "cpu", "--recipe", "tiny", "--data", str(store.path), "--threads", "1",
        "--run-dir", str(tmp_path / "run"), "--log-every", "1", "--eval-every", "6",
        "--set", *SMALL, "schedule.total_steps=6", "schedule.warmup_steps=1",
    ])  # fmt: skip
    said = capsys.readouterr().out
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    train = {line["step"]: line for line in lines if line["kind"] == "train"}
    (held_out,) = (line for line in lines if line["kind"] == "eval")
    shown = re.findall(r"step (\d+)/6  generator loss ([\d.]+)  discriminator loss ([\d.]+)", said)
    assert shown[-1][0] == "6"
    for step, generator, discriminator in shown:
        assert float(generator) == pytest.approx(train[int(step)]["generator_loss"], abs=6e-4)
        assert float(discriminator) == pytest.approx(train[int(step)]["discriminator_loss"], abs=6e-4)
    original = 1 - held_out["replaced_share"]
    assert (
        f"held out at step 6: generator loss {held_out['generator_loss']:.3f} "
        f"({held_out['generator_masked_loss']:.3f} at [MASK], a gain of {held_out['generator_gain']:+.3f} nats over "
        f"the unigram), discriminator loss {held_out['discriminator_loss']:.3f}, accuracy "
        f'{held_out["discriminator_accuracy"]:.3f} (always "original": {original:.3f}), AUC '
        f"{held_out['discriminator_auc']:.3f}"
    ) in " ".join(said.split())
    summary = (tmp_path / "run" / "summary.txt").read_text("utf8")
    for label, value in {
        "generator loss at all selected tokens": held_out["generator_loss"],
        "generator loss at [MASK]": held_out["generator_masked_loss"],
        'accuracy of always answering "original"': original,
    }.items():
        (row,) = (line for line in summary.splitlines() if label in line)
        assert f"{value:.4f}" in row
