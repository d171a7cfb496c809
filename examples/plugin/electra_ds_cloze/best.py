"""A callback that keeps a run's best evaluation."""

from __future__ import annotations

import json

from electra_ds import Callback


class BestEvaluation(Callback):
    """Writes the evaluation with the lowest loss, or in finetuning the highest score, to RUN/best.json."""

    def on_evaluate(self, progress, metrics):
        path = progress.run / "best.json"
        losses = [name for name in metrics if name.endswith("_loss")]
        name, sign = (losses[0], -1) if losses else (next(iter(metrics)), 1)
        if not path.exists() or sign * metrics[name] > sign * json.loads(path.read_text())[name]:
            path.write_text(json.dumps({"step": progress.step, **metrics}, indent=2) + "\n")
