"""Tokenizers that a user gives: from a model on the Hub, a model's folder, a tokenizer.json or a vocab.txt.

Every command reads them here with transformers, so that pretraining, finetuning and later users of the model get the
same ids. This module is only imported if a tokenizer is given, because `transformers` takes seconds to import.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, BertTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from electra_ds.core.errors import DataError
from electra_ds.core.files import is_hub_model
from electra_ds.data.hub import explained, fetch_tokenizer
from electra_ds.data.text_files import kind_of
from electra_ds.data.tokenizer import SPECIAL_TOKENS, Tokenizer

_JSON, _VOCABULARY, _SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
VOCABULARIES = (_JSON, _VOCABULARY, "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""The vocabulary files of tokenizers. A tokenizer's folder has at least one."""
_SETTINGS_FILES = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "config.json")
_TOKEN_KEYS = ("pad_token", "unk_token", "cls_token", "bos_token", "sep_token", "eos_token", "mask_token")
_IN_WORDS = {_JSON: _JSON, _VOCABULARY: "vocabulary of one piece per line"}
_SCORED = re.compile(r".+\t-?\d+(\.\d+)?(e-?\d+)?")
_SHOWN_PIECES = 3


@dataclass(frozen=True)
class Casing:
    """The user's options on how a vocab.txt was made. None leaves one to the settings next to the file."""

    cased: bool | None = None
    strip_accents: bool | None = None

    def arguments(self) -> dict[str, bool]:
        """Return the arguments for transformers' BERT tokenizer."""
        given = {"do_lower_case": None if self.cased is None else not self.cased, "strip_accents": self.strip_accents}
        return {key: value for key, value in given.items() if value is not None}


_NO_OPTIONS = Casing()


def load_given_tokenizer(name: str, casing: Casing = _NO_OPTIONS) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer called `name`, and notes for the user.

    name: OWNER/NAME on the Hub, a folder, or a file. Raises DataError as `read_folder` does.
    """
    fast, notes = _read(name, casing)
    tokenizer = Tokenizer(fast.backend_tokenizer, name, {key: getattr(fast, key) for key in _TOKEN_KEYS})
    path = Path(name)
    there = _pieces(path) if path.exists() else {}
    lacking = [token for token in tokenizer.special_tokens.values() if token in tokenizer.added or
               (there and token not in there)]  # fmt: skip
    if lacking:
        notes.append(
            f"The tokenizer {name} lacked {', '.join(lacking)}; new pieces at the end of its vocabulary serve as them."
        )
    return tokenizer, notes


def _read(name: str, casing: Casing) -> tuple[PreTrainedTokenizerFast, list[str]]:
    path = Path(name)
    if is_hub_model(name):
        return read_folder(fetch_tokenizer(name), name, casing=casing)
    if not path.exists():
        raise DataError(_missing(name))
    if path.is_dir():
        return read_folder(path, name, casing=casing)
    _check_content(path)
    if path.suffix == ".json":
        _check_casing(casing, name)
        with explained(f"the tokenizer {name}"):
            settings = {key: value for key, value in _settings(path.parent).items() if key in _TOKEN_KEYS}
            return PreTrainedTokenizerFast(tokenizer_file=str(path), **_texts(settings)), []
    with tempfile.TemporaryDirectory() as folder:  # without a tokenizer.json that may be next to it
        for settings_file in filter(Path.is_file, map(path.with_name, _SETTINGS_FILES)):
            shutil.copy(settings_file, folder)
        shutil.copy(path, Path(folder) / _VOCABULARY)
        return read_folder(Path(folder), name, casing=casing)


def read_folder(
    folder: Path, name: str, config: PretrainedConfig | None = None, casing: Casing | None = None
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Return the tokenizer in a model's folder as transformers reads it, and notes for the user.

    name: its name in messages. config: the model's configuration, if it has been read. casing: None if the command does
    not have these options. Raises DataError if there is no tokenizer, its files are not what their names say, its class
    needs code of its own or cannot read the files, or it has no fast form.
    """
    found = {file for file in VOCABULARIES if (folder / file).is_file()}
    if not found:
        raise DataError(_missing(name))
    for file in found & {_JSON, _VOCABULARY}:
        _check_content(folder / file, name)
    settings = _settings(folder)
    if _JSON in found or _VOCABULARY not in found:
        _check_casing(casing, name)
        fast = _fast(folder, name, config, settings)
        return fast, _notes_on_json(fast, folder, name) if _JSON in found else []
    chosen = casing or _NO_OPTIONS
    if config is None and not _names_a_class(folder, settings):
        with explained(f"the tokenizer {name}"):
            fast = BertTokenizer.from_pretrained(folder, **chosen.arguments())  # type: ignore[arg-type]
    else:
        fast = _of_class(folder, name, config, settings, chosen)
    _check_wordpiece(fast, folder, name, settings)
    is_known = chosen.cased is not None or "do_lower_case" in settings
    return fast, [] if is_known else [_assumption(fast, folder, name, casing)]


