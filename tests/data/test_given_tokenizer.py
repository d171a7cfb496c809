"""A tokenizer that a user gives has transformers' ids in every command, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer, ElectraConfig, ElectraForPreTraining

from electra_ds import cli
from electra_ds.core.errors import DataError
from electra_ds.data.given_tokenizer import Casing, load_given_tokenizer
from electra_ds.data.token_store import TokenStore
from electra_ds.finetuning.encoder_source import read_encoder
from electra_ds.interop.init_from import read_initial_weights
from electra_ds.interop.pretrained import read_pretrained
from tests.data_files import DataFiles
from tests.helpers import small_recipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzäöüßéABGHMÄÖ日本"
VOCABULARY = [
    *SPECIAL,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    "größe",
    "grosse",
    "gro",
    "Größe",
    "日本",
    ".",
]
TEXT = "Größe größe GRÖSSE Über die Bären, 日本 Hügel."
SETTINGS: list[dict[str, Any]] = [
    {"do_lower_case": lower, **accents, **chinese}
    for lower in (True, False)
    for accents in ({}, {"strip_accents": False}, {"strip_accents": True})
    for chinese in ({}, {"tokenize_chinese_chars": False})
]


def folder_of(
    folder: Path, settings: dict[str, Any] | None = None, pieces: list[str] | None = None, **config: Any
) -> Path:
    """A folder with vocab.txt, and what else is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces or VOCABULARY) + "\n", "utf8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def ids_of(path: Path | str, **casing: bool) -> list[int]:
    return load_given_tokenizer(str(path), Casing(**casing))[0].encode_lines([TEXT])[0]


def notes_of(path: Path, **casing: bool) -> str:
    return " ".join(load_given_tokenizer(str(path), Casing(**casing))[1])


