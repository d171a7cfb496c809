"""One attempt at a trial: what its command line is now, and what came of it."""

from __future__ import annotations

from dataclasses import replace

from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.trials import Trial

_HOW = ("ds_config", "micro_batch", "log_every", "keep")
"""Options that a resumed run takes anew, since they are not of its mathematics."""


def arguments_of(trial: Trial, folder: SweepFolder, spec: SweepSpec) -> list[str]:
    """Return the arguments of the trial's command: for a new run, or to resume one that is there.

    Raises CheckpointError if the encoder is not there that it is to finetune.
    """
    run, threads = folder.run(trial.key), spec.resources.cpus
    if run.exists():
        how = {name: trial.options[name] for name in _HOW if trial.options.get(name) is not None}
        flags = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return ["--resume", str(run.path), *flags, *trial.ending(), "--threads", str(threads)]
    arguments = replace(trial, options=folder.now(trial.stage, trial.options)).arguments(threads)
    if trial.options.get("wandb") not in (None, False, "off") and trial.options.get("wandb_group") is None:
        arguments += ["--wandb-group", spec.name]
    if trial.pretraining is not None:
        arguments = ["--model", str(folder.encoder_of(trial)), *arguments]
    return [*arguments, "--run-dir", str(run.path)]
