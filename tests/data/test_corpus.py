from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from electra_ds import cli
from electra_ds.api.stores import store_name
from electra_ds.config.options import PretrainOptions
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.data import tokenizer
from electra_ds.data.build import build_store
from electra_ds.data.corpus import Boundary, Corpus, builtin_documents, is_saved_dataset, open_corpus, open_source
from electra_ds.data.given_tokenizer import load_given_tokenizer
from electra_ds.data.hub import HubSource, SavedSource, parse_hub_name
from electra_ds.data.token_store import TokenStore
from electra_ds.data.tokenizer import Tokenizer, train_tokenizer
from tests.data_files import DataFiles
from tests.helpers import REPOSITORY, small_recipe, write_corpus

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
TEXTS = [
    "The lighthouse keeper wrote down the weather every evening.\nNobody ever read it.",
    "Ein Satz auf Deutsch, mit Größe.\n\n  Und noch einer.  ",
    "日本語の文。\u2028And a second line after U+2028.",
    "A last, short one.",
]


def _tar_of(content: bytes) -> bytes:
    packed, entry = io.BytesIO(), tarfile.TarInfo("a.txt")
    entry.size = len(content)
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps what it prepared; not in the user's own cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


# --- corpus


def documents_of(path: Path, boundary: Boundary = "file", text_key: str = "text") -> list[list[str]]:
    return list(open_corpus([path], boundary, text_key).documents())


def test_a_byte_order_mark_and_any_line_end_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne line.\r\nTwo  lines.\r\n\r\nThrée.\rFour.\n".encode())
    assert documents_of(path) == [["One line.", "Two  lines.", "Thrée.", "Four."]]


def test_a_document_is_a_file_or_ends_at_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\na\nb\n\n\nc\n   \nd\n")
    assert documents_of(path) == [["a", "b", "c", "d"]]
    assert documents_of(path, "blank-line") == [["a", "b"], ["c"], ["d"]]


def test_wiki_extractor_files_are_known_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "wiki_00"
    path.write_text('<doc id="1" url="u" title="A">\nA\n\nText <b>.\n</doc>\n<doc id="2">\nB\n</doc>\n')
    assert documents_of(path) == [["A", "Text <b>."], ["B"]]


def test_json_lines_give_a_document_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x\\ny"}\n\n{"body": " "}\n{"body": "z"}\n')
    assert documents_of(path, text_key="body") == [["x", "y"], ["z"]]


def test_a_json_string_may_hold_any_character(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line of text but not one of JSON; a lone surrogate is no text at all."""
    path = tmp_path / "a.JSONL"
    path.write_text('{"text": "a\u2028b\u0085c \\ud83d"}\n{"text": "d"}\n', "utf8")
    assert documents_of(path) == [["a", "b", "c ?"], ["d"]]


def test_a_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".hidden.txt", "x.png", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents_of(tmp_path) == [["a/z.txt"], ["b.txt"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"no field 'text'; its keys are body"),
        ("a.jsonl", b"[1]\n", "a list, not an object"),
        ("a.txt", b"", "is empty"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16 text"),
        ("a.csv", b"text,label\nfine,1\n", "is not plain text but a table. Write the column"),
        ("a.tsv.gz", b"text", "is not plain text but a table"),
        ("a.html", b"<p>text</p>", "is not plain text but HTML"),
    ],
)
def test_a_broken_corpus_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents_of(tmp_path / name)


def test_a_missing_or_fileless_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_corpus([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds no text files"):
        open_corpus([tmp_path])


def test_a_folder_says_which_of_its_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    for name in ("b.zip", "c.zip", "d.csv", ".hidden.zip"):
        (tmp_path / name).write_bytes(b"PK")
    corpus = open_corpus([tmp_path])
    assert list(corpus.documents()) == [["some text"]]
    assert "3 other files are not read (1 .csv, 2 .zip)" in corpus.notes()[0]


@pytest.mark.slow
def test_the_builtin_corpus_is_text_and_the_same_at_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the standard library and numpy; the test of learning reads the rest of it."""
    monkeypatch.setattr("electra_ds.data.corpus.PACKAGES", ("numpy",))
    builtin_documents.cache_clear()
    documents = builtin_documents()
    assert sum(len(line) for document in documents for line in document) > 3_000_000
    docstrings = ["\n".join(document) for document in documents]
    assert len(set(docstrings)) == len(docstrings)
    builtin_documents.cache_clear()
    assert builtin_documents() == documents
    builtin_documents.cache_clear()


def test_wikipedia_files_are_read_as_articles(data_files: DataFiles) -> None:
    documents = documents_of(data_files.wikipedia)
    assert len(documents) > 20
    assert not any(line.startswith(("<doc ", "</doc")) for document in documents for line in document)


# --- the same text in any format


def hub_folder(folder: Path, texts: list[str | None], rows_per_group: int | None = None) -> Path:
    """A dataset in the Hub's layout: two Parquet shards of one split."""
    folder.mkdir(parents=True, exist_ok=True)
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        table = pa.table({"id": list(range(len(part))), "text": pa.array(part, pa.string())})
        pq.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=rows_per_group)
    return folder


