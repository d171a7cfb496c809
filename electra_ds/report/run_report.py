"""A run's summary: table, curves and sample sentences, printed and written into its directory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError
from electra_ds.core.program import command
from electra_ds.core.terminal import say, say_command
from electra_ds.data.token_store import recorded_store, split_holdout
from electra_ds.pretraining.evaluation import held_out_batch
from electra_ds.pretraining.objectives.base import Objective
from electra_ds.pretraining.trained import load_trained
from electra_ds.report.figures import draw_curves
from electra_ds.training.tracking import read_metrics

_SENTENCES = 4
_SENTENCE_BATCH = 64


def report_run(run: RunDirectory, console: Console, data: Path | None = None) -> None:
    """Print and write summary.txt, curves.png and samples.txt.

    data: where the run's token store is now, if it has moved. Raises CheckpointError if there is nothing yet, and
    DataError, once the rest is printed, if the store that samples are drawn from is not there.
    """
    metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not evaluations:
        raise CheckpointError(f"The run {run.path} has no evaluation to report yet.")
    recipe, record = run.read_recipe(), run.read_record()
    trained = load_trained(run.path)
    objective = trained.objective
    table = _summary(evaluations, recipe.name, objective)
    table.caption = speed_line(metrics, record.device)
    console.print(table)
    title = f"{recipe.name}: {evaluations[-1]['step']:,} steps, {record.device}"
    draw_curves(metrics, objective.curves, title, run.path / "curves.png")

    _write(run.path / "summary.txt", table)
    remedy = f"say where it is now: {command('report')} {run.path} --data STORE"
    store = recorded_store(record, run.path, data, remedy)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    batch = held_out_batch(store, split, recipe, _SENTENCE_BATCH)
    samples = objective.samples(trained.model, trained.tokenizer, batch, _SENTENCES)
    for index, sample in enumerate(samples):
        if index > 0:
            console.print()
        console.print(sample)
    _write(run.path / "samples.txt", *samples)
    say(console, f"\nThe run is in {run.path}: curves.png, samples.txt, summary.txt, metrics.jsonl, checkpoints/.")
    if run.status() == "stopped":
        say_command(console, "To resume:", f"{command('pretrain')} --resume {run.path}")
    say_command(console, "As transformers models:", f"{command('export')} {run.path}")


def _summary(evaluations: list[dict[str, Any]], name: str, objective: Objective[Any]) -> Table:
    first, last = evaluations[0], evaluations[-1]
    table = Table(title=f"{name} on held-out text")
    table.add_column("")
    columns = [objective.complete(line) for line in ([first, last] if first is not last else [last])]
    for line in columns:
        table.add_column(f"step {line['step']:,}", justify="right")
    for key, label in objective.metric_labels.items():
        table.add_row(label, *("–" if line.get(key) is None else f"{line[key]:.4f}" for line in columns))
    return table


def speed_line(metrics: list[dict[str, Any]], device: str) -> str | None:
    """Median throughput, for a device whose peak is known; medians, since a start's first steps are slow."""
    lines = [line for line in metrics if line.get("mfu") is not None]
    if not lines:
        return None
    mfu, tokens_per_s = (statistics.median(line[key] for line in lines) for key in ("mfu", "tokens_per_s"))
    return f"{tokens_per_s:,.0f} tokens/s, {mfu:.1%} of the peak of {device} (MFU)"


def _write(path: Path, *parts: Any) -> None:
    with path.open("w", encoding="utf8") as file:
        plain = Console(file=file, width=100)
        for part in parts:
            plain.print(part)
            plain.print()
