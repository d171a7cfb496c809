"""Train or load tokenizers with the five special tokens that ELECTRA needs, and measure the text they do not know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The roles of the special tokens, in BERT's spelling."""
_SPELLINGS = {
    "[UNK]": ("[UNK]", "<unk>"),
    "[CLS]": ("[CLS]", "<s>", "<cls>", "<bos>"),
    "[SEP]": ("[SEP]", "</s>", "<sep>", "<eos>"),
    "[MASK]": ("[MASK]", "<mask>"),
    "[PAD]": ("[PAD]", "<pad>"),
}
"""Well-known spellings of each role. A token that fits two roles gets the first of them."""
_CONFIG_KEYS = {
    "[PAD]": ("pad_token",),
    "[UNK]": ("unk_token",),
    "[CLS]": ("cls_token", "bos_token"),
    "[SEP]": ("sep_token", "eos_token"),
    "[MASK]": ("mask_token",),
}

LONGEST_TRAINING_WORD = 1000
"""In characters, or in bytes for a byte-level BPE. The time to train on a word is quadratic in its length.

Measured on one core: 100,000 letters without a space take 3.8 s as one word, 0.37 s in words of 10,000, 0.20 s of
3,000, 0.11 s of 1,000 and 0.07 s of 300. In words of 1,000 the time is linear: 1.3 s for 1 MB and 5.7 s for 4 MB.
"""


