"""`bin/finetune` that kills itself: python -m tests.finetune_worker STEP ARGUMENT …

SIGKILL comes when step STEP is about to begin, wherever the saving of checkpoints is by then; with `end` in place of a
step, when the run is about to write its scores.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from electra_ds.cli import main
from electra_ds.finetuning.finetune import FinetuneLoop
from electra_ds.training.engine import Engine

_train_step = Engine.train_step


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _faulty(self: Engine, batch: Any, step: int, samples: Any = None) -> Any:
    if str(step) == sys.argv[1]:
        _kill()
    return _train_step(self, batch, step, samples)


if __name__ == "__main__":
    Engine.train_step = _faulty  # type: ignore[method-assign]
    if sys.argv[1] == "end":
        FinetuneLoop._write = _kill  # type: ignore[method-assign]
    main(["finetune", *sys.argv[2:]])
