"""Datasets and models of the Hugging Face Hub, or in local folders with the same layout.

The library `datasets` takes seconds to import, so it is imported only when a dataset is opened, or after an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from huggingface_hub.utils import logging as hub_logging

from electra_ds.core.errors import DataError
from electra_ds.data.corpus import Source, file_listing, hash_of
from electra_ds.data.text_files import Progress, check_column, lines_of

HUB = "hub:"
_SPELLING = re.compile(r"(?P<name>[^#@]+)(#(?P<config>[^@]+))?(@(?P<split>.+))?")
_BATCH_ROWS = 1000
_TOKENIZER_FILES = [
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
]  # fmt: skip
_MODEL_FILES = ["model*.safetensors", "model.safetensors.index.json", *_TOKENIZER_FILES]
_PICKLED_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_NOT_REACHED = (ConnectionError, TimeoutError, HfHubHTTPError, LocalEntryNotFoundError)


class HubName(NamedTuple):
    """The parts of `hub:NAME#CONFIG@SPLIT`."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{HUB}{self.name}{f'#{self.config}' if self.config else ''}@{self.split}"


def parse_hub_name(text: str) -> HubName:
    """Parse `hub:NAME#CONFIG@SPLIT`, where `#CONFIG` and `@SPLIT` are optional. Raises DataError."""
    match = _SPELLING.fullmatch(text.removeprefix(HUB))
    if match is None:
        raise DataError(f"'{text}' is not hub:NAME#CONFIG@SPLIT, such as hub:wikimedia/wikipedia#20231101.en@train.")
    return HubName(match["name"], match["config"], match["split"] or "train")


def dataset_path(name: str, revision: str | None) -> str:
    """Return the path to give to `datasets`: the absolute path of a local folder, or the name on the Hub.

    Raises DataError if the folder does not exist, or if a local folder is given with a revision.
    """
    is_local = Path(name).is_dir()
    if not is_local and name.startswith((".", "/", "~")):
        raise DataError(f"The dataset folder {name} does not exist.")
    if is_local and revision:
        raise DataError(f"{name} is a local folder and has no revisions. Leave --revision out.")
    return str(Path(name).resolve()) if is_local else name


