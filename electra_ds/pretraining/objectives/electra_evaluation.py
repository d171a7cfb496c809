"""Evaluating an ELECTRA model on held-out text: metrics, detection of a collapse, and sample sentences.

Training has collapsed if the discriminator has stopped discriminating, or never began to, while the generator still
learns. The reproduction study saw it with generators of at least half the discriminator's width: the generator fools
the discriminator completely, and from then on the run is worthless.

Shape suffixes: M selected positions, V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.text import Text

from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.masked_batch import MicroBatch

ALWAYS_ORIGINAL = "always_original_accuracy"
"""The accuracy of always answering "original", the baseline of `discriminator_accuracy`."""
WINDOW = 4
"""Consecutive evaluations that must all show a collapse."""
LEAST_SHARE = 0.1
"""Share of the schedule before which nothing is judged: at first every discriminator is at chance. The study's
collapses happened at the end of its warm-up, one hundredth into its schedule, and lasted."""
MOST_AUC = 0.52
MOST_YOUDEN = 0.02
"""Maximum of Youden's J, recall minus the false positive rate, which is 0 at chance."""
CONSTANT_LOGITS = 0.02
"""Standard deviation below which the logits do not depend on the text: 0.001 to 0.002 were measured of discriminators
whose learning rate was too high, and 0.1 to 0.4 of those that learn slowly."""
LEAST_PROGRESS = 0.01
"""Minimum decrease of the generator's loss at [MASK] over the window, in nats."""


class Judged(NamedTuple):
    """Results of one micro-batch at the positions that count in the discriminator's loss."""

    loss_sum: float
    labels: np.ndarray
    """The classes, such as whether the token was replaced."""
    scores: np.ndarray
    """The logits."""


def judged(micro_batch: MicroBatch, loss_sum: torch.Tensor, labels_BT: torch.Tensor, logits_BT: torch.Tensor) -> Judged:
    """Return the results of a held-out micro-batch, in CPU memory."""
    return Judged(
        loss_sum=loss_sum.item(),
        labels=labels_BT[micro_batch.counted_BT].cpu().numpy(),
        scores=logits_BT[micro_batch.counted_BT].float().cpu().numpy(),
    )


def discriminator_metrics(chunks: Sequence[Judged], num_counted: int) -> dict[str, float]:
    """Return the metrics of all micro-batches together; the loss in nats, shares and rates in [0, 1].

    `replaced_share` is the share of the counted tokens that were replaced. Precision, recall and F1 have "replaced" as
    the positive class and a threshold of 0.5. `discriminator_auc` is the area under the ROC curve; nan if only one
    class occurred. `discriminator_logit_std` is the standard deviation of the logits, which tells a discriminator that
    answers everything alike from one whose task is hard.
    """
    replaced = np.concatenate([chunk.labels for chunk in chunks])
    score = np.concatenate([chunk.scores for chunk in chunks])
    found = replaced & (score > 0)
    return {
        "replaced_share": float(replaced.mean()),
        "discriminator_loss": sum(chunk.loss_sum for chunk in chunks) / num_counted,
        "discriminator_accuracy": float((replaced == (score > 0)).mean()),
        "discriminator_precision": _share(found.sum(), (score > 0).sum()),
        "discriminator_recall": _share(found.sum(), replaced.sum()),
        "discriminator_f1": _share(2 * found.sum(), (score > 0).sum() + replaced.sum()),
        "discriminator_auc": area_under_roc(replaced, score),
        "discriminator_logit_std": float(score.std(dtype=np.float64)),
    }


def describe_discriminator(metrics: Mapping[str, float]) -> str:
    return (
        f"discriminator loss {metrics['discriminator_loss']:.3f}, accuracy {metrics['discriminator_accuracy']:.3f} "
        f'(always "original": {1 - metrics["replaced_share"]:.3f}), AUC {metrics["discriminator_auc"]:.3f}'
    )


def _share(part: np.integer, of: np.integer) -> float:
    return float(part / of) if of else 0.0


