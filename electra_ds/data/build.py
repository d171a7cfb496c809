"""Build a token store: tokenise a corpus in parallel, in a way that an interrupted build can be resumed.

The corpus is divided into chunks of documents. Worker processes write one shard per chunk, named by its number and
content, into `STORE.partial/`. A second run reads the corpus again and skips the finished shards. When all shards are
written, they are joined and the folder is renamed, so a store is either complete or absent.
"""

from __future__ import annotations

import concurrent.futures.process
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import DataError
from electra_ds.core.launcher import worker_pool
from electra_ds.core.terminal import PREPARING
from electra_ds.data.corpus import Corpus
from electra_ds.data.token_store import FORMAT, SourceInfo, StoreInfo, TokenStore, token_dtype
from electra_ds.data.tokenizer import (
    REFUSED_SHARE,
    Tokenizer,
    UnknownText,
    load_tokenizer,
    problem,
    train_tokenizer,
    unknown_in,
)

_log = logging.getLogger(__name__)
_CHARACTERS_SHOWN_AT_A_TIME = 100_000
_CHUNK_CHARS = 4_000_000
_TRAINED_FROM = "trained_from.json"
_SHARD_FORMAT = 2
_ARRAYS = ("tokens.bin", "documents.npy", "lines.npy")


class BuildProgress(Protocol):
    """The display of the progress of a build, or of other preparations, stage by stage."""

    def begin(self, stage: str, total: float | None = None, status: str = "") -> None:
        """Begin a stage. total: the amount of work, or None if it is unknown."""

    def add(self, done: float) -> None:
        """Add to the amount of work done."""

    def set_status(self, status: str) -> None:
        """Set the status of the stage."""

    def end(self, status: str = "") -> None:
        """End the stage. status: its result."""


class _NoProgress:
    begin = add = set_status = end = staticmethod(lambda *_, **__: None)


ShowProgress: TypeAlias = Callable[[], AbstractContextManager[BuildProgress]]


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer | TokenizerSection,
    out: Path,
    *,
    workers: int | None = None,
    allow_unknown: bool = False,
    show_progress: ShowProgress = lambda: nullcontext(_NoProgress()),
) -> TokenStore:
    """Build the store at `out`, or open it if it exists and was built from the same text and tokenizer.

    tokenizer: a finished one, or the recipe's section with which to train one on this corpus. allow_unknown: build the
    store even if nearly all of a source becomes [UNK]. show_progress: called after the downloads, which have their own
    display. Raises DataError if the corpus cannot be read, if nearly all of a source becomes [UNK] and this is not
    allowed, if `out` holds a different store, or if the disk is full; finished shards are kept.
    """
    if out.name in ("", ".."):
        out = Path(os.path.abspath(out))  # gives "." a name
    partial = out.with_name(out.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        while not out.exists():
            partial.mkdir(exist_ok=True)
            with _locked(partial) as is_ours, _no_empty_folder_after_an_error(partial):
                if is_ours and out.exists():  # another process has just finished it
                    shutil.rmtree(partial)
                elif is_ours:
                    corpus.prepare()
                    with show_progress() as progress:
                        trained = _trained(corpus, tokenizer, partial, progress)
                        shards, read = _tokenise(corpus, trained, partial, workers, progress)
                        _join(shards, trained, corpus, read, partial, allow_unknown)
                    partial.rename(out)
                    return TokenStore(out)
        return _reopen(corpus, tokenizer, out)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"A worker process was killed, perhaps because memory ran out. Finished parts are kept in {partial}; "
            f"run the same command again with fewer --workers."
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot write the token store {out}: {error.strerror or error}. Finished parts are kept in {partial}; "
            f"free some space and run the same command again."
        ) from error


def _reopen(corpus: Corpus, tokenizer: Tokenizer | TokenizerSection, out: Path) -> TokenStore:
    store = TokenStore(out)
    if store.info.corpus_signature != corpus.signature():
        corpus.prepare()
        read = _TextHash(corpus)
        for source, document in corpus.documents_by_source():
            read.add(source, document)
        if store.info.corpus_fingerprint != read.fingerprint:
            raise DataError(
                f"{out} was built from different text than {corpus.description} has now. Delete it, or choose another."
            )
        if store.info.documents_read != read.documents:
            raise DataError(f"{out} divides the same text into other corpora. Delete it, or choose another.")
    same_tokenizer = (
        tokenizer.fingerprint == store.info.tokenizer_fingerprint
        if isinstance(tokenizer, Tokenizer)
        else trained_from(out) == tokenizer
    )
    if not same_tokenizer:
        raise DataError(f"{out} was built with another tokenizer. Delete it, or choose another.")
    _log.info(f"The token store {out} was already built from this text and tokenizer, so it is not built again.")
    return store


def trained_from(folder: Path, corpus: Corpus | None = None) -> TokenizerSection | None:
    """Return the tokenizer section of the recipe that trained the tokenizer in this folder.

    Return None if no build trained it, or if it was trained on a corpus other than the given one.
    """
    try:
        marker = json.loads((folder / "tokenizer" / _TRAINED_FROM).read_text("utf8"))
        if corpus is not None and marker["corpus_signature"] != corpus.signature():
            return None
        return TokenizerSection(**marker["section"])
    except (OSError, ValueError, KeyError, TypeError):  # missing, or incomplete after a kill or a full disk
        return None


