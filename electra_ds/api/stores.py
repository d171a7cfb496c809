"""The token store of a corpus: reading the options for text and tokenizer, and building the store from them."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from electra_ds.config.commands import BuildDataOptions, ImportOptions
from electra_ds.config.names import GPU_RECIPE
from electra_ds.config.options import CorpusOptions, PretrainOptions
from electra_ds.config.plugins import READER, find
from electra_ds.config.recipe import Recipe, RecipeSource, given_options, load_recipe
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import ConfigError
from electra_ds.core.files import is_hub_model
from electra_ds.core.terminal import StageProgress, display
from electra_ds.data.build import ShowProgress, build_store
from electra_ds.data.corpus import Corpus, Source, is_saved_dataset, named_reader, open_source
from electra_ds.data.token_store import StoreInfo, TokenStore
from electra_ds.data.tokenizer import Tokenizer, problem, report

_log = logging.getLogger(__name__)
_BUILTIN, _HUB = "builtin", "hub:"
_DEFAULT_CORPUS = [[_BUILTIN]]
Check = Callable[[Tokenizer], None]
"""Raises an error for an unsuitable tokenizer, before anything is tokenised."""


def build_data(
    corpus: str | Path | Sequence[Any],
    out: str | Path,
    *,
    recipe: RecipeSource | None = None,
    tokenizer: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    workers: int | None = None,
    options: BuildDataOptions | None = None,
    quiet: bool = False,
    **more: Any,
) -> TokenStore:
    """Tokenise a corpus into a token store, or finish an interrupted build, and return the store.

    Args:
        corpus: text files or folders, `builtin`, `hub:NAME#CONFIG@SPLIT`, or a list of sources, each a list of these.
        out: the folder of the store.
        recipe: the recipe whose tokenizer to train on the text, if you give no tokenizer. By default rc2020-small.
        tokenizer: a tokenizer.json or vocab.txt, a folder with one, or the name of a model on the Hub.
        overrides: changed values of the recipe by dotted key, `{"tokenizer.vocab_size": 16000}`.
        workers: the number of processes. By default one for each core.
        options: the command's options; keyword arguments take precedence.
        quiet: print nothing.
        more: any other field of `BuildDataOptions`, such as `text_key="body"` or `streaming=True`.

    Raises:
        ConfigError: options, recipe or tokenizer cannot be used.
        DataError: the text cannot be read, or there is too little of it.

    Examples:
        >>> import electra_ds
        >>> store = electra_ds.build_data("texts/", "stores/small", recipe="tiny", quiet=True)
        >>> store.info.num_documents
        60
    """
    named = {
        "corpus": corpus,
        "out": out,
        "recipe": recipe,
        "tokenizer": tokenizer,
        "overrides": overrides,
        "workers": workers,
    }
    chosen = given_options(BuildDataOptions, options, named | more)
    values = load_recipe(chosen.recipe or GPU_RECIPE, chosen.overrides or ())
    with display(quiet) as console:
        return _make_store(chosen, values, chosen.out, partial(StageProgress, console), workers=chosen.workers)


def open_or_build_store(
    options: PretrainOptions | ImportOptions, recipe: Recipe, show_progress: ShowProgress, check: Check | None = None
) -> TokenStore:
    """Return the store given by --data, or build one in stores/ for --corpus or the built-in corpus."""
    if options.data is not None:
        store = TokenStore(options.data)
        if check is not None:
            check(store.tokenizer)
        _log_unknown(store.info)
        return store
    return _make_store(options, recipe, Path("stores") / store_name(options, recipe), show_progress, check=check)


def find_store(
    options: PretrainOptions, recipe: Recipe, show_progress: ShowProgress, check: Check | None = None
) -> TokenStore | tuple[Path, int]:
    """Return the store that `open_or_build_store` would open or, if it would have to build one, the path and the
    vocabulary size of that store.

    This checks everything except the text, and writes nothing.
    """
    if options.data is None:
        out = Path("stores") / store_name(options, recipe)
        if not out.exists():
            _, tokenizer = _asked_for(options, recipe, check)
            return out, tokenizer.vocab_size
    return open_or_build_store(options, recipe, show_progress, check)


def store_name(options: CorpusOptions, recipe: Recipe) -> str:
    """Return a readable name, from the first source and the tokenizer, with a hash of all the options."""
    sources = options.corpus or _DEFAULT_CORPUS
    first = sources[0][0]
    if (reader := named_reader(first)) is not None:
        name = re.sub(r"[^\w.-]+", "_", f"{reader[0].rpartition(':')[2]}-{Path(reader[1]).name}").strip("_")
    elif first.startswith(_HUB):
        dataset, *config_and_split = re.split("[#@]", first.removeprefix(_HUB))
        name = re.sub(r"[^\w.-]+", "_", "-".join([Path(dataset).resolve().name, *config_and_split])).strip("_")
    else:
        name = Path(first).resolve().name if first != _BUILTIN else _BUILTIN
    kind = (
        Path(options.tokenizer).stem if options.tokenizer else f"{recipe.tokenizer.kind}-{recipe.tokenizer.vocab_size}"
    )
    has_telling_name = not options.tokenizer or is_hub_model(options.tokenizer)  # many folders are `discriminator`
    if sources == _DEFAULT_CORPUS and has_telling_name:
        return f"{name}-{kind}"
    corpus = [[_absolute(word) for word in words] for words in sources]
    given = (
        corpus,
        options.document_boundary,
        options.text_key,
        options.revision,
        options.tokenizer,
        options.cased,
        None if options.tokenizer else recipe.tokenizer.lowercase,
        *(() if options.strip_accents is None else (options.strip_accents,)),
    )
    return f"{name}-{kind}-{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}"


def _absolute(source: str) -> str:
    """Return a source with an absolute path."""
    if source.startswith(_HUB):
        return source
    reader = named_reader(source)
    if reader is None:
        return str(Path(source).resolve())
    name, place = reader
    return f"{name}:{Path(place).resolve()}" if Path(place).exists() else source


def _make_store(
    options: CorpusOptions,
    recipe: Recipe,
    out: Path,
    show_progress: ShowProgress,
    *,
    workers: int | None = None,
    check: Check | None = None,
) -> TokenStore:
    """Build or finish the store in `out` from --corpus and --tokenizer."""
    corpus, tokenizer = _asked_for(options, recipe, check)
    with _without_main():
        store = build_store(
            corpus,
            tokenizer,
            out,
            workers=workers,
            allow_unknown=bool(options.allow_unknown),
            show_progress=show_progress,
        )
    for line in corpus.notes():
        _log.info(line)
    _log_unknown(store.info, always=True)
    return store


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep worker processes from running the caller's script again, as Python makes new processes do.

    Short scripts have no `if __name__ == "__main__"`, and the workers only call functions of this package.
    """
    main = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(before)


