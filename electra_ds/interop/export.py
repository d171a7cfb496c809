"""Export a pretrained run as transformers folders with tokenizer and model card. Any export's folder appears complete
or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

from electra_ds.config.run_directory import RunDirectory
from electra_ds.core import devices
from electra_ds.core.errors import CheckpointError
from electra_ds.interop.model_cards import NO_FACTS, Facts, pretrained_card
from electra_ds.pretraining.evaluation import load_model
from electra_ds.training.checkpoints import default_export_folder, newest_checkpoint

_LONGEST_NAME = 200


def export_run(run_or_checkpoint: Path, out: Path | None, facts: Facts = NO_FACTS) -> str:
    """Write each of the objective's networks into a folder in `out`, and return a description of them.

    Raises CheckpointError if there is nothing to export, or `out` already holds something.
    """
    checkpoint = newest_checkpoint(run_or_checkpoint)
    out = out or default_export_folder(checkpoint, "export")
    check_out(out)
    model, objective, tokenizer, recipe = load_model(checkpoint)
    sources = RunDirectory(checkpoint.path).read_record().initialised_from
    exports = objective.exports(model)
    logging.disable_progress_bar()  # which would show a single shard
    with new_folder(out) as partial:
        for name, exported in exports.items():
            exported.model.save_pretrained(partial / name)
            tokenizer.save(partial / name, recipe.model.max_position_embeddings)
            (partial / name / "README.md").write_text(
                pretrained_card(name, exported, recipe, tokenizer.vocab_size, checkpoint, sources, facts), "utf8"
            )
    return "\n".join(
        f"{out / name}: {exported.loaded_by}, which {exported.purpose}" for name, exported in exports.items()
    )


# --- the folder of an export


def check_out(out: Path) -> None:
    """Raise CheckpointError unless `out` does not exist yet or is an empty folder."""
    try:
        is_other = out.is_symlink() or (out.exists() and not out.is_dir())
        is_full = out.is_dir() and any(out.iterdir())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise CheckpointError(f"Cannot write to {out}: {error.strerror}. Give another --out.") from error
    if is_other:
        raise CheckpointError(f"{out} is a link or a file, but an export is a folder. Give another --out.")
    if is_full:
        raise CheckpointError(f"{out} already exists and is not empty. Delete it, or give another --out.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into. It becomes `out` at the end, or is removed after an error.

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
        shutil.rmtree(partial, ignore_errors=True)  # it is gone after success


def _give_usual_modes(folder: Path) -> None:
    """Give all files the umask's permissions, since safetensors writes files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def unfinished(out: Path, token: str) -> Path:
    """Return the hidden folder next to `out` in which the export is made. token: makes its name unique."""
    return out.parent / f".{out.name[:_LONGEST_NAME]}.{token}"


def cannot_write(out: Path, error: Exception) -> CheckpointError:
    """Return the error of an export that could not be written."""
    advice = " Free some space, then start it again." if devices.is_disk_full(error) else ""
    return CheckpointError(f"Cannot write the export {out}: {error}.{advice}")
