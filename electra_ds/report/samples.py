"""Held-out sentences with what the generator replaced and what the discriminator made of it."""

from __future__ import annotations

import numpy as np
import torch
from rich.text import Text

from electra_ds.data.batches import GlobalBatch
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.model.electra import Electra

LEGEND = Text.assemble(
    "Replaced tokens are shown as {original→replacement}: ",
    ("✓ caught", "bold green"), ", ", ("✗ missed", "bold red"), "; ", ("?token? falsely accused", "yellow"),
    ". Accused are the tokens with the highest scores, as many as were replaced.",
)  # fmt: skip


@torch.no_grad()
def sample_sentences(model: Electra, tokenizer: Tokenizer, batch: GlobalBatch, count: int) -> list[Text]:
    """The first `count` sequences of a held-out batch, marked up. The threshold is set on the whole batch."""
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
    for row in range(min(count, len(shown))):
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