def store_of(corpus: Corpus, tokenizer: Tokenizer, out: Path) -> tuple[TokenStore, list[bytes]]:
    built = build_store(corpus, tokenizer, out, workers=1)
    return built, [(out / name).read_bytes() for name in ("tokens.bin", "documents.npy", "lines.npy")]


@pytest.mark.slow
def test_the_same_text_in_any_format_gives_the_same_store(store: TokenStore, tmp_path: Path) -> None:
    texts = TEXTS + [path.read_text("utf8") for path in sorted(write_corpus(tmp_path / "more", 20).iterdir())]
    records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    sources: dict[str, Path] = {}
    for suffix, pack in {"": bytes, **PACKERS}.items():
        sources[f"txt{suffix}"] = folder = tmp_path / f"txt{suffix}"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.txt{suffix}").write_bytes(pack(text.encode()))
        sources[f"jsonl{suffix}"] = file = tmp_path / f"a.jsonl{suffix}"
        file.write_bytes(pack(records.encode()))
    sources["parquet"] = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), sources["parquet"], row_group_size=7)
    corpora = {name: open_corpus([path]) for name, path in sources.items()}
    folder = hub_folder(tmp_path / "hub", [*texts[:5], None, "  \n ", *texts[5:]], rows_per_group=3)
    corpora |= {
        f"hub{streaming}": Corpus((HubSource(f"hub:{folder}", streaming=streaming),)) for streaming in (False, True)
    }
    expected, files = store_of(corpora.pop("txt"), store.tokenizer, tmp_path / "stores" / "txt")
    assert expected.info.num_documents == len(texts)
    assert len(corpora) == 4 + 5 + 1 + 2
    for name, corpus in corpora.items():
        built, found = store_of(corpus, store.tokenizer, tmp_path / "stores" / name)
        assert found == files, name
        assert built.info.fingerprint == expected.info.fingerprint, name


def test_progress_tells_every_byte_once(tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in write_corpus(tmp_path / "more", 30).iterdir())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"text": text.split("\n"), "n": range(text.count("\n") + 1)}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(text)
    for name in ("a.txt", "a.txt.gz", "a.parquet"):
        told: list[int] = []
        for _ in open_corpus([tmp_path / name]).documents(told.append):
            pass
        assert sum(told) == (tmp_path / name).stat().st_size
    source = HubSource(f"hub:{hub_folder(tmp_path / 'hub', [*text.splitlines()])}")
    told = []
    for _ in source.documents(told.append):
        pass
    assert source.num_bytes is not None
    assert sum(told) == source.num_bytes >= len(text) - text.count("\n")


# --- compressed files


