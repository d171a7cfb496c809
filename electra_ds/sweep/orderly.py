"""How a scheduler's decisions and the wish to stop reach the trials: each saves, and says why it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from electra_ds.sweep.folder import SweepFolder


class OrderlyScheduler(FIFOScheduler):
    """Another scheduler's decisions, but that Tune never ends a trial: where it would, the folder says so, the trial
    saves, closes its trackers and writes its verdict, and is then complete."""

    def __init__(self, inner: TrialScheduler, folder: SweepFolder, key_of: Callable[[Any], str]) -> None:
        super().__init__()
        self._inner, self._folder, self._key_of = inner, folder, key_of
        self._ended: set[str] = set()

    @property
    def metric(self) -> Any:
        return self._inner.metric

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_remove(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id in self._ended or not self._is_evaluation(result):
            return str(TrialScheduler.CONTINUE)
        decision = self._inner.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._ended.add(trial.trial_id)
            self._folder.end_early(self._key_of(trial))
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._is_evaluation(result):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self._inner.choose_trial_to_run(tune_controller)

    def _is_evaluation(self, result: dict[str, Any]) -> bool:
        """A trial that fails before its first one ends with none, which schedulers do not expect."""
        return self._inner.metric is None or ("step" in result and self._inner.metric in result)


class NothingRuns(tune.Stopper):
    """Ends the experiment once the sweep is to stop and the last trial has saved."""

    def __init__(self, folder: SweepFolder, running: Callable[[], int]) -> None:
        self._folder, self._running = folder, running

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes it down, and it is of this process."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._folder.wants_to_stop() and self._running() == 0
