"""Text that a tokenizer turns into [UNK] or leaves out: its share of a store, the reason, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from electra_ds.data.tokenizer import Tokenizer

NOTED_SHARE = 0.03
"""Assumed, since less than 1 % of a text is unknown to a WordPiece that was made for it."""
REFUSED_SHARE = 0.9
_EXAMPLES = 3
_EXAMPLE_CHARS = 24


@dataclass
class UnknownText:
    """The amount of text that is [UNK], in tokens and characters: without spaces, one [UNK] may be a complete line."""

    num_tokens: int = 0
    num_chars: int = 0
    """Characters that those tokens replace."""
    num_long_chars: int = 0
    """The number of those characters in words that are too long for a WordPiece."""
    text_chars: int = 0
    """Characters of the complete text, with spaces."""
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
        """Return the larger of the shares of tokens and of characters; a word that is left out counts as a token."""
        of_tokens = (self.num_tokens + self.num_left_out) / max(all_tokens + self.num_left_out, 1)
        return max(of_tokens, self.num_chars / max(self.text_chars, 1))


def unknown_in(lines: list[str], ids: list[list[int]], tokenizer: Tokenizer) -> UnknownText:
    """Return the unknown text in lines, whose ids are given."""
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
    """Yield each piece of text that becomes [UNK] or is left out, and whether it is left out."""
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
    """Return part of a sentence with the amount of text that is [UNK] or left out."""
    of_chars = unknown.num_chars / max(unknown.text_chars, 1)
    if unknown.num_left_out:
        return (
            f"{unknown.num_tokens:,} of {all_tokens:,} tokens are [UNK], and {unknown.num_left_out:,} stretches of "
            f"text are left out, for which it has no token, not even [UNK]: together {of_chars:.2%} of the characters"
        )
    if not unknown.num_tokens:
        return f"none of {all_tokens:,} tokens is [UNK]"
    of_tokens = unknown.num_tokens / all_tokens
    return (
        f"{unknown.num_tokens:,} of {all_tokens:,} tokens are [UNK] ({of_tokens:.2%}), which replace {of_chars:.2%} of "
        f"the characters"
    )


def problem(description: str, unknown: UnknownText, all_tokens: int) -> str | None:
    """Return a warning if too much of a source is [UNK], with the reason and what to do, else None."""
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
            f"for this language, in the right case (--cased and --strip-accents say how a vocab.txt was made), or"
        )
    return (
        f"The tokenizer does not know much of {description}: {report(unknown, all_tokens)}. {reason} train a "
        f"byte-level BPE, which knows all text: give --set tokenizer.kind=byte-level-bpe and no --tokenizer."
    )
