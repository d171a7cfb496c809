"""A trial as Ray Tune runs it.

A trial is a Tune trainable with a placement group: an empty bundle for itself, and one for each worker. A worker's
actor starts the project's own command and waits for it, so a trial gives the numbers that the command gives, and ends
with its actor however that ends. What counts is written by the run into its directory; Tune is told of it: each
evaluation is a result, and a checkpoint says where the run is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from electra_ds.core.errors import ConfigError, ElectraError, TrainingError
from electra_ds.sweep import process
from electra_ds.sweep.attempt import arguments_of
from electra_ds.sweep.folder import ENDED, ENDED_EARLY, SUCCEEDED, SweepFolder
from electra_ds.sweep.follow import MetricsFollower, as_result
from electra_ds.sweep.spec import Resources, SweepSpec, load_sweep, parse_sweep
from electra_ds.sweep.trials import Trial, suggested

Resolve = Callable[[Mapping[str, Any]], Trial]
"""The trial that a configuration of Tune's stands for."""
_LOOK_EVERY_S = 0.5


class KilledError(TrainingError):
    """A trial's process was killed: the one kind of failure that is tried again."""


def trainable(sweep: SweepSpec | Mapping[str, Any] | str, out: str | os.PathLike[str]) -> Any:
    """For a `tune.Tuner` of one's own: runs a sweep's one stage at whatever values Tune's configuration holds.

    sweep: a file's content, its path, or the name of one that is shipped; what it says of the search, the space and
    the seeds is not used, but for the first seed where a configuration has no `seed`. The configuration's other keys
    are the recipe's dotted keys or the command's options. out: where run directories are made, out/runs/KEY; a run
    that is there goes on, or is not run again where it has ended. Every evaluation is reported, with `step`, and of a
    finetuning `score`, its first metric. Raises ConfigError if the sweep is not valid or has two stages; a
    configuration that is not valid, and a run that fails, make their trial fail.
    """
    if isinstance(sweep, str):
        spec = load_sweep(sweep)
    else:
        spec = sweep if isinstance(sweep, SweepSpec) else parse_sweep(dict(sweep), "given")
    if len(spec.stages) > 1:
        raise ConfigError("A trial is one run, and the sweep has two stages; leave one of them out.")
    folder = SweepFolder(Path(out).absolute())
    folder.make()
    return trial_class(lambda config: suggested(spec, config, lambda stage, arguments: None), folder, spec, raises=True)


def trial_class(resolve: Resolve, folder: SweepFolder, spec: SweepSpec, *, raises: bool) -> Any:
    """What Tune is to run, with the resources that a trial takes. raises: whether a run that fails is an error to Tune,
    or has come to its end, as its folder says."""
    bound = tune.with_parameters(_TuneTrial, resolve=resolve, folder=folder, spec=spec, raises=raises)
    return tune.with_resources(bound, placement(spec.resources))


def placement(resources: Resources) -> tune.PlacementGroupFactory:
    """An empty bundle for the trial itself, without which it would take a worker's place and wait forever."""
    bundle = {"CPU": float(resources.cpus)} | ({"GPU": float(resources.gpus)} if resources.gpus else {})
    return tune.PlacementGroupFactory([{}, *([bundle] * resources.workers)], strategy="PACK")


