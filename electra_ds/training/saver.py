"""Saving checkpoints in the background: training waits only for the copy to memory, not for the disk."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from electra_ds.core.ranks import Ranks
from electra_ds.training.checkpoint import CheckpointFolder, FileEntry, PendingCheckpoint, share_of
from electra_ds.training.optimizer import MasterAdamW
from electra_ds.training.zero import ZeroAdamW


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time. All ranks must call each method together."""

    def __init__(
        self, folder: CheckpointFolder, ranks: Ranks, on_checkpoint: Callable[[Path], None] | None = None
    ) -> None:
        """on_checkpoint: called by `announce` on the main rank."""
        self._folder = folder
        self._ranks = ranks
        self._on_checkpoint = on_checkpoint
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._published: Path | None = None
        """The last checkpoint, until it is announced; only the main rank publishes."""

    def save(self, optimizer: MasterAdamW | ZeroAdamW, state: dict[str, Any], record: Mapping[str, str]) -> None:
        """Copy the optimizer's state and start writing it, each rank its share; `finish` waits for the end.

        state: for state.json, in addition to the optimizer's counters. Raises CheckpointError if the previous save
        failed.
        """
        self.finish()  # before the copy: two copies may not fit
        is_there, token = self._ranks.broadcast((self._folder.path(state["step"]).exists(), secrets.token_hex(4)))
        if is_there:
            return  # this step is already published; damaged checkpoints are set aside before training continues
        tensors = optimizer.snapshot(share_of(optimizer.shapes(), self._ranks.rank, self._ranks.world_size))
        state = state | {"optimizer": optimizer.counters()}
        pending = PendingCheckpoint(self._folder, state["step"], token)
        self._thread = threading.Thread(
            target=self._write, args=(pending, tensors, state, record), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(
        self,
        pending: PendingCheckpoint,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        record: Mapping[str, str],
    ) -> None:
        """Write this rank's share; on the main rank, publish the checkpoint if every rank has written its share."""
        own: dict[str, FileEntry] | None = None
        shards: list[dict[str, FileEntry] | None] = []
        try:
            try:
                own = pending.write_shard(tensors, self._ranks.rank, self._ranks.world_size)
            finally:
                shards = self._ranks.gather_in_background(own)
            if self._ranks.is_main and None not in shards:
                pending.publish(
                    {name: entry for shard in shards for name, entry in (shard or {}).items()}, state, record
                )
                self._published = pending.final
        except Exception as error:  # raised the next time that the training thread checks
            self._error = error
        # On every rank, since ranks may have separate disks. A rank that lost the others leaves the files to them.
        if shards and (self._error is not None or None in shards):
            pending.discard()

    @property
    def has_failed(self) -> bool:
        """True if this rank knows that the last save failed; `finish` raises the reason."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until the pending checkpoint is published. Raises CheckpointError on the rank that could not write its
        share, and FailedElsewhereError on the others."""
        self.close()
        with self._ranks.fail_together():
            error, self._error = self._error, None
            if error is not None:
                raise error
            self.announce()

    def announce(self) -> None:
        """Call `on_checkpoint` with the last checkpoint once it is published. Any rank may call it alone."""
        path, self._published = self._published, None
        if path is not None and self._on_checkpoint is not None:
            self._on_checkpoint(path)

    def saved(self) -> list[Path]:
        """Return all checkpoints, after waiting for the one that is being written."""
        self.close()
        return self._folder.paths()

    def close(self) -> None:
        """Wait for the pending save, and leave reporting its result to `finish`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
