"""Export a finetuned run as one transformers folder: the model with its head if transformers has a class for it, or
only the encoder.

Shape suffixes: C scores, H hidden size.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    ElectraConfig,
    ElectraForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.finetuning.encoder_source import finetuned_encoder, silent_transformers
from electra_ds.finetuning.finetune import SCORES
from electra_ds.finetuning.glue import GLUE
from electra_ds.finetuning.heads import (
    ENCODER_ONLY,
    SequenceHead,
    SpanHead,
    TaskModel,
    make_encoder,
    make_head,
    why_not_exportable,
)
from electra_ds.finetuning.inputs import TaskMicroBatch
from electra_ds.finetuning.load_task import recorded_task
from electra_ds.finetuning.tasks.examples import TaskData
from electra_ds.interop.export import check_out, new_folder
from electra_ds.interop.model_cards import NO_FACTS, Exported, Facts, finetuned_card
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.checkpoints import default_export_folder, kept_checkpoint, recorded_recipe

_TOLERANCE = 1e-4
"""The largest allowed difference between the folder's scores and the run's, as a share of the largest (at least 1).

Rounding gives 1e-6.
"""
_CHECKED_ROWS, _CHECKED_LENGTH = 4, 24


class _Scale(NamedTuple):
    """The scale of a regression: scores in the task's range are `lowest + unit * output`."""

    lowest: float = 0.0
    unit: float = 1.0


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
    trained = _trained_model(checkpoint, recipe, config)
    labels: tuple[str, ...] = ()
    scale = _Scale()
    exported: PreTrainedModel = trained.encoder
    if not encoder_only:
        if problem := why_not_exportable(recipe, config, trained.num_outputs is None, trained.num_outputs):
            raise ConfigError(str(problem))
        if trained.num_outputs is None:
            exported = _for_question_answering(trained, config)
        else:
            labels, scale = _labels_and_scale(record, recipe, checkpoint, scores)
            exported = _for_sequences(trained, config, labels, scale)
    has_segments = recipe.data.segment_ids and int(getattr(config, "type_vocab_size", 0) or 0) >= 2
    what = Exported(recipe, record, checkpoint.state, scores, labels, has_segments)
    with new_folder(out) as partial:
        with silent_transformers():
            exported.save_pretrained(partial)
        _save_tokenizer(checkpoint.path, partial, recipe, has_segments)
        _check_same(trained, partial, exported, scale, has_segments)
        (partial / "README.md").write_text(finetuned_card(what, exported, facts), "utf8")
    kind, step = type(exported).__name__, checkpoint.state["step"]
    return f"{out}: {kind}, {record.task}, seed {recipe.seed}, step {step:,}\n{what.usage(exported, str(out))}"


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


def _trained_model(checkpoint: Checkpoint, recipe: FinetuneRecipe, config: PretrainedConfig) -> TaskModel:
    """Return the encoder and head with the checkpoint's weights."""
    num_outputs = None
    if "master/head.out_proj.weight" in checkpoint.tensors:
        num_outputs = checkpoint.tensors.shape("master/head.out_proj.weight")[0]
    head = make_head(recipe, int(config.hidden_size), num_outputs, num_outputs == 1)
    model = TaskModel(make_encoder(config, recipe.seed), head)
    parameters = dict(model.named_parameters())
    checkpoint.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    _fill(model, {name: checkpoint.tensors[f"master/{name}"] for name in parameters})
    return model


def _labels_and_scale(
    record: FinetuneRecord, recipe: FinetuneRecipe, checkpoint: Checkpoint, scores: dict[str, Any]
) -> tuple[tuple[str, ...], _Scale]:
    """Return the classes in order, none for regression, and the scale of a regression's scores.

    For the user's own examples they come from scores.json, or else from reading the examples again.
    """
    is_unit = recipe.data.regression_scale == "unit"
    if record.source.train is None:
        task = GLUE[record.task]
    else:
        labels = next((of["labels"] for of in scores.get("sets", {}).values() if "labels" in of), None)
        is_regression = checkpoint.tensors.shape("master/head.out_proj.weight")[0] == 1
        if labels is not None or (is_regression and not is_unit):
            return tuple(labels or ()), _Scale()
        try:
            data, _ = recorded_task(record, checkpoint.path, record.source, f"put them back, {ENCODER_ONLY}")
        except DataError as error:
            raise DataError(
                f"The names and the scale of the scores are not in {checkpoint.path} but in the examples, which cannot "
                f"be read again: {error}"
            ) from error
        assert isinstance(data, TaskData)
        task = data.task
    if task.score_range is None or not is_unit:
        return task.labels, _Scale()
    low, high = task.score_range
    return (), _Scale(low, high - low)


