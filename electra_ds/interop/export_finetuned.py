"""A finetuned run as one transformers folder: the model with its head, where a class of transformers can hold it, or
the encoder alone.

Shape suffixes: C scores, H hidden size.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    ElectraConfig,
    ElectraForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.finetuning.encoder_source import finetuned_encoder
from electra_ds.finetuning.exportable import ENCODER_ONLY, why_not_held
from electra_ds.finetuning.finetune import SCORES
from electra_ds.finetuning.glue import GLUE
from electra_ds.finetuning.heads import SequenceHead, SpanHead
from electra_ds.finetuning.microbatch import TaskMicroBatch
from electra_ds.finetuning.model import TaskModel, make_encoder, make_head
from electra_ds.finetuning.recorded_task import recorded_task
from electra_ds.finetuning.tasks import TaskData
from electra_ds.interop.export_folder import check_out, new_folder
from electra_ds.interop.finetuned_card import Exported, finetuned_card
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.recorded import beside, kept_checkpoint, recorded_recipe

_GELU_IS_IDENTITY = 6.0
"""From here on GELU(z) is z in fp32, to the last bit; measured, it is so from 5.36 on."""
_TOLERANCE = 1e-4
"""Of the scores of the folder and of the run, as a share of the largest score, at least 1; rounding gives 1e-6 where
the head is held as it is, and up to 1e-5 where dense shifts."""
_CHECKED_ROWS, _CHECKED_LENGTH = 4, 24


def export_finetuned(run_or_checkpoint: Path, out: Path | None, *, encoder_only: bool = False) -> str:
    """Write a run's kept weights, or a checkpoint's, into `out`; returns what to do with them.

    Raises CheckpointError if there is nothing to export or `out` already holds something, ConfigError if no class
    of transformers computes what was trained.
    """
    checkpoint = kept_checkpoint(run_or_checkpoint)
    recipe = recorded_recipe(checkpoint, FinetuneRecipe)
    record = RunDirectory(checkpoint.path).read_record(FinetuneRecord)
    out = out or beside(checkpoint, "export")
    check_out(out)
    config, _ = finetuned_encoder(checkpoint)
    scores = _scores(checkpoint)
    is_span = not encoder_only and record.source.train is None and record.task not in GLUE
    if not encoder_only and (not_held := why_not_held(recipe, config, is_span)):
        raise ConfigError(str(not_held))
    logging.disable_progress_bar()  # which would count one shard
    labels: tuple[str, ...] = ()
    scale = (0.0, 1.0)
    if not (encoder_only or is_span):
        labels, scale = _labels_and_scale(record, recipe, checkpoint, scores)
    trained = _trained_model(checkpoint, recipe, config)
    what = Exported(recipe, record, checkpoint.state, scores, labels, uses_segments(recipe, config))
    exported: PreTrainedModel = trained.encoder
    if is_span:
        exported = _for_question_answering(trained, config)
    elif not encoder_only:
        exported = _for_sequences(trained, config, labels, scale)
    with new_folder(out) as partial:
        exported.save_pretrained(partial)
        _save_tokenizer(checkpoint.path, partial, recipe, what.uses_segments)
        _check_same(trained, partial, type(exported), scale, what.uses_segments, encoder_only)
        (partial / "README.md").write_text(finetuned_card(what, exported), "utf8")
    return f"{out}: {what.described(exported)}\n{what.usage(exported, str(out))}"


# --- what was trained


def _scores(checkpoint: Checkpoint) -> dict[str, Any]:
    """What scores.json says of the run; empty where there is none."""
    path = checkpoint.path.parent.parent / SCORES
    if checkpoint.path.parent.name not in ("checkpoints", "best") or not path.is_file():
        return {}
    try:
        scores = json.loads(path.read_text("utf8"))
        if not isinstance(scores, dict) or not all(isinstance(of, dict) for of in scores["sets"].values()):
            raise ValueError("it does not hold the scores of sets")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Put it back, or move it away.") from error
    return scores


def _trained_model(checkpoint: Checkpoint, recipe: FinetuneRecipe, config: PretrainedConfig) -> TaskModel:
    """Encoder and head with the checkpoint's weights."""
    num_outputs, is_regression = None, False
    if "master/head.out_proj.weight" in checkpoint.tensors:
        num_outputs = checkpoint.tensors.shape("master/head.out_proj.weight")[0]
        is_regression = num_outputs == 1
    model = TaskModel(
        make_encoder(config, recipe.seed), make_head(recipe, int(config.hidden_size), num_outputs, is_regression)
    )
    parameters = dict(model.named_parameters())
    checkpoint.check_weights({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.tensors[f"master/{name}"])
    return model.eval()


def _labels_and_scale(
    record: FinetuneRecord, recipe: FinetuneRecipe, checkpoint: Checkpoint, scores: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[float, float]]:
    """(classes in order, none for regression; the lowest score of a regression and what one unit of output is).

    Those of the user's own examples are in scores.json, or have to be read from the examples again.
    """
    is_own, is_unit = record.source.train is not None, recipe.data.regression_scale == "unit"
    if not is_own:
        task = GLUE[record.task]
    else:
        told = next((of["labels"] for of in scores.get("sets", {}).values() if "labels" in of), None)
        is_regression = checkpoint.tensors.shape("master/head.out_proj.weight")[0] == 1
        if told is not None or (is_regression and not is_unit):
            return tuple(told or ()), (0.0, 1.0)
        task = _own_data(record, checkpoint).task
    if task.score_range is None or not is_unit:
        return task.labels, (0.0, 1.0)
    low, high = task.score_range
    return (), (low, high - low)


def _own_data(record: FinetuneRecord, checkpoint: Checkpoint) -> TaskData:
    why = f"{checkpoint.path} does not say what its scores are called and scaled by; the examples do"
    try:
        loaded, _ = recorded_task(record, checkpoint.path, record.source, f"put them back, {ENCODER_ONLY}")
    except DataError as error:
        raise DataError(f"{why}, which cannot be read again: {error}") from error
    data = loaded.data
    assert isinstance(data, TaskData)
    return data


def uses_segments(recipe: FinetuneRecipe, config: PretrainedConfig) -> bool:
    """Whether a second text was told from the first by segment ids."""
    return recipe.data.segment_ids and int(getattr(config, "type_vocab_size", 0) or 0) >= 2


# --- what transformers has for it


def _for_question_answering(trained: TaskModel, config: PretrainedConfig) -> PreTrainedModel:
    """transformers' own class, where it is the encoder and one matrix. Raises ConfigError if it is not."""
    assert isinstance(trained.head, SpanHead)
    config = copy.deepcopy(config)
    config.num_labels, config.problem_type = 2, None
    kind = "no class for question answering"
    try:
        model: PreTrainedModel = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32)
    except ValueError:
        model = trained.encoder
    else:
        kind = f"{type(model).__name__}, which has another head"
    tensors = _prefixed(trained.encoder, model) | {
        f"qa_outputs.{name}": parameter for name, parameter in trained.head.qa_outputs.named_parameters()
    }
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ConfigError(
            f"This head scores start and end by one matrix on the encoder's output; for {config.model_type} "
            f"transformers has {kind}. Export the finetuned encoder without its head: add --encoder-only"
        )
    _load(model, tensors)
    return model


