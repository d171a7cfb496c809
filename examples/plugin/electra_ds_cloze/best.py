"""A callback that keeps a run's best evaluation."""

from __future__ import annotations

import json

from electra_ds import Callback


class BestEvaluation(Callback):
    """Writes the evaluation with the lowest first loss to RUN/best.json."""

    def on_evaluate(self, progress, metrics):
        path = progress.run / "best.json"
        name = next(name for name in metrics if name.endswith("_loss"))
        if path.exists() and json.loads(path.read_text())[name] <= metrics[name]:
            return
        path.write_text(json.dumps({"step": progress.step, **metrics}, indent=2) + "\n")
