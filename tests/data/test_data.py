from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from electra_ds.config.sections import DataSection, TokenizerSection
from electra_ds.core.errors import DataError
from electra_ds.core.keyed_random import generator
from electra_ds.data.build import build_store
from electra_ds.data.corpus import Corpus, open_corpus, open_source
from electra_ds.data.sampling import MIXTURE_ROUND, Rows, Sampler, Windows, shuffled
from electra_ds.data.token_store import Ranges, TokenStore, split_holdout, token_dtype
from electra_ds.data.tokenizer import train_tokenizer
from electra_ds.training.step import prefetched
from tests.helpers import REPOSITORY, builder_for, small_recipe, write_corpus

# --- token store


def test_a_store_holds_every_token_in_order(corpus_folder: Path, store: TokenStore) -> None:
    documents = list(open_corpus([corpus_folder]).documents())
    expected = [[token for line in store.tokenizer.encode_lines(document) for token in line] for document in documents]
    found = [
        store.tokens[start:stop].tolist() for start, stop in zip(store.documents[:-1], store.documents[1:], strict=True)
    ]
    assert found == expected
    assert store.info.num_tokens == sum(map(len, expected))
    lines = np.load(store.path / "lines.npy")
    assert len(lines) - 1 == sum(map(len, documents))
    assert store.info.dtype == "uint16"


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(size: int, dtype: str) -> None:
    assert token_dtype(size) == dtype


