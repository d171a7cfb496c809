"""`electra-ds finetune`."""

from __future__ import annotations

import argparse
import contextlib
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import (
    add_command,
    add_launcher_arguments,
    add_overrides,
    add_plan_arguments,
    add_seed,
    add_tracking,
    check_seed,
    positive,
    with_seed,
)
from electra_ds.cli.asking import ask_before_years, say_dry_run
from electra_ds.config.shipped import FINETUNE_RECIPE, OWN_RECIPE, TASKS, finetune_recipe_names
from electra_ds.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from electra_ds.cli.arguments import Commands
    from electra_ds.config.finetune_recipe import FinetuneRecipe
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.config.run_record import TaskSource
    from electra_ds.core.ranks import Ranks
    from electra_ds.finetuning.finetune import FinetuneJob
    from electra_ds.finetuning.prepare import FinetuneOptions

_STARTED = time.monotonic()
_EPILOG = f"""\
examples:
  bin/finetune --model runs/mini-20260101-120000 --task mrpc --data-dir glue/ --seed 3
      glue/ holds the folders of gluebenchmark.com's downloads: CoLA, MRPC, STS-B, …
  bin/finetune --model google/electra-small-discriminator --task sts-b
      model and data from the Hugging Face Hub
  bin/finetune --model export/discriminator --task cola --data-dir glue/ --recipe original
  bin/finetune --model google-bert/bert-base-uncased --task squad1 --data-dir squad/ --set optimizer.learning_rate=1e-4
  bin/finetune --model runs/mini-20260101-120000 --train reviews.csv --dev held_out.csv --text review --label stars
      your own classification or regression, CSV, TSV or JSON lines
  bin/finetune --resume runs/mrpc-rc2020-s3-20260101-120000
  bin/report runs/mrpc-* runs/cola-*
      mean and standard deviation over the seeds, AVG and GLUE

tasks: {", ".join(TASKS)}
AX, GLUE's diagnostic set, has no training examples: mnli with --predict-test predicts it.

recipes: own trains for at least 500 steps, however few the examples are. bin/export writes a transformers model with
the head of own, and with that of original except for SQuAD. rc2020 averages over the tokens, which no class of
transformers does, so bin/export writes only the encoder of its models.

The scores of a run are in RUN/scores.json, the predictions in RUN/predictions/, and with --predict-test those of the
test sets in RUN/submission/, in the files that GLUE's site takes; bin/report --submission zips them.
"""
_OF_OWN = ("train", "dev", "test", "text", "pair", "label", "label_kind")
_NEW_RUN_ONLY = (
    "task", "seed", "recipe", "overrides", "hub", "revision", "text", "pair", "label", "label_kind", "random_init",
    "max_train_examples", "run_dir",
)  # fmt: skip
"""The other options may be given with --resume: they say where something is now that has moved."""


