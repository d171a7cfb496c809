"""The commands that prepare a run: `electra-ds build-data`, `plan`, `recipes` and `doctor`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, wide_console
from electra_ds.config.commands import BuildDataOptions, DoctorOptions, PlanOptions, PluginsOptions, RecipesOptions
from electra_ds.config.names import (
    CPU_RECIPE,
    FINETUNE_RECIPE,
    FINETUNE_RECIPES,
    GPU_RECIPE,
    OWN_RECIPE,
    RECIPES,
    finetune_recipe_names,
    recipe_names,
    shipped_names,
    shipped_text,
)
from electra_ds.core.errors import ConfigError, did_you_mean
from electra_ds.core.program import as_called, command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_BUILD_DATA_HELP = """\
examples:
  bin/build-data --corpus my_texts/ --recipe rc2020-small --out stores/mine
      trains the recipe's tokenizer on the text and tokenises it
  bin/build-data --corpus dump.jsonl.zst --text-key body --tokenizer vocab.txt --out stores/dump
  bin/build-data --corpus 'hub:wikimedia/wikipedia#20231101.en' --streaming --corpus books/ --out stores/both \\
      --tokenizer google-bert/bert-base-multilingual-cased
  bin/build-data --corrupt stores/mine --recipe fast-electra-small --init-from runs/generator --out stores/offline
      draws the replacements of all steps of a Fast-ELECTRA run, which then does not run the generator

Each --corpus is one source of text, and data.corpus_weights has one number for each. A source is a list of files and
folders (read recursively), `builtin`, or hub:NAME#CONFIG@SPLIT, a dataset on the Hugging Face Hub (the default split is
`train`; a local folder in the Hub's layout is hub:./FOLDER). Files are text (one document each, or --document-boundary
blank-line), JSON lines, WikiExtractor's <doc> files, each also as .gz, .bz2, .xz or .zst, and Parquet; a folder may
also be a dataset that save_to_disk wrote. To resume an interrupted build, run the command again.
"""
_INTERRUPTED = "Interrupted. Finished work is kept; to resume, run the same command again."
_PLAN_HELP = """\
examples:
  bin/plan                                                what bin/pretrain would run on this machine
  bin/plan --recipe rc2020-small --ds-config gtx1060-6gb
      memory by part, the micro-batch that fits a GTX 1060, days, and the features that the card lacks
  bin/plan --card "RTX 4090"                              the default recipe and JSON of bin/pretrain on that card
  bin/plan --card cpu --recipe mini                       time and memory on this machine's CPU
  bin/plan --ds-config gtx1060-6gb --card "RTX 2060"      the same JSON on another card
  bin/plan --ds-config zero1 --card "RTX 3090" --ranks 4  each of four cards
  bin/plan --ds-config gtx1060-6gb --memory-gb 3.5        a card with 3.5 GiB of free memory
  bin/plan --all --recipe rc2020-small                    every card; without --recipe, each of ELECTRA's recipes

The command trains nothing and needs no GPU. It computes memory from the sizes of tensors. Time is a range: on a card,
the roofline of a step times the factors by which published runs differ from such rooflines; on this machine's CPU, the
recipe's FLOPs and operations at rates measured in a fifth of a second. The exit status is 1 if the plan does not fit.
"""
_RECIPES_HELP = """\
examples:
  bin/recipes
      all recipes, one per line
  bin/recipes tiny > mine.yaml
      a copy to edit; then: bin/pretrain --recipe mine.yaml

A file may also contain only its changes to another recipe, which it names or gives by path:
  extends: rc2020-small
  schedule: {total_steps: 100000, warmup_share: 0.01}
"""
_DOCTOR_HELP = """\
example:
  bin/doctor
      versions, memory, GPUs, and one real training step in each precision; exit status 0 if pretraining can run
"""

_PLUGINS_HELP = """\
example:
  bin/plugins
      what can be used by name, and where it comes from; exit status 1 if something cannot be loaded

