"""`electra-ds checkpoint`: what can be done with checkpoints beside training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_command, add_overrides, micro_batch
from electra_ds.cli.checkpoint_folder import add_ls, add_prune, add_verify
from electra_ds.cli.pretrain import check_arguments
from electra_ds.cli.stores import add_corpus_arguments, gives_corpus, open_store
from electra_ds.config.shipped import DS_CONFIG_NOTE, ds_config_names, recipe_names
from electra_ds.core.errors import ConfigError

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
examples:
  bin/checkpoint ls runs/tiny-20260101-120000
  bin/checkpoint verify runs/tiny-20260101-120000
  bin/checkpoint prune runs/tiny-20260101-120000 --keep 1
  bin/checkpoint import their_checkpoint/ --run-dir runs/theirs --ds-config cpu --recipe their_recipe.yaml \\
      --data stores/theirs
  bin/checkpoint import --help
"""
_IMPORT_EPILOG = """\
examples:
  bin/checkpoint import out/ --run-dir runs/back --ds-config ds_configs/rtx3090-24gb.json
      our own export (bin/export --to deepspeed), perhaps trained further elsewhere: with the recipe and data of its run
  bin/checkpoint import theirs/global_step40 --run-dir runs/theirs --ds-config cpu --recipe electra-small \\
      --set schedule.total_steps=100000 --data stores/theirs
      a checkpoint of someone's own script; its ZeRO stage and number of ranks may differ from those here
  bin/pretrain --resume runs/theirs

NATIVE is what DeepSpeed's engine.save_checkpoint wrote, or what its ds_to_universal made of it: the folder that holds
the file `latest` or `latest_universal`, or one of its tag folders. Its parameters are named as in electra_ds's joint
module, or as in a joint module of transformers' ElectraForMaskedLM and ElectraForPreTraining. Such files are pickles;
only tensors and numbers are loaded from them, and nothing that they call is run.
"""


def add_checkpoint(commands: Commands) -> None:
    """The parser of `checkpoint` and its actions."""
    command = add_command(
        commands, "checkpoint", "List, verify and prune a run's checkpoints, or bring in DeepSpeed's own.", _EPILOG
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_ls(actions)
    add_verify(actions)
    add_prune(actions)
    _add_import(actions)


def _add_import(actions: Commands) -> None:
    action = add_command(
        actions, "import", "Make a run of a native DeepSpeed checkpoint, to be resumed.", _IMPORT_EPILOG
    )
    action.set_defaults(handler=_import, resume=None, init_from=None, seed=None)
    action.add_argument("native", type=Path, metavar="NATIVE", help="the checkpoint's folder")
    action.add_argument("--trusted", action="store_true", help=argparse.SUPPRESS)  # once needed, now without effect
    action.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="folder of the run to make")
    action.add_argument(
        "--ds-config", metavar="NAME|FILE",
        help=f"how the run continues: {', '.join(ds_config_names())}, or a DeepSpeed JSON ({DS_CONFIG_NOTE})",
    )  # fmt: skip
    action.add_argument("--micro-batch", type=micro_batch, metavar="N|auto", help="in place of the JSON's")
    what = action.add_argument_group("what was trained (default: what our own export says)")
    what.add_argument("--recipe", metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file")
    add_overrides(what, "schedule.total_steps=5000 generator.sharing=none")
    add_corpus_arguments(what, default_note="default: the exported run's token store")
    what.add_argument("--data", type=Path, metavar="STORE", help="a token store that bin/build-data made")
    _add_untold(action)


def _add_untold(action: argparse.ArgumentParser) -> None:
    untold = action.add_argument_group(
        "what the files may not say",
        "The tensors do not show the number of heads, layer_norm_eps, the activation and the position type. They are "
        "taken from the recipe (--set generator.num_attention_heads=4 model.layer_norm_eps=1e-6) and checked against "
        "the config.json files that lie next to or above the checkpoint, or that you give.",
    )
    for part in ("generator", "discriminator"):
        untold.add_argument(
            f"--{part}-config", type=Path, metavar="FILE", help=f"the {part}'s config.json, or the folder it is in"
        )
    untold.add_argument(
        "--frozen", nargs="+", default=[], metavar="NAME",
        help="how the names of parameters begin that were not trained, if a stage 0 checkpoint does not say which",
    )  # fmt: skip


def _import(options: argparse.Namespace) -> None:
    check_arguments(options)

    from electra_ds.interop.deepspeed_checkpoint import read_deepspeed_checkpoint
    from electra_ds.interop.deepspeed_files import find_files
    from electra_ds.interop.fit import find_sizes
    from electra_ds.interop.import_deepspeed import folder_of_export, import_deepspeed, store_of_export

    files = find_files(options.native)
    export = folder_of_export(files)
    has_data = options.data is not None or gives_corpus(options)
    if export is None and (options.recipe is None or not has_data):
        raise ConfigError(
            f"{files.folder} does not come with recipe and data, as an export of ours does. Say what it was trained "
            f"by with --recipe, and on what text with --data or --corpus and --tokenizer."
        )

    from electra_ds.config.overrides import load_recipe
    from electra_ds.config.run_directory import RunDirectory
    from electra_ds.core.ranks import join_ranks
    from electra_ds.pretraining import prepare

    recipe = load_recipe(options.recipe or str(export and export / "recipe.yaml"), options.overrides)
    given = {"generator": options.generator_config, "discriminator": options.discriminator_config}
    known = find_sizes(files.folder, given, export, recipe)
    run = RunDirectory(options.run_dir)
    wanted = prepare.Options(ds_config=options.ds_config, micro_batch=options.micro_batch)
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise ConfigError(
                "One process imports a checkpoint, of however many ranks it is: start it without torchrun."
            )
        plan = prepare.plan_new(wanted, recipe, run, ranks)
        native = read_deepspeed_checkpoint(files, options.frozen)
        store = store_of_export(export) if export and not has_data else open_store(options, recipe)
        job = prepare.prepare_new(wanted, recipe, plan, store, run, ranks)
        job = prepare.with_fitting_micro_batch(job, wanted, ranks)
        with run.locked(is_new=True):
            print(import_deepspeed(native, job, export, known))