def _of_class(
    folder: Path, name: str, config: PretrainedConfig | None, settings: dict[str, Any], casing: Casing
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the class that the folder names, made from vocab.txt."""
    try:
        return _fast(folder, name, config, settings, **casing.arguments())
    except DataError as error:
        if error.__cause__ is None:
            raise
        kind = settings.get("tokenizer_class") or "tokenizer of its own"
        raise DataError(
            f"The tokenizer of {name} is a {kind}, which transformers cannot make from {_VOCABULARY} alone; code that "
            f"comes with a tokenizer is not run here. Give its {_JSON}."
        ) from error.__cause__


def _fast(
    source: Path | str, name: str, config: PretrainedConfig | None, settings: dict[str, Any] | None = None,
    **arguments: bool,
) -> PreTrainedTokenizerFast:  # fmt: skip
    given: dict[str, Any] = {**arguments, "config": config}
    kind = (settings or {}).get("tokenizer_class") or "of an unknown class"
    with explained(
        f"the tokenizer of {name} ({kind})",
        f"Its files may be damaged, or its class may need code or a package that is not here. Choose a tokenizer with "
        f"{_JSON}.",
    ):
        loaded: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **given)
    if not loaded.is_fast:
        raise DataError(
            f"The tokenizer of {name} is a {type(loaded).__name__}, which has no fast form ({_JSON}) and cannot be "
            f"replaced by a plain WordPiece. Choose a model that has one."
        )
    fast: PreTrainedTokenizerFast = loaded
    return fast


def _missing(name: str) -> str:
    return (
        f"No tokenizer at {name}. Give a folder with {_JSON} or {_VOCABULARY}, such a file, or a name on the Hub with "
        f"its owner, such as openai-community/gpt2."
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the files next to a vocabulary. Raises DataError if they are damaged."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _SETTINGS):
        settings |= _json_object(folder / name)
    return settings


def _json_object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, or an empty one if there is no such file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {file}: {error}. Fetch the tokenizer again.") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} is not a JSON object. Fetch the tokenizer again.")
    return values


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    """Return tokens as strings; transformers' files also write them as objects."""
    found = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _names_a_class(folder: Path, settings: dict[str, Any]) -> bool:
    config = _json_object(folder / "config.json")
    return any(settings.get(key) for key in ("tokenizer_class", "auto_map")) or any(
        config.get(key) for key in ("tokenizer_class", "model_type")
    )


def _check_casing(casing: Casing | None, name: str) -> None:
    if casing is not None and casing.arguments():
        raise DataError(
            f"--cased, --uncased and --strip-accents are only for a {_VOCABULARY}; {name} itself says how it treats "
            f"text. Leave them out."
        )


def _pieces(path: Path) -> dict[str, int]:
    """Return the vocabulary of a folder or file before transformers adds to it; empty if it is in neither
    tokenizer.json nor vocab.txt."""
    file = next((path / name for name in (_JSON, _VOCABULARY) if (path / name).is_file()), path)
    if file.is_dir():
        return {}
    added = _json_object(file.with_name("added_tokens.json"))
    if file.suffix != ".json":
        lines = file.read_text("utf8").split("\n")
        return {piece: number for number, line in enumerate(lines) if (piece := line.rstrip())} | added
    document = _json_object(file)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in document.get("added_tokens") or ()} | added


