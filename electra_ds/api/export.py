"""Export checkpoints as transformers folders or native DeepSpeed checkpoints, and import the latter as runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from electra_ds.api.run import Run
from electra_ds.api.stores import open_or_build_store
from electra_ds.config.commands import ExportOptions, ImportOptions
from electra_ds.config.options import PretrainOptions, with_seed
from electra_ds.config.recipe import RecipeSource, given_options, load_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import join_ranks
from electra_ds.core.terminal import StageProgress, display


def export(
    run: str | Path | Run,
    out: str | Path | None = None,
    *,
    to: Literal["transformers", "deepspeed"] = "transformers",
    ds_config: str | Path | None = None,
    encoder_only: bool = False,
    push_to_hub: str | None = None,
    **more: Any,
) -> Path:
    """Write a trained model as transformers folders, or as a native DeepSpeed checkpoint, and return the folder.

    A pretraining's folder has `discriminator/` and `generator/`; load a finetuned model's with `from_pretrained`.

    Args:
        run: a `Run`, its directory, or one of its checkpoints.
        out: the folder to create. By default RUN/export, or RUN/native for DeepSpeed.
        to: `deepspeed` writes a pretraining's weights and optimizer for the number of ranks that call this.
        ds_config: for `deepspeed`, the JSON with the ZeRO stage and precision. By default the run's.
        encoder_only: write a finetuned model without its head.
        push_to_hub: upload it to the Hugging Face Hub as NAME or OWNER/NAME; each network of a pretraining as
            NAME-discriminator and so on.
        more: any other field of `ExportOptions`: `private`, `license`, `language`, `dataset`, `dry_run`.

    Raises:
        CheckpointError: there is nothing to export, or `out` is not empty.
        DataError: the Hub cannot be reached or refuses the upload; the folder remains.
        ConfigError: transformers has no class for the trained model, or the JSON cannot be used here.

    Examples:
        >>> import electra_ds
        >>> folder = electra_ds.export("runs/mine", "my-electra")
        >>> sorted(path.name for path in folder.iterdir())
        ['discriminator', 'generator']
    """
    named: dict[str, Any] = {
        "run": run.path if isinstance(run, Run) else run,
        "out": out,
        "to": to,
        "ds_config": ds_config,
    }
    named |= {"encoder_only": encoder_only, "push_to_hub": push_to_hub}
    options = given_options(ExportOptions, None, named | more)
    run_export(options)
    return _out(options)


def _out(options: ExportOptions) -> Path:
    if options.out is not None:
        return options.out
    is_checkpoint = (options.run / "manifest.json").exists()
    return (options.run.resolve().parent.parent if is_checkpoint else options.run) / _FOLDERS[options.to]


_FOLDERS = {"transformers": "export", "deepspeed": "native"}


def run_export(options: ExportOptions) -> str:
    """Export as `export` does, and return a message on how to use the folder."""
    if options.push_to_hub is not None:
        from electra_ds.interop.publish import check_name

        check_name(options.push_to_hub)
    is_finetuned = _is_finetuned(options.run)
    if options.encoder_only and not is_finetuned:
        raise ConfigError(
            f"--encoder-only is for runs of {command('finetune')}. The export of a pretraining has a folder for "
            f"each of its networks."
        )
    if options.to == "deepspeed":
        if is_finetuned:
            raise ConfigError(
                f"--to deepspeed is for runs of {command('pretrain')}, but {options.run} is a run of "
                f"{command('finetune')}."
            )

        from electra_ds.interop.export_deepspeed import export_deepspeed

        with join_ranks() as ranks:
            told = export_deepspeed(options.run, options.out, options.ds_config, ranks)
            return told if ranks.is_main else ""
    if options.ds_config is not None:
        raise ConfigError("--ds-config works only with --to deepspeed; transformers folders have no DeepSpeed JSON.")
    from electra_ds.interop.model_cards import Facts

    facts = Facts(options.license, options.language or (), options.dataset or (), options.push_to_hub)
    if is_finetuned:
        from electra_ds.interop.export_finetuned import export_finetuned

        told = export_finetuned(options.run, options.out, encoder_only=bool(options.encoder_only), facts=facts)
    else:
        from electra_ds.interop.export import export_run

        told = export_run(options.run, options.out, facts)
    return "\n".join([told, *_published(options)])


def _published(options: ExportOptions) -> Iterator[str]:
    """Upload an export if that was asked for, and yield a line about each repository."""
    if options.push_to_hub is None:
        return
    from electra_ds.interop.publish import repositories, upload

    for repository in repositories(_out(options), options.push_to_hub):
        if options.dry_run:
            yield f"Would upload {repository.folder} ({repository.size}) to {repository.name}."
        else:
            yield f"Uploaded {repository.size} to {upload(repository, private=bool(options.private))}"
    if options.license is None:
        yield "The model card names no licence: give one with --license, such as --license apache-2.0."


def _is_finetuned(run_or_checkpoint: Path) -> bool:
    try:
        return RunDirectory(run_or_checkpoint).kind() == "finetune"
    except CheckpointError:  # the export reports the problem
        return False


def import_checkpoint(
    native: str | Path,
    run_dir: str | Path,
    *,
    recipe: RecipeSource | None = None,
    data: str | Path | None = None,
    ds_config: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    **more: Any,
) -> Run:
    """Turn a native DeepSpeed checkpoint into a run that can be resumed, and return the run.

    Args:
        native: the checkpoint's folder.
        run_dir: the directory of the run to create.
        recipe: the recipe that it was trained with. By default the one in our own export.
        data: the token store that it was trained on. By default the exported run's.
        ds_config: the DeepSpeed JSON with which the run continues.
        overrides: changed values of the recipe by dotted key.
        more: any other field of `ImportOptions`, such as `frozen=[...]`.

    Raises:
        CheckpointError: the files cannot be read or do not have the recipe's tensors.
        ConfigError: recipe, data or JSON are missing or cannot be used.
    """
    named = {
        "native": native,
        "run_dir": run_dir,
        "recipe": recipe,
        "data": data,
        "ds_config": ds_config,
        "overrides": overrides,
    }
    options = given_options(ImportOptions, None, named | more)
    run_import(options)
    return Run(options.run_dir)


def run_import(options: ImportOptions) -> str:
    """Import as `import_checkpoint` does, and return a message on how to resume the run."""
    from electra_ds.interop.deepspeed_checkpoint import read_deepspeed_checkpoint
    from electra_ds.interop.deepspeed_files import find_files
    from electra_ds.interop.import_deepspeed import folder_of_export, import_deepspeed, store_of_export
    from electra_ds.interop.pretrained import find_sizes
    from electra_ds.pretraining.prepare import prepare_new, with_fitting_micro_batch
    from electra_ds.training.prepare import plan_new

    files = find_files(options.native)
    export = folder_of_export(files)
    has_data = options.data is not None or options.gives_corpus()
    if export is None and (options.recipe is None or not has_data):
        raise ConfigError(
            f"{files.folder} has no recipe and data, which only our own exports include. Give the recipe that it was "
            f"trained with as --recipe, and the text with --data, or with --corpus and --tokenizer."
        )
    overrides = with_seed(options.overrides, options.seed)
    recipe = load_recipe(options.recipe or str(export and export / "recipe.yaml"), overrides)
    given = {"generator": options.generator_config, "discriminator": options.discriminator_config}
    known = find_sizes(given, export, recipe)
    run = RunDirectory(options.run_dir)
    wanted = PretrainOptions(ds_config=options.ds_config, micro_batch=options.micro_batch)
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise ConfigError(
                "A single process imports a checkpoint, whatever its number of ranks: start it without torchrun."
            )
        plan = plan_new(wanted, recipe, run, ranks)
        checkpoint = read_deepspeed_checkpoint(files, options.frozen or ())
        if export and not has_data:
            store = store_of_export(export)
        else:
            with display() as console:
                store = open_or_build_store(options, recipe, partial(StageProgress, console))
        job = with_fitting_micro_batch(prepare_new(wanted, recipe, plan, store, run, ranks), wanted, ranks)
        with run.locked(is_new=True):
            return import_deepspeed(checkpoint, job, export, known)