class Tokenizer:
    """A `tokenizers.Tokenizer` with a token for each special role."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str, settings: Mapping[str, Any] | None = None) -> None:
        """Give each role a token. A role without one gets a new token at the end of the vocabulary (see `added`).

        settings: transformers' settings of the tokenizer, such as `cls_token`. Raises DataError if the ids have
        gaps, or if unknown text cannot be encoded.
        """
        before = backend.get_vocab(with_added_tokens=True)
        document = json.loads(backend.to_str())
        found = _roles(backend, document, settings or {})
        if "[UNK]" not in found and not _is_byte_level(document):
            raise DataError(f"The tokenizer {source} lacks [UNK], which text outside its vocabulary needs.")
        self.special_tokens = {role: found.get(role, role) for role in SPECIAL_TOKENS}
        """The token of each role."""
        self.added = tuple(token for token in self.special_tokens.values() if token not in before)
        """Tokens that the tokenizer lacked."""
        # Skip tokens that are already special: adding one again would undo its settings, such as the lstrip of <mask>.
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([token for token in self.special_tokens.values() if token not in special])
        pieces = backend.get_vocab(with_added_tokens=True)
        ids = [pieces[token] for token in self.special_tokens.values()]
        is_taken = len({*before.values(), *ids}) != len(before) + len(self.added)
        if is_taken or max(pieces.values()) > 2 * len(pieces) + 1000:
            raise DataError(
                f"The tokenizer {source} has gaps in its ids: {len(before)} pieces have ids up to "
                f"{max(before.values(), default=0)}. Number its pieces without gaps."
            )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        backend.no_padding()
        backend.no_truncation()
        # It names all five roles, so tokenizer.json is enough to find their tokens again.
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[
                {"id": role, "ids": [token_id], "tokens": [token]}
                for (role, token), token_id in zip(self.special_tokens.items(), ids, strict=True)
            ],
        )
        if isinstance(backend.model, models.Unigram):
            # `tokenizers` reads back one in seven scores of a Unigram model with a different last digit. After one such
            # round trip it writes and reads the same log-probabilities.
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend = backend

    @cached_property
    def vocab_size(self) -> int:
        """The number of rows of an embedding table: the highest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool [vocab_size], True for ids that are not text and are never masked.

        [UNK] is text, so it is masked like any other token (as in google-research/electra).
        """
        special = np.zeros(self.vocab_size, dtype=bool)
        special[[self.pad_id, self.cls_id, self.sep_id, self.mask_id]] = True
        return special

    @cached_property
    def leaves_text_out(self) -> bool:
        """True if some text gets no token at all, not even [UNK].

        This is so for a BPE that has neither a token for unknown text nor a piece for every byte.
        """
        document = json.loads(self.backend.to_str())
        if document["model"]["type"] != "BPE" or document["model"]["unk_token"] is not None:
            return False
        steps = json.dumps([document["normalizer"], document["pre_tokenizer"]])
        in_words = '"ByteLevel"' in steps
        alphabet = pre_tokenizers.ByteLevel.alphabet() if in_words else [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = document["model"]["vocab"]
        return not (in_words or document["model"]["byte_fallback"]) or not all(piece in pieces for piece in alphabet)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's normalised tokenizer.json."""
        document = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return hashlib.sha256(document.encode("utf8")).hexdigest()

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Return the ids of each line, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(lines, add_special_tokens=False)]

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Write a folder that `load_tokenizer` and transformers' `AutoTokenizer` both open.

        model_max_length: the maximum number of tokens of the model, at which transformers then truncates.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            # Without a class, AutoTokenizer assumes WordPiece for an ELECTRA folder and returns wrong ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{_CONFIG_KEYS[role][0]: token for role, token in self.special_tokens.items()},
            **({"model_max_length": model_max_length} if model_max_length else {}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf8")


def _roles(backend: tokenizers.Tokenizer, document: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the token of each role for which one is found.

    It is found by the settings, by the labels that this module writes into the post-processor, by the model's own token
    for unknown text, or by a well-known spelling.

    No token has two roles. A token that both begins and ends texts is neither [CLS] nor [SEP].
    """
    configured = {
        role: next((text for key in keys if (text := text_of_token(settings.get(key)))), None)
        for role, keys in _CONFIG_KEYS.items()
    }
    if configured["[CLS]"] == configured["[SEP]"]:
        configured["[CLS]"] = configured["[SEP]"] = None
    labels = (document.get("post_processor") or {}).get("special_tokens") or {}
    labelled = {role: entry["tokens"][0] for role, entry in labels.items() if role in _SPELLINGS}
    # A BPE piece may look like a special token by chance: <s> is also an HTML tag.
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    pieces = special if document["model"]["type"] == "BPE" else backend.get_vocab(with_added_tokens=True)
    found: dict[str, str] = {}
    for role, spellings in _SPELLINGS.items():
        known = [spelling for spelling in spellings if spelling in pieces]
        unknown = [_unknown_token(document["model"])] if role == "[UNK]" else []
        for token in (configured[role], labelled.get(role), *unknown, *known):
            if token and backend.token_to_id(token) is not None and token not in found.values():
                found[role] = token
                break
    return found


def text_of_token(value: Any) -> str | None:
    """Return the text of a token in transformers' files, where it is a string or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _unknown_token(model: dict[str, Any]) -> str | None:
    """Return the model's own token for text outside its vocabulary."""
    if model["type"] != "Unigram":
        return model.get("unk_token")
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


def _is_byte_level(document: dict[str, Any]) -> bool:
    """Return True if every byte has a piece, so that any text can be encoded."""
    steps = json.dumps([document["normalizer"], document["pre_tokenizer"]])
    return bool('"ByteLevel"' in steps or document["model"].get("byte_fallback"))


def train_tokenizer(lines: Iterable[str], section: TokenizerSection) -> Tokenizer:
    """Return a tokenizer of the recipe's kind and size, trained on lines of text.

    Words longer than LONGEST_TRAINING_WORD are cut during training only.
    """
    if section.kind == "byte-level-bpe":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        # A line's first word is tokenised like any other word: the added space stands for the line break.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=section.vocab_size,
            # [MASK] includes the space before it, as words do, so that a mask in a sentence is a separate word.
            special_tokens=[*SPECIAL_TOKENS[:-1], tokenizers.AddedToken("[MASK]", lstrip=True, special=True)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=section.lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=section.vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
    words = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_TRAINING_WORD)])
    backend.train_from_iterator(lines, trainer)
    backend.pre_tokenizer = words
    return Tokenizer(backend, "trained here")


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a folder that `Tokenizer.save` wrote, or in a tokenizer.json.

    `given_tokenizer` reads the tokenizers of other programs. Raises DataError if tokenizer.json is missing or
    cannot be used.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"Cannot read the tokenizer {file}: {error}") from error
    return Tokenizer(backend, str(path))


# --- text that a tokenizer turns into [UNK] or leaves out

NOTED_SHARE = 0.03
"""Assumed: less than 1 % of a text is unknown to a WordPiece that was made for it."""
REFUSED_SHARE = 0.9
_EXAMPLES = 3
_EXAMPLE_CHARS = 24


