"""`electra-ds sweep`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.tool_options import SweepOptions
from electra_ds.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.cli.arguments import Commands
    from electra_ds.sweep.folder import SweepFolder
    from electra_ds.sweep.spec import SweepSpec
    from electra_ds.sweep.trials import Trial

_EPILOG = """\
examples:
  bin/sweep smoke
      a few minutes on a CPU: four small pretrainings, two at a time
  bin/sweep sweeps/glue_seeds.yaml --set finetune.model=runs/mini-20260101-120000 finetune.data_dir=glue/
      nine tasks, five seeds each, as many at once as the machine has room for
  bin/sweep glue_seeds --set finetune.model=google/electra-small-discriminator --dry-run
      what would be run, and what it would cost
  bin/sweep glue_seeds --set finetune.model=RUN resources.gpus=0.25 --local
      one after the other, without Ray
  bin/sweep --resume runs/sweep-glue-seeds
      what is missing, after a kill or a failure
  bin/sweep --resume runs/sweep-glue-seeds --set finetune.seeds=[0,1,2,3,4,5,6,7,8,9]
      the new seeds alone
  bin/sweep status runs/sweep-glue-seeds
  bin/report runs/sweep-glue-seeds

A sweep is a YAML file: what its trials run, what varies over them, and what one trial gets. docs/sweeps.md explains it.
"""


def add_sweep(commands: Commands) -> None:
    """Add the parser of `sweep`."""
    add_handled(commands, "sweep", SweepOptions, _EPILOG, _sweep)


_CLIENT = "ray://"


def _sweep(options: SweepOptions) -> None:
    if options.what[:1] == ["status"]:
        status_of_sweep(Path(options.what[1]), wide_console())
        return

    from electra_ds.sweep.folder import SweepFolder
    from electra_ds.sweep.options import check_arguments
    from electra_ds.sweep.ray_address import check_reachable
    from electra_ds.sweep.resources import this_machine, trials_at_once
    from electra_ds.sweep.spec import load_sweep
    from electra_ds.sweep.trials import expand

    if options.resume is not None:
        folder = SweepFolder(options.resume)
        spec = folder.read(options.overrides or ())
        if not (options.overrides or options.dry_run) and _is_finished(spec, folder):
            return
    else:
        spec = load_sweep(options.what[0], options.overrides or ())
        folder = SweepFolder(options.out or Path("runs") / f"sweep-{spec.name}")
        if not options.dry_run:
            _check_new(folder)
    if options.local and spec.search.kind == "optuna":
        raise ConfigError("Optuna's suggestions are run by Ray, so leave out --local.")
    trials = expand(spec, check_arguments, folder.now if options.resume is not None else None)
    if options.dry_run:
        _show(options, trials, spec, folder)
        return
    if options.address is None:
        trials_at_once(spec.resources, [this_machine()])
    with folder.locked():
        if options.resume is None:
            _check_new(folder)  # somebody may have begun it since
        own = folder.with_own_inputs(spec)
        if own != spec:
            spec, trials = own, expand(own, None)
        if not (options.address or "").startswith(_CLIENT):
            _run(options, trials, spec, folder)
            return
        check_reachable(str(options.address))
        folder.write(spec)
    _run_from_outside(options, folder)


def _run_from_outside(options: SweepOptions, folder: SweepFolder) -> NoReturn:
    """Have a node of the cluster continue with what is written."""
    from electra_ds.sweep.ray_client import run_from_outside

    arguments = ["--resume", str(folder.path), *(["--retry-failed"] if options.retry_failed else [])]
    arguments += ["--storage", options.storage] if options.storage else []
    arguments += ["--time-limit", f"{options.time_limit:.0f}s"] if options.time_limit else []
    raise SystemExit(run_from_outside(str(options.address), folder, arguments, sys.stdout.write))


def _check_new(folder: SweepFolder) -> None:
    if folder.exists():
        raise ConfigError(f"{folder.path} holds a sweep already. Resume it with --resume, or choose another --out.")


def _say(console: Console, line: str) -> None:
    from electra_ds.core.terminal import say

    say(console, line)


def _run(options: SweepOptions, trials: list[Trial], spec: SweepSpec, folder: SweepFolder) -> None:
    """Run what is missing, and say what the sweep has come to. Exits with 1 where a trial has not come to its end."""
    from electra_ds.sweep.display import SweepDisplay
    from electra_ds.sweep.folder import AS_PLANNED, ENDED
    from electra_ds.sweep.options import check_arguments
    from electra_ds.sweep.report import report_sweep
    from electra_ds.sweep.trials import counted, suggested

    console = wide_console()
    before = _suggested_before(spec, folder)
    known = [*trials, *before]
    again = {"failed"} if options.retry_failed else set()
    states = {trial.key: folder.state_of(trial)[0] for trial in known}
    missing = [trial for trial in known if states[trial.key] not in ENDED or states[trial.key] in again]
    more = max(0, spec.search.samples - len(before)) if spec.search.kind == "optuna" else 0
    before_failed = sum(state == "failed" for state in states.values()) if not again else 0
    done = len(known) - len(missing) - before_failed
    failed = f", {before_failed} that failed" if before_failed else ""
    _say(console, f"{spec.name}: {counted(len(known) + more)}, {done} done before{failed}; in {folder.path}")
    if missing or more:
        if spec.description:
            _say(console, spec.description)
        _say_what_is_read(spec, console)

    def begin() -> None:
        """Once nothing can refuse it any more."""
        folder.write(spec)
        for trial in missing:
            folder.forget_failure(trial.key)

    folder.forget_stop()
    is_cut = False
    """Whether there would have been more suggestions."""
    display = SweepDisplay(console, folder, len(missing) + more, at_once=1)
    display.expect([trial.stage for trial in missing] + list(spec.stages)[-1:] * more)
    if options.local:
        from electra_ds.sweep.local import run_locally

        if spec.scheduler is not None:
            _say(console, f"Without Ray there is no {spec.scheduler.kind}: every trial is run to its end.")
        begin()
        with display:
            run_locally(missing, folder, spec, display, options.time_limit)
    elif missing or more:
        from electra_ds.sweep.tune import ray_runner

        address, storage, limit = options.address, options.storage, options.time_limit
        with ray_runner(folder, spec, display, address=address, storage=storage, time_limit_s=limit) as runner, display:
            begin()
            runner.run(missing)
            if more:
                runner.suggest(before, lambda config: suggested(spec, config, check_arguments, folder.now))
                is_cut = folder.wants_to_stop()
    else:
        begin()
    trials = [*trials, *_suggested_before(spec, folder)]
    table = report_sweep(folder, trials, spec, console, has_more=is_cut)
    if is_cut or not table["state"].isin(AS_PLANNED).all():
        raise SystemExit(1)


def _is_finished(spec: SweepSpec, folder: SweepFolder) -> bool:
    """Return whether nothing of a sweep is left to run. If so, print that, with the results of the sweep."""
    from electra_ds.sweep.folder import AS_PLANNED
    from electra_ds.sweep.report import report_sweep
    from electra_ds.sweep.trials import counted, expand

    suggested = _suggested_before(spec, folder)
    trials = [*expand(spec, None), *suggested]
    has_all = spec.search.kind != "optuna" or len(suggested) >= spec.search.samples
    if not has_all or not all(folder.state_of(trial)[0] in AS_PLANNED for trial in trials):
        return False
    console = wide_console()
    done = f"{spec.name}: {counted(len(trials))}, {len(trials)} done before; in {folder.path}"
    _say(console, f"{done}. The sweep is finished: nothing is left to run. Use --set to add seeds or values.")
    report_sweep(folder, trials, spec, console)
    return True


def _suggested_before(spec: SweepSpec, folder: SweepFolder) -> list[Trial]:
    from electra_ds.sweep.trials import recorded

    return recorded(spec, [record.values for record in folder.records()])


def status_of_sweep(path: Path, console: Console) -> None:
    """Print what a sweep has come to so far, and write its tables and pictures; what it read may be gone by now."""
    from electra_ds.sweep.folder import SweepFolder
    from electra_ds.sweep.report import report_sweep
    from electra_ds.sweep.trials import expand

    folder = SweepFolder(path)
    spec = folder.read()
    trials = [*expand(spec, None), *_suggested_before(spec, folder)]
    report_sweep(folder, trials, spec, console, is_running=folder.is_being_run())


def _show(options: SweepOptions, trials: Sequence[Trial], spec: SweepSpec, folder: SweepFolder) -> None:
    from electra_ds.sweep.forecast import print_plan
    from electra_ds.sweep.resources import this_machine, trials_at_once
    from electra_ds.sweep.trials import ends

    console, at_once, problem = wide_console(), 1, ""
    if options.address is None:
        try:
            room = trials_at_once(spec.resources, [this_machine()])
            at_once = 1 if options.local else room
        except ConfigError as error:  # this need not be the machine that it will run on
            problem = str(error)
    is_suggested = spec.search.kind == "optuna"
    before = _suggested_before(spec, folder)
    suggested = max(0, spec.search.samples - len(before)) if is_suggested else 0
    print_plan([*trials, *before], spec, folder, at_once, console, ends=ends(spec), suggested=suggested)
    if problem:
        _say(console, f"On this machine it would be refused: {problem}")
    _say_what_is_read(spec, console)


def _say_what_is_read(spec: SweepSpec, console: Console) -> None:
    """Nobody is to find out after a day that it was the documentation of Python."""
    stage = spec.pretrain
    if stage is None or any(key in given for key in ("corpus", "data") for given in (stage.options, stage.space)):
        return
    if not all({"corpus", "data"} & set(settings) for settings in stage.variants.values() or [{}]):
        _say(
            console,
            "The text is the built-in corpus of some 6 M tokens. For your own, set pretrain.corpus or pretrain.data.",
        )