def _for_sequences(
    trained: TaskModel, config: PretrainedConfig, labels: tuple[str, ...], scale: tuple[float, float]
) -> PreTrainedModel:
    """scale: a regression's lowest score, and what one unit of the head's output is."""
    head, config = trained.head, copy.deepcopy(config)
    assert isinstance(head, SequenceHead)
    assert isinstance(config, ElectraConfig)
    names = labels or ("score",)
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if head.is_regression else "single_label_classification"
    config.classifier_dropout = head.section.dropout
    low, unit = scale
    weight_CH, bias_C = head.out_proj.weight.detach() * unit, head.out_proj.bias.detach() * unit + low
    if head.dense is not None:
        layers = {"out_proj.weight": weight_CH, "out_proj.bias": bias_C}
        layers |= {f"dense.{name}": tensor for name, tensor in head.dense.state_dict().items()}
    else:
        last = f"encoder.layer.{config.num_hidden_layers - 1}.output.LayerNorm."
        norm = {name: trained.encoder.get_parameter(last + name).detach() for name in ("weight", "bias")}
        layers = one_layer_as_two(weight_CH, bias_C, least_outputs(norm["weight"], norm["bias"]))
    model = ElectraForSequenceClassification(config)
    _load(model, _prefixed(trained.encoder, model) | {f"classifier.{name}": layers[name] for name in layers})
    return model


def least_outputs(weight_H: torch.Tensor, bias_H: torch.Tensor) -> torch.Tensor:
    """What a LayerNorm's outputs cannot fall below: H normalised numbers, whose squares sum to at most H and which sum
    to 0, lie between -sqrt(H - 1) and sqrt(H - 1)."""
    return bias_H - weight_H.abs() * (len(weight_H) - 1) ** 0.5


