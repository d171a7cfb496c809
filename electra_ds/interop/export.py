"""A trained run as transformers folders, with tokenizer and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.interop.export_folder import check_out, new_folder, published_name
from electra_ds.pretraining.objectives.base import Export
from electra_ds.pretraining.trained import load_model
from electra_ds.training.recorded import beside, newest_checkpoint
from electra_ds.training.tracking import read_metrics


def export_run(run_or_checkpoint: Path, out: Path | None) -> str:
    """Write each of the objective's networks into a folder of `out`; return what they are.

    Raises CheckpointError if there is nothing to export, or `out` already holds something.
    """
    checkpoint = newest_checkpoint(run_or_checkpoint)
    out = out or beside(checkpoint, "export")
    check_out(out)
    model, objective, tokenizer, recipe = load_model(checkpoint)
    sources = RunDirectory(checkpoint.path).read_record().initialised_from
    run, state = checkpoint.path.parent.parent, checkpoint.state
    exports = objective.exports(model)
    logging.disable_progress_bar()  # which would count one shard
    with new_folder(out) as partial:
        for name, exported in exports.items():
            exported.model.save_pretrained(partial / name)
            tokenizer.save(partial / name, recipe.model.max_position_embeddings)
            (partial / name / "README.md").write_text(
                _model_card(name, exported, recipe, tokenizer.vocab_size, state, run, sources), "utf8"
            )
    return "\n".join(
        f"{out / name}: {exported.loaded_by}, which {exported.purpose}" for name, exported in exports.items()
    )


def _model_card(
    part: str, exported: Export, recipe: Recipe, vocab_size: int, state: dict[str, Any], run: Path, sources: list[str]
) -> str:
    metrics_file = run / "metrics.jsonl"
    evaluations = [
        line
        for line in (read_metrics(metrics_file) if metrics_file.is_file() else [])
        if line["kind"] == "eval" and line["step"] == state["step"]
    ]
    began = ""
    if sources:
        began = f" It began with the weights of {' and '.join(map(published_name, sources))}."
    results = ""
    if evaluations:
        rows = "\n".join(
            f"| {name} | {value:.4f} |" for name, value in evaluations[-1].items() if isinstance(value, float)
        )
        results = f"\n## On held-out text\n\n| metric | value |\n| --- | --- |\n{rows}\n"
    return f"""---
library_name: transformers
tags:
- {recipe.objective}
---

# {recipe.objective.upper()} {part}, recipe {recipe.name}

This model {exported.purpose}.

It was pretrained with electra_ds for {state["step"]:,} of {recipe.schedule.total_steps:,} steps on
{state["tokens"]:,} tokens, in sequences of {recipe.data.sequence_length} tokens: positions beyond that were never
trained. Its vocabulary has {vocab_size:,} pieces.{began}

```python
from transformers import AutoTokenizer, {exported.loaded_by}

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = {exported.loaded_by}.from_pretrained("PATH")
```
{results}
## Recipe

```json
{json.dumps(recipe.model_dump(), indent=2)}
```
"""
