"""Any encoder of transformers with one of our heads."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.core.errors import ConfigError
from electra_ds.finetuning.heads import JointSpanHead, SequenceHead, SpanHead, TaskOutput, initialise
from electra_ds.finetuning.microbatch import TaskMicroBatch


def make_encoder(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """The encoder of this configuration with random weights keyed by the seed, in fp32 and without a pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        setattr(encoder, "pooler", None)  # noqa: B010  # every encoder gets the same head, on its last layer
    return encoder


def make_head(recipe: FinetuneRecipe, hidden_size: int, num_outputs: int | None, is_regression: bool) -> nn.Module:
    """The recipe's head with its first weights. num_outputs: None for question answering."""
    section = recipe.head
    head: nn.Module
    if num_outputs is not None:
        head = SequenceHead(section, hidden_size, num_outputs, is_regression)
    elif section.span == "joint":
        head = JointSpanHead(section, hidden_size)
    else:
        head = SpanHead(section, hidden_size)
    initialise(head, section, recipe.seed)
    return head


class TaskModel(nn.Module):
    """Encoder and head as one module; its tensors are `encoder.*`, under transformers' names, and `head.*`."""

    def __init__(self, encoder: PreTrainedModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._autocast_dtype: torch.dtype | None = None

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """As `TrainableModel` says. Raises ConfigError if this encoder cannot compute layers again."""
        self._autocast_dtype = autocast_dtype
        if not checkpointed_layers:
            return
        layers = [module for module in self.encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not self.encoder.supports_gradient_checkpointing or not layers:
            raise ConfigError(
                f"transformers cannot compute layers of {type(self.encoder).__name__} again; remove "
                f"activation_checkpointing from the DeepSpeed JSON."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name, which older 5.x do not know
            self.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers[checkpointed_layers:]:
            layer.gradient_checkpointing = False

    def forward(self, batch: TaskMicroBatch) -> TaskOutput:
        """Loss and scores of one micro-batch."""
        # Inside forward, because DeepSpeed's engine switches off an autocast that it was called under.
        with torch.autocast(batch.ids_BT.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attended_BT.long()}
            if batch.segments_BT is not None:
                inputs["token_type_ids"] = batch.segments_BT
            hidden_BTH = self.encoder(**inputs).last_hidden_state
            output: TaskOutput = self.head(hidden_BTH, batch)
        return output