def one_layer_as_two(weight_CH: torch.Tensor, bias_C: torch.Tensor, least_H: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of transformers' head, dense, GELU and out_proj, with which it computes W x + b.

    Since GELU(z) - GELU(-z) = z, dense holds W and -W, and out_proj subtracts the one's GELU from the other's. That is
    as precise as W x itself, in any precision: over LayerNorms' outputs of 256 and 768 random numbers the largest error
    was 7e-7 of the largest score in fp32, 6e-4 in fp16 and 5e-3 in bf16. It takes 2 C of dense's H rows.

    Where there are more classes than that, dense only shifts x until GELU is the identity on it, and out_proj holds W
    and takes the shift back, which costs precision: 9e-6, 1e-2 and 9e-2. Such a head is for fp32.

    least_H: what x cannot fall below.
    """
    classes, width = weight_CH.shape
    dense_HH, out_CH = torch.zeros(width, width), torch.zeros(classes, width)
    if 2 * classes <= width:
        dense_HH[:classes], dense_HH[classes : 2 * classes] = weight_CH, -weight_CH
        out_CH[:, :classes], out_CH[:, classes : 2 * classes] = torch.eye(classes), -torch.eye(classes)
        return {
            "dense.weight": dense_HH, "dense.bias": torch.zeros(width),
            "out_proj.weight": out_CH, "out_proj.bias": bias_C,
        }  # fmt: skip
    shift_H = _GELU_IS_IDENTITY - least_H
    back_C = bias_C.double() - weight_CH.double() @ shift_H.double()
    return {
        "dense.weight": torch.eye(width), "dense.bias": shift_H,
        "out_proj.weight": weight_CH, "out_proj.bias": back_C.float(),
    }  # fmt: skip


def _prefixed(encoder: PreTrainedModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The encoder's tensors under the names that they have in a model with a head."""
    return {f"{model.base_model_prefix}.{name}": parameter for name, parameter in encoder.named_parameters()}


def _load(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    model.eval()


# --- the folder


def _save_tokenizer(source: Path, folder: Path, recipe: FinetuneRecipe, with_segments: bool) -> None:
    """As it was in training: it cuts where inputs were cut, and gives segment ids where the model was trained on them,
    which a plain PreTrainedTokenizerFast would not, and BERT's would always."""
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text("utf8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # its name since transformers 5
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # of the machine, not of the tokenizer
        config.pop(name, None)
    config["model_max_length"] = recipe.data.max_length
    config["model_input_names"] = ["input_ids", *(["token_type_ids"] if with_segments else []), "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf8")


def _check_same(
    trained: TaskModel,
    folder: Path,
    kind: type[PreTrainedModel],
    scale: tuple[float, float],
    with_segments: bool,
    encoder_only: bool,
) -> None:
    """Raises ConfigError unless the folder's model gives the run's scores of a few random inputs."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # which otherwise tells of a pooler that nobody trained
    try:
        model: Any = (AutoModel if encoder_only else kind).from_pretrained(folder, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    batch = _random_inputs(trained.encoder.config, with_segments)
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attended_BT.long()}
    if batch.segments_BT is not None:
        inputs["token_type_ids"] = batch.segments_BT
    with torch.no_grad():
        output = model.eval()(**inputs)
        if encoder_only:
            pairs = [(trained.encoder(**inputs).last_hidden_state, output.last_hidden_state)]
        else:
            scores = trained(batch).scores
            if "logits" in scores:
                pairs = [(scores["logits"] * scale[1] + scale[0], output.logits)]
            else:
                pairs = [(scores["start"], output.start_logits), (scores["end"], output.end_logits)]
    for ours, theirs in pairs:
        if ours.shape[:2] == batch.attended_BT.shape:  # a score for each position, and of padding none counts
            ours, theirs = ours[batch.attended_BT], theirs[batch.attended_BT]
        apart, largest = (ours - theirs).abs().max().item(), max(1.0, ours.abs().max().item())
        if not apart <= _TOLERANCE * largest:
            raise ConfigError(
                f"transformers' {type(model).__name__} does not compute what was trained: its scores of random inputs "
                f"are up to {apart:.2g} away from the run's, which reach {largest:.3g}. That should not be; please "
                f"report it. --encoder-only exports the encoder without its head."
            )


def _random_inputs(config: PretrainedConfig, with_segments: bool) -> TaskMicroBatch:
    rng = torch.Generator().manual_seed(0)
    length = min(_CHECKED_LENGTH, int(getattr(config, "max_position_embeddings", 0) or _CHECKED_LENGTH) - 2)
    ids_BT = torch.randint(0, int(config.vocab_size), (_CHECKED_ROWS, length), generator=rng)
    places_T = torch.arange(length)
    attended_BT = places_T < torch.linspace(length, length // 2, _CHECKED_ROWS).long().unsqueeze(1)
    pad_id = int(config.pad_token_id or 0)
    ids_BT[ids_BT == pad_id] = (pad_id + 1) % int(config.vocab_size)
    ids_BT[~attended_BT] = pad_id
    segments_BT = ((places_T >= length // 3) & attended_BT).long() if with_segments else None
    answerable_BT = attended_BT.clone()
    return TaskMicroBatch(ids_BT, attended_BT, segments_BT, answerable_BT=answerable_BT)
