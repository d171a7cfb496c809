"""Heads for finetuning, and the model that combines an encoder with one of them.

Shape suffixes: B inputs, T positions, H hidden size, C classes, K starts of a beam.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from electra_ds.config.finetune_recipe import FinetuneOptimizerSection, HeadSection
from electra_ds.core.errors import ConfigError
from electra_ds.finetuning.inputs import TaskMicroBatch
from electra_ds.training.optimizer import ParameterRates, Rates, pretraining_rates

ENCODER_ONLY = "or export the finetuned encoder without its head: add --encoder-only"
_EXCLUDED = -1e4
"""Added to the score of an excluded position. It fits fp16, and its exponential is 0."""
_LAYER = re.compile(r"\.(?:layer|layers|h|blocks?)\.(\d+)\.")


class TaskOutput(NamedTuple):
    """The output of a head for a micro-batch."""

    loss_sum: torch.Tensor | None
    """fp32, the sum over the inputs; None if they have no labels."""
    scores: dict[str, torch.Tensor]
    """fp32 by name, each with B rows: `logits` [B, C]; or `start` and `end` [B, T]; or of the joint head `start_top`,
    `start_index` [B, K], `end_top`, `end_index` [B, K, K] and `unanswerable` [B]."""

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The loss sum, under the name in the batch's `loss_terms`. The inputs must have labels."""
        assert self.loss_sum is not None
        return {"loss": self.loss_sum}


