"""Logging a run's metrics: metrics.jsonl, and optionally Weights & Biases, TensorBoard and CSV.

Trackers name metrics KIND/NAME, such as `train/loss` and `eval/accuracy`. A tracker that fails during a run is dropped
with one warning; metrics.jsonl always has every number.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from electra_ds.config.monitors import overruled_wandb_mode, wandb_login, wandb_module
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import TrackingSettings
from electra_ds.core.errors import CheckpointError, ConfigError, ElectraError, InterruptedBySignalError
from electra_ds.core.terminal import NOTE, log_command

_log = logging.getLogger(__name__)
_FINISH_WITHIN_S = 60.0
"""Time limit for the upload at the end; `wandb sync` can upload the rest. A job scheduler may be about to kill us."""
_LOST_ROWS = 512
"""More rows than a kill can lose: wandb writes its file in blocks of 32 KiB, and a row has more than 64 bytes."""


def check_tracking(settings: TrackingSettings, run: RunDirectory, *, is_new: bool) -> None:
    """Raise ConfigError if a tracker cannot run: not installed, no account, or another run's folder."""
    if settings.tensorboard is not None:
        _tensorboard_module()
    if settings.wandb == "online" and not wandb_login():
        raise ConfigError(
            "wandb has no API key on this machine. Log in with: wandb login; or use --wandb offline, which needs no "
            "account, and upload later; or --wandb off."
        )
    for folder, pattern in ((settings.tensorboard, "*tfevents*"), (settings.csv, "*.csv")):
        if is_new and folder is not None and any((run.path / folder).glob(pattern)):
            raise ConfigError(
                f"{run.path / folder} contains the metrics of another run. Choose another --run-dir, or another "
                f"job_name or output_path in the DeepSpeed JSON."
            )


