"""Weights & Biases, TensorBoard and CSV: the numbers of metrics.jsonl for those who watch them there.

Names are KIND/NAME, such as `train/loss` and `eval/accuracy`. A tracker that fails in mid-run is
dropped with one warning; metrics.jsonl has every number in any case.
"""

from __future__ import annotations

import csv
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from electra_ds.config.monitors import overruled_wandb_mode, wandb_login, wandb_module
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import TrackingSettings
from electra_ds.core.errors import CheckpointError, ConfigError, ElectraError, InterruptedBySignalError
from electra_ds.core.terminal import NOTE, log_command
from electra_ds.training.tracking import MetricsFile, read_metrics

_log = logging.getLogger(__name__)
_FINISH_WITHIN_S = 60.0
"""An upload that takes longer at the end is left to `wandb sync`: a job scheduler may be waiting to kill us."""
_LOST_ROWS = 512
"""More than a kill can lose: wandb writes its file in blocks of 32 KiB, and a row takes more than 64 bytes."""


class Writer(Protocol):
    """One place that numbers go to."""

    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """What was written so far must outlive a kill of this process."""

    def close(self, status: int) -> None:
        """`status` is the process's exit status."""


class Trackers:
    """The writers of one run."""

    def __init__(self, writers: list[Writer]) -> None:
        self._writers = writers

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """The same values as a line of metrics.jsonl; those that are None, for not finite, are left out."""
        named = _named(kind, values)
        self._each(lambda writer: writer.write(step, named))

    def flush(self) -> None:
        self._each(lambda writer: writer.flush())

    def finish(self, error: BaseException | None) -> None:
        """Closes each writer with what will be the exit status."""
        status = 0 if error is None else 1
        if isinstance(error, InterruptedBySignalError):
            status = 128 + error.signum
        elif isinstance(error, ElectraError):
            status = 2
        self._each(lambda writer: writer.close(status))

    def _each(self, act: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                act(writer)
            except Exception as error:  # whatever a tracker raises, it must not end the training
                self._writers.remove(writer)
                _log.warning(
                    f"{writer.name} failed and is left out from now on ({type(error).__name__}: {error}). Training "
                    f"continues; metrics.jsonl has every number.",
                )


class RunLog:
    """Where a run's numbers go: metrics.jsonl, which must not fail, and the trackers, which may."""

    def __init__(self, metrics: MetricsFile, trackers: Trackers) -> None:
        self._metrics = metrics
        self._trackers = trackers

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Raises CheckpointError if the disk is full."""
        self._metrics.write(kind, step, values)
        self._trackers.write(kind, step, values)

    def flush(self) -> None:
        self._trackers.flush()

    def finish(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """An exit callback of contextlib.ExitStack."""
        self._metrics.close()
        self._trackers.finish(error)


def _named(kind: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items() if value is not None}


def check_tracking(settings: TrackingSettings, run: RunDirectory, *, is_new: bool) -> None:
    """Raises ConfigError if a tracker could not run: not installed, no account, another run's folder."""
    if settings.tensorboard is not None:
        _tensorboard_module()
    if settings.wandb == "online":
        _check_login()
    for folder, pattern in ((settings.tensorboard, "*tfevents*"), (settings.csv, "*.csv")):
        if is_new and folder is not None and any((run.path / folder).glob(pattern)):
            raise ConfigError(
                f"{run.path / folder} holds the numbers of another run. Choose another --run-dir, or another "
                f"job_name or output_path in the DeepSpeed JSON."
            )


def open_trackers(
    settings: TrackingSettings,
    run: RunDirectory,
    config: dict[str, Any],
    resume_step: int,
    reached: int,
) -> Trackers:
    """The writers that the settings ask for. metrics.jsonl is cut back to `resume_step` already.

    `config` is shown beside the curves. `reached` is the last step that was logged before this start, which lies
    beyond `resume_step` where a run was killed. Raises CheckpointError if a folder cannot be written and
    ConfigError if wandb cannot start even offline.
    """
    writers: list[Writer] = []
    if overruled := overruled_wandb_mode(settings.wandb):
        _log.log(NOTE, overruled)
    try:
        if settings.csv is not None:
            writers.append(_CsvFolder(run.path / settings.csv, resume_step))
        if settings.tensorboard is not None:
            writers.append(_TensorBoard(run.path / settings.tensorboard, resume_step))
        if settings.wandb != "off":
            writers.append(_Wandb(settings, run, config, resume_step, reached))
    except OSError as error:
        raise CheckpointError(f"Cannot write {error.filename or run.path}: {error.strerror}.") from error
    return Trackers(writers)


class _CsvFolder:
    """One file a metric, laid out as DeepSpeed's csv_monitor does: train_loss.csv with the columns step, loss."""

    name = "csv_monitor"

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._files: dict[str, TextIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.csv"):
            rows = path.read_text("utf8").splitlines(keepends=True)
            kept = [row for row in rows[1:] if row.endswith("\n") and int(row.split(",")[0]) <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(rows[:1] + kept), "utf8")
            temporary.replace(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._files:
                path = self._folder / f"{name.replace('/', '_')}.csv"
                self._files[name] = file = path.open("a", encoding="utf8", newline="", buffering=1)
                if file.tell() == 0:
                    self._row(name, "step", name.split("/")[-1])
            self._row(name, step, value)

    def _row(self, name: str, *cells: Any) -> None:
        csv.writer(self._files[name], lineterminator="\n").writerow(cells)

    def flush(self) -> None:
        """Files are line-buffered."""

    def close(self, status: int) -> None:
        for file in self._files.values():
            file.close()


def _tensorboard_module() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard")  # a second's import, for those who asked for it
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard is not installed ({error}). Install it with: pip install tensorboard"
        ) from error


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        # TensorBoard hides what earlier files of the folder say about the steps from purge_step on.
        self._writer = _tensorboard_module().SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: int) -> None:
        self._writer.close()


def _check_login() -> None:
    if not wandb_login():
        raise ConfigError(
            "wandb has no API key on this machine. Log in with: wandb login; or take --wandb offline, which needs no "
            "account, and upload later; or --wandb off."
        )


class _Wandb:
    """A wandb run that keeps its id over every resume.

    wandb drops rows whose step is not above the last one, and offline it starts again at 0. A killed run repeats the
    steps since its checkpoint, so wandb's own step is ours plus the number of steps repeated so far, which never
    falls: nothing is dropped. `step`, a value of its own and the x axis of every chart, is the true one.

    A kill takes wandb's service along, with what it had not written yet; at the next start those rows are told again
    from metrics.jsonl.
    """

    name = "wandb"

    def __init__(
        self,
        settings: TrackingSettings,
        run: RunDirectory,
        config: dict[str, Any],
        resume_step: int,
        reached: int,
    ) -> None:
        folder = run.path / "wandb"
        folder.mkdir(exist_ok=True)  # where it is missing, wandb takes the system's temporary folder
        self._state = folder / "rows.json"
        first_step, self._repeated = resume_step + 1, 0
        if before := self._read_state():
            if not before["finished"]:
                first_step = max(1, first_step - _LOST_ROWS)
            self._repeated = before["repeated"] + max(0, reached + 1 - first_step)
        self._write_state(finished=False)
        self._start(settings, run, config)
        if first_step <= resume_step:
            for line in read_metrics(run.metrics):
                if line["step"] >= first_step:
                    values = {name: value for name, value in line.items() if name not in ("kind", "step")}
                    self.write(line["step"], _named(line["kind"], values))

    def _start(self, settings: TrackingSettings, run: RunDirectory, config: dict[str, Any]) -> None:
        self._module = wandb_module()
        start = {
            "project": settings.wandb_project, "entity": settings.wandb_entity, "group": settings.wandb_group,
            "name": run.path.resolve().name, "id": settings.wandb_id, "resume": "allow", "dir": str(run.path),
            "config": config,
        }  # fmt: skip
        mode = settings.wandb
        if mode == "online":
            try:
                self._run = self._init("online", start)
            except Exception as error:  # no network, a refused key: the numbers can be uploaded later
                _log.warning(f"wandb cannot be reached ({error}). The run continues offline.")
                self._module.teardown()  # or its service would say that the id is in use
                mode = "offline"
        if mode == "offline":
            try:
                self._run = self._init("offline", start)
            except Exception as error:
                raise ConfigError(f"wandb cannot start: {error}. Train without it by --wandb off.") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            _log.info(f"wandb: {self._run.url}")
        else:
            log_command(_log, "wandb: offline; upload with:", f"wandb sync {Path(self._run.dir).parent}")

    def _init(self, mode: str, start: dict[str, Any]) -> Any:
        settings = self._module.Settings(silent=True, console="off", finish_timeout=_FINISH_WITHIN_S)
        return self._module.init(mode=mode, settings=settings, **start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step}, step=step + self._repeated)

    def flush(self) -> None:
        """wandb cannot; see _LOST_ROWS."""

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)
        self._module.teardown(exit_code=status)
        self._write_state(finished=True)

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state.read_text("utf8"))
            return {"repeated": int(state["repeated"]), "finished": bool(state["finished"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _write_state(self, *, finished: bool) -> None:
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps({"repeated": self._repeated, "finished": finished}), "utf8")
        temporary.replace(self._state)