class HubSource(Source):
    """One split of a dataset. Each row is a document; rows without text are left out."""

    description = ""

    def __init__(self, text: str, text_key: str = "text", *, streaming: bool = False, revision: str | None = None):
        """Find the dataset without downloading its data. Raises DataError if it does not exist as specified."""
        import datasets

        self._parts = parse_hub_name(text)
        self.description = f"{self._parts}{f', revision {revision}' if revision else ''}"
        self._text_key = text_key
        self._streaming = streaming
        self._rows: Any = None
        name, config, split = self._parts
        path = dataset_path(name, revision)
        with explain_errors(self.description):
            try:
                self._builder = datasets.load_dataset_builder(path, config, revision=revision)
            except ValueError as error:
                configs = datasets.get_dataset_config_names(path, revision=revision)
                if config in configs or configs == ["default"]:
                    raise
                raise DataError(
                    f"{name} has the configurations {', '.join(configs)}. Give one as {HUB}{name}#{configs[0]}."
                ) from error
            datasets.ReadInstruction.from_spec(split)  # finds a mistake in a slice before the download
        splits = sorted(map(str, self._builder.config.data_files or self._builder.info.splits or ()))
        if splits and not {part.partition("[")[0] for part in split.split("+")} <= set(splits):
            raise DataError(f"{self.description} has no split '{split}'; its splits are {', '.join(splits)}.")

    @property
    def num_bytes(self) -> int | None:
        """The size of the text once it is downloaded, or for a streamed dataset the size on its card."""
        if self._streaming:
            return getattr(self._split_info(), "num_bytes", None)
        return None if self._rows is None else self._rows.data.nbytes

    def signature(self) -> str:
        """Return a hash of the name, split and commit, or for a folder of its files' names, sizes and times."""
        files = self._builder.config.data_files or {}
        listing = [
            (str(split), name, (stat.st_size, stat.st_mtime_ns) if (stat := _stat(name)) else None)
            for split, names in files.items()
            for name in map(str, names)
        ]
        return hash_of((*self._parts, self._text_key, self._builder.config_id, str(self._builder.hash), listing))

    def prepare(self) -> None:
        """Download the dataset, unless it is streamed or already downloaded.

        `datasets` shows its own progress bars only here, so that they do not disturb ours.
        """
        if self._rows is not None:
            return
        with explain_errors(self.description):
            if self._streaming:
                self._rows = self._builder.as_streaming_dataset(split=self._parts.split)
            else:
                self._builder.download_and_prepare()
                self._rows = self._text_column(self._builder.as_dataset(split=self._parts.split))
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        disable_progress_bars()
        hub_logging.set_verbosity_error()

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        """Yield every document. Raises DataError if the network fails, or the text column is missing or not text."""
        self.prepare()
        total_bytes, total_rows = self.num_bytes or 0, self._num_rows()
        read = 0
        tables = iter(self._rows.with_format("arrow").iter(_BATCH_ROWS))
        while True:
            with explain_errors(self.description):
                table = next(tables, None)
            if table is None:
                return
            check_column(self.description, table.schema, self._text_key)
            yield from (lines_of(text) for text in table[self._text_key].to_pylist() if text is not None)
            if total_rows:
                done = min(read + len(table), total_rows)
                progress(total_bytes * done // total_rows - total_bytes * min(read, total_rows) // total_rows)
            read += len(table)

    def _text_column(self, rows: Any) -> Any:
        check_column(self.description, rows.features.arrow_schema, self._text_key)
        return rows.select_columns([self._text_key])

    def _num_rows(self) -> int | None:
        return getattr(self._split_info(), "num_examples", None) if self._streaming else len(self._rows)

    def _split_info(self) -> Any:
        """Return what the dataset's card says about the split; None if it does not list the split."""
        return (self._builder.info.splits or {}).get(self._parts.split)


class SavedSource(HubSource):
    """A dataset in a folder that `save_to_disk` wrote. If it has several splits, the split `train`."""

    def __init__(self, folder: Path, text_key: str = "text") -> None:
        """Open the dataset. Raises DataError if it is damaged, or if it has several splits but no `train`."""
        import datasets

        self.description = str(folder)
        self._text_key = text_key
        self._streaming = False
        with explain_errors(self.description, "Save the dataset again."):
            saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if "train" not in saved and len(saved) != 1:
                raise DataError(
                    f"{folder} holds the splits {', '.join(saved)}. Give the folder of one split: --corpus "
                    f"{folder}/SPLIT"
                )
            split = "train" if "train" in saved else next(iter(saved))
            saved, self.description = saved[split], str(folder / split)
        self._rows = self._text_column(saved)

    def signature(self) -> str:
        files = (Path(entry["filename"]).resolve() for entry in self._rows.cache_files)
        return hash_of((self._text_key, file_listing(files)))


def fetch_tokenizer(name: str) -> Path:
    """Download the tokenizer of a model on the Hub and return its folder in the cache.

    Raises DataError if the download fails.
    """
    with explain_errors(f"the tokenizer {name}, which is not a local path and so must be a name on the Hub"):
        return Path(snapshot_download(name, allow_patterns=_TOKENIZER_FILES))


def fetch_model(name: str) -> Path:
    """Download a model from the Hub, without the files for other frameworks, and return its folder in the cache.

    Pickled weights are downloaded only if there are no safetensors. Raises DataError if the download fails.
    """
    with explain_errors(f"the model {name}, which is not a local path and so must be a name on the Hub"):
        folder = Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_PICKLED_WEIGHTS))
    return folder


def _stat(name: str) -> Any:
    path = Path(name)
    return path.stat() if path.is_file() else None


@contextmanager
def explain_errors(what: str, otherwise: str = "") -> Iterator[None]:
    """Turn errors of `datasets` and `transformers` into a DataError that says what to do.

    otherwise: the advice to give if neither the name nor the connection is at fault.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # from the libraries, the Hub, the network or pyarrow, or a ValueError
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        if any(isinstance(link, DatasetNotFoundError | RepositoryNotFoundError) for link in chain):
            advice = "Check the name; if it is private or gated, ask for access on its page and run: hf auth login."
        elif any(isinstance(link, _NOT_REACHED) for link in chain):
            advice = "Check the connection, or the Hub's status; then run the same command again."
        else:
            advice = otherwise
        message = (str(error).strip() or type(error).__name__).rstrip(".")
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:  # only its cause has details
            message = f"{message}: {error.__cause__}".strip().rstrip(".")
        raise DataError(f"Cannot read {what}: {message}. {advice}".rstrip()) from error
