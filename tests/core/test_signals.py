"""What the signals that stop a sweep do to whoever runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from electra_ds.core.launcher import SECOND_SIGNAL_AFTER_S
from tests.helpers import REPOSITORY

CODE = """
import os, signal, sys, time
from pathlib import Path
from electra_ds.core.errors import InterruptedBySignalError
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.processes import stoppable

folder = SweepFolder(Path(sys.argv[1]))
try:
    with stoppable(folder, None):
        for pause in sys.argv[2:]:
            time.sleep(float(pause))
            os.kill(os.getpid(), signal.SIGTERM)
        print("is to stop:", folder.wants_to_stop())
except InterruptedBySignalError as error:
    print(error.signum, folder.wants_to_stop())
"""


@pytest.mark.parametrize(
    ("pauses", "status"),
    [([0.0], 0), ([0.0, 1.0], 0), ([0.0, SECOND_SIGNAL_AFTER_S + 0.1], 128 + signal.SIGTERM)],
    ids=["one", "two of one wish", "two"],
)
def test_a_second_signal_leaves_at_once_but_not_within_five_seconds(
    tmp_path: Path, pauses: list[float], status: int
) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path), *map(str, pauses)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == status, found.stderr
    assert found.stderr.count("SIGTERM: running trials save and stop. A second signal stops at once.") == 1
    if status:
        assert "SIGTERM again: leaving at once." in found.stderr
        assert not found.stdout
    else:
        assert found.stdout == f"is to stop: True\n{signal.SIGTERM:d} False\n"


def test_signals_stop_a_sweep_that_nobody_hears(tmp_path: Path) -> None:
    """Its terminal, or the `tee` behind it, has ended with the first Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    for pauses, status in (("0",), 0), (("0", str(SECOND_SIGNAL_AFTER_S + 0.1)), 128 + signal.SIGTERM):
        command = [sys.executable, "-c", CODE, str(tmp_path), *pauses]
        found = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=writer, text=True, check=False)
        assert found.returncode == status
        assert ("is to stop: True" in found.stdout) == (status == 0)
    os.close(writer)