@pytest.mark.parametrize("suffix", PACKERS)
def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    packed = PACKERS[suffix]("\n".join(TEXTS).encode())
    path.write_bytes(packed)
    whole = documents_of(path)
    assert len(whole) == 1
    (tmp_path / "b.txt").write_text("Another file, so that the corpus is not empty.")
    for size in range(len(packed)):
        path.write_bytes(packed[:size])
        with pytest.raises(DataError, match=r"a\.txt\.\w+ (is cut off|is damaged)"):
            documents_of(tmp_path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_archive_is_refused_or_gives_the_same_text(tmp_path: Path, suffix: str) -> None:
    """Some bits, such as gzip's time of writing, are not of the text."""
    path = tmp_path / f"a.txt{suffix}"
    packed = PACKERS[suffix]("\n".join(TEXTS).encode())
    path.write_bytes(packed)
    whole, refused = documents_of(path), 0
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert documents_of(path) == whole
        except DataError as error:
            assert "a.txt" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 0.8 * len(packed)


@pytest.mark.parametrize("suffix", PACKERS)
def test_several_streams_in_a_file_are_all_read_and_a_damaged_last_one_is_noticed(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    path = tmp_path / f"a.txt{suffix}"
    parts = [pack(b"one\n"), pack(b""), pack(b"two\nthr"), pack(b"ee\n")]
    path.write_bytes(b"".join(parts) + bytes(8))
    assert documents_of(path) == [["one", "two", "three"]]
    for size in range(1, len(parts[-1])):
        path.write_bytes(b"".join(parts[:-1]) + parts[-1][:size])
        with pytest.raises(DataError, match=r"is cut off|is damaged"):
            documents_of(path)
    path.write_bytes(b"".join(parts) + b"rest")
    with pytest.raises(DataError, match=r"is cut off|is damaged"):
        documents_of(path)


def test_a_large_archive_is_read_block_by_block(tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = [f"{number} {generator.getrandbits(400):x}" for number in range(30_000)]
    for suffix, pack in PACKERS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack("\n".join(lines).encode()))
        assert path.stat().st_size > 4 << 18
        assert documents_of(path) == [lines]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", gzip.compress(b"text", mtime=0), "is compressed with gzip"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "is compressed with gzip"),
        ("a.txt.gz", b"plain text", "is damaged, or not what its name says"),
        ("a.tar.gz", gzip.compress(b"text", mtime=0), "is not plain text but a tar archive. Unpack it first"),
        ("a.tgz", gzip.compress(b"text", mtime=0), "is not plain text but a tar archive. Unpack it first"),
        ("a.txt.gz", gzip.compress(_tar_of(b"text"), mtime=0), "is a tar archive, not plain text"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "although its name says Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"body": ""}', mtime=0), "no field 'text'; its keys are body"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents_of(tmp_path / name)


def test_what_a_folder_gives_is_chosen_by_the_names(tmp_path: Path) -> None:
    for name in ("wiki_00.bz2", "a.md.xz", "b.tar.gz", "c.png.gz", "d.parquet.gz"):
        (tmp_path / name).write_bytes(bz2.compress(b"bz") if name.endswith("bz2") else lzma.compress(b"xz"))
    assert documents_of(tmp_path) == [["xz"], ["bz"]]


# --- Parquet


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["t"], "body": pa.array(["x", None, "y\n\nz"][:1]), "n": [1]}), path)
    assert documents_of(path, text_key="body") == [["x"]]
    with pytest.raises(DataError, match=r"no column 'text'; its columns are title, body, n.*--text-key"):
        documents_of(path)
    with pytest.raises(DataError, match="'n' has type int64, not text"):
        documents_of(path, text_key="n")
    pq.write_table(pa.table({"text": pa.array(["x", None, "y\n\nz", "x"]).dictionary_encode()}), path)
    assert documents_of(path) == [["x"], ["y", "z"], ["x"]]


def test_a_cut_off_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    whole = path.read_bytes()
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"Cannot read the Parquet file .*a\.parquet"):
            documents_of(path)


# --- Hub datasets


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:imdb", ("imdb", None, "train")),
        ("hub:wikimedia/wikipedia#20231101.en@train", ("wikimedia/wikipedia", "20231101.en", "train")),
        ("hub:a/b@train[:10%]+test", ("a/b", None, "train[:10%]+test")),
        ("hub:./folder#c", ("./folder", "c", "train")),
    ],
)
def test_a_hub_name_has_three_parts(text: str, parts: tuple[str, str | None, str]) -> None:
    assert tuple(parse_hub_name(text)) == parts
    for bad in ("hub:", "hub:a#", "hub:a@", "hub:#c"):
        with pytest.raises(DataError, match="is not hub:NAME#CONFIG@SPLIT"):
            parse_hub_name(bad)