@contextmanager
def _no_empty_folder_after_an_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        if {entry.name for entry in partial.iterdir()} <= {".lock"}:
            shutil.rmtree(partial)
        raise


@contextmanager
def _locked(partial: Path) -> Iterator[bool]:
    """Yield True if this process holds the lock on the folder.

    If another process held the lock, wait for it and yield False: the folder may now be a finished store, or deleted.
    """
    try:
        file = (partial / ".lock").open("w")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%swaiting for another process to build %s", PREPARING, partial.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
            yield False
            return
        try:
            is_this = os.path.samestat((partial / ".lock").stat(), os.fstat(file.fileno()))
        except OSError:  # the other process has just finished
            is_this = False
        yield is_this


def _trained(
    corpus: Corpus, tokenizer: Tokenizer | TokenizerSection, partial: Path, progress: BuildProgress
) -> Tokenizer:
    """Return the given tokenizer, the one that an interrupted build finished, or a newly trained one."""
    folder = partial / "tokenizer"
    if isinstance(tokenizer, Tokenizer):
        (folder / _TRAINED_FROM).unlink(missing_ok=True)
        tokenizer.save(folder)
        return tokenizer
    if trained_from(partial, corpus) != tokenizer:
        trained = train_tokenizer(_first_lines(corpus, tokenizer, progress), tokenizer)
        progress.end(f"{tokenizer.kind}, {trained.vocab_size:,} pieces")
        (folder / _TRAINED_FROM).unlink(missing_ok=True)
        trained.save(folder)
        marker = {"section": tokenizer.model_dump(), "corpus_signature": corpus.signature()}
        (folder / _TRAINED_FROM).write_text(json.dumps(marker), "utf8")
    return load_tokenizer(folder)


def _first_lines(corpus: Corpus, section: TokenizerSection, progress: BuildProgress) -> Iterator[str]:
    """Yield lines to train a tokenizer on, and show progress. Training begins once the last line has been read."""
    most = section.max_training_characters
    progress.begin("reading text", total=min(most, corpus.num_bytes) if corpus.num_bytes else None)
    new_characters = 0
    for line in corpus.first_lines(most):
        yield line
        new_characters += len(line)
        if new_characters >= _CHARACTERS_SHOWN_AT_A_TIME:
            progress.add(new_characters)
            new_characters = 0
    progress.end()
    progress.begin("training the tokenizer", status=section.kind)


