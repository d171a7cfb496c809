"""A sweep's trials by Ray Tune, as many at once as there is room for, on this machine or on a cluster."""

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
"""Read by Ray when it is imported or started; what a user has set stays."""
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from electra_ds.core.errors import CheckpointError, ConfigError, TrainingError  # noqa: E402
from electra_ds.core.program import command  # noqa: E402
from electra_ds.sweep import process, tune_trial  # noqa: E402
from electra_ds.sweep.display import SweepDisplay  # noqa: E402
from electra_ds.sweep.folder import SUCCEEDED, SweepFolder  # noqa: E402
from electra_ds.sweep.follow import MetricsFollower, as_result  # noqa: E402
from electra_ds.sweep.ray_address import check_reachable, checked_storage  # noqa: E402
from electra_ds.sweep.resources import Node, this_machine, trials_at_once  # noqa: E402
from electra_ds.sweep.spec import SweepSpec  # noqa: E402
from electra_ds.sweep.stopping import stoppable  # noqa: E402
from electra_ds.sweep.trials import Trial  # noqa: E402
from electra_ds.sweep.tune_scheduler import InOrder, NothingRuns, OrderlyScheduler  # noqa: E402

_IDLE_S = 60.0
"""After which it is told that no trial runs."""
_OBJECT_STORE_BYTES = 128 * 2**20  # next to nothing goes through it


class RayRunner:
    """Runs trials of a sweep in a cluster that is there, or that is started on this machine and ends with it."""

    def __init__(
        self, folder: SweepFolder, spec: SweepSpec, display: SweepDisplay, *, at_once: int, storage: str | None
    ) -> None:
        self._folder, self._spec, self._display, self._at_once = folder, spec, display, at_once
        self._storage = storage

    def run(self, trials: Sequence[Trial]) -> None:
        """In their order, so pretrainings first, and in the room that they leave finetunings of those that have ended;
        until the folder's `stop` file is there: then those that run save and leave."""
        if not trials:
            return
        order = InOrder(trials, self._folder, lambda trial: self._display.end(trial, *self._folder.state_of(trial)))
        known = {trial.key: trial for trial in trials}
        config = tune.TuneConfig(search_alg=order, num_samples=len(trials))
        self._fit(lambda config: known[config["key"]], {}, config)

    def suggest(self, before: Sequence[Trial], resolve: tune_trial.Resolve) -> None:
        """By Optuna, until there are as many as the search's samples.

        before: what was suggested earlier, whatever came of it, from which Optuna learns.
        """
        left = self._spec.search.samples - len(before)
        if left <= 0 or self._folder.wants_to_stop():
            return
        (stage,) = self._spec.stages.values()
        space = {
            key: getattr(tune, domain.kind)(list(domain.values)) if domain.kind == "choice"
            else getattr(tune, domain.kind)(*domain.values)
            for key, domain in stage.space.items() if domain.is_random
        }  # fmt: skip
        searcher = _optuna(self._spec, self._learned(before, space))
        config = tune.TuneConfig(search_alg=searcher, num_samples=left, max_concurrent_trials=self._at_once)
        self._fit(resolve, space, config)

    def _learned(self, before: Sequence[Trial], space: Mapping[str, Any]) -> list[tuple[dict[str, Any], float]]:
        """(values, the metric at the end) of what has one."""
        assert self._spec.metric is not None  # the spec's checks see to it
        found = []
        for trial in before:
            lines = MetricsFollower(self._folder.run(trial.key).metrics).lines()
            last = next((line for line in reversed(lines) if line["kind"] == "eval"), None)
            reward = None if last is None else as_result(trial.stage, last).get(self._spec.metric.name)
            is_of_space = all(_is_in(trial.values, key, space[key]) for key in space)  # which may have changed
            if reward is not None and is_of_space and self._folder.state(trial.key)[0] in SUCCEEDED:
                found.append(({key: trial.values[key] for key in space}, float(reward)))
        return found

    def _fit(self, resolve: tune_trial.Resolve, space: Mapping[str, Any], config: tune.TuneConfig) -> None:
        records = self._folder.path.absolute() / "tune"
        naming: Callable[[Any], str] = lambda trial: str(trial.config.get("key", trial.trial_id))  # noqa: E731
        config.trial_name_creator = config.trial_dirname_creator = naming
        watch = _Watch(resolve, self._folder, self._display)
        key_of: Callable[[Any], str] = lambda trial: resolve(trial.config).key  # noqa: E731
        config.scheduler = OrderlyScheduler(_scheduler(self._spec), self._folder, key_of)
        tuner = tune.Tuner(
            tune_trial.trial_class(resolve, self._folder, self._spec, raises=False),
            param_space=dict(space),
            tune_config=config,
            run_config=tune.RunConfig(
                name=f"{self._spec.name}-{time.time_ns()}",
                storage_path=self._storage or str(records),
                failure_config=tune.FailureConfig(max_failures=self._spec.retries),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_frequency=1),
                callbacks=[watch],
                stop=NothingRuns(self._folder, lambda: len(watch.running)),
                verbose=0,
            ),
        )
        try:
            with ThreadPoolExecutor(1) as pool:  # in the main thread Tune would take the signals for itself
                pool.submit(tuner.fit).result()
        except OSError as error:
            raise CheckpointError(f"Tune cannot write into {self._storage or records}: {error}") from error
        except tune.TuneError as error:
            raise TrainingError(f"Tune has ended the sweep: {error}. Resume it with --resume.") from error
        if self._storage is None:
            shutil.rmtree(records, ignore_errors=True)  # the folder says it all


