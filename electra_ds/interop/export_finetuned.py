"""Export a finetuned run as one transformers folder: the model with its head if transformers has a class for it, or
only the encoder.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.finetuning.encoder_source import finetuned_encoder, silent_transformers
from electra_ds.finetuning.finetune import SCORES
from electra_ds.finetuning.glue import GLUE
from electra_ds.finetuning.heads import ENCODER_ONLY, TaskModel, fill, make_encoder
from electra_ds.finetuning.inputs import TaskMicroBatch
from electra_ds.finetuning.load_task import recorded_task
from electra_ds.finetuning.tasks.base import FinetuneTask, Scale
from electra_ds.finetuning.tasks.examples import TaskData
from electra_ds.finetuning.tasks.find import task_class
from electra_ds.finetuning.tasks.sequence import SequenceTask
from electra_ds.interop.export import check_out, new_folder
from electra_ds.interop.model_cards import NO_FACTS, Exported, Facts, finetuned_card
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.checkpoints import default_export_folder, kept_checkpoint, recorded_recipe

_TOLERANCE = 1e-4
"""The largest allowed difference between the folder's scores and the run's, as a share of the largest (at least 1).

Rounding gives 1e-6.
"""
_CHECKED_ROWS, _CHECKED_LENGTH = 4, 24


def export_finetuned(
    run_or_checkpoint: Path, out: Path | None, *, encoder_only: bool = False, facts: Facts = NO_FACTS
) -> str:
    """Write the weights that a run kept, or those of a checkpoint, into `out`, and return how to use them.

    Raises CheckpointError if there is nothing to export or `out` already holds something, and ConfigError if no
    transformers class computes what was trained.
    """
    checkpoint = kept_checkpoint(run_or_checkpoint)
    recipe = recorded_recipe(checkpoint, FinetuneRecipe)
    record = RunDirectory(checkpoint.path).read_record(FinetuneRecord)
    out = out or default_export_folder(checkpoint, "export")
    check_out(out)
    config, _ = finetuned_encoder(checkpoint)
    scores = _scores(checkpoint)
    task = None if encoder_only else task_class(record.loaded_as)
    num_outputs = _num_outputs(checkpoint)
    trained = _trained_model(checkpoint, recipe, config, task, num_outputs)
    labels: tuple[str, ...] = ()
    scale = Scale()
    exported: PreTrainedModel = trained.encoder
    if task is not None:
        if problem := task.why_not_exportable(recipe, config, num_outputs):
            raise ConfigError(str(problem))
        labels, scale = _labels_and_scale(record, recipe, checkpoint, scores, num_outputs)
        exported = task.to_transformers(trained, copy.deepcopy(config), labels, scale)
    has_segments = recipe.data.segment_ids and int(getattr(config, "type_vocab_size", 0) or 0) >= 2
    what = Exported(recipe, record, checkpoint.state, scores, labels, has_segments, task)
    with new_folder(out) as partial:
        with silent_transformers():
            exported.save_pretrained(partial)
        _save_tokenizer(checkpoint.path, partial, recipe, has_segments)
        _check_same(trained, partial, exported, scale, has_segments, task)
        for name, text in ({} if task is None else task.more_files(recipe, config)).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, "utf8")
        (partial / "README.md").write_text(finetuned_card(what, exported, facts), "utf8")
    kind, step = type(exported).__name__, checkpoint.state["step"]
    return f"{out}: {kind}, {record.task}, seed {recipe.seed}, step {step:,}\n{what.usage(str(out))}"


# --- what was trained


def _scores(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of the run's scores.json; empty for a run that has not finished."""
    path = checkpoint.path.parent.parent / SCORES
    if checkpoint.path.parent.name not in ("checkpoints", "best") or not path.is_file():
        return {}
    try:
        scores: dict[str, Any] = json.loads(path.read_text("utf8"))
        return scores
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it, or move it away.") from error


def _num_outputs(checkpoint: Checkpoint) -> int | None:
    """Return the number of scores of an input; None for a head without a matrix for them."""
    matrix = "master/head.out_proj.weight"
    return checkpoint.tensors.shape(matrix)[0] if matrix in checkpoint.tensors else None


