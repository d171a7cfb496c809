"""Load a tokenizer that the user gives: a model on the Hub, a model's folder, a tokenizer.json or a vocab.txt.

Every command reads them here with transformers, so that pretraining, finetuning and later users of the model get the
same ids. Import this module only if a tokenizer is given, because `transformers` takes seconds to import.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models
from transformers import AutoTokenizer, BertTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from electra_ds.core.errors import DataError
from electra_ds.core.files import is_hub_model
from electra_ds.data.hub import explain_errors, fetch_tokenizer
from electra_ds.data.text_files import kind_of
from electra_ds.data.tokenizer import Tokenizer, text_of_token

_JSON, _VOCABULARY, _SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
VOCABULARIES = (_JSON, _VOCABULARY, "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""The vocabulary files of tokenizers. A tokenizer's folder has at least one of them."""
_SETTINGS_FILES = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "config.json")
_TOKEN_KEYS = ("pad_token", "unk_token", "cls_token", "bos_token", "sep_token", "eos_token", "mask_token")
_ADVICE = (
    f"Its files may be damaged, or its class may need other files, a package, or its own code, which is not run "
    f"here. Give its {_JSON}, or a {_VOCABULARY} with one piece per line."
)


@dataclass(frozen=True)
class Casing:
    """The user's options that describe a vocab.txt. None means that the settings next to the file decide."""

    cased: bool | None = None
    strip_accents: bool | None = None

    def arguments(self) -> dict[str, bool]:
        """Return the arguments for transformers' BERT tokenizer."""
        given = {"do_lower_case": None if self.cased is None else not self.cased, "strip_accents": self.strip_accents}
        return {key: value for key, value in given.items() if value is not None}


_NO_OPTIONS = Casing()


def load_given_tokenizer(name: str, casing: Casing = _NO_OPTIONS) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer `name`, and notes for the user.

    name: OWNER/NAME on the Hub, a folder, or a file. Raises DataError as `read_folder` does.
    """
    fast, notes = _read(name, casing)
    tokenizer = from_transformers(fast, name)
    # transformers adds the special tokens that a vocab.txt lacks; a tokenizer.json holds its own as added tokens.
    is_vocabulary = isinstance(fast.backend_tokenizer.model, models.WordPiece) and not _has_json(Path(name))
    own = fast.backend_tokenizer.get_vocab(with_added_tokens=not is_vocabulary)
    lacking = [token for token in tokenizer.special_tokens.values() if token in tokenizer.added or token not in own]
    if lacking:
        notes.append(
            f"The tokenizer {name} lacked {', '.join(lacking)}; new pieces at its vocabulary's end take their place."
        )
    return tokenizer, notes


def from_transformers(fast: PreTrainedTokenizerFast, name: str) -> Tokenizer:
    """Return a tokenizer of transformers as ours, a copy. name: for messages."""
    backend = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
    return Tokenizer(backend, name, {key: getattr(fast, key) for key in _TOKEN_KEYS})


def _has_json(path: Path) -> bool:
    return path.suffix == ".json" or (path / _JSON).is_file()


def _read(name: str, casing: Casing) -> tuple[PreTrainedTokenizerFast, list[str]]:
    path = Path(name)
    if is_hub_model(name):
        return read_folder(fetch_tokenizer(name), name, casing=casing)
    if not path.is_file():
        return read_folder(path, name, casing=casing)
    _check_is_text(path)
    if path.suffix == ".json":
        _check_casing(casing, name)
        settings = {key: text for key, value in _settings(path.parent).items() if (text := text_of_token(value))}
        tokens = {key: text for key, text in settings.items() if key in _TOKEN_KEYS}
        with explain_errors(f"the tokenizer {name}", _ADVICE):
            return PreTrainedTokenizerFast(tokenizer_file=str(path), **tokens), []
    with tempfile.TemporaryDirectory() as folder:  # leaves out any tokenizer.json next to it
        for settings_file in filter(Path.is_file, map(path.with_name, _SETTINGS_FILES)):
            shutil.copy(settings_file, folder)
        shutil.copy(path, Path(folder) / _VOCABULARY)
        return read_folder(Path(folder), name, casing=casing)


def read_folder(
    folder: Path, name: str, config: PretrainedConfig | None = None, casing: Casing | None = None
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Return the tokenizer in a model's folder as transformers reads it, and notes for the user.

    name: its name in messages. config: the model's configuration, if it has been read. casing: None if the command does
    not have these options. Raises DataError if there is no tokenizer, if its files are damaged, if its class needs its
    own code or cannot read the files, or if it has no fast form.
    """
    found = {file for file in VOCABULARIES if (folder / file).is_file()}
    if not found:
        raise DataError(
            f"No tokenizer at {name}. Give a folder with {_JSON} or {_VOCABULARY}, such a file, or a name on the Hub "
            f"with its owner, such as openai-community/gpt2."
        )
    for file in found & {_JSON, _VOCABULARY}:
        _check_is_text(folder / file)
    settings = _settings(folder)
    if _JSON in found or _VOCABULARY not in found:
        _check_casing(casing, name)
        return _from_pretrained(AutoTokenizer, folder, name, settings, config=config), []
    model = _json_object(folder / "config.json")
    has_class = any(settings.get(key) for key in ("tokenizer_class", "auto_map")) or any(
        model.get(key) for key in ("tokenizer_class", "model_type")
    )
    kind = AutoTokenizer if has_class or config is not None else BertTokenizer
    arguments = (casing or _NO_OPTIONS).arguments()
    fast = _from_pretrained(kind, folder, name, settings, config=config, **arguments)
    _check_wordpiece(fast, folder, name)
    is_known = "do_lower_case" in settings or "do_lower_case" in arguments
    return fast, [] if is_known else [_assumption(name, casing)]


