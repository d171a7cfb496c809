"""A pretrained run as transformers folders, with tokenizer and model card; and the folder of any export, which appears
complete or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError
from electra_ds.core.files import is_hub_model
from electra_ds.pretraining.objectives.base import Export
from electra_ds.pretraining.trained import load_model
from electra_ds.training.recorded import beside, newest_checkpoint
from electra_ds.training.tracking import read_metrics

_LONGEST_NAME = 200


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


# --- the folder of an export


def check_out(out: Path) -> None:
    """Raise CheckpointError unless a folder can be made there, or an empty one be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} is a link or a file, and an export is a folder. Give another --out.")
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} already exists and is not empty. Delete it, or give another --out.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, which becomes `out` at the end, or is removed if anything is raised.

    Raises CheckpointError if it cannot be written.
    """
    partial = unfinished(out, secrets.token_hex(4))
    try:
        partial.mkdir(parents=True)
        yield partial
        _give_usual_modes(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it is gone if all went well


def _give_usual_modes(folder: Path) -> None:
    """Give all files the permissions of the umask; safetensors writes files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def unfinished(out: Path, token: str) -> Path:
    """Return the hidden folder next to `out` in which the export is made. The token makes its name unique."""
    return out.parent / f".{out.name[:_LONGEST_NAME]}.{token}"


def cannot_write(out: Path, error: Exception) -> CheckpointError:
    """Return the error of an export that could not be written."""
    advice = " Make room, then start it again." if devices.is_disk_full(error) else ""
    return CheckpointError(f"Cannot write the export {out}: {error}.{advice}")


def published_name(source: str) -> str:
    """Return the name for a published model card: a Hub name, or a folder's own without its path on this machine."""
    path = Path(source)
    if is_hub_model(source):
        return source
    return f"{path.parent.name}/{path.name}" if path.name in ("generator", "discriminator") else path.name