class _TextHash:
    """A hash of the text read so far, and the number of documents from each source. Together they identify a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self._digest = hashlib.sha256()
        self.documents = [0] * len(corpus.sources)

    def add(self, source: int, document: list[str]) -> None:
        """Add the next document. source: the index of its source."""
        _update(self._digest, document)
        self.documents[source] += 1

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()


class _Chunk(NamedTuple):
    source: int
    path: Path
    """The path of its shard."""
    documents: list[list[str]]


class _Counts(NamedTuple):
    source: int
    num_tokens: int
    unknown: UnknownText


def _chunks(
    documents_by_source: Iterable[tuple[int, list[str]]], partial: Path, tokenizer: Tokenizer, read: _TextHash
) -> Iterator[_Chunk]:
    """Yield chunks of consecutive documents, each from a single source."""
    documents: list[list[str]] = []
    num_chars = number = current = 0

    def finished() -> _Chunk:
        content = hashlib.sha256(f"{_SHARD_FORMAT} {tokenizer.fingerprint}".encode())
        for document in documents:
            _update(content, document)
        return _Chunk(current, partial / f"shard-{number:06d}-{content.hexdigest()[:16]}.npz", documents)

    for source, document in documents_by_source:
        if documents and (source != current or num_chars >= _CHUNK_CHARS):
            yield finished()
            documents, num_chars, number = [], 0, number + 1
        current = source
        read.add(source, document)
        documents.append(document)
        num_chars += sum(map(len, document))
    if documents:
        yield finished()


def _update(digest: hashlib._Hash, document: list[str]) -> None:
    digest.update("\n".join(document).encode("utf8", "surrogatepass"))
    digest.update(b"\0")


def _tokenise(
    corpus: Corpus, tokenizer: Tokenizer, partial: Path, workers: int | None, progress: BuildProgress
) -> tuple[list[tuple[int, Path]], _TextHash]:
    """Write all shards. Return the source and path of each shard, in order, and the hash of the text."""
    workers = workers or os.cpu_count() or 1
    read = _TextHash(corpus)
    progress.begin("tokenising", total=corpus.num_bytes)
    shards: list[tuple[int, Path]] = []
    running: set[concurrent.futures.Future[_Counts]] = set()
    is_checked = [False] * len(corpus.sources)
    chunks = _chunks(corpus.documents_by_source(progress.add), partial, tokenizer, read)
    first = list(itertools.islice(chunks, 2))
    if len(first) == 1:  # done before a worker has started
        (chunk,) = first
        if not chunk.path.exists():
            _write_shard(chunk, tokenizer)
        progress.end(f"{sum(read.documents):,} documents")
        return [(chunk.source, chunk.path)], read
    chunks = itertools.chain(first, chunks)
    del first  # not to keep them
    with worker_pool(workers, _start_worker, partial / "tokenizer") as pool:
        try:
            for chunk in chunks:
                progress.set_status(f"{sum(read.documents):,} documents")
                shards.append((chunk.source, chunk.path))
                if chunk.path.exists():
                    continue
                while len(running) >= 2 * workers:
                    done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                    for future in done:
                        _warn_early(corpus, future.result(), is_checked)
                running.add(pool.submit(_write_in_worker, chunk))
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    progress.end(f"{sum(read.documents):,} documents")
    return shards, read


def _warn_early(corpus: Corpus, counts: _Counts, is_checked: list[bool]) -> None:
    """Warn early if most of the beginning of a source becomes [UNK]. `_source_info` decides once all of it is read."""
    source, num_tokens, unknown = counts
    if not is_checked[source] and unknown.share(num_tokens) >= REFUSED_SHARE:
        _log.warning(problem(f"the beginning of {corpus.sources[source].description}", unknown, num_tokens))
    is_checked[source] = True


_worker_tokenizer: Tokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already run in parallel
    _worker_tokenizer = load_tokenizer(folder)


def _write_in_worker(chunk: _Chunk) -> _Counts:
    return _write_shard(chunk, _worker_tokenizer)


def _write_shard(chunk: _Chunk, tokenizer: Tokenizer) -> _Counts:
    lines = [line for document in chunk.documents for line in document]
    ids = tokenizer.encode_lines(lines)
    lines_of_document = np.array([len(document) for document in chunk.documents])
    tokens_of_line = np.array([len(line) for line in ids])
    first_lines = np.concatenate([[0], np.cumsum(lines_of_document)[:-1]])
    unknown = unknown_in(lines, ids, tokenizer)
    temporary = chunk.path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            tokens=np.fromiter(itertools.chain.from_iterable(ids), dtype=token_dtype(tokenizer.vocab_size)),
            tokens_of_line=tokens_of_line[tokens_of_line > 0],
            tokens_of_document=np.add.reduceat(tokens_of_line, first_lines),
            unknown=json.dumps(asdict(unknown)),
        )
    os.replace(temporary, chunk.path)
    return _Counts(chunk.source, int(tokens_of_line.sum()), unknown)


def _join(
    shards: list[tuple[int, Path]],
    tokenizer: Tokenizer,
    corpus: Corpus,
    read: _TextHash,
    partial: Path,
    allow_unknown: bool,
) -> None:
    unknown = [UnknownText() for _ in corpus.sources]
    tokens_of_line: list[np.ndarray] = []
    tokens_of_document: list[list[np.ndarray]] = [[] for _ in corpus.sources]
    with (partial / "tokens.bin").open("wb") as file:
        for source, path in shards:
            with np.load(path) as shard:
                file.write(shard["tokens"].tobytes())
                tokens_of_line.append(shard["tokens_of_line"])
                sizes = shard["tokens_of_document"]
                tokens_of_document[source].append(sizes[sizes > 0])
                unknown[source].add(UnknownText(**json.loads(str(shard["unknown"]))))
    corpora = [
        _source_info(source.description, parts, not_known, allow_unknown)
        for source, parts, not_known in zip(corpus.sources, tokens_of_document, unknown, strict=True)
    ]
    documents = _starts(np.concatenate(list(itertools.chain.from_iterable(tokens_of_document))))
    lines = _starts(np.concatenate(tokens_of_line))
    np.save(partial / "documents.npy", documents)
    np.save(partial / "lines.npy", lines)
    info = StoreInfo(
        format=FORMAT,
        corpora=corpora,
        documents_read=read.documents,
        corpus_signature=corpus.signature(),
        corpus_fingerprint=read.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        num_documents=len(documents) - 1,
        num_lines=len(lines) - 1,
        num_tokens=int(documents[-1]),
        file_bytes={name: (partial / name).stat().st_size for name in _ARRAYS},
        unknown_share=sum(each.num_tokens for each in unknown) / int(documents[-1]),
    )
    (partial / "store.json").write_text(info.to_json(), "utf8")
    for path in partial.glob("shard-*"):
        path.unlink()
    (partial / ".lock").unlink()


def _source_info(
    description: str, tokens_of_document: list[np.ndarray], unknown: UnknownText, allow_unknown: bool
) -> SourceInfo:
    num_documents = sum(map(len, tokens_of_document))
    num_tokens = sum(int(part.sum()) for part in tokens_of_document)
    if not num_tokens:
        raise DataError(f"The corpus {description} holds no text that this tokenizer knows.")
    if unknown.share(num_tokens) >= REFUSED_SHARE and not allow_unknown:
        raise DataError(
            f"{problem(description, unknown, num_tokens)} A model learns nothing from such a store; to build it "
            f"anyway, add --allow-unknown."
        )
    return SourceInfo(description, num_documents, num_tokens, unknown)


def _starts(sizes: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
