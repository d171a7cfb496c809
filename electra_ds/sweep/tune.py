"""Run a sweep's trials with Ray Tune, as many at once as fit, on this machine or on a cluster."""

# ruff: noqa: E402  # Ray reads the variables below when it is imported

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "30",
    "TUNE_MAX_PENDING_TRIALS_PG": "200",
}
"""Variables that Ray reads when it is imported or started. Those that the user has set are kept."""
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import pyarrow  # type: ignore[import-untyped]
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from electra_ds.core.errors import CheckpointError, ConfigError, TrainingError
from electra_ds.core.program import command
from electra_ds.sweep import processes, tune_trial
from electra_ds.sweep.folder import SweepFolder, as_result, evaluations_of
from electra_ds.sweep.progress import SweepMonitor
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import Trial

_log = logging.getLogger(__name__)
_IDLE_S = 60.0
"""The time after which a line reports that no trial is running."""
_OBJECT_STORE_BYTES = 128 * 2**20  # almost nothing goes through it


class RayRunner:
    """Runs the trials of a sweep on a cluster, see `ray_runner`."""

    def __init__(self, folder: SweepFolder, spec: SweepSpec, monitor: SweepMonitor) -> None:
        self._folder, self._spec, self._monitor = folder, spec, monitor

    def run(self, trials: Sequence[Trial]) -> None:
        """Run the trials in order, until the folder's `stop` file appears; running trials then save and stop.

        Pretrainings come first. Finetunings of finished pretrainings take the slots that are free.
        """
        if not trials:
            return
        order = FixedOrderSearcher(
            trials, self._folder, lambda trial: self._monitor.end(trial, *self._folder.state_of(trial))
        )
        known = {trial.key: trial for trial in trials}
        config = tune.TuneConfig(search_alg=order, num_samples=len(trials))
        self._fit(lambda config: known[config["key"]], {}, config)

    def suggest(self, before: Sequence[Trial], resolve: tune_trial.Resolve) -> None:
        """Run Optuna's suggestions, until there are as many trials as the search has samples.

        before: earlier suggestions, whatever their outcome, from which Optuna learns.
        """
        left = self._spec.search.samples - len(before)
        if left <= 0 or self._folder.wants_to_stop():
            return
        (stage,) = self._spec.stages.values()
        space = {
            key: tune.choice(domain.values) if domain.kind == "choice" else getattr(tune, domain.kind)(*domain.values)
            for key, domain in stage.space.items()
        }
        searcher = _optuna(self._spec, self._learned(before, space))
        config = tune.TuneConfig(search_alg=searcher, num_samples=left, max_concurrent_trials=self._monitor.at_once)
        self._fit(resolve, space, config)

    def _learned(self, before: Sequence[Trial], space: Mapping[str, Any]) -> list[tuple[dict[str, Any], float]]:
        """Return (values, final metric) of each trial that has a final metric."""
        assert self._spec.metric is not None  # the spec's checks ensure this
        found = []
        for trial in before:
            files = self._folder.trial(trial.key)
            evaluations = evaluations_of(files.run.metrics)
            reward = as_result(trial.stage, evaluations[-1]).get(self._spec.metric.name) if evaluations else None
            is_of_space = all(_is_in(trial.values, key, space[key]) for key in space)  # the space may have changed
            if reward is not None and is_of_space and files.has_succeeded:
                found.append(({key: trial.values[key] for key in space}, reward))
        return found

    def _fit(self, resolve: tune_trial.Resolve, space: Mapping[str, Any], config: tune.TuneConfig) -> None:
        records = self._folder.path / "tune"
        naming: Callable[[Any], str] = lambda trial: str(trial.config.get("key", trial.trial_id))  # noqa: E731
        config.trial_name_creator = config.trial_dirname_creator = naming
        folder = self._folder  # Tune can pickle it with the scheduler, but not the monitor
        config.scheduler = _scheduler(self._spec, lambda trial: folder.trial(resolve(trial.config).key).end_early())
        watch = _Watch(resolve, self._folder, self._monitor)
        tuner = tune.Tuner(
            tune_trial.trial_class(resolve, self._folder, self._spec, raises=False),
            param_space=dict(space),
            tune_config=config,
            run_config=tune.RunConfig(
                name=f"{self._spec.name}-{time.time_ns()}",
                storage_path=str(records),
                failure_config=tune.FailureConfig(max_failures=self._spec.retries),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_frequency=1),
                callbacks=[watch],
                stop=watch,
                verbose=0,
            ),
        )
        try:
            with ThreadPoolExecutor(1) as pool:  # in the main thread Tune would handle the signals itself
                pool.submit(tuner.fit).result()
        except (OSError, pyarrow.ArrowException) as error:
            raise CheckpointError(f"Tune cannot write into {records}: {error}") from error
        except tune.TuneError as error:
            raise TrainingError(f"Tune has ended the sweep: {error}. Resume it with --resume.") from error
        shutil.rmtree(records, ignore_errors=True)  # the sweep's folder has everything


def _is_in(values: Mapping[str, Any], key: str, domain: Any) -> bool:
    """Return True if a searcher could have suggested the value. Any number is assumed to be in a range."""
    return key in values and (not hasattr(domain, "categories") or values[key] in domain.categories)