A package registers a name with an entry point in the group electra_ds.objectives or electra_ds.callbacks. What is not
registered is given as module:Class: --set objective=my_package.objective:MyObjective
"""


def add_preparing(commands: Commands) -> None:
    """Add the parsers of `build-data`, `plan`, `recipes`, `doctor` and `plugins`."""
    add_handled(commands, "build-data", BuildDataOptions, _BUILD_DATA_HELP, _build_data)
    add_handled(commands, "plan", PlanOptions, _PLAN_HELP, _plan)
    add_handled(commands, "recipes", RecipesOptions, _RECIPES_HELP, _recipes)
    add_handled(commands, "doctor", DoctorOptions, _DOCTOR_HELP, _doctor)
    add_handled(commands, "plugins", PluginsOptions, _PLUGINS_HELP, _plugins)


def _build_data(options: BuildDataOptions) -> None:
    from rich.console import Console

    from electra_ds.api.stores import build_data
    from electra_ds.config.recipe import load_recipe
    from electra_ds.core.terminal import note, say, say_command

    console = Console()
    if options.corrupt is not None:
        from electra_ds.api.corrupt import corrupt_data

        try:
            found = corrupt_data(options.corrupt, options.out, options=options)
        except KeyboardInterrupt:
            print(_INTERRUPTED, file=sys.stderr)
            raise
        assert found.replacements is not None
        folder = found.replacements.folder
        say(console, f"{folder}: replacements for {found.replacements.info.steps:,} steps.")
        train = f"{command('pretrain')} --recipe {folder}/recipe.yaml --data {found.path}"
        if load_recipe(folder / "recipe.yaml").required_weights is not None:
            train += f" --init-from {options.init_from}"
        if options.eval_windows is not None:
            train += f" --eval-windows {options.eval_windows}"
        say_command(console, "Train on it with:", train)
        return
    recipe = load_recipe(options.recipe or GPU_RECIPE, options.overrides or ())
    try:
        assert options.corpus is not None
        store = build_data(options.corpus, options.out, options=options)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        raise
    info = store.info
    say(
        console,
        f"{store.path}: {info.num_documents:,} documents, {info.num_tokens:,} tokens, vocabulary {info.vocab_size:,} "
        f"({info.dtype}, {sum(info.file_bytes.values()) / 1e6:,.1f} MB).",
    )
    wanted = recipe.tokenizer.vocab_size
    if options.tokenizer is None and info.vocab_size < wanted:
        note(
            console,
            f"the text is too short for the recipe's {wanted:,} tokens, so the vocabulary has {info.vocab_size:,}",
        )
    recipe_argument = f" --recipe {options.recipe}" if options.recipe else ""
    say_command(console, "Train on it with:", f"{command('pretrain')} --data {store.path}{recipe_argument}")


def _plan(options: PlanOptions) -> None:
    from electra_ds.api.plan import run_plan
    from electra_ds.config.recipe import load_recipe
    from electra_ds.report.forecast import as_json, forecast_all, forecast_report, forecasts_table

    console = wide_console()
    if options.all:
        if options.recipe is None:
            recipes = [recipe for recipe in map(load_recipe, recipe_names()) if recipe.objective == "electra"]
        else:
            recipes = [load_recipe(options.recipe, options.overrides or ())]
        forecasts = forecast_all(recipes)
        if options.json:
            console.print_json(data=[as_json(found) for found in forecasts])
        else:
            console.print(forecasts_table(forecasts))
        return
    found = run_plan(options)
    if options.json:
        console.print_json(data=as_json(found))
    else:
        for part in forecast_report(found):
            console.print(part, highlight=False)
    if found.fits is False:
        raise SystemExit(1)


_KINDS = {
    RECIPES: "pretraining, bin/pretrain --recipe NAME",
    FINETUNE_RECIPES: "finetuning, bin/finetune --recipe NAME",
}
_DEFAULTS = {
    GPU_RECIPE: " (default with a GPU)", CPU_RECIPE: " (default without a GPU)",
    FINETUNE_RECIPE: " (default with --task)", OWN_RECIPE: " (default with --train)",
}  # fmt: skip


def _recipes(options: RecipesOptions) -> None:
    if options.name is not None:
        print(full_text(options.name), end="")
        return

    from rich.console import Console

    from electra_ds.config.recipe import named_values
    from electra_ds.core.terminal import say

    console = Console()
    for folder, kind in _KINDS.items():
        say(console, as_called(f"{kind}:"))
        for name in shipped_names(folder):
            say(console, f"  {name:21}{named_values(name, folder)['description']}{_DEFAULTS.get(name, '')}")


def full_text(name: str) -> str:
    """Return a shipped recipe's file, followed by comments that list the values it leaves at their defaults."""
    folder = next((folder for folder in _KINDS if name in shipped_names(folder)), None)
    if folder is None:
        known = [*recipe_names(), *finetune_recipe_names()]
        hint = did_you_mean(name, known) or "."
        raise ConfigError(f"There is no recipe '{name}'{hint} The recipes are {', '.join(known)}.")

    from electra_ds.config.finetune_recipe import FinetuneRecipe
    from electra_ds.config.recipe import Recipe, named_values, validate_recipe
    from electra_ds.config.values import RECIPE_KEYS, dotted_values, values_yaml

    values = named_values(name, folder)
    values.pop("by_task", None)
    kind = Recipe if folder == RECIPES else FinetuneRecipe
    given = {key for key, _ in dotted_values(values)}
    if "schedule.warmup_share" in given:
        given.add("schedule.warmup_steps")  # computed from warmup_share
    complete = dotted_values(validate_recipe(values, name, kind).model_dump())
    rest = [
        "#   " + values_yaml({key: value}).strip()
        for key, value in complete
        if key not in given and not key.startswith(tuple(f"{each}." for each in RECIPE_KEYS))
    ]
    return shipped_text(folder, name).rstrip() + "\n" + "\n".join(["# Left at their defaults:", *rest]) + "\n"


def _doctor(options: DoctorOptions) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from electra_ds.core.terminal import say_command
    from electra_ds.pretraining.doctor import doctor

    found, console = doctor(), Console()
    if options.json:
        console.print_json(data=asdict(found))
    else:
        signs = {"fine": Text("✓", "green"), "note": Text("–", "yellow"), "wrong": Text("✗", "red")}
        table = Table(show_header=False, box=None, padding=(0, 1))
        for finding in found.findings:
            text = finding.found + (f"  ({finding.meaning})" if finding.meaning else "")
            table.add_row(signs[finding.state], finding.what, Text(text))
        console.print(table, highlight=False)
        console.print()
        for finding in found.findings:
            if finding.fix is not None:
                say_command(console, f"To fix {finding.what}:", finding.fix)
        can, cannot = "[green]Pretraining can run here.[/]", "[red]Pretraining cannot run here yet.[/]"
        console.print(can if found.can_pretrain else cannot, highlight=False)
    if not found.can_pretrain:
        raise SystemExit(1)


def _plugins(options: PluginsOptions) -> None:
    from rich.markup import escape
    from rich.table import Table

    from electra_ds.config.plugins import parts

    console, found = wide_console(), list(parts())
    table = Table("kind", "name", "from", box=None, padding=(0, 2, 0, 0))
    for part in found:
        table.add_row(part.kind.name, part.name, " and ".join(part.places))
    console.print(table, highlight=False)
    problems = [part.problem for part in found if part.problem]
    for problem in problems:
        console.print(f"\n[red]✗[/] {escape(problem)}", highlight=False)
    if problems:
        raise SystemExit(1)