def _check_wordpiece(fast: PreTrainedTokenizerFast, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Raise DataError unless transformers made a WordPiece from the lines of vocab.txt. A class that reads other files
    only has its own special tokens then."""
    ours, theirs = _pieces(folder), fast.get_vocab()
    model = json.loads(fast.backend_tokenizer.to_str())["model"]
    num_shared = sum(theirs.get(piece) == number for piece, number in ours.items())
    if model["type"] != "WordPiece" or num_shared < len(ours) / 2:
        kind = settings.get("tokenizer_class") or type(fast).__name__
        raise DataError(
            f"The tokenizer of {name} is a {kind}, which does not read {_VOCABULARY} as a WordPiece vocabulary. Give "
            f"its {_JSON}, or a folder with all of its files."
        )
    if model["unk_token"] not in ours:
        raise DataError(f"The tokenizer {name} lacks {model['unk_token']}, which text outside its vocabulary needs.")


def _assumption(fast: PreTrainedTokenizerFast, folder: Path, name: str, casing: Casing | None) -> str:
    """Return a note on the assumptions about a vocabulary without settings, and on pieces that contradict them."""
    keeps = casing is not None and casing.strip_accents is False
    normalizer = normalizers.BertNormalizer(False, False, strip_accents=not keeps, lowercase=True)
    special = {*SPECIAL_TOKENS, *fast.all_special_tokens}
    never = [piece for piece in _pieces(folder) if piece not in special and normalizer.normalize_str(piece) != piece]
    doubt = f" {len(never):,} of its pieces, such as {', '.join(never[:_SHOWN_PIECES])}, can then never occur."
    switch = "" if casing is None else "give --cased or --no-strip-accents (--uncased confirms it), or "
    return (
        f"{name} does not say whether its vocabulary is cased. It is treated as uncased, as in transformers: text is "
        f"lower-cased and its accents are {'kept' if keeps else 'stripped'}.{doubt if never else ''} If that is "
        f"wrong, {switch}write do_lower_case and strip_accents into a {_SETTINGS} next to it."
    )


def _notes_on_json(fast: PreTrainedTokenizerFast, folder: Path, name: str) -> list[str]:
    """Return a note if transformers splits text differently from tokenizer.json: some of its classes only read the
    vocabulary in it."""
    ours, theirs = _json_object(folder / _JSON), json.loads(fast.backend_tokenizer.to_str())
    if ours["model"].get("type") != "WordPiece":
        return []  # other models have several ways to write the same steps
    differing = [step for step in ("normalizer", "pre_tokenizer") if ours.get(step) != theirs[step]]
    if not differing:
        return []
    return [
        f"transformers does not use the {' and '.join(differing)} in the {_JSON} of {name}: for a "
        f"{type(fast).__name__} it makes its own from {_SETTINGS}. The ids are transformers'; to get the file's, "
        f"give {_JSON} itself."
    ]


def _check_content(file: Path, name: str | None = None) -> None:
    """Raise DataError if a tokenizer's file is not what its name says."""
    shown = file if name is None or not Path(name).is_dir() else Path(name) / file.name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {shown}: {error.strerror}.") from error
    if kind := kind_of(content):
        raise DataError(f"{shown} is {kind.what}, not a tokenizer. {kind.advice}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown} is not text. If it is a SentencePiece model, such as spiece.model, save it as {_JSON} with "
            f"transformers and give that."
        ) from error
    wanted = _JSON if file.suffix == ".json" else _VOCABULARY
    found = _content_of(text, wanted)
    if found in (_JSON, _VOCABULARY) and found != wanted:
        raise DataError(f"{shown} is a {found}, not a {_IN_WORDS[wanted]}. Rename it to {found}.")
    if found != wanted:
        raise DataError(f"{shown} {found}. Give the model's {_JSON}.")


def _content_of(text: str, wanted: str) -> str:
    """Return `tokenizer.json` or `vocab.txt`, or what else the content of a tokenizer's file is."""
    try:
        values = json.loads(text)
    except ValueError:
        if wanted == _JSON and not {"[UNK]", "[CLS]"} <= set(text.split()):
            return "is not JSON: it is damaged, cut off, or something else"
        lines = text.splitlines()
        if lines and lines[0].startswith("#version"):
            return "holds the merges of a byte-level BPE, not a vocabulary"
        if lines and all(_SCORED.fullmatch(line) for line in lines):
            return "holds a SentencePiece vocabulary with scores, not one of WordPiece"
        return _VOCABULARY
    if not isinstance(values, dict):
        return f"is some other JSON, not a {_IN_WORDS[wanted]}"
    if isinstance(values.get("model"), dict):
        return _JSON
    if {"tokenizer_class", "do_lower_case", "model_max_length"} & values.keys():
        return f"is a {_SETTINGS}, not a {_IN_WORDS[wanted]}"
    if values and all(isinstance(number, int) for number in values.values()):
        return f"is a vocab.json, pieces with their ids, not a {_IN_WORDS[wanted]}"
    return f"is some other JSON, not a {_IN_WORDS[wanted]}"