def area_under_roc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the probability that a positive example has a higher score than a negative one, equal scores counting 1/2
    (Mann and Whitney); nan if only one class occurs or a score is not finite.

    It is scikit-learn's `roc_auc_score`, whose import takes as long as torch's.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives or not np.isfinite(scores).all():
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[place][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def collapsed_at(
    evaluations: Sequence[Mapping[str, Any]], total_steps: int, warmup_steps: int, *, generator_learns: bool = True
) -> int | None:
    """Return the step at which training collapsed, or None if it has not.

    evaluations: in order, with `step` and the metrics. Training has collapsed if AUC and recall are at chance in WINDOW
    consecutive evaluations that are judged, and the generator, unless it is frozen, improved over them. The step is
    that of the first of all consecutive evaluations at chance, judged or not; for a discriminator that never began to
    learn, it is the run's first evaluation.
    """
    least = max(LEAST_SHARE * total_steps, warmup_steps)
    for first in range(len(evaluations) - WINDOW + 1):
        window = evaluations[first : first + WINDOW]
        losses = [_number(each.get("generator_masked_loss")) for each in window]
        is_judged, progress = window[0]["step"] >= least, losses[0] - losses[-1]
        if is_judged and all(map(_is_at_chance, window)) and (not generator_learns or progress >= LEAST_PROGRESS):
            while first > 0 and _is_at_chance(evaluations[first - 1]):
                first -= 1
            return int(evaluations[first]["step"])
    return None


def _is_at_chance(evaluation: Mapping[str, Any]) -> bool:
    auc = _number(evaluation.get("discriminator_auc"))
    return auc <= MOST_AUC and _youden(evaluation) <= MOST_YOUDEN


def _youden(evaluation: Mapping[str, Any]) -> float:
    """Return Youden's J, recall minus the false positive rate: 0 for any blind guess, 1 at best."""
    accuracy, recall, replaced = (
        _number(evaluation.get(name)) for name in ("discriminator_accuracy", "discriminator_recall", "replaced_share")
    )
    if not 0 < replaced < 1:
        return math.nan
    specificity = (accuracy - replaced * recall) / (1 - replaced)
    return recall + specificity - 1


def describe_collapse(step: int, evaluations: Sequence[Mapping[str, Any]], *, generator_learns: bool = True) -> str:
    """Return the message for the step of a collapse, with advice from the last evaluation."""
    improved = " while the generator improved" if generator_learns else ""
    found = f"The discriminator has been at chance since step {step}{improved}: it has collapsed."
    spread = _number(evaluations[-1].get("discriminator_logit_std")) if evaluations else math.nan
    if spread < CONSTANT_LOGITS:
        return f"{found} Its logits are constant (standard deviation {spread:.3f}), so lower optimizer.learning_rate."
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


LEGEND = Text.assemble(
    "Replaced tokens are shown as {original→replacement}: ",
    ("✓ detected", "bold green"),
    ", ",
    ("✗ missed", "bold red"),
    "; ",
    ("?token? false alarm", "yellow"),
    ". The discriminator marks as many tokens as were replaced, those with the highest scores.",
)


@torch.no_grad()
def sample_sentences(model: Electra, tokenizer: Tokenizer, batch: Any, count: int) -> list[Text]:
    """Return the `count` sequences of a held-out `MaskedBatch` that are most like prose, marked up.

    The threshold is computed over the entire batch.
    """
    micro_batch = batch.micro_batch(0, len(batch.ids_BT), packed=False)
    output = model(micro_batch)
    scores = output.discriminator_logits_BT.numpy()
    replaced = output.is_replaced_BT.numpy()
    counted = batch.counted_BT
    threshold = np.quantile(scores[counted], 1 - replaced[counted].mean())
    shown: np.ndarray = batch.ids_BT.copy().reshape(-1)
    shown[micro_batch.selected_M.numpy()] = np.where(
        micro_batch.replaced_M.numpy(), output.samples_M.numpy(), shown[micro_batch.selected_M.numpy()]
    )
    shown = shown.reshape(batch.ids_BT.shape)
    texts = [tokenizer.backend.decode(row.tolist(), skip_special_tokens=True) for row in batch.ids_BT]
    sentences = []
    for row in most_prose(texts, count):
        text = Text()
        for place in range(1, batch.lengths_B[row] - 1):
            accused = counted[row, place] and scores[row, place] > threshold
            token = token_text(tokenizer, shown[row, place])
            if not text.plain:
                token = token.lstrip()
            space = token[: len(token) - len(token.lstrip())]
            if replaced[row, place]:
                original = token_text(tokenizer, batch.ids_BT[row, place]).strip()
                mark, style = ("✓", "bold green") if accused else ("✗", "bold red")
                text.append(f"{space}{{{original}→{token.strip()}}}{mark}", style)
            elif accused:
                text.append(f"{space}?{token.strip()}?", "yellow")
            else:
                text.append(token)
        sentences.append(text)
    return sentences


def most_prose(texts: Sequence[str], count: int) -> list[int]:
    """Return the indices of the `count` texts that are most like prose, in ascending order.

    Prose, in any script, consists of letters and spaces; code and tables have digits, brackets and operators.
    """
    ranked = sorted(range(len(texts)), key=lambda place: _prose(texts[place]), reverse=True)
    return sorted(ranked[:count])


def _prose(text: str) -> int:
    """Return the number of letters, marks and spaces in a text, less five for each other character."""
    return sum(1 if unicodedata.category(each)[0] in "LMZ" else -5 for each in text)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as it appears in running text: with a space before it if it starts a word."""
    token = tokenizer.backend.id_to_token(int(token_id)) or "�"
    if type(tokenizer.backend.model).__name__ == "WordPiece":
        return token.removeprefix("##") if token.startswith("##") else f" {token}"
    if "▁" in token:  # SentencePiece's marker of a word's start, which its decoder drops from a first token
        return token.replace("▁", " ")
    if tokenizer.backend.decoder is None:
        return token
    return tokenizer.backend.decoder.decode([token])
