"""A trained run as transformers folders, with tokenizer and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers.utils import logging

from electra_ds.config.recipe import Recipe, validate_recipe
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.engine.checkpoint import CheckpointFolder, load_checkpoint
from electra_ds.errors import CheckpointError
from electra_ds.model.convert import to_transformers
from electra_ds.model.electra import Electra
from electra_ds.train.tracking import read_metrics


def load_trained(run_or_checkpoint: Path) -> tuple[Electra, Tokenizer, Recipe, dict[str, Any]]:
    """(model in fp32, tokenizer, recipe, checkpoint state) of a run's newest checkpoint, or of a given one.

    Needs nothing but the folder itself. Raises CheckpointError where there is no whole checkpoint.
    """
    if (run_or_checkpoint / "manifest.json").is_file():
        checkpoint = load_checkpoint(run_or_checkpoint)
    elif (run_or_checkpoint / "run.json").is_file():
        newest, damaged = CheckpointFolder(run_or_checkpoint / "checkpoints", keep=1).load_latest()
        if newest is None:
            raise CheckpointError(f"The run {run_or_checkpoint} has no checkpoint yet.")
        for problem in damaged.values():
            print(f"Warning: {problem} Taking the one before.")
        checkpoint = newest
    else:
        raise CheckpointError(f"{run_or_checkpoint} is neither a run directory nor a checkpoint.")
    recipe = validate_recipe(
        yaml.safe_load((checkpoint.path / "recipe.yaml").read_text("utf8")), str(checkpoint.path / "recipe.yaml")
    )
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return model.eval(), tokenizer, recipe, checkpoint.state


def export_run(run_or_checkpoint: Path, out: Path | None) -> str:
    """Write `generator/` and `discriminator/` into `out`; returns what to do with them.

    Raises CheckpointError where there is nothing to export, or `out` already holds something.
    """
    is_checkpoint = (run_or_checkpoint / "manifest.json").is_file()
    run = run_or_checkpoint.parent.parent if is_checkpoint else run_or_checkpoint
    out = out or run / "export"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} already exists and is not empty. Delete it, or give another --out.")
    model, tokenizer, recipe, state = load_trained(run_or_checkpoint)
    generator, discriminator = to_transformers(model)
    logging.disable_progress_bar()  # which would count one shard
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, exported in (("generator", generator), ("discriminator", discriminator)):
            exported.save_pretrained(partial / name)
            tokenizer.save(partial / name, recipe.model.max_position_embeddings)
            (partial / name / "README.md").write_text(
                _model_card(name, recipe, tokenizer.vocab_size, state, run), "utf8"
            )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"Cannot write the export {out}: {error}.") from error
    return (
        f"{out / 'discriminator'}: the encoder to finetune, AutoModel.from_pretrained({str(out / 'discriminator')!r})\n"
        f"{out / 'generator'}: the masked language model, ElectraForMaskedLM.from_pretrained(…)"
    )


def _model_card(part: str, recipe: Recipe, vocab_size: int, state: dict[str, Any], run: Path) -> str:
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
trained. Its vocabulary has {vocab_size:,} pieces.

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
