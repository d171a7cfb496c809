"""`electra-ds finetune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from electra_ds.cli.arguments import add_handled, confirm, from_start
from electra_ds.config.options import FinetuneOptions
from electra_ds.config.shipped import TASKS

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

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


def add_finetune(commands: Commands) -> None:
    """Add the parser of `finetune`."""
    add_handled(commands, "finetune", FinetuneOptions, _EPILOG, _finetune)


def _finetune(options: FinetuneOptions) -> None:
    if options.resume is None:
        from electra_ds.config.finetune_recipe import load_finetune_recipe

        # One that cannot be used does not wait for torch.
        load_finetune_recipe(options.recipe_or_default(), options.task or "", options.recipe_overrides())

    from electra_ds.api.finetune import FinetuneStart
    from electra_ds.api.launch import launch

    launch(FinetuneStart(from_start(options)), confirm=confirm)
