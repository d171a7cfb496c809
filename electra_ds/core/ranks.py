"""The process group of a job's ranks, and the collective operations that the ranks use to agree."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from electra_ds.core import devices
from electra_ds.core.errors import ConfigError, ElectraError, FailedElsewhereError, LostRankError
from electra_ds.core.launcher import Launch, LauncherWatch, detect

# gloo notices immediately when a rank dies, because its connections close. This only limits the wait for a busy rank,
# such as rank 0 while it tokenises a corpus.
_PATIENCE = timedelta(days=7)
_MEETING_TIMEOUT = timedelta(minutes=10)


class Ranks:
    """All ranks of the job. Every rank must call each method, in the same order."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.is_main = launch.is_main
        self.launcher_watch = LauncherWatch(launch)
        # On the CPU, so that these operations never wait for a GPU.
        self._control = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None
        self._background = distributed.new_group(backend="gloo", timeout=_PATIENCE) if self.world_size > 1 else None

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Make the code inside succeed on every rank or fail on every rank.

        Raises the ElectraError that was raised on this rank, or FailedElsewhereError if another rank raised one.
        """
        error = None
        try:
            yield
        except ElectraError as caught:
            error = caught
        failed = [rank for rank, wrong in enumerate(self.gather(error is not None)) if wrong]
        if not failed:
            return
        if failed[0] == self.rank and error is not None:
            error.rank = self.rank
            raise error
        raise FailedElsewhereError(f"Rank {failed[0]} failed.")

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks, on every rank."""
        return self._gather(value, self._control)

    def gather_in_background(self, value: Any) -> list[Any]:
        """Do the same as `gather` from a background thread; only one such thread may run at a time on each rank."""
        return self._gather(value, self._background)

    def _gather(self, value: Any, group: distributed.ProcessGroup | None) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor on this rank's device over all ranks, in place, and return it."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def start_maximum(self, value: int) -> Any:
        """Start computing the largest value over several ranks; `finish_maximum` waits for it."""
        tensor = torch.tensor([value])
        return tensor, distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._control, async_op=True)

    @staticmethod
    def finish_maximum(started: Any) -> int:
        """Wait for what `start_maximum` started, and return the largest value."""
        tensor, work = started
        work.wait()
        return int(tensor.item())


_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables by which torch and DeepSpeed find the other ranks."""


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other ranks' process group while the context lasts; an existing process group is used and kept.

    A process without a launcher forms its own group, which needs no port. Raises ConfigError if the ranks cannot
    connect to each other, and LostRankError if one of them died.
    """
    launch = detect(os.environ)
    with warnings.catch_warnings(), kept_environment():
        # DeepSpeed and torch warn about their own deprecated calls, which do not concern the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
        alone, hook = launch.world_size == 1, sys.excepthook
        started = meet(launch)
        if alone:
            sys.excepthook = hook  # torch's puts the rank before every line of an error, once more in each run
        completed = False
        try:
            yield Ranks(launch)
            completed = True
        except ElectraError as error:
            if not alone and error.rank is None:
                error.rank = launch.rank  # the other ranks may not have hit it
            raise
        except RuntimeError as error:
            if alone or not is_lost_connection(error):
                raise
            lost = LostRankError(
                f"lost contact with another rank. Its own error is shown above; if none is shown, it was killed, "
                f"perhaps because memory ran out. ({str(error).splitlines()[0]})"
            )
            lost.rank = launch.rank
            raise lost from error
        finally:
            if started and (alone or completed):  # after an error the other ranks may never get here
                _part()


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restore the variables of launchers at the end; other libraries would take ours for those of a launcher."""
    given = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in given.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _part() -> None:
    """Destroy the process group through DeepSpeed if it is loaded, which would otherwise keep using the old group."""
    theirs = sys.modules.get("deepspeed.comm")
    (theirs if theirs is not None and theirs.is_initialized() else distributed).destroy_process_group()


def meet(launch: Launch) -> bool:
    """Create the process group of all ranks, and return True; return False if there is one.

    It sets the environment's variables for DeepSpeed and torch (`kept_environment`). Raises ConfigError if the ranks
    cannot connect to each other.
    """
    os.environ["LOCAL_RANK"] = str(devices.device_index(launch))  # DeepSpeed chooses the GPU by it
    if distributed.is_initialized():
        return False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.world_size == 1:
        store = distributed.HashStore()  # type: ignore[attr-defined]  # needs no port
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return True
    os.environ |= {  # torch and DeepSpeed read these, and srun does not set them
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.address,
        "MASTER_PORT": str(launch.port),
    }
    try:
        distributed.init_process_group(backend, init_method="env://", timeout=_MEETING_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Rank {launch.rank} cannot connect to the other {launch.world_size - 1} at {launch.address}:{launch.port} "
            f"({str(error).splitlines()[0]}). Check that the host is reachable, the port is free and all ranks started."
        ) from error
    return True


def is_lost_connection(error: BaseException) -> bool:
    """Return whether torch.distributed raised the error because another rank died."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))
