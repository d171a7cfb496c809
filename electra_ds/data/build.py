"""Building a token store: tokenise a corpus in parallel, safe to interrupt and run again.

The corpus is cut into chunks of documents; worker processes write one shard per chunk, named by its number
and content, into `STORE.partial/`. A second run reads the corpus again, finds the finished shards and goes
on. When all are there they are joined and the folder is renamed: a store is complete or absent.
"""

from __future__ import annotations

import concurrent.futures.process
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from electra_ds.config.recipe import TokenizerSection
from electra_ds.data.corpus import Corpus
from electra_ds.data.token_store import FORMAT, StoreInfo, TokenStore, token_dtype
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from electra_ds.data.worker_pool import worker_pool
from electra_ds.errors import DataError

_CHUNK_CHARS = 4_000_000
_TRAINED_FROM = "trained_from.json"
_ARRAYS = ("tokens.bin", "documents.npy", "lines.npy")


def build_store(
    corpus: Corpus, tokenizer: Tokenizer | TokenizerSection, out: Path, *, workers: int | None = None
) -> TokenStore:
    """Build the store at `out`, or open it if it is already there and holds the same text and tokenizer.

    tokenizer: a finished one, or the recipe's section from which to train one on this corpus. Raises
    DataError for a bad corpus, for another store at `out`, and for a full disk; finished shards are kept.
    """
    out = Path(os.path.abspath(out))  # a name even where "." was given
    if not out.name:
        raise DataError(f"{out} cannot be a token store. Name a new folder.")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            return _reopen(corpus, tokenizer, out)
        partial.mkdir(exist_ok=True)
        with _locked(partial), _progress() as progress:
            trained = _trained(corpus, tokenizer, partial, progress)
            shards, corpus_fingerprint = _tokenise(corpus, trained, partial, workers, progress)
            _join(shards, trained, corpus, corpus_fingerprint, partial)
            partial.rename(out)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"A worker process was killed, perhaps for want of memory. What is finished is kept in {partial}; "
            f"run the same command again, with fewer --workers."
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot write the token store {out}: {error.strerror or error}. What is finished is kept in {partial}; "
            f"make room and run the same command again."
        ) from error
    return TokenStore(out)


def _reopen(corpus: Corpus, tokenizer: Tokenizer | TokenizerSection, out: Path) -> TokenStore:
    store = TokenStore(out)
    if store.info.corpus_signature != corpus.signature():
        digest = hashlib.sha256()
        for document in corpus.documents():
            _update(digest, document)
        if store.info.corpus_fingerprint != digest.hexdigest():
            raise DataError(
                f"{out} holds other text than {corpus.description} gives now. Delete it, or choose another."
            )
    same_tokenizer = (
        tokenizer.fingerprint == store.info.tokenizer_fingerprint
        if isinstance(tokenizer, Tokenizer)
        else trained_from(out) == tokenizer
    )
    if not same_tokenizer:
        raise DataError(f"{out} was made with another tokenizer. Delete it, or choose another.")
    return store