def _optuna(spec: SweepSpec, learned: Sequence[tuple[dict[str, Any], float]]) -> Searcher:
    """Return Optuna's searcher. Raises ConfigError if Optuna is not installed."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        assert spec.metric is not None
        known: dict[str, Any] = {}
        if learned:
            known = {"points_to_evaluate": [p for p, _ in learned], "evaluated_rewards": [r for _, r in learned]}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = spec.search.seed + len(learned)  # not the same suggestions again
        return OptunaSearch(metric=spec.metric.name, mode=spec.metric.mode, seed=seed, **known)
    except (ImportError, AssertionError) as error:
        raise ConfigError("search.kind: optuna needs Optuna. Install it: pip install 'electra_ds[optuna]'") from error


# --- when trials begin and end


class FixedOrderSearcher(Searcher):
    """Suggests listed trials in order. A finetuning follows as soon as the pretraining of its encoder has ended."""

    def __init__(self, trials: Sequence[Trial], folder: SweepFolder, refuse: Callable[[Trial], None]) -> None:
        """refuse: called with each trial that cannot start because its encoder does not exist."""
        super().__init__()
        self._waiting, self._folder, self._refuse = list(trials), folder, refuse
        self._running: dict[str, str] = {}
        """The trials' keys, by Tune's ids."""

    def __getstate__(self) -> dict[str, Any]:
        """Give Tune no state, since it would pickle objects that belong to this process."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing, since the folder records what is done."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a string
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


class _EndsByFolder(FIFOScheduler):
    """Lets a trial that the scheduler would stop save, close its trackers and write its status first.

    The sweep's folder records that the trial should end, and Tune gets the answer to continue it.
    """

    end_early: Callable[[Any], None]
    ended: set[str]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id in self.ended:
            return str(TrialScheduler.CONTINUE)
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self.ended.add(trial.trial_id)
            self.end_early(trial)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self.metric in result and "step" in result:  # false if it failed before its first evaluation
            super().on_trial_complete(tune_controller, trial, result)


class _Asha(_EndsByFolder, ASHAScheduler):
    pass


class _Median(_EndsByFolder, MedianStoppingRule):
    pass


def _scheduler(spec: SweepSpec, end_early: Callable[[Any], None]) -> TrialScheduler:
    wanted, metric = spec.scheduler, spec.metric
    if wanted is None or metric is None:
        return FIFOScheduler()
    common: dict[str, Any] = {"time_attr": "step", "metric": metric.name, "mode": metric.mode}
    common["grace_period"] = wanted.grace_steps
    scheduler: _Asha | _Median
    if wanted.kind == "asha":
        scheduler = _Asha(max_t=10**12, reduction_factor=wanted.reduction_factor, **common)
    else:
        scheduler = _Median(min_time_slice=10**15, **common)  # never pause a trial for others
    scheduler.end_early, scheduler.ended = end_early, set()
    return scheduler


class _Watch(tune.Callback, tune.Stopper):
    """Shows the progress of trials, and sets the status of those that Tune has given up.

    It ends the experiment once the sweep has been asked to stop and the last trial has saved.
    """

    def __init__(self, resolve: tune_trial.Resolve, folder: SweepFolder, monitor: SweepMonitor) -> None:
        self._resolve, self._folder, self._monitor = resolve, folder, monitor
        self._running: set[str] = set()
        self._idle_since: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Give Tune no state, since it would pickle objects that belong to this process."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._folder.wants_to_stop() and not self._running

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.add(trial.trial_id)
        try:
            self._monitor.begin(self._resolve(trial.config))
        except ConfigError:  # reported when it ends
            return

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._monitor.update()
        if self._running or self._folder.wants_to_stop():
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > _IDLE_S:
            self._idle_since = time.monotonic()
            _log.info("No trial is running: no node has a free slot yet. The sweep waits; press Ctrl-C to stop")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        ours = self._resolve(trial.config)
        state, reason = self._folder.trial(ours.key).state()
        if state != "waiting":  # Tune also completes waiting trials while the sweep stops
            self._monitor.end(ours, state, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        why = _failure_reason(trial)
        try:
            ours = self._resolve(trial.config)
        except ConfigError as error:
            self._monitor.refuse(str(error))
            return
        if not self._folder.wants_to_stop():
            self._folder.trial(ours.key).give_up(f"after {trial.num_failures} attempts: {why}")
        self._monitor.end(ours, *self._folder.trial(ours.key).state())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.discard(trial.trial_id)  # until it has a slot again


def _failure_reason(trial: Any) -> str:
    """Return the reason why Tune gave a trial up."""
    text = str(trial.get_error() or "")
    if not text:
        with contextlib.suppress(OSError, TypeError):
            text = Path(trial.error_file).read_text("utf8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rpartition("Error: ")[2] if lines else "its process was killed"


@contextmanager
def ray_runner(
    folder: SweepFolder, spec: SweepSpec, monitor: SweepMonitor, *, address: str | None, time_limit_s: float | None
) -> Iterator[RayRunner]:
    """Yield a runner on a cluster, or on a Ray that is started on this machine and ends with the context.

    address: the address of a cluster; None starts Ray on this machine alone. Raises ConfigError if the cluster cannot
    be reached or has no slot for a single trial, and InterruptedBySignalError at the end if a signal arrived.
    """
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the monitor reports on trials
    local: dict[str, Any] = {}
    if address is None:
        here = processes.this_machine()
        os.environ["PYTHONPATH"] = processes.python_path()
        local = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        local |= {"num_cpus": here.cpus, "num_gpus": here.gpus}
    try:
        ray.init(address=address or "local", logging_level=logging.CRITICAL, log_to_driver=False, **local)
    except (OSError, ValueError, RuntimeError) as error:
        where = "Ray cannot be started here" if address is None else f"No Ray cluster can be reached at {address}"
        raise ConfigError(f"{where}: {str(error).strip()}. Without Ray: {command('sweep')} --local") from error
    try:
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [processes.Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in there]
        monitor.at_once = processes.trials_at_once(spec.resources, nodes)
        with processes.stoppable(folder, time_limit_s):  # after Ray, which installs its own handlers
            yield RayRunner(folder, spec, monitor)
    finally:
        ray.shutdown()
