"""A trained run as transformers folders, with tokenizer and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.interop.export_folder import check_out, new_folder, published_name
from electra_ds.pretraining.convert import to_transformers
from electra_ds.pretraining.trained import load_model
from electra_ds.training.recorded import beside, newest_checkpoint
from electra_ds.training.tracking import read_metrics


def export_run(run_or_checkpoint: Path, out: Path | None) -> str:
    """Write `generator/` and `discriminator/` into `out`; returns what to do with them.

    Raises CheckpointError if there is nothing to export, or `out` already holds something.
    """
    checkpoint = newest_checkpoint(run_or_checkpoint)
    out = out or beside(checkpoint, "export")
    check_out(out)
    model, tokenizer, recipe = load_model(checkpoint)
    sources = RunDirectory(checkpoint.path).read_record().initialised_from
    run, state = checkpoint.path.parent.parent, checkpoint.state
    generator, discriminator = to_transformers(model)
    logging.disable_progress_bar()  # which would count one shard
    with new_folder(out) as partial:
        for name, exported in (("generator", generator), ("discriminator", discriminator)):
            exported.save_pretrained(partial / name)
            tokenizer.save(partial / name, recipe.model.max_position_embeddings)
            (partial / name / "README.md").write_text(
                _model_card(name, recipe, tokenizer.vocab_size, state, run, sources), "utf8"
            )
    return (
        f"{out / 'discriminator'}: the encoder to finetune, AutoModel.from_pretrained({str(out / 'discriminator')!r})\n"
        f"{out / 'generator'}: the masked language model, ElectraForMaskedLM.from_pretrained(…)"
    )


def _model_card(
    part: str, recipe: Recipe, vocab_size: int, state: dict[str, Any], run: Path, sources: list[str]
) -> str:
    classes = {"generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"}
    used_for = {
        "generator": "fills in [MASK] tokens; it was trained to give the discriminator something to detect",
        "discriminator": "tells for every token whether it was replaced; this is the encoder to finetune",
    }
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
- electra
---

# ELECTRA {part}, recipe {recipe.name}

This model {used_for[part]}.

It was pretrained with electra_ds for {state["step"]:,} of {recipe.schedule.total_steps:,} steps on
{state["tokens"]:,} tokens, in sequences of {recipe.data.sequence_length} tokens: positions beyond that were never
trained. Its vocabulary has {vocab_size:,} pieces.{began}

```python
from transformers import AutoTokenizer, {classes[part]}

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = {classes[part]}.from_pretrained("PATH")
```
{results}
## Recipe

```json
{json.dumps(recipe.model_dump(), indent=2)}
```
"""
