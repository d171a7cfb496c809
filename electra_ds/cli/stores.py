"""Where the text comes from: arguments that name a corpus and a tokenizer, and the token store made of them."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from electra_ds.core.errors import ConfigError
from electra_ds.core.files import is_hub_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from electra_ds.cli.arguments import Group
    from electra_ds.config.recipe import Recipe, TokenizerSection
    from electra_ds.data.corpus import Corpus, Source
    from electra_ds.data.token_store import StoreInfo, TokenStore
    from electra_ds.data.tokenizer import Tokenizer

CORPUS_ARGUMENTS = (
    "corpus", "document_boundary", "text_key", "streaming", "revision", "tokenizer", "cased", "strip_accents",
    "allow_unknown",
)  # fmt: skip
_BUILTIN, _HUB = "builtin", "hub:"


def add_corpus_arguments(group: Group, default_note: str, required: bool = False) -> None:
    """What CORPUS_ARGUMENTS names; None where it is not given."""
    group.add_argument(
        "--corpus", nargs="+", action="append", metavar="SOURCE", required=required,
        help=f"text files and folders, or hub:NAME#CONFIG@SPLIT; once for each source ({default_note})",
    )  # fmt: skip
    group.add_argument(
        "--document-boundary", choices=("file", "blank-line"),
        help="where a document ends in a text file (default: file)",
    )  # fmt: skip
    group.add_argument(
        "--text-key", metavar="KEY", help="field of JSON lines, column of Parquet and datasets (default: text)"
    )
    group.add_argument(
        "--streaming", action="store_true", default=None, help="read Hub datasets without downloading them whole"
    )
    group.add_argument("--revision", metavar="REV", help="commit, branch or tag of the Hub dataset")
    group.add_argument(
        "--tokenizer", metavar="PATH|NAME",
        help="use this tokenizer.json or vocab.txt, a folder with one, or that of a model on the Hub, such as "
        "FacebookAI/xlm-roberta-base, instead of training one",
    )  # fmt: skip
    casing = group.add_mutually_exclusive_group()
    casing.add_argument("--cased", action="store_true", default=None, help="the vocab.txt was made from cased text")
    casing.add_argument(
        "--uncased", action="store_false", dest="cased", default=None,
        help="the vocab.txt was made from lower-cased text (assumed if nothing says so)",
    )  # fmt: skip
    group.add_argument(
        "--strip-accents", action=argparse.BooleanOptionalAction,
        help="whether the vocab.txt was made from text without accents (default: yes if it is uncased)",
    )  # fmt: skip
    group.add_argument(
        "--allow-unknown", action="store_true", default=None,
        help="build a store even if the tokenizer turns nearly all of a source into [UNK]",
    )  # fmt: skip


def gives_corpus(options: argparse.Namespace) -> bool:
    """Return whether any of CORPUS_ARGUMENTS is given."""
    return any(getattr(options, name) is not None for name in CORPUS_ARGUMENTS)


def open_store(
    options: argparse.Namespace, recipe: Recipe, check: Callable[[Tokenizer], None] | None = None
) -> TokenStore:
    """The store that --data names, or one built in stores/ for --corpus or the built-in corpus.

    check: raises an error where the store's tokenizer, which is then a given one, will not do; it is asked before
    anything is tokenised.
    """
    from electra_ds.data.token_store import TokenStore

    if options.data is not None:
        store = TokenStore(options.data)
        if check is not None:
            check(store.tokenizer)
        _say_unknown(store.info)
        return store
    options.corpus = options.corpus or [[_BUILTIN]]
    return make_store(options, recipe, Path("stores") / store_name(options, recipe), check=check)


def look_for_store(
    options: argparse.Namespace, recipe: Recipe, check: Callable[[Tokenizer], None] | None = None
) -> TokenStore | tuple[Path, int]:
    """The store that `open_store` opens; where it would have to build one, that one's path and vocabulary size.

    Everything but the text is checked, and nothing is written.
    """
    if options.data is None:
        options.corpus = options.corpus or [[_BUILTIN]]
        out = Path("stores") / store_name(options, recipe)
        if not out.exists():
            _, tokenizer = _asked_for(options, recipe, check)
            return out, tokenizer.vocab_size
    return open_store(options, recipe, check)


def store_name(options: argparse.Namespace, recipe: Recipe) -> str:
    """A name for people, after the first source and the tokenizer, and a hash of all that was asked for."""
    first = options.corpus[0][0]
    if first.startswith(_HUB):
        dataset, *config_and_split = re.split("[#@]", first.removeprefix(_HUB))
        name = re.sub(r"[^\w.-]+", "_", "-".join([Path(dataset).resolve().name, *config_and_split])).strip("_")
    else:
        name = Path(first).resolve().name if first != _BUILTIN else _BUILTIN
    kind = (
        Path(options.tokenizer).stem if options.tokenizer else f"{recipe.tokenizer.kind}-{recipe.tokenizer.vocab_size}"
    )
    has_telling_name = not options.tokenizer or is_hub_model(options.tokenizer)  # many folders are `discriminator`
    if options.corpus == [[_BUILTIN]] and has_telling_name:
        return f"{name}-{kind}"
    corpus = [
        [word if word.startswith(_HUB) else str(Path(word).resolve()) for word in words] for words in options.corpus
    ]
    given = (
        corpus, options.document_boundary, options.text_key, options.revision, options.tokenizer, options.cased,
        None if options.tokenizer else recipe.tokenizer.lowercase,
        *(() if options.strip_accents is None else (options.strip_accents,)),
    )  # fmt: skip
    return f"{name}-{kind}-{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}"


def make_store(
    options: argparse.Namespace,
    recipe: Recipe,
    out: Path,
    workers: int | None = None,
    check: Callable[[Tokenizer], None] | None = None,
) -> TokenStore:
    """Build, or finish, the store in `out` from what --corpus and --tokenizer say. check: as in `open_store`."""
    from electra_ds.data.build import build_store

    corpus, tokenizer = _asked_for(options, recipe, check)
    store = build_store(corpus, tokenizer, out, workers=workers, allow_unknown=bool(options.allow_unknown))
    _say(corpus.notes())
    _say_unknown(store.info, always=True)
    return store


def _asked_for(
    options: argparse.Namespace, recipe: Recipe, check: Callable[[Tokenizer], None] | None
) -> tuple[Corpus, Tokenizer | TokenizerSection]:
    """Return the corpus and the tokenizer to build a store from, after checking them."""
    from electra_ds.data.corpus import Corpus

    if (options.streaming or options.revision) and not any(
        word.startswith(_HUB) for words in options.corpus for word in words
    ):
        raise ConfigError("--streaming and --revision are for datasets of the Hub; give one as --corpus hub:NAME.")
    tokenizer = _tokenizer(options, recipe)
    if check is not None:
        assert options.tokenizer is not None
        check(cast("Tokenizer", tokenizer))
    return Corpus(tuple(_source(options, words) for words in options.corpus)), tokenizer


def _say_unknown(info: StoreInfo, always: bool = False) -> None:
    """Print how much of each source is [UNK], or only for the sources where it is too much."""
    from rich.console import Console

    from electra_ds.core.terminal import warn
    from electra_ds.data.unknown import problem, report

    console = Console()
    for source in info.corpora:
        if source.unknown is None:
            continue
        if said := problem(source.description, source.unknown, source.num_tokens):
            warn(console, said)
        elif always:
            _say([f"{source.description}: {report(source.unknown, source.num_tokens)}."])


def _say(notes: list[str]) -> None:
    from rich.console import Console

    from electra_ds.core.terminal import say

    for note in notes:
        say(Console(), note)


def _source(options: argparse.Namespace, words: list[str]) -> Source:
    """What one --corpus asks for."""
    text_key = options.text_key or "text"
    if not any(word.startswith(_HUB) for word in words):
        if len(words) > 1 and _BUILTIN in words:
            raise ConfigError(f"Give `{_BUILTIN}` a --corpus of its own.")
        from electra_ds.data.corpus import open_source

        return open_source(words, options.document_boundary or "file", text_key)
    if len(words) > 1:
        raise ConfigError(f"Give each Hub dataset a --corpus of its own, not {' '.join(words)}.")
    from electra_ds.data.hub import HubSource

    return HubSource(words[0], text_key, streaming=bool(options.streaming), revision=options.revision)


def _tokenizer(options: argparse.Namespace, recipe: Recipe) -> Tokenizer | TokenizerSection:
    """The given tokenizer, from here or from the Hub, or the recipe's section to train one from."""
    if options.tokenizer is None:
        if options.cased is not None or options.strip_accents is not None:
            raise ConfigError(
                "--cased, --uncased and --strip-accents say how a given vocab.txt was made, so they need --tokenizer. "
                "For a tokenizer that is trained here, set tokenizer.lowercase."
            )
        return recipe.tokenizer
    from electra_ds.data.given_tokenizer import Casing, load_given_tokenizer

    tokenizer, notes = load_given_tokenizer(options.tokenizer, Casing(options.cased, options.strip_accents))
    _say(notes)
    return tokenizer