def with_configs(folder: Path) -> Path:
    for config in ("en", "sw"):
        hub_folder(folder / config, [f"{config} one", f"{config} two"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.parquet\n"
        "- config_name: sw\n  data_files:\n  - split: train\n    path: sw/train-00000*\n"
        "  - split: test\n    path: sw/train-00001*\n---\n"
    )
    return folder


def test_configurations_splits_and_slices(tmp_path: Path) -> None:
    folder = with_configs(tmp_path / "data")
    read = lambda text, **kw: [line for [line] in HubSource(f"hub:{folder}{text}", **kw).documents(lambda n: None)]  # noqa: E731
    for streaming in (False, True):
        assert read("#en", streaming=streaming) == ["en one", "en two"]
        assert read("#sw@test", streaming=streaming) == ["sw two"]
        assert read("#sw@test+train", streaming=streaming) == ["sw two", "sw one"]
    assert read("#en@train[:50%]") == ["en one"]
    for text, options, message in [
        ("", {}, "has the configurations en, sw"),
        ("#de", {}, "has the configurations en, sw"),
        ("#sw@validation", {}, "no split 'validation'; its splits are test, train"),
        ("#en@train[:x]", {}, "Cannot read hub:"),
        ("#en@train[:50%]", {"streaming": True}, "Cannot read hub:"),
        ("#en", {"revision": "main"}, "has no revisions"),
        ("#en", {"text_key": "body"}, "no column 'body'; its columns are id, text"),
        ("#en", {"text_key": "body", "streaming": True}, "no column 'body'; its columns are id, text"),
        ("#en", {"text_key": "id"}, "'id' has type int64, not text"),
        ("#en", {"text_key": "id", "streaming": True}, "'id' has type int64, not text"),
    ]:
        with pytest.raises(DataError, match=message):
            read(text, **options)
    with pytest.raises(DataError, match=r"The dataset folder .* does not exist"):
        HubSource("hub:./nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="doesn't contain any data files"):
        HubSource(f"hub:{tmp_path / 'none'}")


def test_a_changed_dataset_has_another_signature_and_is_read_anew(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "data", ["one", "two"])
    first = HubSource(f"hub:{folder}")
    assert list(first.documents(lambda n: None)) == [["one"], ["two"]]
    assert HubSource(f"hub:{folder}", streaming=True).signature() == first.signature()
    assert HubSource(f"hub:{folder}", "id").signature() != first.signature()
    hub_folder(folder, ["one", "six"])
    os.utime(folder / "train-00001-of-00002.parquet", (1, 1))
    second = HubSource(f"hub:{folder}")
    assert second.signature() != first.signature()
    assert list(second.documents(lambda n: None)) == [["one"], ["six"]]


def test_a_dataset_cut_off_on_disk_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "data", ["one", "two"])
    shard = folder / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-40])
    for streaming in (False, True):
        with pytest.raises(DataError, match="Cannot read hub:"):
            list(HubSource(f"hub:{folder}", streaming=streaming).documents(lambda n: None))


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "electra_ds", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_network_hub_names_are_refused_with_what_to_do(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = run_cli("build-data", "--corpus", "hub:nobody/nothing", "--out", str(tmp_path / "a"), **offline)
    assert result.returncode == 2
    assert "Cannot read hub:nobody/nothing@train" in result.stderr
    assert "Check the connection" in result.stderr
    (tmp_path / "a.txt").write_text("text\n")
    result = run_cli(
        "build-data", "--corpus", str(tmp_path / "a.txt"), "--tokenizer", "nobody/nothing",
        "--out", str(tmp_path / "a"), **offline,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Cannot read the tokenizer nobody/nothing" in result.stderr
    assert "Check the connection" in result.stderr


@pytest.mark.slow
def test_datasets_writes_nothing_into_the_progress_of_a_build(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "data", TEXTS * 20)
    for flags in ([], ["--streaming"]):
        result = run_cli(
            "build-data", "--corpus", f"hub:{folder}", *flags, "--out", str(tmp_path / f"store{len(flags)}"),
            "--recipe", "tiny", "--workers", "1", "--set", "tokenizer.vocab_size=400", HF_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        ours = result.stdout
        assert "80 documents" in ours
        assert "Generating" not in ours
        assert "Warning" not in result.stderr
    assert (tmp_path / "store0" / "tokens.bin").read_bytes() == (tmp_path / "store1" / "tokens.bin").read_bytes()


# --- several sources


def test_each_source_has_its_own_stretch_of_documents(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("electra_ds.data.build._CHUNK_CHARS", 500)
    first, second = write_corpus(tmp_path / "first", 7, seed=1), write_corpus(tmp_path / "second", 11, seed=2)
    hub = HubSource(f"hub:{hub_folder(tmp_path / 'hub', [*TEXTS])}")
    sources = (open_source([first]), open_source(sorted(second.iterdir())), hub)
    built, _ = store_of(Corpus(sources), store.tokenizer, tmp_path / "all")
    alone = [store_of(Corpus((source,)), store.tokenizer, tmp_path / f"{n}")[0] for n, source in enumerate(sources)]
    assert [part.num_documents for part in built.info.corpora] == [7, 11, 4]
    assert built.info.documents_read == [7, 11, 4]
    begin = 0
    for part, single in zip(built.info.corpora, alone, strict=True):
        stop = begin + part.num_documents
        tokens = built.tokens[built.documents[begin] : built.documents[stop]]
        np.testing.assert_equal(tokens, single.tokens)
        assert [part] == single.info.corpora
        begin = stop
    assert begin == built.info.num_documents
    assert built.info.corpora[0].description == str(first)
    assert built.info.corpora[1].description.startswith("11 files from")
    entries = json.loads((built.path / "store.json").read_text())["corpora"]
    assert all(list(entry) == ["description", "num_documents", "num_tokens", "unknown"] for entry in entries)


def test_documents_without_a_token_have_no_place_in_a_source(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    for name, text in (("x", "a\n\n\u200b\n\nb\n"), ("y", "b\n")):
        (tmp_path / f"{name}.txt").write_text(text, "utf8")
    corpus = open_corpus([tmp_path / "x.txt", tmp_path / "y.txt"], "blank-line")
    given, _ = load_given_tokenizer(str(vocabulary))
    built, _ = store_of(corpus, given, tmp_path / "s")
    assert [part.num_documents for part in built.info.corpora] == [2, 1]
    assert built.info.documents_read == [3, 1]
    (tmp_path / "z.txt").write_text("\u200b\n", "utf8")
    with pytest.raises(DataError, match=r"z\.txt holds no text"):
        store_of(open_corpus([tmp_path / "x.txt", tmp_path / "z.txt"]), given, tmp_path / "t")


def test_a_source_without_text_is_refused_by_name(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank\.txt holds no text"):
        store_of(open_corpus([tmp_path / "full.txt", tmp_path / "blank.txt"]), store.tokenizer, tmp_path / "s")
    with pytest.raises(DataError, match=r"hub:.* holds no text"):
        list(Corpus((HubSource(f"hub:{hub_folder(tmp_path / 'hub', [None, ' '])}"),)).documents())


def test_the_same_text_divided_otherwise_is_another_store(store: TokenStore, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} {name}\n")
    a, b, c = (tmp_path / f"{name}.txt" for name in "abc")
    out = tmp_path / "s"
    store_of(Corpus((open_source([a, b]), open_source([c]))), store.tokenizer, out)
    store_of(Corpus((open_source([a, b]), open_source([c]))), store.tokenizer, out)
    for other in (Corpus((open_source([a]), open_source([b, c]))), Corpus((open_source([a, b, c]),))):
        with pytest.raises(DataError, match="divides the same text into other corpora"):
            build_store(other, store.tokenizer, out)


def test_a_store_of_the_first_format_is_refused(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="has format 1; this version reads 2"):
        TokenStore(tmp_path)


def test_a_tokenizer_is_trained_on_no_more_than_the_first_characters(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("abc abd abc\nabd\n" * 50)
    (folder / "b.txt").write_text("Ж Ю Я\n" * 50, "utf8")
    first = sum(map(len, ("abc abd abc", "abd"))) * 50

    def pieces(characters: int) -> set[str]:
        section = TokenizerSection(kind="wordpiece", vocab_size=300, max_training_characters=characters)
        return set(
            build_store(open_corpus([folder]), section, tmp_path / str(characters)).tokenizer.backend.get_vocab()
        )

    assert not pieces(first) & set("ЖЮЯ")
    assert pieces(first + 1) & set("ЖЮЯ") == {"Ж"}
    assert pieces(10**9) >= set("ЖЮЯ")


def test_a_tokenizer_learns_from_every_source_however_long_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc abd abc\nabd\n" * 5000)
    (tmp_path / "b.txt").write_text("Ж Ю Я\n" * 50, "utf8")
    corpus = open_corpus([tmp_path / "a.txt", tmp_path / "b.txt"])
    section = TokenizerSection(kind="wordpiece", vocab_size=300, max_training_characters=200)
    assert set(build_store(corpus, section, tmp_path / "s").tokenizer.backend.get_vocab()) >= set("abcЖЮЯ")


# --- the command line


def test_each_corpus_argument_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_corpus(tmp_path / "texts", 6)
    hub_folder(tmp_path / "data", TEXTS * 5)
    cli.main(
        ["build-data", "--corpus", "texts/000.txt", "texts/001.txt", "--corpus", "hub:./data", "--out", "s",
         "--recipe", "tiny", "--set", "tokenizer.vocab_size=400", "--workers", "1"]
    )  # fmt: skip
    assert [part.num_documents for part in TokenStore(Path("s")).info.corpora] == [2, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "hub:a", "texts"], "Give each Hub dataset its own --corpus"),
        (["--corpus", "builtin", "texts"], "Give `builtin` its own --corpus"),
        (["--corpus", "texts", "--streaming"], "--streaming and --revision are for datasets on the Hub"),
        (["--corpus", "texts", "--cased"], "--cased, --uncased and --strip-accents say how a given vocab.txt was made"),
        (["--corpus", "texts", "--tokenizer", "nowhere.txt"], "No tokenizer at nowhere.txt"),
        (["--corpus", "texts", "--tokenizer", "./nowhere"], "No tokenizer at ./nowhere"),
        (["--corpus", "texts", "--no-strip-accents"], "so they need --tokenizer"),
    ],
)
def test_arguments_that_cannot_go_together_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "texts", 3)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["build-data", "--out", "s", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--text-key", "body"],
        ["--document-boundary", "file"],
        ["--cased"],
        ["--streaming"],
        ["--revision", "x"],
        ["--no-strip-accents"],
        ["--allow-unknown"],
    ],
)
def test_what_belongs_to_a_corpus_cannot_be_given_with_resume_or_data(flags: list[str]) -> None:
    for what in (["--resume", "run"], ["--data", "store", "--ds-config", "x.json"]):
        options = PretrainOptions.parsed(cli.build_parser().parse_args(["pretrain", *what, *flags]))
        with pytest.raises(
            ConfigError,
            match=flags[0].replace("--no-", "--") if what[0] == "--resume" else "--data is a finished token store",
        ):
            options.check()


def test_stores_made_on_the_way_have_names_for_people() -> None:
    def name(*arguments: str) -> str:
        options = PretrainOptions.parsed(cli.build_parser().parse_args(["pretrain", *arguments]))
        return store_name(replace(options, corpus=options.corpus or [["builtin"]]), small_recipe())

    assert name() == "builtin-byte-level-bpe-400"
    wikipedia = name(
        "--corpus", "hub:wikimedia/wikipedia#20231101.en@train[:10%]", "--tokenizer", "openai-community/gpt2"
    )
    assert wikipedia.startswith("wikipedia-20231101.en-train_10-gpt2-")
    assert name("--corpus", "hub:./my_data").startswith("my_data-byte-level-bpe-400-")
    names = {
        name("--corpus", "a", *more)
        for more in ([], ["b"], ["--corpus", "b"], ["--text-key", "x"], ["--revision", "x"], ["--tokenizer", "x/y"])
    }
    assert len(names) == 6
    # A model's folder is often called `discriminator`.
    assert name("--tokenizer", "google/electra-small-discriminator") == "builtin-electra-small-discriminator"
    assert name("--tokenizer", "./a/discriminator") != name("--tokenizer", "./b/discriminator")


# --- Wikipedia extracts


@pytest.mark.parametrize("boundary", ["file", "blank-line"])
def test_text_between_the_tags_of_an_article_is_one_document(tmp_path: Path, boundary: Boundary) -> None:
    article = '<doc id="{0}" url="u?curid={0}" title="Place {0}">\nPlace {0}\n\nText {0}.\n</doc>\n'
    extract = "".join(article.format(number) for number in range(4))
    complete = [[f"Place {number}", f"Text {number}."] for number in range(4)]
    path = tmp_path / "a.txt"
    path.write_text(f"\n\n</doc>\n{extract}")
    assert documents_of(path, boundary) == complete
    path.write_text(f"About this dump.\n\nMade in May.\n\n{extract}")
    before = [["About this dump.", "Made in May."]] if boundary == "file" else [["About this dump."], ["Made in May."]]
    assert documents_of(path, boundary) == before + complete
    path.write_text(extract[: extract.rindex("Text")])  # cut off
    assert documents_of(path, boundary) == [*complete[:3], ["Place 3"]]


# --- files that are not what their names say


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', r"a\.txt holds JSON lines, .* Rename it to end in \.jsonl"),
        ("a.jsonl", b"Plain text.\n", r"not JSON .* plain text has a name that ends in \.txt"),
        ("a.json", b'[\n{"text": "one"},\n{"text": "two"}\n]\n', r"one object per line\. A list .* jq -c"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}]\n', r"a list, not an object.* A list is converted with: jq -c"),
        ("a.txt", b"PAR1\x15\x04", r"is Parquet, .* Rename it to end in \.parquet"),
        ("a.jsonl", b"PAR1\x15\x04", r"is Parquet, .* Rename it to end in \.parquet"),
        ("a.parquet", gzip.compress(b"text", mtime=0), "although its name says Parquet"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file. Give the folder of the dataset that save_to_disk wrote"),
        ("a.txt", bz2.compress(b"text"), r"is compressed with bzip2, .* Add \.bz2 to its name"),
        ("a.txt", lzma.compress(b"text"), r"is compressed with xz, .* Add \.xz to its name"),
        ("a.txt", PACKERS[".zst"](b"text"), r"is compressed with zstd, .* Add \.zst to its name"),
        ("a.xml.bz2", bz2.compress(b"<mediawiki version='0.10'>\n"), "is a MediaWiki dump in XML"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3", "is a PDF, .* pdftotext"),
        ("a.txt", b"PK\x03\x04\x14", "is a ZIP archive, as .docx and .xlsx files are"),
        ("a", _tar_of(b"text"), "is a tar archive, not plain text.* tar xf"),
        ("a.xml", b'<mediawiki xmlns="x">\n<page>', "is a MediaWiki dump in XML, .* WikiExtractor"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*git lfs pull"),
    ],
)  # fmt: skip
def test_a_corpus_file_that_is_not_what_its_name_says_is_recognised(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents_of(tmp_path / name)


def test_text_that_only_looks_like_json_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"title": "x"}\n{not json}\n')
    assert documents_of(tmp_path / "a.txt") == [['{"title": "x"}', "{not json}"]]


# --- datasets saved by save_to_disk


def rows_of(*texts: str | None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"n": list(range(len(texts))), "text": list(texts)})


def saved_documents(folder: Path, text_key: str = "text") -> list[list[str]]:
    assert is_saved_dataset(folder)
    return list(Corpus((SavedSource(folder, text_key),)).documents())


def test_a_saved_dataset_is_read_like_the_same_text_in_a_file(store: TokenStore, tmp_path: Path) -> None:
    rows_of(*TEXTS).save_to_disk(tmp_path / "saved", num_shards=3)
    rows_of(*reversed(TEXTS)).select([3, 2, 1, 0]).save_to_disk(tmp_path / "chosen")
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    saved = [SavedSource(tmp_path / name) for name in ("saved", "chosen")]
    stores = []
    for number, source in enumerate([open_source([tmp_path / "a.jsonl"]), *saved]):
        corpus, seen = Corpus((source,)), list[int]()
        list(corpus.documents(seen.append))
        assert sum(seen) == corpus.num_bytes
        stores.append(build_store(corpus, store.tokenizer, tmp_path / f"store-{number}", workers=1).info)
    assert len({info.fingerprint for info in stores}) == 1
    assert len({info.num_documents for info in stores}) == 1
    assert SavedSource(tmp_path / "saved").signature() == saved[0].signature() != saved[1].signature()


def test_a_saved_datasets_splits_are_folders_and_train_is_the_default(tmp_path: Path) -> None:
    parts = {"train": rows_of("one", None, "two"), "validation": rows_of("three")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert saved_documents(tmp_path / "saved") == saved_documents(tmp_path / "saved" / "train") == [["one"], ["two"]]
    assert SavedSource(tmp_path / "saved").description == str(tmp_path / "saved" / "train")
    assert saved_documents(tmp_path / "saved" / "validation") == [["three"]]
    datasets.DatasetDict({"a": parts["train"], "b": parts["validation"]}).save_to_disk(tmp_path / "others")
    with pytest.raises(
        DataError, match=r"holds the splits a, b\. Give the folder of one split: --corpus .*others/SPLIT"
    ):
        SavedSource(tmp_path / "others")
    with pytest.raises(DataError, match=r"is a dataset that save_to_disk wrote\. Give it its own --corpus"):
        open_corpus([tmp_path])
    with pytest.raises(DataError, match=r"no column 'body'; its columns are n, text\. Name it with --text-key"):
        saved_documents(tmp_path / "saved", "body")
    with pytest.raises(DataError, match="'n' has type int64, not text"):
        saved_documents(tmp_path / "saved", "n")


def test_a_saved_dataset_that_is_damaged_is_refused(tmp_path: Path) -> None:
    rows_of(*TEXTS).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    complete = file.read_bytes()
    for size in (0, 1, 8, len(complete) // 2):
        file.write_bytes(complete[:size])
        with pytest.raises(DataError, match=r"Cannot read .*Save the dataset again"):
            saved_documents(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"Cannot read .*Save the dataset again"):
        saved_documents(tmp_path)


def test_a_command_recognises_a_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows_of(*TEXTS * 5).save_to_disk("saved")
    cli.main(["build-data", "--corpus", "saved", "--out", "s", "--recipe", "tiny", "--workers", "1"])
    assert TokenStore(Path("s")).info.num_documents == 20


# --- text without spaces


@pytest.mark.parametrize("kind", ["byte-level-bpe", "wordpiece"])
def test_training_on_a_long_word_takes_about_as_long_as_on_short_ones(kind: str) -> None:
    """The text has 100,000 letters; uncut it takes some thirty times as long."""
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 100_000))
    section = TokenizerSection(kind=kind, vocab_size=1000)  # type: ignore[arg-type]
    seconds = []
    for lines in ([letters[start : start + 900] for start in range(0, len(letters), 900)], [letters]):
        start = time.process_time()
        assert train_tokenizer(lines, section).vocab_size == 1000
        seconds.append(time.process_time() - start)
    assert seconds[1] < 8 * seconds[0]


@pytest.mark.parametrize("kind", ["byte-level-bpe", "wordpiece"])
def test_only_the_training_cuts_long_words(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [*TEXTS, "ACGT" * 600]
    section = TokenizerSection(kind=kind, vocab_size=300)  # type: ignore[arg-type]
    trained = train_tokenizer(lines, section)
    assert "FixedLength" not in trained.backend.to_str()
    if kind == "byte-level-bpe":  # whose training is the same each time
        short = train_tokenizer(TEXTS, section)
        monkeypatch.setattr(tokenizer, "LONGEST_TRAINING_WORD", 10**6)
        assert train_tokenizer(TEXTS, section).fingerprint == short.fingerprint
