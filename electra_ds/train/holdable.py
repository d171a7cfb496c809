"""Which heads of a finetuned model transformers' own classes can hold."""

from __future__ import annotations

from transformers import PretrainedConfig

from electra_ds.config.finetune_recipe import FinetuneRecipe

ENCODER_ONLY = "or export the finetuned encoder without its head: add --encoder-only"


def why_not_held(recipe: FinetuneRecipe, config: PretrainedConfig, is_span: bool) -> str | None:
    """Why no class of transformers computes this head, and what to do; None where one does. Of question answering with
    other encoders than ELECTRA, as far as can be said without making the model."""
    head, what, instead = recipe.head, "", ""
    if is_span and head.span == "joint":
        what = (
            "head.span is joint, a head that scores ends given the start, and transformers' classes for question "
            "answering score start and end on their own"
        )
        instead = "Finetune with --set head.span=independent, "
    elif not is_span and config.model_type != "electra":
        return (
            f"This head scores the encoder's output, and transformers' classes for {config.model_type} have other "
            f"layers before the scores, which were not trained. Export the finetuned encoder without its head: add "
            f"--encoder-only"
        )
    elif not is_span and head.pooling != "first":
        what = (
            f"head.pooling is {head.pooling}, and transformers' ElectraForSequenceClassification scores the first "
            f"token's vector alone"
        )
        instead = "Finetune with --set head.pooling=first head.hidden_size=null, "
    elif not is_span and head.num_layers == 2 and head.hidden_size not in (None, int(config.hidden_size)):
        what = (
            f"head.hidden_size is {head.hidden_size}, and that of transformers' head is the encoder's, "
            f"{config.hidden_size}"
        )
        instead = "Finetune with --set head.hidden_size=null, "
    return f"No class of transformers computes what was trained: {what}. {instead}{ENCODER_ONLY}" if what else None
