"""Which heads of a finetuned model transformers' own classes can hold."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig

from electra_ds.config.finetune_recipe import FinetuneRecipe

ENCODER_ONLY = "or export the finetuned encoder without its head: add --encoder-only"


class NotHeld(NamedTuple):
    why: str
    """Without a full stop."""
    instead: str
    """Overrides of the recipe with which a class of transformers can hold the head; empty if there are none."""

    def __str__(self) -> str:
        otherwise = f"Finetune with --set {self.instead}, {ENCODER_ONLY}"
        if not self.instead:
            otherwise = "Export the finetuned encoder without its head: add --encoder-only"
        return f"No class of transformers computes what was trained: {self.why}. {otherwise}"


def why_not_held(recipe: FinetuneRecipe, config: PretrainedConfig, is_span: bool) -> NotHeld | None:
    """Why no class of transformers computes this head, and what to do; None where one does. Of question answering with
    other encoders than ELECTRA, as far as can be said without making the model."""
    head = recipe.head
    if is_span:
        if head.span != "joint":
            return None
        return NotHeld(
            "head.span is joint, a head that scores ends given the start, and transformers' classes for question "
            "answering score start and end on their own",
            "head.span=independent",
        )
    if config.model_type != "electra":
        return NotHeld(
            f"this head scores the encoder's output, and transformers' classes for {config.model_type} have other "
            f"layers before the scores, which are not trained here",
            "",
        )
    if head.pooling != "first":
        return NotHeld(
            f"head.pooling is {head.pooling}, and transformers' ElectraForSequenceClassification scores the first "
            f"token's vector alone",
            "head.pooling=first head.hidden_size=null",
        )
    if head.num_layers == 2 and head.hidden_size not in (None, int(config.hidden_size)):
        return NotHeld(
            f"head.hidden_size is {head.hidden_size}, and that of transformers' head is the encoder's, "
            f"{config.hidden_size}",
            "head.hidden_size=null",
        )
    return None