def add_finetune(commands: Commands) -> None:
    """The parser of `finetune`."""
    command = add_command(commands, "finetune", "Finetune an encoder on GLUE, SQuAD or a task of your own.", _EPILOG)
    command.set_defaults(handler=_finetune)
    what = command.add_argument_group("what to train")
    what.add_argument(
        "--model", metavar="RUN|FOLDER|HUB",
        help="the encoder: a run of bin/pretrain or bin/finetune, a transformers folder, or a name on the Hub",
    )  # fmt: skip
    what.add_argument("--task", type=_task, metavar="TASK", help="one of those below")
    add_seed(what, "of the head, the order of the examples and dropout")
    names = ", ".join(finetune_recipe_names())
    what.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"{names}, or a YAML file (default: {FINETUNE_RECIPE} with --task, {OWN_RECIPE} with --train)",
    )  # fmt: skip
    add_overrides(what, "schedule.epochs=5 head.pooling=first")
    what.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this directory")
    what.add_argument(
        "--random-init", action="store_true",
        help="the model's shape and tokenizer, but random weights by the seed: what pretraining is compared with",
    )  # fmt: skip
    what.add_argument("--max-train-examples", type=positive, metavar="N", help="train on N examples (default: all)")
    data = command.add_argument_group(
        "where the examples come from (default: the Hub)",
        "With --resume, --data-dir, --train, --dev and --test say where the run's own examples are now; --model says "
        "where its encoder is, which only a run without a checkpoint needs.",
    )
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="official files: GLUE's folders, or SQuAD's JSON")
    data.add_argument("--hub", metavar="NAME", help="a data set on the Hub, laid out as nyu-mll/glue or squad")
    data.add_argument("--revision", metavar="REV", help="commit, branch or tag of the data set on the Hub")
    data.add_argument("--train", type=Path, metavar="FILE", help="your own training examples: .csv, .tsv or .jsonl")
    data.add_argument("--dev", type=Path, metavar="FILE", help="your own examples to score by")
    data.add_argument(
        "--test", type=Path, metavar="FILE", help="your own examples to predict at the end; labels are optional"
    )
    data.add_argument("--text", metavar="COLUMN", help="the text (default: the first of text, sentence, sentence1, …)")
    data.add_argument("--pair", metavar="COLUMN", help="the second text, where there is one")
    data.add_argument("--label", metavar="COLUMN", help="the label (default: the first of label, labels, score, …)")
    data.add_argument(
        "--label-kind", choices=("classification", "regression"), help="default: regression where labels are no classes"
    )
    add_launcher_arguments(command)
    how = command.add_argument_group("how to run it")
    add_plan_arguments(
        how, "runs/TASK-RECIPE-sSEED-TIME",
        "inputs at a time, in place of the JSON's; auto: a rank's whole share, or less where memory runs out",
    )  # fmt: skip
    how.add_argument(
        "--eval-every", type=positive, metavar="STEPS",
        help="default: an epoch, or a tenth of the recipe's schedule.min_steps if that is more",
    )  # fmt: skip
    how.add_argument("--save-every", type=positive, metavar="STEPS", help="default: 500")
    how.add_argument("--keep", type=positive, metavar="N", help="checkpoints to retain (default: 1)")
    how.add_argument(
        "--discard-weights", action="store_true", default=None,
        help="remove the checkpoints once the run is done; scores and predictions stay",
    )  # fmt: skip
    how.add_argument(
        "--predict-test", action="store_true", default=None,
        help="predict the test sets too, and write GLUE's files; with --resume for a finished run as well",
    )  # fmt: skip
    choice = command.add_argument_group("choices by the development set, whose scores are then no test any more")
    choice.add_argument(
        "--early-stopping", type=positive, metavar="N", help="end after N evaluations without a better score"
    )
    choice.add_argument(
        "--best", action="store_true", default=None, help="keep and score the best evaluation's weights, not the last"
    )
    add_tracking(command.add_argument_group("where to watch it (metrics.jsonl is always written)"))


def _task(text: str) -> str:
    """Under the names of the Hub too, `stsb` and `sst2`."""
    plain = {task.replace("-", ""): task for task in TASKS}
    task = plain.get(text.lower().replace("-", "").replace("_", ""))
    if task is None:
        raise argparse.ArgumentTypeError(
            f"there is no task {text!r}{did_you_mean(text.lower(), TASKS) or '.'} They are {', '.join(TASKS)}"
        )
    return task


def _finetune(options: argparse.Namespace) -> None:
    check_arguments(options)

    from electra_ds.config.finetune_recipe import load_finetune_recipe

    recipe = None
    if not options.resume:
        recipe = load_finetune_recipe(_recipe_name(options), options.task or "", with_seed(options))

    from rich.console import Console

    from electra_ds.cli.progress import ConsoleDisplay
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.core.log import show_log
    from electra_ds.core.ranks import join_ranks
    from electra_ds.finetuning import prepare
    from electra_ds.finetuning.finetune import discard_weights, finetune
    from electra_ds.pretraining import prepare as runs

    if options.test is not None:
        options.predict_test = True
    names = prepare.FinetuneOptions.__dataclass_fields__
    wanted = prepare.FinetuneOptions(**{name: getattr(options, name, None) for name in names})
    with join_ranks() as ranks, contextlib.ExitStack() as held:
        console = Console(quiet=not ranks.is_main)
        show_log(console)
        run = RunDirectory(ranks.broadcast(_run_path(options, recipe)))
        if recipe is None and prepare.is_finished(wanted, run, ranks):
            prepare.say_finished(run, console)
            return
        if recipe is not None:
            job = _new_job(options, wanted, recipe, run, ranks, console)
        else:
            with ranks.together():
                job = prepare.prepare_resume(wanted, run, ranks, console)
        prepare.check_same_examples(job, ranks)
        if options.dry_run:
            prepare.announce(job, console)
            say_dry_run(prepare.run_time(job, ranks), job.stop_at, console)
            return
        if recipe is not None:
            shorter = "Choose a smaller --model, or fewer examples with --max-train-examples N."
            ask_before_years(options, lambda: prepare.run_time(job, ranks), shorter, ranks)
        runs.hold(run, ranks, held, is_new=recipe is not None)
        prepare.announce(job, console)
        time_limit = None if options.time_limit is None else options.time_limit - (time.monotonic() - _STARTED)
        if finetune(job, ranks, time_limit, [ConsoleDisplay(console)]) and ranks.is_main:
            prepare.say_end(job, console)
            if run.status() == "done" and job.record.settings.discard_weights:
                discard_weights(run)


