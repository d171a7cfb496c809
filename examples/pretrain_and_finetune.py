"""Pretrain a small ELECTRA, look at what it learned, and finetune it: a notebook as a script.

Editors that support `# %%` show cells. As a script it runs from beginning to end, in under a minute on a CPU:

    python examples/pretrain_and_finetune.py [FOLDER [TEXTS]]
"""

# %% A short pretraining on the texts that the script is given, or the built-in corpus. The recipe is `tiny`, cut to a
# few steps.
import sys
import tempfile
from pathlib import Path

import electra_ds

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
texts = sys.argv[2] if len(sys.argv) > 2 else "builtin"
recipe = electra_ds.load_recipe("tiny", {"schedule.total_steps": 60})
run = electra_ds.pretrain(
    recipe, corpus=texts, ds_config="cpu", run_dir=folder / "pretrained", eval_windows=64, log_every=5
)

# %% The run directory holds everything; `Run` reads it.
print(run, run.status, [path.name for path in run.checkpoints])
steps = run.metrics.query("kind == 'train'")
print(steps[["step", "generator_loss", "discriminator_loss"]].tail())

# %% Your own examples: a text and a label in each row. Here the label says if a text asks something.
questions = ["who wrote this", "where is the file", "how does it work", "why was it removed", "what is a list"]
statements = ["the file is here", "this works well", "it was removed", "a list has items", "the name is new"]
rows = [f"{text},{label}" for label, texts in (("ask", questions), ("tell", statements)) for text in texts]
(folder / "train.csv").write_text("\n".join(["text,label", *rows * 4]) + "\n")
(folder / "dev.csv").write_text("\n".join(["text,label", *rows]) + "\n")

# %% Finetune the encoder on them.
tuned = electra_ds.finetune(
    run,
    train=folder / "train.csv",
    dev=folder / "dev.csv",
    ds_config="cpu",
    run_dir=folder / "finetuned",
    overrides={"schedule.min_steps": 30, "data.max_length": 16},
)
print({name: scored["metrics"] for name, scored in tuned.scores["sets"].items()})

# %% Another seed of the same finetuning, and the encoder as a transformers model.
other = electra_ds.finetune(
    run,
    train=folder / "train.csv",
    dev=folder / "dev.csv",
    run_dir=folder / "finetuned-1",
    seed=1,
    overrides={"schedule.min_steps": 30, "data.max_length": 16},
    quiet=True,
)
print(other.status, electra_ds.export(run, folder / "my-electra"))
