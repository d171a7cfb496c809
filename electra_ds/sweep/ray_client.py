"""A sweep started from outside its cluster, `--address ray://HOST:10001`: the same command, run on a node of it."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from electra_ds.core.errors import ConfigError, TrainingError
from electra_ds.sweep import process
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.stopping import stoppable

_LOOK_EVERY_S = 1.0


@ray.remote(num_cpus=0)
class _Driver:
    """On a node of the cluster."""

    def start(self, arguments: list[str]) -> None:
        address = ray.get_runtime_context().gcs_address
        self._log = Path(tempfile.mkstemp(prefix="electra-ds-sweep-")[1])
        self._process = process.start("sweep", [*arguments, "--address", address], self._log, {}, Path.cwd())
        self._read = 0

    def look(self) -> tuple[str, int | None]:
        """(what it has said since, its exit status once it has ended)."""
        status = self._process.poll()
        with self._log.open("rb") as file:
            file.seek(self._read)
            said = file.read()
        self._read += len(said)
        return said.decode("utf8", "replace"), status

    def forget(self) -> None:
        process.end([self._process])
        self._log.unlink(missing_ok=True)


def run_from_outside(address: str, folder: SweepFolder, arguments: Sequence[str], say: Callable[[str], object]) -> int:
    """`electra-ds sweep ARGUMENTS` on a node, its output as it comes; returns its exit status. What stops a sweep is in
    its folder, which the nodes share. Raises ConfigError if the cluster cannot be reached, TrainingError if it is
    lost, InterruptedBySignalError at the end where a signal came."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is told below
    try:
        ray.init(address, log_to_driver=False)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"No Ray cluster can be reached at {address}: {str(error).strip()}") from error
    try:
        with stoppable(folder, None):  # after Ray, which has handlers of its own
            driver = _Driver.remote()  # type: ignore[attr-defined]
            ray.get(driver.start.remote(list(arguments)))
            status: int | None = None
            while status is None:
                said, status = ray.get(driver.look.remote())
                if said:
                    say(said)
                time.sleep(_LOOK_EVERY_S)
            ray.get(driver.forget.remote())
        return status
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise TrainingError(f"The cluster at {address} was lost: {str(error).strip().splitlines()[0]}") from error
    finally:
        ray.shutdown()