class _TuneTrial(tune.Trainable):
    """One attempt at a trial. Its steps, as Tune calls them, are evaluations."""

    def setup(  # type: ignore[override]  # by tune.with_parameters
        self, config: dict[str, Any], resolve: Resolve, folder: SweepFolder, spec: SweepSpec, raises: bool
    ) -> None:
        self._trial, self._folder, self._spec, self._raises = resolve(config), folder, spec, raises
        self._follower = MetricsFollower(folder.run(self._trial.key).metrics)
        self._found: deque[dict[str, Any]] = deque()
        self._told = 0
        """The step of the last evaluation that Tune knows."""
        self._ranks: _Ranks | None = None
        self._last: dict[str, Any] = {}
        if not folder.path.is_dir():
            raise ConfigError(
                f"{folder.path} is not there on {os.uname().nodename}; a sweep's folder must be on a disk that all "
                f"nodes share."
            )
        self._stack = contextlib.ExitStack()
        self._is_ours = False
        self._take()

    def _take(self) -> None:
        """Begin, unless somebody else is at the same trial or it is over."""
        with contextlib.ExitStack() as stack:
            self._is_ours = stack.enter_context(self._folder.held(self._trial.key))
            if self._is_ours:
                self._stack = stack.pop_all()
        if self._is_ours and not self._is_over():
            self._start()

    def _is_over(self) -> bool:
        """Whether there is nothing to be run any more."""
        return self._folder.wants_to_stop() or self._folder.state(self._trial.key)[0] in SUCCEEDED or self._end_early()

    def _end_early(self) -> bool:
        """Give a trial its status that a scheduler has ended, as soon as it does not run; whether that is so."""
        if not self._folder.is_to_end(self._trial.key) or self._folder.state(self._trial.key)[0] in ENDED:
            return False
        run = self._folder.run(self._trial.key)
        run.write_status("stopped", step=self._last.get("step", 0), reason=ENDED_EARLY)
        return True

    def _start(self) -> None:
        trial, folder = self._trial, self._folder
        try:
            arguments = arguments_of(trial, folder, self._spec)
        except ElectraError as error:
            folder.refuse(trial, self._spec, str(error))
            return
        folder.begin(trial, ["electra-ds", trial.stage, *arguments], self._spec)
        self._ranks = _Ranks(trial, arguments, folder, self._spec.resources)

    def step(self) -> dict[str, Any]:
        """The next evaluation. Raises KilledError if a process was killed; any other failure is the trial's
        outcome, and read from its folder."""
        try:
            while not self._look():
                if self._ranks is None:
                    if self._is_ours or self._is_over() or self._folder.state(self._trial.key)[0] in ENDED:
                        return self._outcome()
                    time.sleep(_LOOK_EVERY_S)  # until whoever is at the same trial has finished it, or is gone
                    self._take()
                elif not self._ranks.are_running():
                    self._finish()
                else:
                    if self._folder.wants_to_stop() or self._folder.is_to_end(self._trial.key):
                        self._ranks.leave()
                    self._ranks.wait(_LOOK_EVERY_S)
        except ray.exceptions.RayError:
            self._end(-signal.SIGKILL)
            raise
        return self._tell() | {tune.result.DONE: False}

    def _outcome(self) -> dict[str, Any]:
        state, reason = self._folder.state(self._trial.key)
        if state == "failed" and self._raises:
            raise TrainingError(f"{self._trial.label}: {reason}")
        return self._last | {tune.result.DONE: True}

    def _look(self) -> bool:
        """Whether there is an evaluation to be told."""
        for line in self._follower.lines():
            if line["kind"] == "eval" and line["step"] > self._told:
                self._told = line["step"]
                self._found.append(as_result(self._trial.stage, line))
        return bool(self._found)

    def _tell(self) -> dict[str, Any]:
        """What is not finite is the worst there is, for schedulers and searchers that compare."""
        self._last, wanted = self._found.popleft(), self._spec.metric
        if wanted is not None and wanted.name in self._last and self._last[wanted.name] is None:
            self._last[wanted.name] = math.inf if wanted.mode == "min" else -math.inf
        return dict(self._last)

    def _finish(self) -> None:
        """Once no rank runs any more."""
        assert self._ranks is not None
        status = self._ranks.status()
        self._end(status)
        if not self._is_over() and self._folder.state(self._trial.key)[0] not in ENDED:
            how = f"was killed by signal {-status}" if status < 0 else f"left with exit status {status}"
            raise KilledError(f"{self._trial.label} {how}.")

    def _end(self, status: int) -> None:
        if self._ranks is not None:
            self._ranks.end()
            self._ranks = None
            self._folder.end(self._trial.key, status)

    def cleanup(self) -> None:
        """Let the run of a trial that the user's own scheduler ends or pauses save first. A run that cannot save yet is
        stopped anyway."""
        if self._ranks is not None:
            self._ranks.leave()
            while self._ranks.are_running():
                self._ranks.wait(_LOOK_EVERY_S)
            status = self._ranks.status()
            self._end(status)
            self._folder.note_stopped(self._trial.key, status, self._last.get("step", 0))
        self._stack.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        run = self._folder.run(self._trial.key).path
        text = json.dumps({"run": str(run), "step": self._last.get("step", 0)})
        (Path(checkpoint_dir) / "run.json").write_text(text, "utf8")

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """A run goes on from its own directory."""


@ray.remote
class _Rank:
    """One worker's place, and the process in it."""

    def __init__(self) -> None:
        self._started: subprocess.Popen[bytes] | None = None

    def where(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), process.free_port()

    def run(self, stage: str, arguments: list[str], log: Path, environment: dict[str, str], folder: Path) -> int:
        self._started = started = process.start(stage, arguments, log, environment, folder)
        try:
            return started.wait()
        finally:
            process.end([started])

    def leave(self) -> None:
        """Let the process save and leave, as soon as there is one."""
        while self._started is None:
            time.sleep(0.05)
        self._started.send_signal(signal.SIGTERM)


class _Ranks:
    """A trial's workers, actors in the bundles of its placement group; they end with it, and what they have started
    with them."""

    def __init__(self, trial: Trial, arguments: list[str], folder: SweepFolder, resources: Resources) -> None:
        group = get_current_placement_group()
        assert group is not None  # Tune has made it, see `placement`
        self._actors = [
            _Rank.options(  # type: ignore[attr-defined]
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(resources.workers)  # Tune strips the empty bundle
        ]
        address, port = ray.get(self._actors[0].where.remote())
        environments = [process.rank_environment(rank, address, port, resources) for rank in range(resources.workers)]
        self._running = [
            actor.run.remote(trial.stage, arguments, folder.log(trial.key), environment, folder.start_in)
            for actor, environment in zip(self._actors, environments, strict=True)
        ]
        self._statuses: list[int] = []
        self._deadline: float | None = None
        self._is_leaving = False

    def are_running(self) -> bool:
        return bool(self._running) and (self._deadline is None or time.monotonic() < self._deadline)

    def wait(self, seconds: float) -> None:
        """Until one has ended, at most so long."""
        ready, self._running = ray.wait(self._running, timeout=seconds)
        for each in ready:
            try:
                self._statuses.append(ray.get(each))
            except ray.exceptions.RayError:  # its actor or its node is gone
                self._statuses.append(-signal.SIGKILL)
        if any(self._statuses) and self._deadline is None:
            self._deadline = time.monotonic() + process.TO_NOTICE_S

    def leave(self) -> None:
        """Ask all, once, to save and leave."""
        if not self._is_leaving:
            self._is_leaving, self._deadline = True, time.monotonic() + process.TO_SAVE_S
            for actor in self._actors:
                actor.leave.remote()

    def status(self) -> int:
        """Of one that was killed before others, else of the first that failed, else 0; those that still run are."""
        return process.status_of([*self._statuses, *(-signal.SIGKILL for _ in self._running)])

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