# --- transformers' classes with the same head


def _for_question_answering(trained: TaskModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return transformers' question answering model. Raises ConfigError unless it is the encoder plus one matrix."""
    assert isinstance(trained.head, SpanHead)
    config = copy.deepcopy(config)
    config.num_labels, config.problem_type = 2, None
    head = trained.head.qa_outputs.named_parameters()
    tensors: dict[str, torch.Tensor] = {f"qa_outputs.{name}": parameter for name, parameter in head}
    try:
        model: PreTrainedModel = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32)
        tensors |= _prefixed(trained.encoder, model)
        fits = {name: parameter.shape for name, parameter in model.named_parameters()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }
    except ValueError:  # transformers has no class for this kind of encoder
        fits = False
    if not fits:
        raise ConfigError(
            f"This head scores start and end by one matrix on the encoder's output, but transformers has no such "
            f"class for {config.model_type}. Export the finetuned encoder without its head: add --encoder-only"
        )
    _fill(model, tensors)
    return model


def _for_sequences(
    trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: _Scale
) -> PreTrainedModel:
    head, config = trained.head, copy.deepcopy(config)
    assert isinstance(head, SequenceHead)
    assert isinstance(config, ElectraConfig)
    names = labels or ("score",)
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if head.is_regression else "single_label_classification"
    config.classifier_dropout = head.section.dropout
    weight_CH = head.out_proj.weight.detach() * scale.unit
    bias_C = head.out_proj.bias.detach() * scale.unit + scale.lowest
    if head.dense is None:
        layers = one_layer_as_two(weight_CH, bias_C)
    else:
        layers = {"out_proj.weight": weight_CH, "out_proj.bias": bias_C}
        layers |= {f"dense.{name}": tensor for name, tensor in head.dense.state_dict().items()}
    model = ElectraForSequenceClassification(config)
    _fill(model, _prefixed(trained.encoder, model) | {f"classifier.{name}": layers[name] for name in layers})
    return model


def one_layer_as_two(weight_CH: torch.Tensor, bias_C: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return weights with which transformers' head (dense, GELU and out_proj) computes W x + b.

    Since GELU(z) - GELU(-z) = z, dense holds W and -W, and out_proj subtracts the GELU of the second from that of the
    first. This is as precise as W x itself, in any precision: for LayerNorm outputs of 256 and 768 random numbers, the
    largest error was 7e-7 of the largest score in fp32, 6e-4 in fp16 and 5e-3 in bf16. It uses 2 C of dense's H rows.
    """
    classes, width = weight_CH.shape
    assert 2 * classes <= width  # `why_not_exportable` ensures this
    dense_HH, out_CH = torch.zeros(width, width), torch.zeros(classes, width)
    dense_HH[:classes], dense_HH[classes : 2 * classes] = weight_CH, -weight_CH
    out_CH[:, :classes], out_CH[:, classes : 2 * classes] = torch.eye(classes), -torch.eye(classes)
    return {
        "dense.weight": dense_HH,
        "dense.bias": torch.zeros(width),
        "out_proj.weight": out_CH,
        "out_proj.bias": bias_C,
    }


def _prefixed(encoder: PreTrainedModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors under their names in a model with a head."""
    return {f"{model.base_model_prefix}.{name}": parameter for name, parameter in encoder.named_parameters()}


def _fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    model.eval()


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


def _check_same(trained: TaskModel, folder: Path, exported: PreTrainedModel, scale: _Scale, has_segments: bool) -> None:
    """Raise ConfigError unless the folder's model and the run give the same scores for a few random inputs."""
    with silent_transformers():  # it would report the untrained pooler
        model: Any = type(exported).from_pretrained(folder, dtype=torch.float32)
    batch = _random_inputs(trained.encoder.config, has_segments)
    inputs = trained.encoder_inputs(batch)
    with torch.no_grad():
        output = model.eval()(**inputs)
        if exported is trained.encoder:
            pairs = [(trained.encoder(**inputs).last_hidden_state, output.last_hidden_state)]
        else:
            scores = trained(batch).scores
            if "logits" in scores:
                pairs = [(scores["logits"] * scale.unit + scale.lowest, output.logits)]
            else:
                pairs = [(scores["start"], output.start_logits), (scores["end"], output.end_logits)]
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
    return TaskMicroBatch(ids_BT, attended_BT, segments_BT, answerable_BT=attended_BT)
