"""Find the token store that a run's record names, and check that it is still the same one."""

from __future__ import annotations

from pathlib import Path

from electra_ds.config.run_directory import read_where_it_is
from electra_ds.config.run_record import RunRecord
from electra_ds.core.errors import DataError
from electra_ds.data.token_store import TokenStore


def recorded_store(record: RunRecord, folder: Path, given: Path | None, remedy: str) -> TokenStore:
    """Return the token store that a record names.

    folder: the folder with the record; given: where the user says that the store is now; remedy: the option that says
    so. Raises DataError if there is no store any more, or if it is another one.
    """

    def read(place: Path) -> TokenStore:
        store = TokenStore(place)
        if store.info.fingerprint != record.store_fingerprint:
            raise DataError(
                f"The token store {place} is not the one that {folder} was started on "
                f"({store.info.fingerprint}, not {record.store_fingerprint}). Put the original back, or {remedy}."
            )
        return store

    if given is not None:
        return read(given)
    missing = (
        f"The token store of {folder} is neither at {record.store} nor at the same place relative to the run. "
        f"If it has moved, {remedy}."
    )
    return read_where_it_is(record.store, folder, read, missing)