@dataclass
class UnknownText:
    """The amount of text that is [UNK], in tokens and in characters, since one [UNK] may be a line without spaces."""

    num_tokens: int = 0
    num_chars: int = 0
    """The number of characters that those tokens replace."""
    num_long_chars: int = 0
    """The number of those characters in words that are too long for a WordPiece."""
    text_chars: int = 0
    """The number of characters in the entire text, with spaces."""
    examples: list[str] = field(default_factory=list)
    num_left_out: int = 0
    """The number of words without any token, not even [UNK]; num_chars includes their characters."""

    def add(self, other: UnknownText) -> None:
        """Add the counts of another text."""
        self.num_tokens += other.num_tokens
        self.num_chars += other.num_chars
        self.num_long_chars += other.num_long_chars
        self.text_chars += other.text_chars
        self.num_left_out += other.num_left_out
        self.examples = list(dict.fromkeys([*self.examples, *other.examples]))[:_EXAMPLES]

    def share(self, all_tokens: int) -> float:
        """Return the share of tokens or characters, whichever is larger. A word that is left out counts as a token."""
        of_tokens = (self.num_tokens + self.num_left_out) / max(all_tokens + self.num_left_out, 1)
        return max(of_tokens, self.num_chars / max(self.text_chars, 1))


def unknown_in(lines: list[str], ids: list[list[int]], tokenizer: Tokenizer) -> UnknownText:
    """Return the unknown text in lines. ids: the ids of each line."""
    found = UnknownText(text_chars=sum(map(len, lines)))
    longest_word = getattr(tokenizer.backend.model, "max_input_chars_per_word", None)
    for unknown, is_left_out in _unknown_words(lines, ids, tokenizer):
        found.num_tokens += not is_left_out
        found.num_left_out += is_left_out
        found.num_chars += len(unknown)
        if longest_word is not None and len(unknown) > longest_word:
            found.num_long_chars += len(unknown)
        if len(found.examples) < _EXAMPLES and (example := unknown[:_EXAMPLE_CHARS]) not in found.examples:
            found.examples.append(example)
    return found


def _unknown_words(lines: list[str], ids: list[list[int]], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield (text, is_left_out) for each piece of text that becomes [UNK] or is left out."""
    leaves_out = tokenizer.leaves_text_out
    checked = [
        line for line, ids_of_line in zip(lines, ids, strict=True) if leaves_out or tokenizer.unk_id in ids_of_line
    ]
    for line, encoding in zip(checked, tokenizer.backend.encode_batch(checked, add_special_tokens=False), strict=True):
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == tokenizer.unk_id:
                yield line[start:stop], False
        if leaves_out:
            rest = list(line)
            for start, stop in encoding.offsets:
                rest[start:stop] = " " * (stop - start)
            yield from ((word, True) for word in "".join(rest).split())


def report(unknown: UnknownText, all_tokens: int) -> str:
    """Return a clause that states how much text is [UNK] or left out."""
    of_chars = unknown.num_chars / max(unknown.text_chars, 1)
    if unknown.num_left_out:
        return (
            f"{unknown.num_tokens:,} of {all_tokens:,} tokens are [UNK], and {unknown.num_left_out:,} stretches of "
            f"text get no token, not even [UNK]: together {of_chars:.2%} of the characters"
        )
    if not unknown.num_tokens:
        return f"none of {all_tokens:,} tokens is [UNK]"
    of_tokens = unknown.num_tokens / all_tokens
    return (
        f"{unknown.num_tokens:,} of {all_tokens:,} tokens are [UNK] ({of_tokens:.2%}), which replace {of_chars:.2%} of "
        f"the characters"
    )


def problem(description: str, unknown: UnknownText, all_tokens: int) -> str | None:
    """Return a warning with reason and remedy if too much of a source is [UNK], else None."""
    if unknown.share(all_tokens) < NOTED_SHARE:
        return None
    examples = ", ".join(f"'{example}'" for example in unknown.examples)
    if unknown.num_long_chars > unknown.num_chars / 2:
        reason = (
            f"It has no spaces between words ({examples} …), and a WordPiece does not look up words of more than 100 "
            f"characters. Put spaces between the words first, with a word segmenter for the language, or"
        )
    else:
        reason = (
            f"The vocabulary lacks characters or forms of the text, such as {examples}. Use a tokenizer that was made "
            f"for this language, in the right case (--cased and --strip-accents describe a vocab.txt), or"
        )
    return (
        f"The tokenizer does not know much of {description}: {report(unknown, all_tokens)}. {reason} train a "
        f"byte-level BPE, which knows all text: give --set tokenizer.kind=byte-level-bpe and no --tokenizer."
    )