def test_workers_and_chunks_change_nothing(
    corpus_folder: Path, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("electra_ds.data.build._CHUNK_CHARS", 3000)
    again = build_store(open_corpus([corpus_folder]), store.tokenizer, tmp_path / "again", workers=2)
    for name in ("tokens.bin", "documents.npy", "lines.npy"):
        assert (again.path / name).read_bytes() == (store.path / name).read_bytes()
    assert again.info.fingerprint == store.info.fingerprint


def test_an_interrupted_build_never_lends_its_tokenizer_to_another_corpus(tmp_path: Path) -> None:
    section = small_recipe().tokenizer
    first, second = write_corpus(tmp_path / "a", 5, seed=1), write_corpus(tmp_path / "b", 5, seed=2)
    straight = build_store(open_corpus([second]), section, tmp_path / "straight", workers=1)
    left_over = build_store(open_corpus([first]), section, tmp_path / "out", workers=1)
    left_over.path.rename(tmp_path / "out.partial")  # as an interruption after the tokenizer leaves it
    rebuilt = build_store(open_corpus([second]), section, tmp_path / "out", workers=1)
    assert rebuilt.info.fingerprint == straight.info.fingerprint
    (tmp_path / "other.partial" / "tokenizer").mkdir(parents=True)
    (tmp_path / "other.partial" / "tokenizer" / "trained_from.json").write_text("")  # cut off by a full disk
    again = build_store(open_corpus([second]), section, tmp_path / "other", workers=1)
    assert again.info.fingerprint == straight.info.fingerprint


def test_building_a_store_twice_opens_the_first_one_and_says_so(
    corpus_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    section = small_recipe().tokenizer
    folder = write_corpus(tmp_path / "corpus", documents=5)
    store = build_store(open_corpus([folder]), section, tmp_path / "s", workers=1)
    written = (store.path / "store.json").stat().st_mtime_ns
    assert "already built" not in caplog.text
    build_store(open_corpus([folder]), section, tmp_path / "s")
    assert caplog.messages == [
        f"The token store {store.path} was already built from this text and tokenizer, so it is not built again."
    ]
    assert (store.path / "store.json").stat().st_mtime_ns == written
    os.utime(folder / "000.txt")  # touched, same text
    build_store(open_corpus([folder]), section, tmp_path / "s")
    (folder / "000.txt").write_text("other text\n")
    with pytest.raises(DataError, match="was built from different text than"):
        build_store(open_corpus([folder]), section, tmp_path / "s")
    with pytest.raises(DataError, match=r"built from different text|another tokenizer"):
        build_store(open_corpus([corpus_folder]), TokenizerSection(kind="wordpiece", vocab_size=300), tmp_path / "s")


BUILD = """
import sys
from pathlib import Path
import electra_ds.data.build as build
from electra_ds.data.corpus import Corpus, open_corpus, open_source
from electra_ds.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    build._CHUNK_CHARS = 20_000
    build.build_store(open_corpus([sys.argv[1]]), load_tokenizer(Path(sys.argv[2])), Path(sys.argv[3]), workers=2)
"""


def parent_of(process: Path) -> int | None:
    """Parent's id from /proc; None for one that is gone or a zombie."""
    try:
        state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_stopped(store: TokenStore, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=1500)
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    out = tmp_path / "store"
    command = [sys.executable, str(script), str(corpus), str(store.path / "tokenizer"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "store.partial"
    while process.poll() is None and len(list(partial.glob("shard-*.npz"))) < 3:
        time.sleep(0.02)
    assert process.poll() is None, "finished before it could be killed"
    workers = [
        int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent_of(path) == process.pid
    ]
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() and parent_of(Path(f"/proc/{worker}")) for worker in workers):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.05)
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("shard-*.npz")}
    with pytest.raises(DataError, match="does not exist"):
        TokenStore(out)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    kept = True
    while process.poll() is None:  # the shards of the first build are not written again
        for path, written in finished.items():
            try:
                kept = kept and path.stat().st_mtime_ns == written
            except FileNotFoundError:
                break  # joined
        time.sleep(0.01)
    assert process.returncode == 0
    assert kept
    straight = build_store(open_corpus([corpus]), store.tokenizer, tmp_path / "straight", workers=1)
    assert (out / "tokens.bin").read_bytes() == (straight.path / "tokens.bin").read_bytes()


def damaged_copy(store: TokenStore, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    for path in store.path.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(store.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "lines.npy"])
def test_a_truncated_store_is_refused(store: TokenStore, tmp_path: Path, name: str) -> None:
    copy = damaged_copy(store, tmp_path)
    (copy / name).write_bytes((copy / name).read_bytes()[:-2])
    with pytest.raises(DataError, match=f"damaged: {name} has"):
        TokenStore(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"damaged: {name} is missing"):
        TokenStore(copy)


def test_a_store_with_a_foreign_tokenizer_or_a_damaged_index_is_refused(store: TokenStore, tmp_path: Path) -> None:
    copy = damaged_copy(store, tmp_path)
    train_tokenizer(
        ["The quick brown fox jumps over the lazy dog."], TokenizerSection(kind="wordpiece", vocab_size=300)
    ).save(copy / "tokenizer")
    with pytest.raises(DataError, match="is not the one that built this token store"):
        TokenStore(copy)
    info = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        TokenStore(copy)
    (copy / "store.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        TokenStore(copy)
    (copy / "store.json").unlink()
    with pytest.raises(DataError, match="not a finished token store"):
        TokenStore(copy)


def test_text_as_a_store_and_a_store_as_text_name_the_other_option(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    for text in (tmp_path / "texts", tmp_path / "texts" / "a.txt"):
        with pytest.raises(DataError, match=re.escape(f"--corpus {text}")):
            TokenStore(text)
    with pytest.raises(DataError, match=re.escape(f"is a token store, not text. Train on it with --data {store.path}")):
        open_corpus([store.path])


def test_ids_outside_the_vocabulary_are_refused_when_they_are_met(store: TokenStore, tmp_path: Path) -> None:
    copy = damaged_copy(store, tmp_path)
    (copy / "tokens.bin").write_bytes(b"\xff" * (copy / "tokens.bin").stat().st_size)
    recipe = small_recipe()
    broken = TokenStore(copy)
    builder = builder_for(broken, recipe)
    with pytest.raises(DataError, match="id 65535"):
        builder.build(0)
    with pytest.raises(DataError, match="id 65535"):  # through the prefetching thread, too
        list(prefetched(builder, 0, 2))


def test_a_full_disk_is_a_clear_error_and_finished_shards_are_kept(store: TokenStore, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse to write past a size, as a full disk does."""
    corpus = write_corpus(tmp_path / "corpus", documents=400)
    script = tmp_path / "build.py"
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    errors = "from electra_ds.core.errors import ElectraError\n"
    script.write_text(limited + errors + BUILD.replace("    build.build_store", "    try:\n      build.build_store")
                      + "    except ElectraError as error: sys.exit(str(error))\n")  # fmt: skip
    out = tmp_path / "store"
    command = [sys.executable, str(script), str(corpus), str(store.path / "tokenizer"), str(out)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Cannot write the token store" in result.stderr
    assert "run the same command again" in result.stderr
    assert not out.exists()
    assert build_store(open_corpus([corpus]), store.tokenizer, out).info.num_tokens > 30_000


# --- held-out split and windows


def ranges_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=2, max_size=60),
    by=st.sampled_from(["document", "span"]),
    seed=st.integers(0, 1000),
    fraction=st.floats(0.01, 0.4),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_train_and_held_out_are_disjoint_and_together_the_corpus(
    lengths: list[int], by: str, seed: int, fraction: float
) -> None:
    data = DataSection(sequence_length=32, holdout_by=by, holdout_fraction=fraction)  # type: ignore[arg-type]
    try:
        split = split_holdout(ranges_of(lengths), data, seed)
    except DataError:
        assert by == "span"  # no document long enough
        assert max(lengths) < 4 * max(30, round(fraction * max(lengths)))
        return
    covered = np.zeros(sum(lengths), dtype=int)
    for ranges in (split.train, split.holdout):
        for start, stop in zip(*ranges, strict=True):
            assert stop > start
            covered[start:stop] += 1
    assert (covered == 1).all()
    bounds = set(ranges_of(lengths).tolist())
    for start, stop in zip(*split.holdout, strict=True):  # nothing crosses a document's end
        assert not any(start < bound < stop for bound in bounds)


def test_a_corpus_of_one_short_document_is_refused() -> None:
    with pytest.raises(DataError, match="too small to hold out"):
        split_holdout(ranges_of([50]), DataSection(sequence_length=32), 0)


def test_few_long_documents_are_held_out_by_spans_and_many_by_document() -> None:
    assert split_holdout(ranges_of([4000] * 20), DataSection(sequence_length=32), 0).held_out_by == "span"
    assert split_holdout(ranges_of([40] * 2000), DataSection(sequence_length=32), 0).held_out_by == "document"


def windows_of(lengths: list[int], sampling: str, window: int = 30) -> Windows:
    bounds = ranges_of(lengths)
    return Windows(Ranges(bounds[:-1], bounds[1:]), window, sampling, 5)  # type: ignore[arg-type]


def starts_at(windows: Windows, step: int, size: int) -> np.ndarray:
    return windows.rows(step * size + np.arange(size), generator(5, step)).starts_B


def test_window_offsets_are_uniform_over_every_place_that_fits() -> None:
    """The last offset too, which the study's released code never draws."""
    windows = windows_of([45], "epoch")
    offsets = np.concatenate([starts_at(windows, step, 50) for step in range(600)])
    assert offsets.min() == 0
    assert offsets.max() == 15
    assert stats.chisquare(np.bincount(offsets, minlength=16)).pvalue > 1e-4


def test_an_epoch_takes_each_document_once_and_epochs_differ() -> None:
    lengths = list(range(40, 77))
    windows = windows_of(lengths, "epoch")
    found = [starts_at(windows, step, 5) for step in range(37)]  # five epochs of 37 documents
    documents = np.searchsorted(ranges_of(lengths), np.concatenate(found), side="right") - 1
    epochs = documents.reshape(5, 37)
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


@pytest.mark.parametrize("size", [1, 37, 4096, 4097, 10_000])
def test_running_numbers_give_every_item_once_per_epoch_in_whatever_order_they_are_asked_for(size: int) -> None:
    numbers = np.arange(3 * size)
    items = shuffled(numbers, size, 5, 9)
    assert (np.sort(items.reshape(3, size), axis=1) == np.arange(size)).all()
    order = np.random.default_rng(0).permutation(len(numbers))
    np.testing.assert_equal(shuffled(numbers[order], size, 5, 9), items[order])


def test_sampling_by_length_is_in_proportion() -> None:
    lengths = [100, 200, 700]
    windows = windows_of(lengths, "length")
    starts = np.concatenate([starts_at(windows, step, 100) for step in range(100)])
    counts = np.bincount(np.searchsorted(ranges_of(lengths), starts, side="right") - 1)
    assert stats.chisquare(counts, np.array([1000.0, 2000, 7000])).pvalue > 1e-4


def test_short_documents_are_taken_whole() -> None:
    rows = windows_of([7, 30, 31], "epoch").rows(np.arange(3), generator(0))
    assert sorted(rows.first_B.tolist()) == [7, 30, 30]


@pytest.mark.parametrize(
    ("lengths", "sampling"), [([5000] * 10, "length"), ([10] * 10, "epoch"), ([100] * 12_000, "epoch")]
)
def test_auto_samples_by_length_where_documents_are_few_and_long(lengths: list[int], sampling: str) -> None:
    assert windows_of(lengths, "auto").sampling == sampling


# --- several corpora


@pytest.fixture(scope="module")
def mixed_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Three corpora of 60, 20 and 40 documents."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = [open_source([write_corpus(folder / str(n), n, seed=n)], "file", "text") for n in (60, 20, 40)]
    return build_store(Corpus(tuple(sources)), small_recipe().tokenizer, folder / "store", workers=1)


def sources_of(store: TokenStore, rows: Rows) -> np.ndarray:
    ends = store.documents[np.cumsum([corpus.num_documents for corpus in store.info.corpora])]
    return np.searchsorted(ends, rows.starts_B, side="right")


@pytest.mark.parametrize("segments", ["one", "two"])
@pytest.mark.parametrize(
    ("weights", "rows"),
    [([0.5, 0.25, 0.25], [512, 256, 256]), ([7, 2, 1], [717, 205, 102]), ([1e6, 1, 1], [1022, 1, 1])],
)
def test_every_round_holds_each_corpus_in_its_proportion(
    mixed_store: TokenStore, segments: str, weights: list[float], rows: list[int]
) -> None:
    data = small_recipe(f"data.corpus_weights={weights}", f"data.segments={segments}").data
    split = split_holdout(mixed_store.documents, data, 0)
    sampler = Sampler(mixed_store, split.train, data, seed=3)
    size = MIXTURE_ROUND // 8
    steps = [sources_of(mixed_store, sampler.rows(step, size)) for step in range(24)]
    for number in range(3):
        found = np.concatenate(steps[8 * number : 8 * number + 8])
        assert np.bincount(found, minlength=3).tolist() == rows
    assert (np.diff(np.concatenate(steps)) != 0).sum() > 3  # and not one corpus after another


def test_a_mixture_takes_each_corpus_document_by_document(mixed_store: TokenStore) -> None:
    """Under "epoch" the small corpus comes round more often, and every document equally often."""
    data = small_recipe("data.corpus_weights=[1,1,2]").data
    split = split_holdout(mixed_store.documents, data, 0)
    sampler = Sampler(mixed_store, split.train, data, seed=3)
    starts = np.concatenate([sampler.rows(step, 64).starts_B for step in range(400)])
    ranges = np.searchsorted(split.train.starts, starts, side="right") - 1
    counts = np.bincount(ranges, minlength=len(split.train.starts))
    corpora = np.searchsorted(mixed_store.documents[[60, 80]], split.train.starts, side="right")
    for corpus in range(3):
        assert np.ptp(counts[corpora == corpus]) <= 1


def test_weights_must_fit_the_store(mixed_store: TokenStore) -> None:
    data = small_recipe("data.corpus_weights=[1,1]").data
    split = split_holdout(mixed_store.documents, data, 0)
    with pytest.raises(DataError, match=r"has 2 numbers, but .* holds 3 corpora"):
        Sampler(mixed_store, split.train, data, seed=0)