def _from_pretrained(
    kind: Any, folder: Path, name: str, settings: dict[str, Any], **arguments: Any
) -> PreTrainedTokenizerFast:
    with explain_errors(
        f"the tokenizer of {name} ({settings.get('tokenizer_class') or 'of an unknown class'})", _ADVICE
    ):
        fast: PreTrainedTokenizerFast = kind.from_pretrained(folder, trust_remote_code=False, **arguments)
    if not fast.is_fast:
        raise DataError(f"The tokenizer of {name} is a {type(fast).__name__}, which has no fast form. {_ADVICE}")
    return fast


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the files next to a vocabulary. Raises DataError if one of them is damaged."""
    return _json_object(folder / "special_tokens_map.json") | _json_object(folder / _SETTINGS)


def _json_object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, or an empty one if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {file}: {error}. Download the tokenizer again.") from error
    return values


def _check_casing(casing: Casing | None, name: str) -> None:
    if casing is not None and casing.arguments():
        raise DataError(
            f"--cased, --uncased and --strip-accents apply only to a {_VOCABULARY}; {name} already defines how it "
            f"treats text. Leave them out."
        )


def _check_is_text(file: Path) -> None:
    try:
        content = file.read_bytes()
        if kind := kind_of(content):
            raise DataError(f"{file} is {kind.what}, not a tokenizer. {kind.advice}")
        content.decode("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read {file} as text: {error}. If it is a SentencePiece model, such as spiece.model, save it as "
            f"{_JSON} with transformers and give that."
        ) from error


def _check_wordpiece(fast: PreTrainedTokenizerFast, folder: Path, name: str) -> None:
    """Raise DataError unless transformers made a WordPiece from the lines of vocab.txt.

    A class that reads other files ends up with nothing but its own special tokens.
    """
    lines = (folder / _VOCABULARY).read_text("utf8").splitlines()
    model = fast.backend_tokenizer.model
    pieces = fast.backend_tokenizer.get_vocab(with_added_tokens=False)
    if not isinstance(model, models.WordPiece) or sum(line.rstrip() in pieces for line in lines) < len(lines) / 2:
        raise DataError(
            f"The tokenizer of {name} is a {type(fast).__name__}, which does not read {_VOCABULARY} as a WordPiece "
            f"vocabulary. {_ADVICE}"
        )
    if model.unk_token not in pieces:
        raise DataError(f"The tokenizer {name} lacks {model.unk_token}, which text outside its vocabulary needs.")


def _assumption(name: str, casing: Casing | None) -> str:
    """Return a note on what is assumed about a vocabulary without settings."""
    accents = "kept" if casing is not None and casing.strip_accents is False else "stripped"
    switch = "" if casing is None else "give --cased or --no-strip-accents (--uncased confirms it), or "
    return (
        f"{name} does not say whether its vocabulary is cased. It is treated as uncased, as in transformers: text is "
        f"lower-cased and its accents are {accents}. If that is wrong, {switch}write do_lower_case and strip_accents "
        f"into a {_SETTINGS} next to it."
    )
