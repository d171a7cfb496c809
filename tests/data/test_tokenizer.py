from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, RobertaTokenizer, XLMRobertaTokenizer

from electra_ds import cli
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import DataError
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.data.given_tokenizer import Casing, load_given_tokenizer
from electra_ds.data.token_store import TokenStore
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.data_files import DataFiles
from tests.helpers import builder_for, small_recipe, write_corpus

# --- tokenizers


def given(path: Path, casing: Casing | None = None) -> Tokenizer:
    return load_given_tokenizer(str(path), casing or Casing())[0]


LINES = ["The quick brown fox jumps over the lazy dog.", "Größe, naïve café", "x = f(y)  # 12,345", "日本 emoji 🙂"]


@pytest.mark.parametrize("kind", ["byte-level-bpe", "wordpiece"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_a_saved_tokenizer_gives_the_same_ids_in_transformers(tmp_path: Path, kind: str, lowercase: bool) -> None:
    if kind == "byte-level-bpe" and lowercase:
        pytest.skip("byte-level BPE keeps case")
    section = TokenizerSection(kind=kind, vocab_size=400, lowercase=lowercase)  # type: ignore[arg-type]
    tokenizer = train_tokenizer(LINES * 20, section)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for line, ids in zip(LINES, tokenizer.encode_lines(LINES), strict=True):
        assert theirs(line)["input_ids"] == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    pair = theirs("brown fox", "lazy")
    assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(tokenizer.sep_id) + 1) + [1] * (
        len(pair["input_ids"]) - pair["input_ids"].index(tokenizer.sep_id) - 1
    )
    assert (theirs.pad_token_id, theirs.mask_token_id) == (tokenizer.pad_id, tokenizer.mask_id)
    assert theirs.encode("a [MASK] b")[2] == tokenizer.mask_id or tokenizer.mask_id in theirs.encode("a [MASK] b")
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_line_is_tokenised_the_same_wherever_it_was_wrapped() -> None:
    tokenizer = train_tokenizer(LINES * 20, TokenizerSection(kind="byte-level-bpe", vocab_size=400))
    whole = tokenizer.encode_lines(["The quick brown fox"])[0]
    halves = tokenizer.encode_lines(["The quick", "brown fox"])
    assert halves[0] + halves[1] == whole


def test_text_that_spells_a_special_token_is_never_masked_like_text() -> None:
    tokenizer = train_tokenizer(LINES, TokenizerSection(kind="wordpiece", vocab_size=300))
    ids = tokenizer.encode_lines(["fox [SEP] [MASK] dog"])[0]
    assert tokenizer.is_special[ids].sum() == 2


def test_a_vocabulary_file_is_read_as_wordpiece(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es", "dog"]))
    tokenizer = given(path)
    assert tokenizer.encode_lines(["FOXES dog cat"]) == [[5, 6, 7, 1]]
    assert tokenizer.vocab_size == 8


def test_a_vocabulary_folder_says_itself_whether_it_is_cased(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "Fox"]))
    assert given(tmp_path).encode_lines(["Fox fox"]) == [[5, 5]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert given(tmp_path).encode_lines(["Fox fox"]) == [[6, 5]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.txt", "[PAD]\n[CLS]\n[SEP]\n[MASK]\nfox", r"lacks \[UNK\]"),
        ("tokenizer.json", "{}", r"Cannot read .*Give its tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        given(tmp_path)
    with pytest.raises(DataError, match="No tokenizer at"):
        given(tmp_path / "nowhere")


def test_an_uncased_vocabulary_gives_transformers_ids(data_files: DataFiles) -> None:
    ours = given(data_files.vocabulary)
    theirs = BertTokenizer(str(data_files.vocabulary))
    for line in LINES:
        assert ours.encode_lines([line])[0] == theirs.encode(line, add_special_tokens=False)


# --- tokenizers of other models


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's and RoBERTa's: byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES * 20, trainer)
    backend.add_special_tokens(special)
    return backend


def unigram() -> tokenizers.Tokenizer:
    """As XLM-R's: a Unigram model with <s>-style tokens, a <mask> that takes the space before it."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(LINES * 20, trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    return backend


BERT_SPELLINGS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ("pad", "unk", "cls", "sep", "mask")
S_STYLE = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def folder_of(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, object] | None) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CASES = [
    ("xlm-r", unigram, None, S_STYLE, []),
    ("roberta", lambda: byte_level(S_STYLE), None, S_STYLE, []),
    ("t5", lambda: byte_level(["<pad>", "</s>", "<unk>"]), None, ["<pad>", "<unk>", "[CLS]", "</s>", "[MASK]"],
     ["[CLS]", "[MASK]"]),
    ("gpt2", lambda: byte_level(["<|endoftext|>"]), GPT2, ["[PAD]", "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]"],
     ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]),
    ("gpt2 alone", lambda: byte_level(["<|endoftext|>"]), None, BERT_SPELLINGS, BERT_SPELLINGS),
    ("configured", lambda: byte_level(["<|a|>", "<|b:c $d|>", "<s>", "</s>", "<mask>"]),
     {"bos_token": {"__type": "AddedToken", "content": "<|a|>"}, "eos_token": "<|b:c $d|>", "pad_token": "<|a|>",
      "mask_token": None},
     ["[PAD]", "[UNK]", "<|a|>", "<|b:c $d|>", "<mask>"], ["[PAD]", "[UNK]"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "config", "roles", "added"), CASES, ids=[case[0] for case in CASES])
def test_any_models_tokenizer_goes_from_file_to_store_to_transformers(
    tmp_path: Path, name: str, make, config: dict[str, object] | None, roles: list[str], added: list[str]
) -> None:
    original = make()
    size = len(original.get_vocab())
    tokenizer = given(folder_of(original, tmp_path / "given", config))
    assert list(tokenizer.special_tokens.values()) == roles
    assert list(tokenizer.added) == added
    assert tokenizer.vocab_size == size + len(added)
    role_ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert [tokenizer.backend.id_to_token(token_id) for token_id in role_ids] == roles
    assert len(set(role_ids)) == 5
    assert set(np.flatnonzero(tokenizer.is_special)) == set(role_ids) - {tokenizer.unk_id}
    for line, ids in zip(LINES, tokenizer.encode_lines(LINES), strict=True):  # text is encoded as the model's own
        assert ids == original.encode(line, add_special_tokens=False).ids
    corpus = write_corpus(tmp_path / "corpus", 60)
    (corpus / "lines.txt").write_text("\n".join(LINES), "utf8")
    store = build_store(open_corpus([corpus]), tokenizer, tmp_path / "store", workers=1)
    assert store.tokenizer.fingerprint == tokenizer.fingerprint
    assert store.tokenizer.added == ()
    batch = builder_for(store, small_recipe()).build(0)
    assert (batch.ids_BT[:, 0] == tokenizer.cls_id).all()
    (tmp_path / "tokenizer.json").write_text(store.tokenizer.backend.to_str(), "utf8")  # as in a checkpoint
    alone = load_tokenizer(tmp_path / "tokenizer.json")
    assert (alone.fingerprint, alone.special_tokens) == (tokenizer.fingerprint, tokenizer.special_tokens)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "store" / "tokenizer")
    assert len(theirs) == tokenizer.vocab_size
    for line, ids in zip(LINES, tokenizer.encode_lines(LINES), strict=True):
        assert theirs(line)["input_ids"] == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    first, second = tokenizer.encode_lines(LINES[:2])
    pair = theirs(*LINES[:2])
    assert pair["input_ids"] == [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert [getattr(theirs, f"{kind}_token_id") for kind in KINDS] == role_ids
    assert tokenizer.encode_lines([f"fox {roles[4]} dog"])[0] == theirs.encode(
        f"fox {roles[4]} dog", add_special_tokens=False
    )


def test_a_mask_token_keeps_its_own_settings(tmp_path: Path) -> None:
    tokenizer = given(folder_of(unigram(), tmp_path / "given", None))
    added = tokenizer.backend.get_added_tokens_decoder()[tokenizer.mask_id]
    assert (added.content, added.lstrip) == ("<mask>", True)


def test_a_unigram_models_scores_survive_their_file(tmp_path: Path) -> None:
    """`tokenizers` reads some of them with another last digit than it wrote."""
    scores = -np.random.default_rng(0).random(1000) * 15
    pieces = [("<unk>", 0.0), *((f"p{number}", float(score)) for number, score in enumerate(scores))]
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)), "test")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_piece_that_only_looks_like_a_token_plays_no_role() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, [("<", "s"), ("<s", ">")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(backend, "test")
    assert tokenizer.special_tokens["[CLS]"] == "[CLS]"
    assert tokenizer.encode_lines(["<s>"]) == [[4]]


def test_a_tokenizer_that_loses_unknown_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"lacks \[UNK\]"):
        Tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, [])), "test")
    with pytest.raises(DataError, match="gaps"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "b": 9000}, unk_token="[UNK]")), "test")
    with pytest.raises(DataError, match="gaps"):  # the next id is taken
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "b": 2}, unk_token="[UNK]")), "test")


def test_70000_pieces_are_stored_in_32_bits_and_come_back(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(70_000)]
    vocabulary = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = given(folder_of(backend, tmp_path / "given", None))
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 70_000, rng.integers(5, 80)) for _ in range(300)]
    corpus = tmp_path / "a.txt"
    corpus.write_text("\n\n".join(" ".join(words[number] for number in document) for document in documents))
    store = build_store(open_corpus([corpus], "blank-line"), tokenizer, tmp_path / "store", workers=1)
    assert (store.info.dtype, store.tokens.dtype, store.info.vocab_size) == ("uint32", np.uint32, 70_005)
    assert (store.path / "tokens.bin").stat().st_size == 4 * store.info.num_tokens
    np.testing.assert_equal(store.tokens, np.concatenate(documents) + 5)
    assert store.tokens.max() > 65_535
    again = TokenStore(store.path)
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    batches = [builder_for(again, small_recipe("data.holdout_by=document")).build(step) for step in range(5)]
    assert max(int(batch.ids_BT.max()) for batch in batches) > 65_535
    known = {tuple(document[:4] + 5) for document in documents}
    short = [row for batch in batches for row, size in zip(batch.ids_BT, batch.lengths_B, strict=True) if size < 32]
    assert short
    assert all(tuple(row[1:5]) in known for row in short)
    theirs = AutoTokenizer.from_pretrained(store.path / "tokenizer")
    assert theirs("w69999 w1")["input_ids"] == [2, 70_004, 6, 3]


def test_a_models_folder_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    model = json.loads(byte_level([]).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]

    def with_special(special: list[str]) -> dict[str, int]:
        return model["vocab"] | {token: len(model["vocab"]) + place for place, token in enumerate(special)}

    pieces = [tuple(piece) for piece in json.loads(unigram().to_str())["model"]["vocab"]]
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_SPELLINGS, "fox", "##es", "dog", "café"]), "utf8")
    for name, theirs in {
        "bert": BertTokenizer(str(tmp_path / "vocab.txt")),
        "gpt2": GPT2Tokenizer(vocab=with_special(["<|endoftext|>"]), merges=merges),
        "roberta": RobertaTokenizer(vocab=with_special(S_STYLE), merges=merges),
        "xlm-roberta": XLMRobertaTokenizer(vocab=pieces),
    }.items():
        folder = tmp_path / name
        theirs.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": name}))
        ids = [theirs.encode(line, add_special_tokens=False) for line in LINES]
        ours = given(folder)
        assert bool(ours.added) == (name == "gpt2")
        assert ours.encode_lines(LINES) == ids
        ours.save(tmp_path / "saved" / name)
        assert load_tokenizer(tmp_path / "saved" / name).fingerprint == ours.fingerprint
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved" / name)
        assert [saved.encode(line, add_special_tokens=False) for line in LINES] == ids


def test_the_user_is_told_which_tokens_were_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(byte_level(["<|endoftext|>"]), tmp_path / "gpt2", GPT2)
    write_corpus(tmp_path / "texts", 3)
    cli.main(["build-data", "--corpus", "texts", "--tokenizer", "gpt2", "--out", "s", "--workers", "1"])
    assert "The tokenizer gpt2 lacked [PAD], [CLS], [SEP], [MASK]; new pieces" in capsys.readouterr().out
    cli.main(["build-data", "--corpus", "texts", "--tokenizer", "s/tokenizer", "--out", "t", "--workers", "1"])
    assert "lacked" not in capsys.readouterr().out
