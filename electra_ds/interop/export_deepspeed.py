"""Write a run's checkpoint in DeepSpeed's own format, with everything that a script needs to continue from it.

A DeepSpeed engine in the usual setup writes the files. Unlike in training, DeepSpeed owns precision and loss scale at
stage 0 too, since such an engine will load the files.
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.config.monitors import MONITOR_SECTIONS
from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe, electra_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.config.run_record import Record
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.export import cannot_write, check_out, unfinished
from electra_ds.pretraining.electra import Electra
from electra_ds.training.checkpoint import Checkpoint
from electra_ds.training.checkpoints import default_export_folder, newest_checkpoint, recorded_recipe
from electra_ds.training.engine import check_plan, close_deepspeed
from electra_ds.training.optimizer import MOMENTS, adamw_state, learning_rate_at
from electra_ds.training.prepare import plan_of_run
from electra_ds.training.zero import ZeroAdamW, sharded_optimizer

_CONVERTED = (1, 2)
"""Stages at which DeepSpeed loads a universal checkpoint unchanged."""
_COPIED = ("recipe.yaml", "tokenizer.json", "state.json", "run.json")


_OF_GENERATOR = ("learning_rate", "beta1", "beta2", "total_steps", "max_grad_norm")


def export_deepspeed(run_or_checkpoint: Path, out: Path | None, ds_config: str | None, ranks: Ranks) -> str:
    """Write the newest or the given checkpoint for the current number of ranks, and return how to use it.

    Call it on all ranks. ds_config: the name or path of a DeepSpeed JSON, or None for the run's. `out` appears complete
    or not at all. Raises CheckpointError if there is nothing to export, if `out` already holds something or if the
    tensors are not the recipe's, and ConfigError if the JSON cannot be used here.
    """
    with ranks.fail_together():
        checkpoint = newest_checkpoint(run_or_checkpoint, ranks)
        out = out or default_export_folder(checkpoint, "native")
        check_out(out)
        recipe = electra_recipe(recorded_recipe(checkpoint))
        own = [f"generator.{key}" for key in _OF_GENERATOR if getattr(recipe.generator, key) is not None]
        if recipe.optimizer.rule != "adamw":
            raise ConfigError(
                f"A run with optimizer.rule={recipe.optimizer.rule} cannot be exported as a DeepSpeed checkpoint, "
                f"which supports only adamw. Export it as a transformers model, or resume the run itself with --resume."
            )
        if own:
            raise ConfigError(
                f"DeepSpeed's own checkpoint has the same optimizer settings and schedule for all weights, but the "
                f"recipe sets {', '.join(own)}."
            )
        saved = RunDirectory(checkpoint.path)
        options = PretrainOptions(ds_config=ds_config)
        plan = plan_of_run(options, saved, saved.read_record(Record), recipe, ranks)
        tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
        model = Electra(recipe, tokenizer.vocab_size, tokenizer.pad_id)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        checkpoint.check(shapes, shapes)
    tag = f"global_step{checkpoint.state['step']}"
    partial = unfinished(out, ranks.broadcast(secrets.token_hex(4)))
    try:
        with ranks.fail_together(), _writing(out):
            if ranks.is_main:
                partial.mkdir(parents=True)
        # ds_to_universal needs this at stages 1 and 2, and DeepSpeed leaves it to the caller.
        version = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        client_state = {UNIVERSAL_CHECKPOINT_INFO: version} if plan.stage in _CONVERTED else {}
        device = devices.device(ranks.launch)
        with _writing(out), native_engine(checkpoint, model, recipe, plan, device) as engine:
            engine.save_checkpoint(str(partial), tag=tag, client_state=client_state)
        with ranks.fail_together(), _writing(out):
            if ranks.is_main:
                _write_record(checkpoint, recipe, plan, partial)
                if out.exists():
                    out.rmdir()
                partial.rename(out)
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # it is gone after success
    lines = [
        f"{out / tag}: step {checkpoint.state['step']:,}",
        f"{out / 'resume.py'}: a script that continues from it; README.md says how to start it",
        *(f"Note: {note}." for note in plan.notes),
        f"Written at {_layout(plan)}; DeepSpeed loads it only with the same stage, precision and number of ranks.",
        *([f"For another number of ranks: {_conversion(str(out / tag))}"] if plan.stage in _CONVERTED else []),
    ]
    return "\n".join(lines)


def _conversion(folder: str) -> str:
    """Return the command that converts a tag's folder to a universal checkpoint."""
    return f"python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder {folder}_universal"


def _layout(plan: DeepSpeedPlan) -> str:
    name = plan.precision.name
    precision = f"fp32 ({name} applies only during steps)" if name.startswith("autocast") else name
    return f"ZeRO stage {plan.stage}, {precision}, for {plan.batch.world_size} rank(s)"


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raise CheckpointError if the disk refuses a write, which torch's writer reports as a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        ):
            raise cannot_write(out, error) from error
        raise


def _write_record(checkpoint: Checkpoint, recipe: Recipe, plan: DeepSpeedPlan, folder: Path) -> None:
    for name in _COPIED:
        shutil.copyfile(checkpoint.path / name, folder / name)
    (folder / "deepspeed.json").write_text(json.dumps(native_config(plan), indent=2) + "\n", "utf8")
    (folder / "resume.py").write_text(_script(recipe), "utf8")
    (folder / "README.md").write_text(_readme(checkpoint, recipe, plan), "utf8")


