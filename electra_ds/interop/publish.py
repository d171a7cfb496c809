"""Upload an export to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from electra_ds.core.errors import ConfigError, DataError


class Repository(NamedTuple):
    """A repository on the Hub, and the folder with its content."""

    name: str
    folder: Path

    @property
    def size(self) -> str:
        """The number of its files, and their size."""
        files = [path.stat().st_size for path in self.folder.iterdir()]
        return f"{len(files)} files, {sum(files) / 1e6:,.1f} MB"


def repositories(out: Path, name: str) -> Iterator[Repository]:
    """Yield the repositories for an export: one for a finetuned model, or one for each network of a pretraining, such
    as NAME-discriminator and NAME-generator."""
    if (out / "config.json").is_file():
        yield Repository(name, out)
        return
    for folder in sorted(path for path in out.iterdir() if (path / "config.json").is_file()):
        yield Repository(f"{name}-{folder.name}", folder)


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a repository cannot have."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub takes NAME or OWNER/NAME, not '{name}': {error}") from error


def upload(repository: Repository, *, private: bool) -> str:
    """Create a repository if it does not exist, upload the folder, and return its address.

    Raises DataError if nobody is logged in, or if the Hub cannot be reached or refuses it; the folder remains.
    """
    api, folder = HfApi(library_name="electra_ds"), repository.folder
    try:
        address = api.create_repo(repository.name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload the model with electra_ds"
        )
    except LocalTokenNotFoundError as error:
        raise DataError(f"Nobody is logged in to the Hub: run hf auth login. The model is in {folder}.") from error
    except Exception as error:  # of the Hub, the network, or the library
        problem = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise DataError(
            f"Cannot upload {folder} to {repository.name}: {problem}. Check the name, your rights (hf auth whoami) and "
            f"the connection, and upload it with: hf upload {repository.name} {folder}"
        ) from error
    return str(address)