def _recipe_name(options: argparse.Namespace) -> str:
    name: str | None = options.recipe
    return name or (OWN_RECIPE if options.task is None else FINETUNE_RECIPE)


def _new_job(
    options: argparse.Namespace,
    wanted: FinetuneOptions,
    recipe: FinetuneRecipe,
    run: RunDirectory,
    ranks: Ranks,
    console: Console,
) -> FinetuneJob:
    from electra_ds.config.finetune_recipe import Finetuning, recipe_source
    from electra_ds.finetuning import prepare
    from electra_ds.finetuning.encoder_source import read_encoder
    from electra_ds.finetuning.loaded_task import load_task
    from electra_ds.finetuning.tasks import TaskData
    from electra_ds.pretraining import prepare as runs

    source = task_source(options)
    for is_turn in (ranks.is_main, not ranks.is_main):  # what the first one downloads, the others find
        with ranks.together():
            if not is_turn:
                continue
            run.check_free()
            loaded = load_task(options.task, source)
            encoder = read_encoder(options.model)
            if isinstance(loaded.data, TaskData):  # a JSON that cannot be used is told of before tokenising begins
                count = prepare.num_training_inputs(loaded.data, recipe, options.max_train_examples)
                runs.plan_for(wanted, Finetuning(recipe, count, encoder.num_layers), ranks)
    with ranks.together():
        return prepare.prepare_new(
            wanted, options.task, loaded, source, encoder, recipe, run, ranks, console,
            has_random_weights=options.random_init,
            source_of_recipe=recipe_source(_recipe_name(options)), changes=_changes(options),
        )  # fmt: skip


def task_source(options: argparse.Namespace) -> TaskSource:
    """Where the examples are."""
    from electra_ds.config.run_record import TaskSource

    return TaskSource(
        folder=_full(options.data_dir), hub=options.hub, revision=options.revision,
        train=_full(options.train), dev=_full(options.dev), test=_full(options.test),
        text=options.text, pair=options.pair, label=options.label, label_kind=options.label_kind or "auto",
    )  # fmt: skip


def _changes(options: argparse.Namespace) -> list[str]:
    """What tells runs of one recipe apart that are not repetitions of each other."""
    changes = sorted(override for override in options.overrides if override.partition("=")[0] != "seed")
    if options.max_train_examples is not None:
        changes.append(f"{options.max_train_examples} training examples")
    return changes


def _full(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _run_path(options: argparse.Namespace, recipe: FinetuneRecipe | None) -> Path:
    if options.resume or options.run_dir:
        path: Path = options.resume or options.run_dir
        return path
    assert recipe is not None
    task = options.task or options.train.stem
    return Path("runs") / f"{task}-{recipe.name}-s{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"


def check_arguments(options: argparse.Namespace) -> None:
    """Raise ConfigError if arguments cannot go together."""
    if options.resume is not None:
        values = {name: getattr(options, name) for name in _NEW_RUN_ONLY}
        given = [name for name, value in values.items() if value is not None and value is not False and value != []]
        if given:
            flags = ", ".join("--" + name.replace("overrides", "set").replace("_", "-") for name in given)
            raise ConfigError(f"--resume takes task, model and recipe from the run, so leave out {flags}.")
        return
    if options.model is None:
        raise ConfigError("Say what to finetune with --model: a run, a transformers folder, or a name on the Hub.")
    check_seed(options)
    if options.task is None:
        _check_own(options)
        return
    of_own = [name for name in _OF_OWN if getattr(options, name) is not None]
    if of_own:
        raise ConfigError(
            f"--{of_own[0].replace('_', '-')} is for examples of your own, and --task {options.task} has others. Leave "
            f"--task out for your own; for official files there is --data-dir."
        )
    if options.data_dir is not None and (options.hub is not None or options.revision is not None):
        raise ConfigError("--hub and --revision are for data sets of the Hub, and --data-dir is given.")


def _check_own(options: argparse.Namespace) -> None:
    if options.train is None and options.dev is None:
        raise ConfigError("Say what to finetune on: --task TASK, or your own examples with --train and --dev.")
    if options.train is None or options.dev is None:
        lacking = "--dev FILE, the examples to score by," if options.dev is None else "--train FILE"
        raise ConfigError(f"Your own examples need {lacking} too.")
    if any(given is not None for given in (options.data_dir, options.hub, options.revision)):
        raise ConfigError(
            "--data-dir, --hub and --revision are for --task; your own examples are given with --train and --dev."
        )