def _trained_model(
    checkpoint: Checkpoint,
    recipe: FinetuneRecipe,
    config: PretrainedConfig,
    task: type[FinetuneTask] | None,
    num_outputs: int | None,
) -> TaskModel:
    """Return the encoder and head with the checkpoint's weights. task: None for the encoder alone."""
    head = torch.nn.Identity() if task is None else task.new_head(recipe, int(config.hidden_size), num_outputs)
    model = TaskModel(make_encoder(config, recipe.seed), head)
    parameters = dict(model.named_parameters())
    if task is not None:
        checkpoint.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    fill(model, {name: checkpoint.tensors[f"master/{name}"] for name in parameters})
    return model


def _labels_and_scale(
    record: FinetuneRecord,
    recipe: FinetuneRecipe,
    checkpoint: Checkpoint,
    scores: dict[str, Any],
    num_outputs: int | None,
) -> tuple[tuple[str, ...], Scale]:
    """Return the classes in order, none for tasks without, and the scale of a regression's scores.

    For the user's own examples they come from scores.json, or else from reading the examples again.
    """
    is_unit, name = recipe.data.regression_scale == "unit", record.loaded_as
    kind = task_class(name)
    if not kind.has_labels:
        return (), Scale()
    if name in GLUE:
        task = GLUE[str(name)]
    else:
        labels = next((of["labels"] for of in scores.get("sets", {}).values() if "labels" in of), None)
        if labels is not None or (num_outputs == 1 and not is_unit and kind is SequenceTask):
            return tuple(labels or ()), Scale()
        try:
            data, _ = recorded_task(record, checkpoint.path, record.source, f"put them back, {ENCODER_ONLY}")
        except DataError as error:
            raise DataError(
                f"The names and the scale of the scores are not in {checkpoint.path} but in the examples, which cannot "
                f"be read again: {error}"
            ) from error
        if not isinstance(data, TaskData):
            return data.labels, Scale()
        task = data.task
    if task.score_range is None or not is_unit:
        return task.labels, Scale()
    low, high = task.score_range
    return (), Scale(low, high - low)


# --- the folder


def _save_tokenizer(source: Path, folder: Path, recipe: FinetuneRecipe, has_segments: bool) -> None:
    """Save a tokenizer that cuts inputs as training did, and gives segment ids if the model was trained on them.

    A plain PreTrainedTokenizerFast would never give segment ids, and BERT's always would.
    """
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text("utf8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # these depend on the machine, not on the tokenizer
        config.pop(name, None)
    config["model_max_length"] = recipe.data.max_length
    config["model_input_names"] = ["input_ids", *(["token_type_ids"] if has_segments else []), "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf8")


def _check_same(
    trained: TaskModel,
    folder: Path,
    exported: PreTrainedModel,
    scale: Scale,
    has_segments: bool,
    task: type[FinetuneTask] | None,
) -> None:
    """Raise ConfigError unless the folder's model and the run give the same scores for a few random inputs.

    task: None if the folder has only the encoder.
    """
    with silent_transformers():  # it would report the untrained pooler
        model: Any = type(exported).from_pretrained(folder, dtype=torch.float32)
    batch = _random_inputs(trained.encoder.config, has_segments)
    inputs = trained.encoder_inputs(batch)
    with torch.no_grad():
        model.eval()
        if task is None or exported is trained.encoder:
            pairs = [(trained.encoder(**inputs).last_hidden_state, model(**inputs).last_hidden_state)]
        else:
            pairs = task.compared(trained, model, batch, scale)
    for ours, theirs in pairs:
        apart, largest = (ours - theirs).abs().max().item(), max(1.0, ours.abs().max().item())
        if not apart <= _TOLERANCE * largest:
            raise ConfigError(
                f"transformers' {type(model).__name__} does not compute what was trained: its scores of random inputs "
                f"differ from the run's, which reach {largest:.3g}, by up to {apart:.2g}. This should not happen; "
                f"please report it. --encoder-only exports the encoder without its head."
            )


def _random_inputs(config: PretrainedConfig, has_segments: bool) -> TaskMicroBatch:
    rng = torch.Generator().manual_seed(0)
    length = min(_CHECKED_LENGTH, int(getattr(config, "max_position_embeddings", 0) or _CHECKED_LENGTH) - 2)
    ids_BT = torch.randint(0, int(config.vocab_size), (_CHECKED_ROWS, length), generator=rng)
    segments_BT = (torch.arange(length) >= length // 3).long().expand_as(ids_BT) if has_segments else None
    attended_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    more = {"answerable": attended_BT, "sizes": torch.tensor([_CHECKED_ROWS // 2] * 2)}
    return TaskMicroBatch(ids_BT, attended_BT, segments_BT, more)
