"""Held-out sentences with what the generator replaced and what the discriminator made of it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.text import Text

from electra_ds.data.tokenizer import Tokenizer
from electra_ds.pretraining.electra import Electra

LEGEND = Text.assemble(
    "Replaced tokens are shown as {original→replacement}: ",
    ("✓ caught", "bold green"), ", ", ("✗ missed", "bold red"), "; ", ("?token? falsely accused", "yellow"),
    ". Accused are the tokens with the highest scores, as many as were replaced.",
)  # fmt: skip

_BETWEEN_WORDS = " .,;:?!'’\"“”«»…。、，；：？！।؟،"


@torch.no_grad()
def sample_sentences(model: Electra, tokenizer: Tokenizer, batch: Any, count: int) -> list[Text]:
    """Return the `count` sequences of a held-out `ElectraBatch` that read most like prose, marked up.

    The threshold is set on the whole batch.
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
    sentences = []
    for row in most_prose([_decoded(tokenizer, row) for row in batch.ids_BT], count):
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
    """Return the places of the `count` texts with the largest share of prose, in their order.

    Prose, in any script, is letters, spaces and the marks between sentences and their parts; brackets, digits,
    underscores and operators are what code and tables are made of. Texts that are shorter than half of the longest
    come last, since a short one is easily all letters.
    """
    longest = max(map(len, texts), default=0)
    ranked = sorted(
        range(len(texts)), key=lambda place: (2 * len(texts[place]) < longest, -_share_of_prose(texts[place]))
    )
    return sorted(ranked[:count])


def _share_of_prose(text: str) -> float:
    is_prose = [unicodedata.category(each)[0] in "LM" or each in _BETWEEN_WORDS for each in text]
    return sum(is_prose) / max(1, len(text))


def _decoded(tokenizer: Tokenizer, ids_T: np.ndarray) -> str:
    return tokenizer.backend.decode(ids_T.tolist(), skip_special_tokens=True)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as it reads in running text: with the space before it, where it starts a word."""
    token = tokenizer.backend.id_to_token(int(token_id)) or "�"
    if type(tokenizer.backend.model).__name__ == "WordPiece":
        return token.removeprefix("##") if token.startswith("##") else f" {token}"
    if "▁" in token:  # SentencePiece's mark of a word's beginning, which its decoder drops from a first token
        return token.replace("▁", " ")
    if tokenizer.backend.decoder is None:
        return token
    return tokenizer.backend.decoder.decode([token])
