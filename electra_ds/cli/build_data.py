"""`electra-ds build-data`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled
from electra_ds.config.shipped import GPU_RECIPE
from electra_ds.config.tool_options import BuildDataOptions
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_EPILOG = """\
examples:
  bin/build-data --corpus my_texts/ --recipe rc2020-small --out stores/mine
      trains the recipe's tokenizer on the text and tokenises it
  bin/build-data --corpus dump.jsonl.zst --text-key body --tokenizer vocab.txt --out stores/dump
  bin/build-data --corpus 'hub:wikimedia/wikipedia#20231101.en' --streaming --corpus books/ --out stores/both \\
      --tokenizer google-bert/bert-base-multilingual-cased

Each --corpus is one source of text, and data.corpus_weights has one number for each. A source is files and folders
(read recursively), `builtin`, or hub:NAME#CONFIG@SPLIT, a dataset of the Hugging Face Hub (the split is `train` where
none is given; a local folder in the Hub's layout is hub:./FOLDER). Files are text (one document each, or
--document-boundary blank-line), JSON lines, WikiExtractor's <doc> files, each also as .gz, .bz2, .xz or .zst, and
Parquet; a folder may also be a dataset that save_to_disk wrote. An interrupted build resumes when run again.
"""


def add_build_data(commands: Commands) -> None:
    """Add the parser of `build-data`."""
    add_handled(commands, "build-data", BuildDataOptions, _EPILOG, _build_data)


def _build_data(options: BuildDataOptions) -> None:
    from rich.console import Console

    from electra_ds.api.stores import make_store
    from electra_ds.config.overrides import load_recipe
    from electra_ds.core.terminal import note, say, say_command

    recipe = load_recipe(options.recipe or GPU_RECIPE, options.overrides or ())
    console = Console()
    try:
        store = make_store(options, recipe, options.out, console, workers=options.workers)
    except KeyboardInterrupt:
        print("What is done so far is kept. To resume, run the same command again.", file=sys.stderr)
        raise
    info = store.info
    say(
        console,
        f"{store.path}: {info.num_documents:,} documents, {info.num_tokens:,} tokens of {info.vocab_size:,} kinds "
        f"({info.dtype}, {sum(info.file_bytes.values()) / 1e6:,.1f} MB).",
    )
    wanted = recipe.tokenizer.vocab_size
    if options.tokenizer is None and info.vocab_size < wanted:
        note(console, f"the text was enough for {info.vocab_size:,} of the recipe's {wanted:,} pieces")
    recipe_argument = f" --recipe {options.recipe}" if options.recipe else ""
    say_command(console, "Train on it with:", f"{command('pretrain')} --data {store.path}{recipe_argument}")
