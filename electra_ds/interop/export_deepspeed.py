"""Write a run's checkpoint as DeepSpeed's own, with what a script needs to continue from it."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import Record
from electra_ds.core import devices
from electra_ds.core.ranks import Ranks
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.deepspeed_export import native_config, write_native
from electra_ds.interop.export_folder import cannot_write, check_out, unfinished
from electra_ds.pretraining.electra import Electra
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.prepare import plan_of_run
from electra_ds.training.recorded import beside, newest_checkpoint, recorded_recipe

_CONVERTED = (1, 2)
"""Stages at which DeepSpeed loads a universal checkpoint as it was saved."""
_BESIDE = ("recipe.yaml", "tokenizer.json", "state.json", "run.json")


def export_deepspeed(run_or_checkpoint: Path, out: Path | None, ds_config: str | None, ranks: Ranks) -> str:
    """Write the newest checkpoint, or the given one, for as many ranks as there are; returns what to do with it.

    To be called by all ranks. ds_config: a DeepSpeed JSON's name or file, None for the one that the run had.
    `out` appears complete or not at all. Raises CheckpointError if there is nothing to export or `out` already holds
    something or the tensors are not the recipe's, ConfigError if the JSON cannot be used here.
    """
    with ranks.together():
        checkpoint = newest_checkpoint(run_or_checkpoint, ranks)
        out = out or beside(checkpoint, "native")
        check_out(out)
        recipe = recorded_recipe(checkpoint)
        saved = RunDirectory(checkpoint.path)
        options = PretrainOptions(ds_config=ds_config)
        plan = plan_of_run(options, saved, saved.read_record(Record), recipe, ranks)
        tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
        model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        checkpoint.check(shapes, shapes)
    partial = unfinished(out, ranks.broadcast(secrets.token_hex(4)))
    try:
        with ranks.together(), _writing(out):
            if ranks.is_main:
                partial.mkdir(parents=True)
        with _writing(out):
            tag = write_native(checkpoint, model, recipe, plan, devices.device(ranks.launch), partial)
        with ranks.together(), _writing(out):
            if ranks.is_main:
                _write_beside(checkpoint, recipe, plan, partial)
                if out.exists():
                    out.rmdir()
                partial.rename(out)
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # gone where all went well
    lines = [
        f"{out / tag}: step {checkpoint.state['step']:,}",
        f"{out / 'go_on.py'}: a script that continues from it; README.md says how to start it",
        *(f"Note: {note}." for note in plan.notes),
        f"Written at {_layout(plan)}; DeepSpeed loads it only with the same stage, precision and number of ranks.",
        *([_to_other_ranks(out / tag)] if plan.stage in _CONVERTED else []),
    ]
    return "\n".join(lines)


def _to_other_ranks(folder: Path) -> str:
    return (
        f"For another number of ranks: python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} "
        f"--output_folder {folder}_universal"
    )


def _layout(plan: DeepSpeedPlan) -> str:
    name = plan.precision.name
    precision = f"fp32 (without {name}, which is a matter of the steps)" if name.startswith("autocast") else name
    return f"ZeRO stage {plan.stage}, {precision}, for {plan.batch.world_size} rank(s)"


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raise CheckpointError if the disk does not take it, which torch's writer says as a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        ):
            raise cannot_write(out, error) from error
        raise


def _write_beside(checkpoint: Checkpoint, recipe: Recipe, plan: DeepSpeedPlan, folder: Path) -> None:
    for name in _BESIDE:
        shutil.copyfile(checkpoint.path / name, folder / name)
    (folder / "deepspeed.json").write_text(json.dumps(native_config(plan), indent=2) + "\n", "utf8")
    (folder / "go_on.py").write_text(_script(recipe), "utf8")
    (folder / "README.md").write_text(_readme(checkpoint, recipe, plan), "utf8")


def _script(recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    return f'''"""Continue from this folder's checkpoint; README.md says how to start it."""

import json
from pathlib import Path

import deepspeed
import torch

from electra_ds.config.recipe import load_yaml, validate_recipe
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.training.optimizer import parameter_groups
from electra_ds.pretraining.electra import Electra

if not torch.cuda.is_available():
    # DeepSpeed would otherwise compile a collective with g++ at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

here = Path(__file__).resolve().parent
recipe = validate_recipe(load_yaml((here / "recipe.yaml").read_text("utf8"), "recipe.yaml"), "recipe.yaml")
tokenizer = load_tokenizer(here / "tokenizer.json")
model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
groups = parameter_groups(model.named_parameters(), {optimizer.weight_decay})
optimizer = torch.optim.AdamW(
    groups, lr={optimizer.learning_rate}, betas=({optimizer.beta1}, {optimizer.beta2}), eps={optimizer.epsilon}
)
config = json.loads((here / "deepspeed.json").read_text("utf8"))
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
loaded, _ = engine.load_checkpoint(str(here))
if loaded is None:
    raise SystemExit(f"There is no checkpoint in {{here}}.")
if torch.distributed.get_rank() == 0:
    print(f"Loaded {{loaded}}: step {{engine.global_steps}}")

# From here on it is yours: engine(batch), engine.backward(loss), engine.step(), engine.save_checkpoint(folder).
'''


def _universal(checkpoint: Checkpoint, plan: DeepSpeedPlan) -> str:
    if plan.stage not in _CONVERTED:
        return ""
    tag = f"global_step{checkpoint.state['step']}"
    return f"""
For another number of ranks, make a universal checkpoint of it, and add `"checkpoint": {{"load_universal": true}}` to
deepspeed.json:

```bash
python -m deepspeed.checkpoint.ds_to_universal --input_folder {tag} --output_folder {tag}_universal
```
"""


def _readme(checkpoint: Checkpoint, recipe: Recipe, plan: DeepSpeedPlan) -> str:
    state = checkpoint.state
    corrected = "" if recipe.optimizer.bias_correction else (
        "\nIts AdamW makes no bias correction: torch's own does none at the step count of 2^24 that its state holds.\n"
    )  # fmt: skip
    return f"""# {recipe.name}, step {state["step"]:,}, as DeepSpeed's own checkpoint

{_layout(plan)}, after {state["tokens"]:,} tokens. DeepSpeed loads it with as many ranks, the same stage and the same
precision. Where electra_ds is installed:

```bash
torchrun --nproc_per_node {plan.batch.world_size} go_on.py
```

`go_on.py` makes model, optimizer and engine and loads this folder; the training is yours to add. (The line is for one
machine; on several, their `--nproc_per_node` times `--nnodes` is {plan.batch.world_size}.)
{corrected}{_universal(checkpoint, plan)}
`engine(batch)` gives sums of losses over the batch, see `ElectraOutput`; the learning rate and its schedule are the
script's to set. Back into a run of electra_ds: `electra-ds checkpoint import THIS_FOLDER --trusted --run-dir RUN
--ds-config JSON`.
"""