def _script(recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    return f'''"""Continue from this folder's checkpoint; README.md says how to start it."""

import json
from pathlib import Path

import deepspeed
import torch

from electra_ds.config.recipe import validate_recipe
from electra_ds.config.values import load_yaml
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

# Add your training here: engine(batch), engine.backward(loss), engine.step(), engine.save_checkpoint(folder).
'''


def _readme(checkpoint: Checkpoint, recipe: Recipe, plan: DeepSpeedPlan) -> str:
    state = checkpoint.state
    notes = ""
    if not recipe.optimizer.bias_correction:
        notes += """
Its AdamW makes no bias correction, since torch's makes none at the step count of 2^24 that its state holds.
"""
    if plan.stage in _CONVERTED:
        notes += f"""
For another number of ranks, convert it to a universal checkpoint, and add `"checkpoint": {{"load_universal": true}}` to
deepspeed.json:

```bash
{_conversion(f"global_step{state['step']}")}
```
"""
    return f"""# {recipe.name}, step {state["step"]:,}, as DeepSpeed's own checkpoint

{_layout(plan)}, after {state["tokens"]:,} tokens. DeepSpeed loads it only with the same number of ranks,
stage and precision. Run, with electra_ds installed:

```bash
torchrun --nproc_per_node {plan.batch.world_size} resume.py
```

`resume.py` makes the model, optimizer and engine and loads this folder. Add your own training, learning rate and
schedule. On several machines, `--nproc_per_node` times `--nnodes` is {plan.batch.world_size}.
{notes}
To import it into a run of electra_ds: `electra-ds checkpoint import THIS_FOLDER --run-dir RUN --ds-config JSON`.
"""


# --- the engine that writes the files


def native_config(plan: DeepSpeedPlan) -> dict[str, Any]:
    """Return the JSON for a plain DeepSpeed script: the resolved one without monitors and keys for our engine only.

    Autocast is left out, since its checkpoints are fp32 ones.
    """
    config = copy.deepcopy(plan.document)
    for key in ("torch_autocast", *MONITOR_SECTIONS):
        config.pop(key, None)
    if plan.stage:
        config["zero_force_ds_cpu_optimizer"] = False  # allow torch's AdamW with an offloaded optimizer
    return config


@contextmanager
def native_engine(
    checkpoint: Checkpoint, model: Electra, recipe: Recipe, plan: DeepSpeedPlan, device: torch.device
) -> Iterator[Any]:
    """Yield DeepSpeed's engine with a checkpoint's state, and close it at the end. Call it on all ranks.

    model: its weights are replaced. Raises ConfigError if the device cannot run the plan's precision.
    """
    check_plan(plan, device, "the DeepSpeed JSON")
    model.to(device)
    optimizer = sharded_optimizer(model.named_parameters(), recipe.optimizer)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=native_config(plan), dist_init_required=False
    )
    try:
        step, counters = checkpoint.state["step"], checkpoint.state["optimizer"]
        if plan.stage:
            _fill_zero(engine, recipe, plan, checkpoint)
        else:
            _fill_stage_0(engine, recipe, checkpoint.tensors, counters)
        peak = recipe.optimizer.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, learning_rate=peak, **recipe.schedule.model_dump())
        engine.global_steps = step
        engine.global_samples = step * recipe.global_batch_size
        engine.skipped_steps = int(counters["skipped_steps"])
        yield engine
    finally:
        close_deepspeed(engine)


def _fill_zero(engine: Any, recipe: Recipe, plan: DeepSpeedPlan, checkpoint: Checkpoint) -> None:
    """Fill the engine at stages 1 to 3.

    The loss scaler is saved as an object, so it keeps DeepSpeed's rules instead of those of our training.
    """
    scaler = engine.optimizer.loss_scaler
    rules = {
        name: getattr(scaler, name) for name in ("scale_window", "raise_error_at_min_scale") if hasattr(scaler, name)
    }
    ours = ZeroAdamW(engine, recipe.optimizer, plan.precision.loss_scaling)
    ours.load(checkpoint.tensors, checkpoint.state["optimizer"])
    vars(scaler).pop("raise_error_at_min_scale", None)
    for name, value in rules.items():
        setattr(scaler, name, value)


@torch.no_grad()
def _fill_stage_0(
    engine: Any, recipe: Recipe, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]
) -> None:
    """Fill the engine at stage 0.

    It has torch's AdamW alone in fp32, or wrapped in FP16_UnfusedOptimizer with fp32 masters in half precision.
    """
    wrapper = engine.optimizer if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else None
    optimizer = engine.optimizer if wrapper is None else wrapper.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    parameters = [group["params"] for group in optimizer.param_groups] if wrapper is None else wrapper.fp16_groups
    for group, masters in zip(parameters, (group["params"] for group in optimizer.param_groups), strict=True):
        for parameter, master in zip(group, masters, strict=True):
            name = names[parameter]
            master.copy_(tensors[f"master/{name}"])
            parameter.copy_(master)
            state = adamw_state(
                master, bias_correction=recipe.optimizer.bias_correction, taken_steps=counters["taken_steps"]
            )
            for key in MOMENTS:
                state[key].copy_(tensors[f"{key}/{name}"])
            optimizer.state[master] = state
    if wrapper is not None and wrapper.loss_scale_config.dynamic_loss_scale and counters["is_scaled"]:
        scaling = wrapper.loss_scale_config
        scaling.cur_scale = counters["loss_scale"]
        scaling.cur_iter, scaling.last_overflow_iter = int(counters["good_steps"]), -1
