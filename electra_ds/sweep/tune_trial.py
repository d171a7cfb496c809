"""A trial as Ray Tune runs it.

A trial is a Tune trainable with a placement group: an empty bundle for itself, and one for each worker. A worker's
actor starts the project's own command and waits for it, so a trial gives the numbers that the command gives, and ends
with its actor however that ends. The run writes all that counts into its directory; Tune learns of it: each evaluation
is a result, and a checkpoint says where the run is.
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

from electra_ds.core.errors import ConfigError, TrainingError
from electra_ds.sweep import processes
from electra_ds.sweep.folder import MetricsTail, SweepFolder, as_result, ending
from electra_ds.sweep.spec import Resources, SweepSpec
from electra_ds.sweep.sweep_file import Sweep, as_spec
from electra_ds.sweep.trials import Trial, suggested

Resolve = Callable[[Mapping[str, Any]], Trial]
"""A function that gives the trial for a configuration of Tune's."""
_LOOK_EVERY_S = 0.5


class KilledError(TrainingError):
    """A trial's process was killed: the one kind of failure that is tried again."""


def trainable(sweep: Sweep, out: str | os.PathLike[str]) -> Any:
    """Return a trainable for your own `tune.Tuner`: it runs a sweep's one stage at the values in Tune's configuration.

    sweep: a file's content, its path, or the name of one that is shipped; what it says of the search, the space and
    the seeds is not used, but for the first seed where a configuration has no `seed`. The configuration's other keys
    are the recipe's dotted keys or the command's options. out: where run directories are made, out/runs/KEY; a run
    that is there is resumed, or not run again if it has ended. Every evaluation is reported, with `step`, and of a
    finetuning `score`, its first metric. Raises ConfigError if the sweep is not valid or has two stages; a
    configuration that is not valid, and a run that fails, make their trial fail.
    """
    spec = as_spec(sweep)
    if len(spec.stages) > 1:
        raise ConfigError("A trial is one run, and the sweep has two stages; leave one of them out.")
    folder = SweepFolder(Path(out).absolute())
    folder.make()
    return trial_class(lambda config: suggested(spec, config), folder, spec, raises=True)


def trial_class(resolve: Resolve, folder: SweepFolder, spec: SweepSpec, *, raises: bool) -> Any:
    """Return what Tune is to run, with the resources that a trial takes. raises: whether a run that fails is an error
    to Tune, or has ended, as its folder says."""
    bound = tune.with_parameters(_TuneTrial, resolve=resolve, folder=folder, spec=spec, raises=raises)
    bundle = {"CPU": float(spec.resources.cpus)} | ({"GPU": spec.resources.gpus} if spec.resources.gpus else {})
    bundles = [{}, *([bundle] * spec.resources.workers)]  # the trial itself would take a worker's place otherwise
    return tune.with_resources(bound, tune.PlacementGroupFactory(bundles, strategy="PACK"))