class RunLog:
    """Writes metrics.jsonl, one JSON object per line with `step` and `kind` ("train", "eval" or "plan"), and trackers.

    `reached` is the last step that a killed run logged, and `evaluated` the step of the last evaluation that is kept.
    """

    def __init__(
        self, run: RunDirectory, settings: TrackingSettings, config: Mapping[str, Any], resume_step: int
    ) -> None:
        """Open the log, dropping lines after `resume_step`, which a killed run wrote after its last checkpoint.

        config: shown next to wandb's curves. Raises CheckpointError if a file cannot be written, and ConfigError if
        wandb cannot start even offline.
        """
        if overruled := overruled_wandb_mode(settings.wandb):
            _log.log(NOTE, overruled)
        self._trackers: list[_Tracker] = []
        try:
            lines = read_metrics(run.metrics)
            kept = [line for line in lines if line["step"] <= resume_step]
            self.reached = max((line["step"] for line in lines), default=0)
            self.evaluated = max((line["step"] for line in kept if line["kind"] == "eval"), default=0)
            _replace(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = run.metrics.open("a", encoding="utf8", buffering=1)
            if settings.csv is not None:
                self._trackers.append(_CsvFolder(run.path / settings.csv, resume_step))
            if settings.tensorboard is not None:
                self._trackers.append(_TensorBoard(run.path / settings.tensorboard, resume_step))
            if settings.wandb != "off":
                self._trackers.append(_Wandb(settings, run, config, kept, resume_step, self.reached))
        except OSError as error:
            raise CheckpointError(f"Cannot write {error.filename or run.path}: {error.strerror}.") from error

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Log the values of a step. Raises CheckpointError if the disk is full."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"Cannot write {self._file.name}: {error.strerror}.") from error
        named = _named(kind, values)
        self._each(lambda tracker: tracker.write(step, named))

    def flush(self) -> None:
        """Make written values survive a kill of this process. metrics.jsonl always does, line by line."""
        self._each(lambda tracker: tracker.flush())

    def finish(self, error: BaseException | None) -> None:
        """Close everything. error: the error that ended the run, which determines the process's exit status."""
        status = 0 if error is None else 1
        if isinstance(error, InterruptedBySignalError):
            status = 128 + error.signum
        elif isinstance(error, ElectraError):
            status = 2
        with contextlib.suppress(OSError):  # a failed write was reported already
            self._file.close()
        self._each(lambda tracker: tracker.close(status))

    def _each(self, act: Callable[[_Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker raises, it must not end the training
                self._trackers.remove(tracker)
                _log.warning(
                    f"{tracker.name} failed and is disabled from now on ({type(error).__name__}: {error}). Training "
                    f"continues; metrics.jsonl has every number.",
                )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf8")
    temporary.replace(path)


def _named(kind: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values under the trackers' names, without values that are not finite (None)."""
    return {f"{kind}/{name}": value for name, value in values.items() if value is not None}


class _Tracker:
    """A destination of metrics."""

    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Make written values survive a kill of this process, if possible."""

    def close(self, status: int) -> None:
        """status: the process's exit status."""
        raise NotImplementedError


class _CsvFolder(_Tracker):
    """One file per metric, in the format of DeepSpeed's csv_monitor: train_loss.csv with the columns step, loss."""

    name = "csv_monitor"

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._files: dict[str, TextIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.csv"):
            rows = path.read_text("utf8").splitlines(keepends=True)
            kept = [row for row in rows[1:] if row.endswith("\n") and int(row.split(",")[0]) <= resume_step]
            _replace(path, "".join(rows[:1] + kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            file = self._files.get(name)
            if file is None:
                path = self._folder / f"{name.replace('/', '_')}.csv"
                self._files[name] = file = path.open("a", encoding="utf8", buffering=1)
                if file.tell() == 0:
                    file.write(f"step,{name.split('/')[-1]}\n")
            file.write(f"{step},{value}\n")

    def close(self, status: int) -> None:
        for file in self._files.values():
            file.close()


def _tensorboard_module() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard")  # takes a second, so only when it is used
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard is not installed ({error}). Install it with: pip install tensorboard"
        ) from error


class _TensorBoard(_Tracker):
    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        # TensorBoard hides values in the folder's earlier files from purge_step on.
        self._writer = _tensorboard_module().SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: int) -> None:
        self._writer.close()


class _Wandb(_Tracker):
    """A wandb run that keeps its id over every resume.

    wandb drops rows whose step is not above the last one, and offline it starts again at 0. A killed run repeats the
    steps since its checkpoint, so wandb's own step is ours plus the number of steps repeated so far, which never
    decreases, and nothing is dropped. The true step is logged as `step`, which is the x axis of every chart.

    A kill also ends wandb's service and loses the rows that it had not written yet; the next start writes those rows
    again from metrics.jsonl.
    """

    name = "wandb"

    def __init__(
        self,
        settings: TrackingSettings,
        run: RunDirectory,
        config: Mapping[str, Any],
        kept: list[dict[str, Any]],
        resume_step: int,
        reached: int,
    ) -> None:
        """kept: the lines of metrics.jsonl up to `resume_step`."""
        folder = run.path / "wandb"
        folder.mkdir(exist_ok=True)  # without it, wandb uses the system's temporary folder
        self._state = folder / "rows.json"
        first_step, self._repeated = resume_step + 1, 0
        before = None
        with contextlib.suppress(OSError, ValueError):  # missing, or cut off by a kill
            before = json.loads(self._state.read_text("utf8"))
        if before:
            if not before["finished"]:
                first_step = max(1, first_step - _LOST_ROWS)
            self._repeated = before["repeated"] + max(0, reached + 1 - first_step)
        self._write_state(finished=False)
        self._start(settings, run, config)
        for line in kept:
            if line["step"] >= first_step:
                values = {name: value for name, value in line.items() if name not in ("kind", "step")}
                self.write(line["step"], _named(line["kind"], values))

    def _start(self, settings: TrackingSettings, run: RunDirectory, config: Mapping[str, Any]) -> None:
        self._module = wandb_module()
        start = {
            "project": settings.wandb_project,
            "entity": settings.wandb_entity,
            "group": settings.wandb_group,
            "name": run.title,
            "id": settings.wandb_id,
            "resume": "allow",
            "dir": str(run.path),
            "config": config,
            "settings": {"silent": True, "console": "off", "finish_timeout": _FINISH_WITHIN_S},
        }
        mode = settings.wandb
        if mode == "online":
            try:
                self._run = self._module.init(mode="online", **start)
            except Exception as error:  # no network, a rejected key: the metrics can be uploaded later
                _log.warning(f"wandb cannot be reached ({error}). The run continues offline.")
                self._module.teardown()  # otherwise its service reports that the id is in use
                mode = "offline"
        if mode == "offline":
            try:
                self._run = self._module.init(mode="offline", **start)
            except Exception as error:
                raise ConfigError(f"wandb cannot start: {error}. Train without it: --wandb off.") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            _log.info(f"wandb: {self._run.url}")
        else:
            log_command(_log, "wandb: offline; upload with:", f"wandb sync {Path(self._run.dir).parent}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step}, step=step + self._repeated)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)
        self._module.teardown(exit_code=status)
        self._write_state(finished=True)

    def _write_state(self, *, finished: bool) -> None:
        _replace(self._state, json.dumps({"repeated": self._repeated, "finished": finished}))