def trained_from(folder: Path, corpus: Corpus | None = None) -> TokenizerSection | None:
    """The section that this folder's tokenizer was trained from, on the given corpus where one is given.

    None where the tokenizer was not trained here, or was trained on another corpus.
    """
    try:
        marker = json.loads((folder / "tokenizer" / _TRAINED_FROM).read_text("utf8"))
        if corpus is not None and marker["corpus_signature"] != corpus.signature():
            return None
        return TokenizerSection(**marker["section"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off by a kill or a full disk
        return None


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    with (partial / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"Another process is building {partial.with_suffix('')} right now.") from error
        yield


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip


def _trained(corpus: Corpus, tokenizer: Tokenizer | TokenizerSection, partial: Path, progress: Progress) -> Tokenizer:
    """The tokenizer to use: the given one, the one that an interrupted build had finished, or a new one."""
    folder = partial / "tokenizer"
    if isinstance(tokenizer, TokenizerSection):
        if trained_from(partial, corpus) == tokenizer:
            return load_tokenizer(folder)
        task = progress.add_task(f"training {tokenizer.kind} tokenizer", total=corpus.num_bytes, note="")
        documents = corpus.documents(lambda num_bytes: progress.advance(task, num_bytes))
        trained = train_tokenizer(itertools.chain.from_iterable(documents), tokenizer)
        progress.update(task, total=1, completed=1, note=f"{trained.vocab_size:,} pieces")
        (folder / _TRAINED_FROM).unlink(missing_ok=True)
        trained.save(folder)
        marker = {"section": tokenizer.model_dump(), "corpus_signature": corpus.signature()}
        (folder / _TRAINED_FROM).write_text(json.dumps(marker), "utf8")
        return load_tokenizer(folder)
    (folder / _TRAINED_FROM).unlink(missing_ok=True)
    tokenizer.save(folder)
    return tokenizer


class _Chunk(NamedTuple):
    path: Path
    """Where its shard goes."""
    documents: list[list[str]]


def _chunks(corpus: Corpus, partial: Path, tokenizer: Tokenizer, digest: hashlib._Hash, advance) -> Iterator[_Chunk]:  # type: ignore[no-untyped-def]
    documents: list[list[str]] = []
    num_chars = number = 0

    def finished() -> _Chunk:
        content = hashlib.sha256(tokenizer.fingerprint.encode())
        for document in documents:
            _update(content, document)
        return _Chunk(partial / f"shard-{number:06d}-{content.hexdigest()[:16]}.npz", documents)

    for document in corpus.documents(advance):
        _update(digest, document)
        documents.append(document)
        num_chars += sum(map(len, document))
        if num_chars >= _CHUNK_CHARS:
            yield finished()
            documents, num_chars, number = [], 0, number + 1
    if documents:
        yield finished()


def _update(digest: hashlib._Hash, document: list[str]) -> None:
    digest.update("\n".join(document).encode("utf8", "surrogatepass"))
    digest.update(b"\0")


def _tokenise(
    corpus: Corpus, tokenizer: Tokenizer, partial: Path, workers: int | None, progress: Progress
) -> tuple[list[Path], str]:
    """Shards in order, and the corpus's fingerprint."""
    workers = workers or os.cpu_count() or 1
    digest = hashlib.sha256()
    task = progress.add_task("tokenising", total=corpus.num_bytes, note="")
    shards: list[Path] = []
    running: set[concurrent.futures.Future[None]] = set()
    with worker_pool(workers, _start_worker, partial / "tokenizer") as pool:
        try:
            advance = lambda num_bytes: progress.advance(task, num_bytes)  # noqa: E731
            for chunk in _chunks(corpus, partial, tokenizer, digest, advance):
                shards.append(chunk.path)
                if chunk.path.exists():
                    continue
                while len(running) >= 2 * workers:
                    done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                    for future in done:
                        future.result()
                running.add(pool.submit(_write_shard, chunk))
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not shards:
        raise DataError(f"The corpus {corpus.description} holds no text.")
    progress.update(task, total=1, completed=1, note=f"{len(shards)} shards")
    return shards, digest.hexdigest()


_worker_tokenizer: Tokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is over processes
    _worker_tokenizer = load_tokenizer(folder)


def _write_shard(chunk: _Chunk) -> None:
    lines = [line for document in chunk.documents for line in document]
    ids = _worker_tokenizer.encode_lines(lines)
    lines_of_document = np.array([len(document) for document in chunk.documents])
    tokens_of_line = np.array([len(line) for line in ids])
    first_lines = np.concatenate([[0], np.cumsum(lines_of_document)[:-1]])
    temporary = chunk.path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            tokens=np.fromiter(itertools.chain.from_iterable(ids), dtype=token_dtype(_worker_tokenizer.vocab_size)),
            tokens_of_line=tokens_of_line[tokens_of_line > 0],
            tokens_of_document=np.add.reduceat(tokens_of_line, first_lines),
        )
    os.replace(temporary, chunk.path)


def _join(shards: list[Path], tokenizer: Tokenizer, corpus: Corpus, corpus_fingerprint: str, partial: Path) -> None:
    tokens_of_line, tokens_of_document = [], []
    with (partial / "tokens.bin").open("wb") as file:
        for path in shards:
            with np.load(path) as shard:
                file.write(shard["tokens"].tobytes())
                tokens_of_line.append(shard["tokens_of_line"])
                tokens_of_document.append(shard["tokens_of_document"])
    sizes = np.concatenate(tokens_of_document)
    documents = _starts(sizes[sizes > 0])
    lines = _starts(np.concatenate(tokens_of_line))
    np.save(partial / "documents.npy", documents)
    np.save(partial / "lines.npy", lines)
    if documents[-1] == 0:
        raise DataError(f"The corpus {corpus.description} holds no token that this tokenizer knows.")
    info = StoreInfo(
        format=FORMAT,
        corpus=corpus.description,
        corpus_signature=corpus.signature(),
        corpus_fingerprint=corpus_fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        num_documents=len(documents) - 1,
        num_lines=len(lines) - 1,
        num_tokens=int(documents[-1]),
        file_bytes={name: (partial / name).stat().st_size for name in _ARRAYS},
    )
    (partial / "store.json").write_text(info.to_json(), "utf8")
    for path in partial.glob("shard-*"):
        path.unlink()
    (partial / ".lock").unlink()


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