def theirs(folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_whatever_a_folder_says_the_ids_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    for name, more, config in (
        ("class", {"tokenizer_class": "BertTokenizer"}, {}),
        ("fast class", {"tokenizer_class": "ElectraTokenizerFast"}, {"model_type": "electra"}),
        ("model alone", {}, {"model_type": "electra"}),
    ):
        folder = folder_of(tmp_path / name, settings | more, **config)
        assert ids_of(folder) == ids_of(folder / "vocab.txt") == theirs(folder), name
    saved = BertTokenizer.from_pretrained(tmp_path / "class")
    saved.save_pretrained(tmp_path / "json")
    assert ids_of(tmp_path / "json") == theirs(tmp_path / "json") == theirs(tmp_path / "class")
    bare = folder_of(tmp_path / "no class", settings)  # which AutoTokenizer does not open
    assert ids_of(bare) == theirs(tmp_path / "class")


def test_a_class_that_reads_only_the_vocabulary_of_a_json_is_followed(tmp_path: Path) -> None:
    """transformers makes the normalizer of some classes anew, whatever tokenizer.json says of it."""
    BertTokenizer(VOCABULARY_OF, do_lower_case=False).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    assert ids_of(tmp_path) == theirs(tmp_path)
    assert ids_of(tmp_path / "tokenizer.json") != ids_of(tmp_path)


VOCABULARY_OF = {piece: number for number, piece in enumerate(VOCABULARY)}


def test_every_command_reads_a_model_with_the_same_ids(tmp_path: Path) -> None:
    """--tokenizer, --init-from and finetune."""
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ElectraForPreTraining(ElectraConfig(vocab_size=len(VOCABULARY), intermediate_size=64, **sizes))
    model.save_pretrained(tmp_path)
    for settings in SETTINGS:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        folder_of(tmp_path)
        expected = theirs(tmp_path)
        weights = read_pretrained(str(tmp_path), tmp_path)
        assert weights.tokenizer is not None
        encoder = read_encoder(str(tmp_path))
        assert encoder.notes == ()
        found = encoder.tokenizer.encode(TEXT, add_special_tokens=False)
        assert found == weights.tokenizer.encode_lines([TEXT])[0] == ids_of(tmp_path) == expected, settings
    (tmp_path / "tokenizer_config.json").unlink()
    assert "does not say whether its vocabulary is cased" in read_encoder(str(tmp_path)).notes[0]
    assert "--cased" not in read_encoder(str(tmp_path)).notes[0]  # finetune has no such option


def test_text_that_is_split_differently_from_the_weights_own_gives_a_note(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ElectraForPreTraining(ElectraConfig(vocab_size=len(VOCABULARY), intermediate_size=64, **sizes))
    model.save_pretrained(tmp_path)
    folder_of(tmp_path, {"do_lower_case": True, "strip_accents": False})
    recipe = small_recipe()
    beginning = read_initial_weights([str(tmp_path)], recipe)
    own, _ = load_given_tokenizer(str(tmp_path))
    other, _ = load_given_tokenizer(str(folder_of(tmp_path / "other", {"do_lower_case": True})))
    beginning.check_vocabulary(other)
    assert not any("how text is split" in note for note in beginning.notes(recipe, own))
    assert any("another normalizer, which changes how text is split" in note for note in beginning.notes(recipe, other))


def test_the_switches_for_a_bare_vocabulary_do_what_transformers_does(tmp_path: Path) -> None:
    bare = folder_of(tmp_path / "bare")
    for casing, settings in (
        ({"cased": True}, {"do_lower_case": False}),
        ({"cased": False}, {"do_lower_case": True}),
        ({"cased": False, "strip_accents": False}, {"do_lower_case": True, "strip_accents": False}),
        ({"cased": True, "strip_accents": True}, {"do_lower_case": False, "strip_accents": True}),
        ({"strip_accents": False}, {"strip_accents": False}),
    ):
        same = BertTokenizer(str(bare / "vocab.txt"), **settings).encode(TEXT, add_special_tokens=False)
        assert ids_of(bare, **casing) == ids_of(bare / "vocab.txt", **casing) == same
        assert ("It is treated as uncased" in notes_of(bare, **casing)) == ("cased" not in casing)
    said = folder_of(tmp_path / "said", {"do_lower_case": True})
    assert ids_of(said, cased=True) == ids_of(bare, cased=True)


def test_a_note_says_how_a_bare_vocabulary_is_read(tmp_path: Path) -> None:
    note = notes_of(folder_of(tmp_path / "bare") / "vocab.txt")
    assert "It is treated as uncased, as in transformers: text is lower-cased and its accents are stripped" in note
    assert "give --cased or --no-strip-accents" in note
    assert not notes_of(folder_of(tmp_path / "said", {"do_lower_case": True}))


@pytest.mark.parametrize(
    "kind", ["BertJapaneseTokenizer", "EsmTokenizer", "RobertaTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"]
)
def test_a_class_that_wordpiece_cannot_replace_is_refused(kind: str, tmp_path: Path) -> None:
    for number, config in enumerate(({}, {"model_type": "electra"})):
        folder = folder_of(tmp_path / str(number), {"tokenizer_class": kind, "do_lower_case": True}, **config)
        for path in (folder, folder / "vocab.txt"):
            with pytest.raises(DataError, match=rf"(?s){kind}.*Give its tokenizer\.json"):
                load_given_tokenizer(str(path))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="its own code, which is not run here"):
        load_given_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def tokenizer_json(path: Path) -> None:
    Tokenizer(models.WordPiece(VOCABULARY_OF, unk_token="[UNK]")).save(str(path))


UNREADABLE = r"Cannot read .*Give its tokenizer\.json"
CONTENTS: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "tokenizer.json": ("vocab.txt", tokenizer_json, r"lacks \[UNK\]"),
    "vocab.json": ("vocab.txt", b'{"a": 0, "b": 1}', r"lacks \[UNK\]"),
    "merges": ("vocab.txt", b"#version: 0.2\na b\n", r"lacks \[UNK\]"),
    "scores": ("vocab.txt", "▁a\t-1.5\n▁b\t-2\n".encode(), r"lacks \[UNK\]"),
    "model": ("vocab.txt", b"\n\x0e\n\x05<unk>\x15\xff\x00", "as text.* If it is a SentencePiece model"),
    "gzip": ("vocab.txt", b"\x1f\x8b\x08abc", "is compressed with gzip, not a tokenizer"),
    "pointer": ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    "vocabulary": ("tokenizer.json", "\n".join(VOCABULARY).encode(), UNREADABLE),
    "settings": ("tokenizer.json", b'{"do_lower_case": true}', UNREADABLE),
    "cut": ("tokenizer.json", b'{"model": {"vocab"', UNREADABLE),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_tokenizer_file_that_is_not_what_its_name_says_is_recognised(kind: str, tmp_path: Path) -> None:
    name, content, said = CONTENTS[kind]
    for file in (tmp_path / name, tmp_path / f"mine{Path(name).suffix}"):
        if callable(content):
            content(file)
        else:
            file.write_bytes(content)
        for given in {file, tmp_path} if file.name == name else {file}:
            with pytest.raises(DataError, match=said):
                load_given_tokenizer(str(given))


def test_a_vocabulary_without_unk_is_refused_and_other_roles_are_added(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks \[UNK\]"):
        load_given_tokenizer(str(folder_of(tmp_path / "a", pieces=["[PAD]", "[CLS]", "[SEP]", "[MASK]", "a"])))
    tokenizer, notes = load_given_tokenizer(str(folder_of(tmp_path / "b", pieces=["[UNK]", "[CLS]", "[SEP]", "a"])))
    assert "lacked [PAD], [MASK]; new pieces" in notes[-1]
    assert tokenizer.encode_lines(["a b"]) == [[3, 0]]


def test_tokens_that_were_added_to_a_vocabulary_are_read(tmp_path: Path) -> None:
    theirs = BertTokenizer(VOCABULARY_OF)
    theirs.add_tokens([AddedToken("größeres", normalized=False)])
    theirs.save_pretrained(tmp_path)
    tokenizer, notes = load_given_tokenizer(str(tmp_path))
    line = "größeres a"
    assert tokenizer.encode_lines([line])[0] == theirs.encode(line, add_special_tokens=False)
    assert not notes


def test_build_data_takes_the_switches_and_says_what_it_assumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "texts.txt").write_text(f"{TEXT}\n", "utf8")

    def built(*flags: str) -> list[int]:
        out = "-".join(["store", *flags])
        cli.main(
            ["build-data", "--corpus", "texts.txt", "--tokenizer", "vocab.txt", "--out", out, "--workers", "1", *flags]
        )
        return TokenStore(tmp_path / out).tokens.tolist()

    uncased = built()
    assert "vocab.txt does not say whether its vocabulary is cased. It is treated as uncased" in capsys.readouterr().out
    assert built("--uncased") == uncased
    assert "does not say" not in capsys.readouterr().out
    assert built("--cased") == ids_of("vocab.txt", cased=True) != uncased
    assert built("--uncased", "--no-strip-accents") == ids_of("vocab.txt", cased=False, strip_accents=False) != uncased
    tokenizer_json(tmp_path / "tokenizer.json")
    for name in ("tokenizer.json", "."):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["build-data", "--corpus", "texts.txt", "--tokenizer", name, "--out", "x", "--cased"])
        assert "apply only to a vocab.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            ["build-data", "--corpus", "texts.txt", "--tokenizer", "vocab.txt", "--out", "x", "--cased", "--uncased"]
        )


def test_german_text_has_the_tokens_of_its_folders_settings(data_files: DataFiles) -> None:
    """Every word with its accents is in the vocabulary, and few are without."""
    lines = (data_files.german / "de.txt").read_text("utf8").splitlines()
    tokenizer, notes = load_given_tokenizer(str(data_files.german))
    vocabulary = str(data_files.german / "vocab.txt")
    theirs = BertTokenizer(vocabulary, do_lower_case=True, strip_accents=False)
    assert tokenizer.encode_lines(lines) == [theirs.encode(line, add_special_tokens=False) for line in lines]
    assert not notes
    words = sum(len(line[:-1].split()) + 1 for line in lines)  # and the full stop
    assert sum(map(len, tokenizer.encode_lines(lines))) == words
    stripped = BertTokenizer(vocabulary, do_lower_case=True, strip_accents=True)
    assert sum(len(stripped.encode(line, add_special_tokens=False)) for line in lines) > 1.5 * words