def _is_in(values: Mapping[str, Any], key: str, domain: Any) -> bool:
    """Whether a searcher could have suggested it; of one that is no choice any number will do."""
    return key in values and (not hasattr(domain, "categories") or values[key] in domain.categories)


class _Watch(tune.Callback):
    """Says how trials go, and gives those a status that Tune has given up."""

    def __init__(self, resolve: tune_trial.Resolve, folder: SweepFolder, display: SweepDisplay) -> None:
        self._resolve, self._folder, self._display = resolve, folder, display
        self.running: set[str] = set()
        self._idle_since: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes it down, and it is of this process."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.trial_id)
        try:
            self._display.begin(self._resolve(trial.config))
        except ConfigError:  # told when it ends
            return

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._display.look()
        if self.running or self._folder.wants_to_stop():
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > _IDLE_S:
            self._idle_since = time.monotonic()
            self._display.say("No trial runs: no node has room for one now. It waits; Ctrl-C leaves")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)
        ours = self._resolve(trial.config)
        state, reason = self._folder.state(ours.key)
        if state != "waiting":  # which Tune has looked at while the sweep is to stop
            self._display.end(ours, state, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)
        why = _last_words(trial)
        try:
            ours = self._resolve(trial.config)
        except ConfigError as error:
            self._display.refuse(str(error))
            return
        if not self._folder.wants_to_stop():
            self._folder.give_up(ours.key, f"after {trial.num_failures} attempts: {why}")
        self._display.end(ours, *self._folder.state(ours.key))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.trial_id)  # until there is a place for it again


def _last_words(trial: Any) -> str:
    """Why Tune gave a trial up."""
    told = str(trial.get_error() or "")
    if not told:
        with contextlib.suppress(OSError, TypeError):
            told = Path(trial.error_file).read_text("utf8", "replace")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[-1].rpartition("Error: ")[2] if lines else "its process was killed"


def _scheduler(spec: SweepSpec) -> TrialScheduler:
    wanted, metric = spec.scheduler, spec.metric
    if wanted is None or metric is None:
        return FIFOScheduler()
    common: dict[str, Any] = {"time_attr": "step", "metric": metric.name, "mode": metric.mode}
    if wanted.kind == "median":
        never = 10**15  # is a trial paused for others
        return MedianStoppingRule(grace_period=wanted.grace_steps, min_time_slice=never, **common)
    return ASHAScheduler(
        max_t=10**12, grace_period=wanted.grace_steps, reduction_factor=wanted.reduction_factor, **common
    )


def _optuna(spec: SweepSpec, learned: Sequence[tuple[dict[str, Any], float]]) -> Searcher:
    """Raises ConfigError if Optuna is not installed."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        assert spec.metric is not None
        known: dict[str, Any] = {}
        if learned:
            known = {"points_to_evaluate": [p for p, _ in learned], "evaluated_rewards": [r for _, r in learned]}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = spec.search.seed + len(learned)  # not what was suggested before
        return OptunaSearch(metric=spec.metric.name, mode=spec.metric.mode, seed=seed, **known)
    except (ImportError, AssertionError) as error:
        raise ConfigError("search.kind: optuna needs Optuna. Install it: pip install 'electra_ds[optuna]'") from error


@contextmanager
def ray_runner(
    folder: SweepFolder,
    spec: SweepSpec,
    display: SweepDisplay,
    *,
    address: str | None = None,
    storage: str | None = None,
    time_limit_s: float | None = None,
) -> Iterator[RayRunner]:
    """address: of a cluster; None starts Ray on this machine alone. storage: where Tune keeps its own records, which
    are removed where it is None.

    Raises ConfigError if the cluster cannot be reached or has no room for a single trial, and
    InterruptedBySignalError at the end where a signal came.
    """
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what becomes of trials is told by the display
    storage = None if storage is None else checked_storage(storage)
    if address is not None:
        check_reachable(address)
    try:
        if address is None:
            here = this_machine()
            os.environ["PYTHONPATH"] = process.python_path()
            ray.init(
                address="local", include_dashboard=False, logging_level=logging.CRITICAL, log_to_driver=False,
                object_store_memory=_OBJECT_STORE_BYTES, num_cpus=here.cpus, num_gpus=here.gpus,
            )  # fmt: skip
        else:
            ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        where = "Ray cannot be started here" if address is None else f"No Ray cluster can be reached at {address}"
        raise ConfigError(f"{where}: {str(error).strip()}. Without Ray: {command('sweep')} --local") from error
    try:
        nodes = [
            Node(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes() if node["Alive"]
        ]  # fmt: skip
        at_once = display.at_once = trials_at_once(spec.resources, nodes)
        with stoppable(folder, time_limit_s):  # after Ray, which has handlers of its own
            yield RayRunner(folder, spec, display, at_once=at_once, storage=storage)
    finally:
        ray.shutdown()
