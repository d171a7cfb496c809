"""When trials begin, and how a scheduler and the wish to stop reach them: each saves, and says why it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.trials import Trial


class InOrder(Searcher):
    """Suggests listed trials in their order, a finetuning of a pretraining among them as soon as that has ended."""

    def __init__(self, trials: Sequence[Trial], folder: SweepFolder, refuse: Callable[[Trial], None]) -> None:
        """refuse: is told of each that cannot be begun, since its encoder is not there."""
        super().__init__()
        self._waiting, self._folder, self._refuse = list(trials), folder, refuse
        self._running: dict[str, str] = {}
        """Keys by Tune's names."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes it down, and it is of this process."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """What is done is in the folder."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        if self._folder.wants_to_stop():
            return str(Searcher.FINISHED)
        unended = {*self._running.values(), *(trial.key for trial in self._waiting)}
        for trial in list(self._waiting):
            if trial.pretraining is not None and trial.pretraining.key in unended:
                continue
            self._waiting.remove(trial)
            if self._folder.can_begin(trial):
                self._running[trial_id] = trial.key
                return {"key": trial.key}
            self._refuse(trial)
        return None if self._waiting else str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.pop(trial_id, None)


class OrderlyScheduler(FIFOScheduler):
    """Another scheduler's decisions, but that Tune never ends a trial: where it would, the folder says so, the trial
    saves, closes its trackers and writes its status, and is then complete. Trials of a first stage do not report the
    metric that it goes by."""

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
        if trial.trial_id in self._ended or not self._is_comparable(result):
            return str(TrialScheduler.CONTINUE)
        decision = self._inner.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._ended.add(trial.trial_id)
            self._folder.end_early(self._key_of(trial))
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._is_comparable(result):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self._inner.choose_trial_to_run(tune_controller)

    def _is_comparable(self, result: dict[str, Any]) -> bool:
        """A trial that fails before its first evaluation ends with none, which schedulers do not expect."""
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
