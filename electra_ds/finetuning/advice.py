"""Notes on a finetuning before it starts, and the warning about a model that is no better than its baseline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning
from electra_ds.core.program import command
from electra_ds.data.tokenizer import NOTED_SHARE
from electra_ds.finetuning.encoder_source import EncoderSource
from electra_ds.finetuning.tasks.base import EvaluationResult, FinetuneTask

_SMALL_RATE, _BASE_WIDTH = 2e-4, 768
_FEW_STEPS, _ENOUGH_STEPS = 200, 500
"""A new head needs some hundreds of steps: docs/experiments.md, "Small sets of your own"."""
_UNBALANCED = 0.8
"""The share of the training examples (assumed) above which a class may be the reason why nothing else is predicted."""


def advice(training: Finetuning, encoder: EncoderSource, task: FinetuneTask, *, keeps_weights: bool) -> Iterator[str]:
    """Yield notes on a run that is about to start, without a final full stop."""
    recipe, schedule = training.recipe, training.recipe.schedule
    if training.schedule.total_steps > training.steps_of_epochs:
        epochs = "1 epoch" if schedule.epochs == 1 else f"{schedule.epochs:g} epochs"
        yield (
            f"{epochs} of {len(task.train):,} examples are {training.steps_of_epochs:,} steps, too few to train a new "
            f"head, so schedule.min_steps makes it {schedule.min_steps:,}. To train for another number of epochs, add "
            f"--set schedule.epochs=N"
        )
    longest, trained = int(task.train.input_lengths.max()), encoder.trained_length
    if trained is not None and longest > trained:
        share = float((task.train.input_lengths > trained).mean())
        yield (
            f"{share:.0%} of the training inputs are longer than the {trained} tokens that the encoder was pretrained "
            f"on (the longest has {longest}); later positions were never trained. To cut inputs there, add --set "
            f"data.max_length={trained}"
        )
    yield from _unknown_text(encoder, task)
    if rate := _lower_rate(recipe, encoder):
        yield (
            f"a learning rate of {recipe.optimizer.learning_rate:g} is for small models; the original paper uses "
            f"{rate} for this size: --set optimizer.learning_rate={rate}"
        )
    if keeps_weights and (problem := task.why_not_exportable(recipe, encoder.config, task.num_outputs)):
        instead = f". For a head that can be exported, add --set {problem.instead}" if problem.instead else ""
        yield (
            f"the head of this run cannot be exported as a transformers model; the encoder can, with "
            f"{command('export')} --encoder-only: {problem.why}{instead}"
        )


def _unknown_text(encoder: EncoderSource, task: FinetuneTask) -> Iterator[str]:
    """Yield a note for each set if the encoder's tokenizer turns too much of its text into [UNK]."""
    tokenizer = encoder.tokenizer
    for name, inputs in ({"training": task.train} | task.dev | task.test).items():
        text = inputs.ids[~np.isin(inputs.ids, [tokenizer.cls_token_id, tokenizer.sep_token_id])]
        if tokenizer.unk_token_id is None or not len(text):
            continue
        share = float((text == tokenizer.unk_token_id).mean())
        if share >= NOTED_SHARE:
            yield (
                f"{share:.0%} of the {name} inputs' tokens are {tokenizer.unk_token}: the tokenizer of {encoder.name} "
                f"does not know this text. Is it in another language or case, or without spaces between words? Choose "
                f"a model that was pretrained on such text"
            )


def useless_warning(
    name: str, result: EvaluationResult, steps: int, training: Finetuning, encoder: EncoderSource, task: FinetuneTask
) -> str:
    """Return a warning about a model that is no better on a set than its baseline, with likely reasons and remedies."""
    if result.constant is not None:
        problem = (
            f"all {result.rows:,} predictions of {name} are {result.constant}, so the model has learned nothing that "
            f"tells its rows apart"
        )
    else:
        metric, baseline = next(iter(result.baseline.items()))
        problem = (
            f"{metric} on {name} is {result.metrics[metric]:.4f}, no better than the {baseline:.4f} of answering "
            f"{result.baseline_prediction.partition(' (')[0]} for every row"
        )
    rate, reasons = training.optimizer.learning_rate, []
    if steps < _FEW_STEPS:
        reasons.append(f"{steps:,} steps are too few to train a new head; add --set schedule.min_steps={_ENOUGH_STEPS}")
    shares = task.class_shares()
    if shares is not None and result.constant is not None and shares.max() >= _UNBALANCED:
        reasons.append(
            f"{shares.max():.0%} of the training examples are '{task.labels[shares.argmax()]}'; add examples of "
            f"the other classes, or train for longer"
        )
    if lower := _lower_rate(training.recipe, encoder):
        reasons.append(
            f"a learning rate of {rate:g} is high for a model of this size; add --set optimizer.learning_rate={lower}"
        )
    reasons = reasons or [
        "the labels may not follow from the texts; look at some rows, and at the columns that were read",
        f"the learning rate may be too low or too high; try --set optimizer.learning_rate={3 * rate:.1g} or "
        f"{rate / 3:.1g}",
        f"{steps:,} steps may be too few; try --set schedule.min_steps={3 * steps}",
        "the encoder may know too little of such text; try one that was pretrained for longer",
    ]
    listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
    return f"{problem}. Likely reasons: {listed}."


def _lower_rate(recipe: FinetuneRecipe, encoder: EncoderSource) -> str | None:
    """Return the original paper's learning rate for this width if the recipe's is for small models, else None.

    More overrides may follow the learning rate.
    """
    if encoder.hidden_size < _BASE_WIDTH or recipe.optimizer.learning_rate <= _SMALL_RATE:
        return None
    return "1e-4" if encoder.hidden_size == _BASE_WIDTH else "5e-5 optimizer.layer_decay=0.9"