def _asked_for(
    options: CorpusOptions, recipe: Recipe, check: Check | None
) -> tuple[Corpus, Tokenizer | TokenizerSection]:
    """Return the corpus and the tokenizer to build a store from, after checking them."""
    sources = options.corpus or _DEFAULT_CORPUS
    uses_hub = any(word.startswith(_HUB) for words in sources for word in words)
    if (options.streaming or options.revision) and not uses_hub:
        raise ConfigError("--streaming and --revision are for datasets on the Hub; give one as --corpus hub:NAME.")
    tokenizer = _tokenizer(options, recipe)
    if check is not None:
        assert options.tokenizer is not None
        check(cast("Tokenizer", tokenizer))
    return Corpus(tuple(_source(options, words) for words in sources)), tokenizer


def _log_unknown(info: StoreInfo, always: bool = False) -> None:
    """Log the share of [UNK] in each source; without `always`, only for sources where it is too large."""
    for source in info.corpora:
        if source.unknown is None:
            continue
        if said := problem(source.description, source.unknown, source.num_tokens):
            _log.warning(said)
        elif always:
            _log.info(f"{source.description}: {report(source.unknown, source.num_tokens)}.")


def _source(options: CorpusOptions, words: list[str]) -> Source:
    """Return the source of one --corpus."""
    text_key = options.text_key or "text"
    if any(named_reader(word) for word in words):
        if len(words) > 1:
            raise ConfigError(f"Give each source with a reader its own --corpus, not {' '.join(words)}.")
        name, place = cast("tuple[str, str]", named_reader(words[0]))
        read: Source = find(READER, name)(place)
        return read
    if not any(word.startswith(_HUB) for word in words):
        if len(words) > 1 and _BUILTIN in words:
            raise ConfigError(f"Give `{_BUILTIN}` its own --corpus.")
        if len(words) == 1 and is_saved_dataset(Path(words[0])):
            from electra_ds.data.hub import SavedSource

            return SavedSource(Path(words[0]), text_key)
        return open_source(words, options.document_boundary or "file", text_key)
    if len(words) > 1:
        raise ConfigError(f"Give each Hub dataset its own --corpus, not {' '.join(words)}.")
    from electra_ds.data.hub import HubSource

    return HubSource(words[0], text_key, streaming=bool(options.streaming), revision=options.revision)


def _tokenizer(options: CorpusOptions, recipe: Recipe) -> Tokenizer | TokenizerSection:
    """Return the given tokenizer, local or from the Hub, or the recipe's section for training one."""
    if options.tokenizer is None:
        if options.cased is not None or options.strip_accents is not None:
            raise ConfigError(
                "--cased, --uncased and --strip-accents say how a given vocab.txt was made, so they need --tokenizer. "
                "For a tokenizer that is trained here, set tokenizer.lowercase."
            )
        return recipe.tokenizer
    from electra_ds.data.given_tokenizer import Casing, load_given_tokenizer

    tokenizer, notes = load_given_tokenizer(options.tokenizer, Casing(options.cased, options.strip_accents))
    for line in notes:
        _log.info(line)
    return tokenizer
