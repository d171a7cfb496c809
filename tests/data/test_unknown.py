"""How much of a text is [UNK] is counted, recorded and said, and a store of nothing else is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from electra_ds import cli
from electra_ds.api.stores import open_or_build_store
from electra_ds.config.options import PretrainOptions
from electra_ds.core.errors import DataError
from electra_ds.core.terminal import StageProgress, display
from electra_ds.data import build
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.data.given_tokenizer import load_given_tokenizer
from electra_ds.data.token_store import StoreInfo, TokenStore
from electra_ds.data.tokenizer import (
    REFUSED_SHARE,
    Tokenizer,
    UnknownText,
    problem,
    report,
    train_tokenizer,
    unknown_in,
)
from tests.data_files import DataFiles
from tests.finetune_runs import arguments_of, finetune, tiny_electra, write_csv
from tests.helpers import small_recipe

KNOWN = "the quick brown fox jumps over the lazy dog"
FOREIGN = "пес лис двір"
LONG = "abcdefgh" * 20
"""A word of known letters, longer than a WordPiece looks up."""


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    section = small_recipe("tokenizer.kind=wordpiece", "tokenizer.vocab_size=300").tokenizer
    train_tokenizer([KNOWN] * 20, section).save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(wordpiece: Path) -> Tokenizer:
    return load_given_tokenizer(str(wordpiece))[0]


def corpus_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", "utf8")
    return path


def built(path: Path, tokenizer: Tokenizer, out: Path, *, allow_unknown: bool = False) -> StoreInfo:
    return build_store(open_corpus([path]), tokenizer, out, workers=1, allow_unknown=allow_unknown).info


def test_tokens_and_characters_that_are_unknown_are_counted(tokenizer: Tokenizer) -> None:
    lines = [KNOWN, f"fox {FOREIGN}", LONG, "dog"]
    found = unknown_in(lines, tokenizer.encode_lines(lines), tokenizer)
    assert (found.num_tokens, found.num_chars) == (3 + 1, 3 + 3 + 4 + 160)
    assert (found.num_long_chars, found.text_chars) == (160, sum(map(len, lines)))
    assert found.examples == ["пес", "лис", "двір"]
    again = UnknownText()
    again.add(found)
    again.add(unknown_in(["лис пес"], tokenizer.encode_lines(["лис пес"]), tokenizer))
    assert (again.num_tokens, again.examples) == (6, found.examples)


def test_the_share_is_in_the_record_as_a_whole_and_for_each_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = corpus_of(tmp_path / "a.txt", KNOWN, f"fox {FOREIGN}")
    second = corpus_of(tmp_path / "b.txt", KNOWN)
    store = build_store(open_corpus([first, second]), tokenizer, tmp_path / "store", workers=1)
    unknown = [source.unknown for source in store.info.corpora]
    assert [each and each.num_tokens for each in unknown] == [3, 0]
    assert store.info.unknown_share == (store.tokens == tokenizer.unk_id).mean()
    assert TokenStore(tmp_path / "store").info == store.info
    assert json.loads((tmp_path / "store" / "store.json").read_text())["unknown_share"] == store.info.unknown_share


def test_a_store_from_before_it_was_counted_still_opens(
    store: TokenStore, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "old"
    build_store(open_corpus([corpus_folder]), small_recipe().tokenizer, out, workers=1)
    values = json.loads((out / "store.json").read_text())
    del values["unknown_share"]
    for source in values["corpora"]:
        del source["unknown"]
    (out / "store.json").write_text(json.dumps(values))
    old = TokenStore(out).info
    assert old.fingerprint == store.info.fingerprint
    assert (old.unknown_share, old.corpora[0].unknown) == (None, None)
    assert build_store(open_corpus([corpus_folder]), small_recipe().tokenizer, out).info == old


def test_a_usual_share_gives_no_warning_and_an_unusual_one_gives_the_reason() -> None:
    usual = UnknownText(num_tokens=29, num_chars=20, text_chars=5000, examples=["ж"])
    assert problem("c", usual, 1000) is None
    foreign = problem("c", replace(usual, num_tokens=30), 1000)
    assert foreign is not None
    assert "30 of 1,000 tokens are [UNK] (3.00%), which replace 0.40% of the characters" in foreign
    assert "lacks characters or forms of the text, such as 'ж'" in foreign
    assert "--cased" in foreign
    assert "tokenizer.kind=byte-level-bpe" in foreign
    unspaced = problem("c", UnknownText(1, 200, 200, 5000, ["жжж"]), 1000)
    assert unspaced is not None  # a thousandth of the tokens, and a twenty-fifth of the text
    assert "no spaces between words ('жжж' …)" in unspaced
    assert "word segmenter" in unspaced
    assert report(UnknownText(text_chars=9), 5) == "none of 5 tokens is [UNK]"


@pytest.mark.parametrize("text", [FOREIGN, LONG])
def test_a_text_that_is_all_unknown_is_refused_unless_it_is_allowed(
    text: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus_of(tmp_path / "a.txt", *[text] * 20, KNOWN[:3])
    with pytest.raises(DataError, match=r"tokens are \[UNK\] .* A model learns nothing .* add --allow-unknown"):
        built(path, tokenizer, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(build, "_write_shard", None)  # what was tokenised is not done again
    info = built(path, tokenizer, tmp_path / "store", allow_unknown=True)
    assert info.unknown_share is not None
    assert info.unknown_share > 0.9


def test_one_unknown_source_among_known_ones_is_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    known, foreign = corpus_of(tmp_path / "known.txt", *[KNOWN] * 500), corpus_of(tmp_path / "foreign.txt", FOREIGN)
    with pytest.raises(DataError, match=r"does not know much of .*foreign\.txt: 3 of 3 tokens"):
        build_store(open_corpus([known, foreign]), tokenizer, tmp_path / "store", workers=1)


def test_every_command_that_builds_a_store_says_the_share_and_a_given_store_only_a_large_one(
    wordpiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus_of(tmp_path / "good.txt", KNOWN)
    corpus_of(tmp_path / "bad.txt", KNOWN, f"{LONG} {FOREIGN}")
    start = ["build-data", "--workers", "1", "--tokenizer", str(wordpiece)]
    cli.main([*start, "--corpus", "good.txt", "--out", "g"])
    assert re.search(r"^good.txt: none of [\d,]+ tokens is \[UNK\]\.$", capsys.readouterr().out, re.MULTILINE)
    cli.main([*start, "--corpus", "bad.txt", "--out", "b"])
    out = capsys.readouterr().out
    assert "Warning: The tokenizer does not know much of bad.txt: 4 of" in out
    training_on_text = ["--corpus", "bad.txt", "--tokenizer", str(wordpiece)]
    for where, is_said in ((["--data", "g"], False), (["--data", "b"], True), (training_on_text, True)):
        options = PretrainOptions.parsed(cli.build_parser().parse_args(["pretrain", *where]))
        with display() as console:
            open_or_build_store(options, small_recipe(), partial(StageProgress, console))
        assert ("Warning: The tokenizer does not know much of" in capsys.readouterr().out) == is_said, where
    foreign = corpus_of(tmp_path / "foreign.txt", FOREIGN)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*start, "--corpus", str(foreign), "--out", "f"])
    cli.main([*start, "--corpus", str(foreign), "--out", "f", "--allow-unknown"])
    assert "Warning" in capsys.readouterr().out


def test_a_long_build_says_early_that_its_text_is_unknown(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_CHUNK_CHARS", 10)
    documents = "\n\n".join([FOREIGN] * 5 + [KNOWN] * 20)
    corpus = open_corpus([corpus_of(tmp_path / "a.txt", documents)], "blank-line")
    info = build_store(corpus, tokenizer, tmp_path / "store", workers=1).info
    assert info.unknown_share is not None
    assert info.unknown_share < 0.9
    assert caplog.text.count("The tokenizer does not know much of the beginning of") == 1


@pytest.mark.parametrize("is_byte_level", [True, False])
def test_text_that_a_tokenizer_leaves_out_without_a_token_is_counted_too(is_byte_level: bool, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())  # without unk_token, and trained without an alphabet of all bytes
    backend.pre_tokenizer = pre_tokenizers.ByteLevel() if is_byte_level else pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([KNOWN] * 20, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    bpe = load_given_tokenizer(str(tmp_path / "tokenizer.json"))[0]
    lines = [KNOWN, f"fox {FOREIGN}"]
    found = unknown_in(lines, bpe.encode_lines(lines), bpe)
    assert (found.num_tokens, found.num_left_out, found.num_chars, found.examples[0]) == (0, 3, 10, "пес")
    info = built(corpus_of(tmp_path / "a.txt", *lines), bpe, tmp_path / "store")
    assert info.corpora[0].unknown == found
    said = problem("a.txt", found, 20)
    assert said is not None
    assert "3 stretches of text get no token" in said
    assert UnknownText(0, 800, 0, 1000, [], num_left_out=100).share(5) > REFUSED_SHARE


def test_a_byte_level_tokenizer_knows_everything(tmp_path: Path) -> None:
    path = corpus_of(tmp_path / "a.txt", FOREIGN, LONG, "日本語 🙂")
    info = build_store(open_corpus([path]), small_recipe().tokenizer, tmp_path / "store", workers=1).info
    assert info.unknown_share == 0


def test_a_script_without_spaces_is_refused_with_the_reason(data_files: DataFiles, tmp_path: Path) -> None:
    section = small_recipe("tokenizer.kind=wordpiece", "tokenizer.vocab_size=2000").tokenizer
    with pytest.raises(DataError, match=r"100 of 100 tokens are .* no spaces between words"):
        build_store(open_corpus([data_files.unspaced]), section, tmp_path / "store", workers=1)


@pytest.mark.slow
def test_finetuning_on_text_that_the_model_does_not_know_says_so(tmp_path: Path) -> None:
    model = tiny_electra(tmp_path / "model")
    for name in ("train", "dev"):
        write_csv(tmp_path / f"{name}.csv", ("text", "label"), [(FOREIGN, "a"), (f"{FOREIGN} the", "b")] * 8)
    out = finetune(
        *arguments_of(model, None, "mine", tmp_path / "run", train=tmp_path / "train.csv", dev=tmp_path / "dev.csv")
    )
    assert re.search(r"8\d% of the training inputs' tokens are \[UNK\]", " ".join(out.split()))
    assert re.search(r"8\d% of the dev inputs' tokens are \[UNK\]", " ".join(out.split()))