class SequenceHead(nn.Module):
    """Scores of a text or a pair from one pooled vector: [B, T, H] -> [B, C], with C = 1 for regression."""

    def __init__(self, section: HeadSection, hidden_size: int, num_outputs: int, is_regression: bool) -> None:
        super().__init__()
        self.section = section
        self.is_regression = is_regression
        width = section.hidden_size or hidden_size
        self.dense = nn.Linear(hidden_size, width) if section.num_layers == 2 else None
        self.out_proj = nn.Linear(width if self.dense is not None else hidden_size, num_outputs)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        logits_BC = self.out_proj(self.vector(hidden_BTH, batch.attended_BT)).float()
        return TaskOutput(self._loss_sum(logits_BC, batch.labels), {"logits": logits_BC})

    def vector(self, hidden_BTH: torch.Tensor, attended_BT: torch.Tensor) -> torch.Tensor:
        """Return the vector [B, H] on which the last matrix acts."""
        vector_BH = self._dropout(pooled(hidden_BTH, attended_BT, self.section))
        if self.dense is not None:
            vector_BH = functional.gelu(self.dense(vector_BH))
            if self.section.dropout_at == "each":
                vector_BH = self._dropout(vector_BH)
        return vector_BH

    def _dropout(self, vector_BH: torch.Tensor) -> torch.Tensor:
        return functional.dropout(vector_BH, self.section.dropout, self.training)

    def _loss_sum(self, logits_BC: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None:
            return None
        if self.is_regression:
            return functional.mse_loss(logits_BC.squeeze(-1), labels, reduction="sum")
        return functional.cross_entropy(logits_BC, labels, reduction="sum")


def pooled(hidden_BTH: torch.Tensor, attended_BT: torch.Tensor, section: HeadSection) -> torch.Tensor:
    """Return the vector that represents each text, [B, H]: the first token's or the mean, by the recipe."""
    if section.pooling == "first":
        return hidden_BTH[:, 0]
    weights_BT1 = attended_BT.unsqueeze(-1).float()
    mean_BH = (hidden_BTH.float() * weights_BT1).sum(1) / weights_BT1.sum(1)
    return mean_BH.to(hidden_BTH.dtype)


class SpanHead(nn.Module):
    """Independent scores of an answer's start and end, as in transformers' models: [B, T, H] -> twice [B, T]."""

    def __init__(self, section: HeadSection, hidden_size: int) -> None:
        super().__init__()
        self.qa_outputs = nn.Linear(hidden_size, 2)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        start_BT, end_BT = (
            self.qa_outputs(hidden_BTH).float().masked_fill(~batch.attended_BT.unsqueeze(-1), _EXCLUDED).unbind(-1)
        )
        loss_sum = None
        if "starts" in batch.targets:
            loss_sum = (_nats(start_BT, batch.targets["starts"]) + _nats(end_BT, batch.targets["ends"])).sum() / 2
        return TaskOutput(loss_sum, {"start": start_BT, "end": end_BT})


class JointSpanHead(nn.Module):
    """Scores of the start, of the end given the start, and of whether there is an answer (google-research/electra,
    finetune/qa/qa_tasks.py)."""

    def __init__(self, section: HeadSection, hidden_size: int) -> None:
        super().__init__()
        self.section = section
        width = section.span_hidden_size
        self.start = nn.Linear(hidden_size, 1)
        self.end_hidden = nn.Linear(2 * hidden_size, width)
        self.end = nn.Linear(width, 1)
        self.answerable_hidden = nn.Linear(2 * hidden_size, width)
        self.answerable = nn.Linear(width, 1)

    def forward(self, hidden_BTH: torch.Tensor, batch: TaskMicroBatch) -> TaskOutput:
        excluded_BT = ~batch.targets["answerable"]
        start_BT = self.start(hidden_BTH).squeeze(-1).float().masked_fill(excluded_BT, _EXCLUDED)
        chances_BT = start_BT.softmax(-1).to(hidden_BTH.dtype)
        expected_BH = (chances_BT.unsqueeze(1) @ hidden_BTH).squeeze(1)
        features_BW = functional.gelu(self.answerable_hidden(torch.cat([hidden_BTH[:, 0], expected_BH], -1)))
        unanswerable_B = self.answerable(features_BW).squeeze(-1).float()
        loss_sum = None
        if "starts" in batch.targets:
            starts_B, ends_B = batch.targets["starts"], batch.targets["ends"]
            rows_B = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
            chosen_B1H = hidden_BTH[rows_B, starts_B].unsqueeze(1)
            end_BT = self._ends(hidden_BTH, chosen_B1H, excluded_BT).squeeze(1)
            loss_sum = (_nats(start_BT, starts_B) + _nats(end_BT, ends_B)).sum() / 2
            loss_sum = loss_sum + self.section.answerable_weight * functional.binary_cross_entropy_with_logits(
                unanswerable_B, batch.targets["is_impossible"], reduction="sum"
            )
        if self.training:
            return TaskOutput(loss_sum, {})
        return TaskOutput(loss_sum, self._beam(hidden_BTH, start_BT, excluded_BT) | {"unanswerable": unanswerable_B})

    def _beam(
        self, hidden_BTH: torch.Tensor, start_BT: torch.Tensor, excluded_BT: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size = min(self.section.beam_size, start_BT.shape[1])
        start_top_BK, start_index_BK = start_BT.log_softmax(-1).topk(size)
        chosen_BKH = hidden_BTH.gather(1, start_index_BK.unsqueeze(-1).expand(-1, -1, hidden_BTH.shape[-1]))
        # One start at a time: all at once would need K times the memory of the hidden states.
        ends = [self._ends(hidden_BTH, chosen_BKH[:, k : k + 1], excluded_BT) for k in range(size)]
        end_top_BKK, end_index_BKK = torch.cat(ends, 1).log_softmax(-1).topk(size)
        starts = {"start_top": start_top_BK, "start_index": start_index_BK}
        return starts | {"end_top": end_top_BKK, "end_index": end_index_BKK}

    def _ends(self, hidden_BTH: torch.Tensor, start_B1H: torch.Tensor, excluded_BT: torch.Tensor) -> torch.Tensor:
        """Return the scores of every end, [B, 1, T], given one start per row."""
        pairs_BTH2 = torch.cat([start_B1H.expand_as(hidden_BTH), hidden_BTH], -1)
        scores_BT = self.end(functional.gelu(self.end_hidden(pairs_BTH2))).squeeze(-1).float()
        return scores_BT.masked_fill(excluded_BT, _EXCLUDED).unsqueeze(1)


def _nats(scores_BT: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores_BT, targets_B, reduction="none")


def initialise(head: nn.Module, section: HeadSection, seed: int) -> None:
    """Set matrices to the recipe's random numbers, keyed by the seed, and biases to 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() < 2:
                parameter.zero_()
            elif section.initializer == "normal":
                parameter.normal_(0.0, section.initializer_range, generator=rng)
            else:
                bound = math.sqrt(6 / sum(parameter.shape))
                parameter.uniform_(-bound, bound, generator=rng)


def make_encoder(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return an fp32 encoder of this configuration with random weights, keyed by the seed, without a pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        setattr(encoder, "pooler", None)  # noqa: B010  # every encoder gets the same head, on its last layer
    return encoder


class TaskModel(nn.Module):
    """Encoder and head as one module. Its tensors are `encoder.*`, under transformers' names, and `head.*`."""

    def __init__(self, encoder: PreTrainedModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._autocast_dtype: torch.dtype | None = None

    @staticmethod
    def encoder_inputs(batch: TaskMicroBatch) -> dict[str, torch.Tensor]:
        """Return the arguments of transformers' encoder."""
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attended_BT.long()}
        return inputs if batch.segments_BT is None else inputs | {"token_type_ids": batch.segments_BT}

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """See `TrainableModel`. Raises ConfigError if this encoder cannot recompute layers."""
        self._autocast_dtype = autocast_dtype
        if not checkpointed_layers:
            return
        layers = [module for module in self.encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not self.encoder.supports_gradient_checkpointing or not layers:
            raise ConfigError(
                f"transformers cannot recompute the layers of {type(self.encoder).__name__}; remove "
                f"activation_checkpointing from the DeepSpeed JSON."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a new name that older 5.x releases do not know
            self.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers[checkpointed_layers:]:
            layer.gradient_checkpointing = False

    def forward(self, batch: TaskMicroBatch) -> TaskOutput:
        """Return the loss and the scores of one micro-batch."""
        # Inside forward, because DeepSpeed's engine turns off any autocast around it.
        with torch.autocast(batch.ids_BT.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            hidden_BTH = self.encoder(**self.encoder_inputs(batch)).last_hidden_state
            output: TaskOutput = self.head(hidden_BTH, batch)
        return output


# --- learning rates by layer


def decay_exponent(name: str, num_layers: int, section: FinetuneOptimizerSection) -> int:
    """Return how many times layer decay is applied to the learning rate of a parameter of a `TaskModel`.

    A parameter that is neither in a layer nor in the embeddings, such as a last norm, belongs to the last layer.
    """
    if name.startswith("head."):
        return 0
    match = _LAYER.search(name)
    if match is not None:
        depth = int(match[1]) + 1
    else:
        depth = 0 if "embeddings" in name else num_layers
    if section.layer_decay_exponents == "study":
        return num_layers - max(depth, 1)
    if section.layer_decay_exponents == "original":
        return num_layers + 2 - depth
    return num_layers + 1 - depth


def finetuning_rates(num_layers: int, section: FinetuneOptimizerSection) -> Rates:
    """Return, for each parameter, its learning rate over the schedule's and whether it has weight decay.

    Learning rates fall from the head to the embeddings.
    """

    def rates(name: str) -> ParameterRates:
        scale = section.layer_decay ** decay_exponent(name, num_layers, section)
        return ParameterRates(scale, section.weight_decay_on == "all" or pretraining_rates(name).decays)

    return rates


def check_layers(names: Iterable[str], section: FinetuneOptimizerSection) -> None:
    """Raise ConfigError if layer decay is asked for and an encoder's parameter names do not show its layers."""
    if section.layer_decay < 1 and not any(_LAYER.search(name) for name in names):
        raise ConfigError(
            f"optimizer.layer_decay is {section.layer_decay}, but this model's parameter names do not show its "
            f"layers. Add --set optimizer.layer_decay=1"
        )


# --- heads that transformers' own classes support


class NotExportable(NamedTuple):
    """The reason why no class of transformers can compute a head, and what to do instead."""

    why: str
    """The reason, without a full stop."""
    instead: str
    """Recipe overrides that give a head with a class in transformers; empty if no overrides do."""

    def __str__(self) -> str:
        otherwise = f"Finetune with --set {self.instead}, {ENCODER_ONLY}"
        if not self.instead:
            otherwise = "Export the finetuned encoder without its head: add --encoder-only"
        return f"No transformers class computes what was trained: {self.why}. {otherwise}"


def prefixed(encoder: PreTrainedModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors under their names in a model with a head."""
    return {f"{model.base_model_prefix}.{name}": parameter for name, parameter in encoder.named_parameters()}


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the parameters of the same names, all of them, and set the model to evaluation."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    model.eval()


def with_linear_head(
    make: Any, trained: TaskModel, config: PretrainedConfig, name: str, layer: nn.Linear
) -> PreTrainedModel:
    """Return transformers' model that has one matrix on the encoder's output.

    make: such as `AutoModelForTokenClassification`. name: of the matrix in such models. Raises ConfigError if
    transformers has no class for this encoder, or if it has more layers than these.
    """
    tensors: dict[str, torch.Tensor] = {f"{name}.{key}": tensor for key, tensor in layer.named_parameters()}
    try:
        model: PreTrainedModel = make.from_config(config, dtype=torch.float32)
        tensors |= prefixed(trained.encoder, model)
        fits = {key: parameter.shape for key, parameter in model.named_parameters()} == {
            key: tensor.shape for key, tensor in tensors.items()
        }
    except ValueError:  # transformers has no class for this kind of encoder
        fits = False
    if not fits:
        raise ConfigError(
            f"This head is one matrix on the encoder's output, but transformers has no such class for "
            f"{config.model_type}. Export the finetuned encoder without its head: add --encoder-only"
        )
    fill(model, tensors)
    return model
