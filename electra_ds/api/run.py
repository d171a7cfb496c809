"""A run in Python: its configuration, its progress and its measurements."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory, Status
from electra_ds.config.run_record import FinetuneRecord, RunRecord
from electra_ds.core.errors import CheckpointError
from electra_ds.core.program import command
from electra_ds.training.checkpoint import CheckpointFolder
from electra_ds.training.checkpoints import CheckpointInfo, checkpoints_to_verify, list_checkpoints, prune, verify

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from electra_ds.report.tables import Report


class Run:
    """The run directory of a pretraining or a finetuning. Every property reads the current files.

    >>> from electra_ds import Run
    >>> run = Run("runs/mine")
    >>> run.kind, run.status
    ('pretrain', 'done')
    >>> len(run.metrics.query("kind == 'train'"))
    6
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._directory = RunDirectory(self.path)

    def __fspath__(self) -> str:
        """The run's directory, so that it can be given wherever a path is."""
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """True if a run was started here; a dry run starts none."""
        return self._directory.exists()

    @property
    def kind(self) -> str:
        """`pretrain` or `finetune`. Raises CheckpointError if there is no run, as do the properties below."""
        return self._directory.kind()

    @property
    def status(self) -> Status | None:
        """The status: `done`, `stopped`, `collapsed` or `failed`; None if the run has not ended."""
        status = self._directory.status()
        if status is None:
            self._directory.kind()  # raises CheckpointError if there is no run
        return status

    @property
    def recipe(self) -> Recipe | FinetuneRecipe:
        """The complete recipe."""
        if self.kind == "finetune":
            return self._directory.read_recipe(FinetuneRecipe)
        return self._directory.read_recipe()

    @property
    def record(self) -> RunRecord | FinetuneRecord:
        """The content of run.json: settings, hardware, data and versions."""
        if self.kind == "finetune":
            return self._directory.read_record(FinetuneRecord)
        return self._directory.read_record()

    @property
    def metrics(self) -> pd.DataFrame:
        """One row for each logged step and each evaluation; the column `kind` distinguishes them."""
        import pandas as pd

        from electra_ds.config.run_directory import read_metrics

        self._directory.kind()
        path = self._directory.metrics
        return pd.DataFrame(read_metrics(path) if path.exists() else [])

    @property
    def scores(self) -> dict[str, Any]:
        """The content of a finished finetuning's scores.json: `scores["sets"]` has each set's metrics."""
        try:
            found: dict[str, Any] = json.loads((self.path / "scores.json").read_text("utf8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} has no scores; only a finished finetuning has them.") from error
        return found

    @property
    def checkpoints(self) -> list[Path]:
        """The published checkpoints, oldest first."""
        self._directory.kind()
        return CheckpointFolder(self._directory.checkpoints, keep=1).paths()

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Describe each checkpoint, oldest first: step, tokens, size, precision, and problems that sizes reveal."""
        return list_checkpoints(self.path)

    def verify_checkpoints(self) -> dict[Path, str | None]:
        """Read every byte of every checkpoint; return each one's problem, or None if it is complete."""
        found = {}
        for path in checkpoints_to_verify(self.path):
            with contextlib.suppress(FileNotFoundError):  # the run has pruned it in the meantime
                found[path] = verify(path)
        return found

    def prune_checkpoints(
        self, keep: int | None = None, *, damaged: bool = False, dry_run: bool = False
    ) -> dict[Path, str]:
        """Remove old checkpoints and the leftovers of interrupted saves; return the removed paths with the reasons.

        keep: the number of newest checkpoints to keep; by default the run's setting. damaged: also remove checkpoints
        that were set aside as damaged. dry_run: only return the paths.
        """
        return dict(prune(self.path, keep, damaged=damaged, dry=dry_run))

    def report(self, data: str | Path | None = None) -> Report:
        """Return the results, for `print`. For a pretraining, also write summary.txt, curves.png and samples.txt.

        data: the current place of a pretraining's token store, if it has moved.
        """
        if self.kind == "finetune":
            from electra_ds.report.scores import report_scores

            return report_scores([self.path])

        from electra_ds.report.run_report import report_run
        from electra_ds.report.tables import Line

        report = report_run(self._directory, None if data is None else Path(data))
        resume = Line("To resume:", command=f"{command('pretrain')} --resume {self.path}")
        return replace(report, parts=[*report.parts, resume]) if self.status == "stopped" else report

    def resume(self, **options: Any) -> Run:
        """Resume the run, with any option that `pretrain` or `finetune` accepts together with `resume`."""
        if self.kind == "finetune":
            from electra_ds.api.finetune import finetune

            return finetune(resume=self.path, **options)

        from electra_ds.api.pretrain import pretrain

        return pretrain(resume=self.path, **options)
