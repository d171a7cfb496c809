"""Tokenizers: trained here or loaded, all with [CLS] … [SEP] and segment ids built in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from electra_ds.config.recipe import TokenizerSection
from electra_ds.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens are known to be there."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str) -> None:
        missing = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is None]
        if missing:
            raise DataError(f"The tokenizer {source} lacks {', '.join(missing)}, which ELECTRA needs.")
        pieces = backend.get_vocab(with_added_tokens=True)
        if max(pieces.values()) > 2 * len(pieces) + 1000:
            raise DataError(
                f"The tokenizer {source} has {len(pieces)} pieces but ids up to {max(pieces.values())}, "
                f"each of which would need a row in the model. Number its pieces without such gaps."
            )
        self.backend = backend
        ids = [token_id for token in SPECIAL_TOKENS if (token_id := backend.token_to_id(token)) is not None]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding table needs: the highest id and one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool [vocab_size], True at ids that are never masked and never text.

        [UNK] stands for text, so it is masked like any other token (as in google-research/electra).
        """
        special = np.zeros(self.vocab_size, dtype=bool)
        special[[self.pad_id, self.cls_id, self.sep_id, self.mask_id]] = True
        return special

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the tokenizer does."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode("utf8")).hexdigest()

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Ids of each line, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(lines, add_special_tokens=False)]

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """A folder that `load_tokenizer` and transformers' `AutoTokenizer` both open.

        model_max_length: tokens that the model takes, at which transformers then truncates.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            # Without a class, AutoTokenizer takes an ELECTRA folder for WordPiece and returns wrong ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
            **({"model_max_length": model_max_length} if model_max_length else {}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf8")


def train_tokenizer(lines: Iterable[str], section: TokenizerSection) -> Tokenizer:
    """A tokenizer of the recipe's kind and size, trained on lines of text."""
    if section.kind == "byte-level-bpe":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        # A line's first word is tokenised like any other: the prefix space stands for the line break.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=section.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        backend = _wordpiece(models.WordPiece(unk_token="[UNK]"), section.lowercase)
        trainer = trainers.WordPieceTrainer(
            vocab_size=section.vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
    backend.train_from_iterator(lines, trainer)
    return Tokenizer(backend, "trained here")


def load_tokenizer(path: Path, *, lowercase: bool | None = None) -> Tokenizer:
    """A tokenizer from a folder with `tokenizer.json` or `vocab.txt`, or from either file itself.

    `vocab.txt` is a WordPiece vocabulary, one piece a line; `lowercase` says how it was made, and None leaves it
    to `do_lower_case` of a `tokenizer_config.json` beside it, or else to the default of BERT, True. Raises DataError
    where there is no tokenizer or it lacks a special token.
    """
    candidates = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise DataError(f"No tokenizer at {path}: give a folder with tokenizer.json or vocab.txt, or such a file.")
    try:
        if file.suffix == ".json":
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:
            config = file.with_name("tokenizer_config.json")
            if lowercase is None:
                lowercase = (
                    bool(json.loads(config.read_text("utf8")).get("do_lower_case", True)) if config.is_file() else True
                )
            backend = _wordpiece(models.WordPiece.from_file(str(file), unk_token="[UNK]"), lowercase)
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"Cannot read the tokenizer {file}: {error}") from error
    return Tokenizer(backend, str(path))


def _wordpiece(model: models.WordPiece, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's normaliser and pre-tokeniser around a WordPiece model."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend
