"""A trial as Ray Tune runs it.

A trial is a Tune trainable with a placement group of one bundle for each worker. The trainable starts the project's own
command for the first worker, and an actor does so for each further one, so a trial gives the same numbers as the
command. A process ends with the trainable or the actor that started it, however that ends. The run writes everything
that counts into its directory. Tune gets each evaluation as a result, and a checkpoint with the path of the run.
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
"""A function that returns the trial for a Tune configuration."""
_LOOK_EVERY_S = 0.5


class KilledError(TrainingError):
    """A trial's process was killed, the only failure after which a trial is tried again."""


def trainable(sweep: Sweep, out: str | os.PathLike[str]) -> Any:
    """Return a trainable for your own `tune.Tuner`, which runs a sweep's single stage with the values in Tune's config.

    sweep: the content of a file, its path, or the name of a shipped sweep. Its search and space are ignored; its first
    seed is used if a configuration has no `seed`. The configuration's other keys are the recipe's dotted keys or the
    command's options. out: the folder for run directories, out/runs/KEY. An existing run is resumed, or not run again
    if it has ended.

    Every evaluation is reported with `step` and, for a finetuning, with its first metric as `score`. Raises ConfigError
    if the sweep is not valid or has two stages. An invalid configuration or a failing run makes its trial fail.
    """
    spec = as_spec(sweep)
    if len(spec.stages) > 1:
        raise ConfigError("A trial is one run, but the sweep has two stages; leave one of them out.")
    folder = SweepFolder(Path(out).absolute())
    folder.make()
    return trial_class(lambda config: suggested(spec, config), folder, spec, raises=True)


def trial_class(resolve: Resolve, folder: SweepFolder, spec: SweepSpec, *, raises: bool) -> Any:
    """Return the trainable for Tune, with the resources of a trial.

    raises: report a failing run to Tune as an error, instead of as an ended trial whose folder has the status.
    """
    bound = tune.with_parameters(_TuneTrial, resolve=resolve, folder=folder, spec=spec, raises=raises)
    bundle = {"CPU": float(spec.resources.cpus)} | ({"GPU": spec.resources.gpus} if spec.resources.gpus else {})
    bundles = [bundle] * spec.resources.workers  # Tune places the trainable in the first one
    return tune.with_resources(bound, tune.PlacementGroupFactory(bundles, strategy="PACK"))


class _TuneTrial(tune.Trainable):
    """One attempt at a trial. What Tune calls steps are evaluations."""

    def setup(  # type: ignore[override]  # called by tune.with_parameters
        self, config: dict[str, Any], resolve: Resolve, folder: SweepFolder, spec: SweepSpec, raises: bool
    ) -> None:
        self._trial, self._folder, self._spec, self._raises = resolve(config), folder, spec, raises
        self._files = folder.trial(self._trial.key)
        self._tail = MetricsTail(self._files.run.metrics)
        self._found: deque[dict[str, Any]] = deque()
        self._reported = 0
        """The step of the last evaluation that was reported to Tune."""
        self._ranks: _Ranks | None = None
        self._last: dict[str, Any] = {}
        if not folder.path.is_dir():
            raise ConfigError(
                f"{folder.path} does not exist on {os.uname().nodename}; a sweep's folder must be on a disk that all "
                f"nodes share."
            )
        self._stack = contextlib.ExitStack()
        self._is_ours = False
        self._take()

    def _take(self) -> None:
        """Start, unless another process works on the same trial or it is over."""
        with contextlib.ExitStack() as stack:
            self._is_ours = stack.enter_context(self._files.held())
            if self._is_ours:
                self._stack = stack.pop_all()
        if self._is_ours and not self._is_over():
            arguments = processes.begin(self._trial, self._folder, self._spec)
            if arguments is not None:
                self._ranks = _Ranks(self._trial, arguments, self._folder, self._spec.resources)

    def _is_over(self) -> bool:
        """Return True if nothing is left to run."""
        step = self._last.get("step", 0)
        return self._folder.wants_to_stop() or self._files.has_succeeded or self._files.ended_early(step)

    def step(self) -> dict[str, Any]:
        """Return the next evaluation. Raises KilledError if a process was killed.

        Any other failure is the trial's outcome and is read from its folder.
        """
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
                    if self._folder.wants_to_stop() or self._files.is_asked_to_stop:
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
        """Return the next evaluation, or None. Schedulers and searchers get the worst value for a non-finite metric."""
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
        """End the attempt, since no rank is running any more."""
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
        """Let a run save first if the user's own scheduler ends or pauses its trial.

        A run that cannot save yet is stopped anyway.
        """
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
        """Read nothing, since a run resumes from its own directory."""


@ray.remote
class _Rank:
    """The slot of one further worker, and its process."""

    def __init__(self) -> None:
        self._started: subprocess.Popen[bytes] | None = None

    def run(self, stage: str, arguments: list[str], log: Path, environment: dict[str, str], folder: Path) -> int:
        self._started = started = processes.start(stage, arguments, log, environment, folder)
        try:
            return started.wait()
        finally:
            processes.end([started])

    def leave(self) -> None:
        """Ask the process to save and stop, as soon as there is one."""
        while self._started is None:
            time.sleep(0.05)
        self._started.send_signal(signal.SIGTERM)


class _Ranks:
    """A trial's workers. The first is a child process of this one; the others are actors in the remaining bundles of
    the trial's placement group. All end with this process."""

    def __init__(self, trial: Trial, arguments: list[str], folder: SweepFolder, resources: Resources) -> None:
        address, port, log = ray.util.get_node_ip_address(), processes.free_port(), folder.trial(trial.key).log

        def of_rank(rank: int) -> tuple[str, list[str], Path, dict[str, str], Path]:
            environment = processes.rank_environment(rank, address, port, resources)
            return trial.stage, arguments, log, environment, folder.start_in

        group = get_current_placement_group()
        assert group is not None  # Tune made it, see `trial_class`
        self._actors = [
            _Rank.options(  # type: ignore[attr-defined]
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(1, resources.workers)
        ]
        self._running = [actor.run.remote(*of_rank(rank)) for rank, actor in enumerate(self._actors, start=1)]
        self._first = processes.start(*of_rank(0))
        self._statuses: list[int] = []
        """The exit statuses of the other workers that have ended."""
        self._deadline: float | None = None
        self._is_leaving = False

    def are_running(self) -> bool:
        is_running = self._first.poll() is None or bool(self._running)
        return is_running and (self._deadline is None or time.monotonic() < self._deadline)

    def wait(self, seconds: float) -> None:
        """Wait until the first worker, or after it another one, has ended, at most `seconds`."""
        is_over = self._first.poll() is not None
        ready: list[Any] = []
        processes.wait([self._first], seconds)
        if self._running:
            ready, self._running = ray.wait(self._running, timeout=seconds if is_over else 0)
        for each in ready:
            try:
                self._statuses.append(ray.get(each))
            except ray.exceptions.RayError:  # its actor or its node is gone
                self._statuses.append(-signal.SIGKILL)
        if any([self._first.poll(), *self._statuses]) and self._deadline is None:
            self._deadline = time.monotonic() + processes.TO_NOTICE_S

    def leave(self) -> None:
        """Ask all workers, once, to save and stop."""
        if not self._is_leaving:
            self._is_leaving, self._deadline = True, time.monotonic() + processes.TO_SAVE_S
            self._first.send_signal(signal.SIGTERM)
            for actor in self._actors:
                actor.leave.remote()

    def status(self) -> int:
        """Return the status of all ranks, counting those that still run as killed."""
        first = self._first.poll()
        killed = [-signal.SIGKILL] * (len(self._running) + (first is None))
        return processes.status_of([first, *self._statuses, *killed])

    def end(self) -> None:
        processes.end([self._first])
        for actor in self._actors:
            ray.kill(actor)