class _TuneTrial(tune.Trainable):
    """One attempt at a trial. Its steps, as Tune calls them, are evaluations."""

    def setup(  # type: ignore[override]  # by tune.with_parameters
        self, config: dict[str, Any], resolve: Resolve, folder: SweepFolder, spec: SweepSpec, raises: bool
    ) -> None:
        self._trial, self._folder, self._spec, self._raises = resolve(config), folder, spec, raises
        self._files = folder.trial(self._trial.key)
        self._tail = MetricsTail(self._files.run.metrics)
        self._found: deque[dict[str, Any]] = deque()
        self._reported = 0
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
        """Begin, unless another process works on the same trial or it is over."""
        with contextlib.ExitStack() as stack:
            self._is_ours = stack.enter_context(self._files.held())
            if self._is_ours:
                self._stack = stack.pop_all()
        if self._is_ours and not self._is_over():
            arguments = processes.begin(self._trial, self._folder, self._spec)
            if arguments is not None:
                self._ranks = _Ranks(self._trial, arguments, self._folder, self._spec.resources)

    def _is_over(self) -> bool:
        """Return whether there is nothing left to run."""
        step = self._last.get("step", 0)
        return self._folder.wants_to_stop() or self._files.has_succeeded or self._files.ended_early(step)

    def step(self) -> dict[str, Any]:
        """Return the next evaluation. Raises KilledError if a process was killed; any other failure is the trial's
        outcome, and read from its folder."""
        try:
            while (found := self._next()) is None:
                if self._ranks is None:
                    if self._is_ours or self._is_over() or self._files.has_ended:
                        return self._outcome()
                    time.sleep(_LOOK_EVERY_S)  # until the other process has finished the trial, or is gone
                    self._take()
                elif not self._ranks.are_running():
                    self._finish()
                else:
                    if self._folder.wants_to_stop() or self._files.is_to_end:
                        self._ranks.leave()
                    self._ranks.wait(_LOOK_EVERY_S)
        except ray.exceptions.RayError:
            self._end(-signal.SIGKILL)
            raise
        return found | {tune.result.DONE: False}

    def _outcome(self) -> dict[str, Any]:
        state, reason = self._files.state()
        if state == "failed" and self._raises:
            raise TrainingError(f"{self._trial.label}: {reason}")
        return self._last | {tune.result.DONE: True}

    def _next(self) -> dict[str, Any] | None:
        """Return the next evaluation, if there is one. A metric that is not finite is the worst, for schedulers and
        searchers."""
        for line in self._tail.lines():
            if line["kind"] == "eval" and line["step"] > self._reported:
                self._reported = line["step"]
                self._found.append(as_result(self._trial.stage, line))
        if not self._found:
            return None
        self._last, wanted = self._found.popleft(), self._spec.metric
        if wanted is not None and self._last.get(wanted.name, 0) is None:
            self._last[wanted.name] = math.inf if wanted.mode == "min" else -math.inf
        return dict(self._last)

    def _finish(self) -> None:
        """End the attempt, as no rank runs any more."""
        assert self._ranks is not None
        status = self._ranks.status()
        self._end(status)
        if not self._is_over() and not self._files.has_ended:
            raise KilledError(f"{self._trial.label}: {ending(status)}.")

    def _end(self, status: int) -> None:
        if self._ranks is not None:
            self._ranks.end()
            self._ranks = None
            self._files.end(status)

    def cleanup(self) -> None:
        """Let the run of a trial that the user's own scheduler ends or pauses save first. A run that cannot save yet is
        stopped anyway."""
        if self._ranks is not None:
            self._ranks.leave()
            while self._ranks.are_running():
                self._ranks.wait(_LOOK_EVERY_S)
            status = self._ranks.status()
            self._end(status)
            self._files.note_stopped(status, self._last.get("step", 0))
        self._stack.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        text = json.dumps({"run": str(self._files.run.path), "step": self._last.get("step", 0)})
        (Path(checkpoint_dir) / "run.json").write_text(text, "utf8")

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """Read nothing: a run resumes from its own directory."""


@ray.remote
class _Rank:
    """One worker's slot, and the process in it."""

    def __init__(self) -> None:
        self._started: subprocess.Popen[bytes] | None = None

    def where(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), processes.free_port()

    def run(self, stage: str, arguments: list[str], log: Path, environment: dict[str, str], folder: Path) -> int:
        self._started = started = processes.start(stage, arguments, log, environment, folder)
        try:
            return started.wait()
        finally:
            processes.end([started])

    def leave(self) -> None:
        """Let the process save and leave, as soon as there is one."""
        while self._started is None:
            time.sleep(0.05)
        self._started.send_signal(signal.SIGTERM)


class _Ranks:
    """A trial's workers, actors in the bundles of its placement group; they end with it, and their processes with
    them."""

    def __init__(self, trial: Trial, arguments: list[str], folder: SweepFolder, resources: Resources) -> None:
        group = get_current_placement_group()
        assert group is not None  # Tune has made it, see `trial_class`
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
        log = folder.trial(trial.key).log
        self._running = [
            actor.run.remote(
                trial.stage, arguments, log, processes.rank_environment(rank, address, port, resources), folder.start_in
            )
            for rank, actor in enumerate(self._actors)
        ]
        self._statuses: list[int] = []
        self._deadline: float | None = None
        self._is_leaving = False

    def are_running(self) -> bool:
        return bool(self._running) and (self._deadline is None or time.monotonic() < self._deadline)

    def wait(self, seconds: float) -> None:
        """Wait until one has ended, at most so long."""
        ready, self._running = ray.wait(self._running, timeout=seconds)
        for each in ready:
            try:
                self._statuses.append(ray.get(each))
            except ray.exceptions.RayError:  # its actor or its node is gone
                self._statuses.append(-signal.SIGKILL)
        if any(self._statuses) and self._deadline is None:
            self._deadline = time.monotonic() + processes.TO_NOTICE_S

    def leave(self) -> None:
        """Ask all, once, to save and leave."""
        if not self._is_leaving:
            self._is_leaving, self._deadline = True, time.monotonic() + processes.TO_SAVE_S
            for actor in self._actors:
                actor.leave.remote()

    def status(self) -> int:
        """Return the status of all, in which ranks that still run count as killed."""
        return processes.status_of([*self._statuses, *(-signal.SIGKILL for _ in self._running)])

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
