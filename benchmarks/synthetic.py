"""Token stores of random tokens, since speed depends on the lengths of texts and not on what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers

from electra_ds.data.token_store import FORMAT, SourceInfo, StoreInfo, TokenStore, token_dtype
from electra_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer

# Tokens of GLUE's inputs (CoLA, MRPC and STS-B train, QNLI and matched MNLI dev: 33,246 examples, pairs joined, [CLS]
# and [SEP] included) under BERT's uncased vocabulary, cut at 128: 33 equidistant quantiles; mean 33.5.
GLUE_LENGTHS = (
    4, 7, 8, 9, 10, 11, 12, 14, 16, 17, 18, 20, 22, 23, 25, 27, 30, 32, 34, 36, 39, 41, 43, 46, 48, 51, 53, 56, 60, 63,
    68, 76, 128,
)  # fmt: skip
# Documents of web text: exponential about this mean, none shorter than a row.
WEB_TEXT_MEAN_TOKENS = 1100
_SENTENCE_TOKENS = 24


def web_text_lengths(documents: int, row: int, rng: np.random.Generator) -> np.ndarray:
    return row + rng.exponential(max(row, WEB_TEXT_MEAN_TOKENS - row), documents).astype(np.int64)


def glue_lengths(documents: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of text, [CLS] and [SEP] not counted."""
    places = rng.random(documents) * (len(GLUE_LENGTHS) - 1)
    return np.maximum(1, np.interp(places, np.arange(len(GLUE_LENGTHS)), GLUE_LENGTHS).round() - 2).astype(np.int64)


def write_store(folder: Path, lengths: np.ndarray, vocab_size: int, rng: np.random.Generator) -> TokenStore:
    """A store of documents of these lengths, in lines of about a sentence."""
    names = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(vocab_size - len(SPECIAL_TOKENS)))]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = Tokenizer(backend, "of the benchmark")
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    dtype = token_dtype(vocab_size)
    tokens = rng.integers(len(SPECIAL_TOKENS), vocab_size, int(lengths.sum()), dtype=dtype)
    documents = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.cumsum(rng.integers(_SENTENCE_TOKENS // 2, _SENTENCE_TOKENS * 3 // 2, len(tokens) // 12 + 1))
    lines = np.union1d(documents, ends[ends < len(tokens)])
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", documents)
    np.save(folder / "lines.npy", lines)
    files = ("tokens.bin", "documents.npy", "lines.npy")
    info = StoreInfo(
        format=FORMAT,
        corpora=[SourceInfo("random tokens", len(lengths), len(tokens))],
        documents_read=[len(lengths)],
        corpus_signature="random",
        corpus_fingerprint="random",
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=dtype,
        vocab_size=vocab_size,
        num_documents=len(lengths),
        num_lines=len(lines) - 1,
        num_tokens=len(tokens),
        file_bytes={name: (folder / name).stat().st_size for name in files},
    )
    (folder / "store.json").write_text(info.to_json())
    return TokenStore(folder)
