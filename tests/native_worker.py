"""Plain DeepSpeed engines, as anybody would write them, whose checkpoints are imported, and which load our exports.

`main` runs on the ranks of tests/interop/test_deepspeed_checkpoint.py. Arguments: a token store, a run to
export, and a folder for what is written: `plain-STAGE-PRECISION/`, DeepSpeed's, and
`plain-STAGE-PRECISION.safetensors`, what that engine held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import distributed, nn

from electra_ds.core.ranks import join_ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.export_deepspeed import export_deepspeed
from electra_ds.training.checkpoint import CheckpointFolder, load_checkpoint
from electra_ds.training.engine import close_deepspeed
from electra_ds.training.optimizer import parameter_groups
from tests.helpers import builder_for, model_for, small_recipe

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 3}},
}
STEPS = 3
LEARNING_RATE = 1e-3


def config(stage: int, precision: str, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **zero},
        **PRECISIONS[precision],
    }


@contextmanager
def plain_engine(model: nn.Module, values: dict[str, Any], groups: Iterable[Any] | None = None) -> Iterator[Any]:
    """groups: the optimizer's, in place of those of `parameter_groups`."""
    groups = parameter_groups(model.named_parameters(), 0.01) if groups is None else groups
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=1e-6)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=values, dist_init_required=False)
    try:
        yield engine
    finally:
        close_deepspeed(engine)


def train(engine: Any, store: TokenStore, steps: int = STEPS) -> float:
    """A few steps of our model; the last loss."""
    builder = builder_for(store, small_recipe())
    for step in range(steps):
        output = engine(builder.build(step).micro_batch(4 * distributed.get_rank() % 8, 4))
        loss = (output.generator_loss_sum / 20 + output.discriminator_loss_sum / 100).float()
        engine.backward(loss)
        engine.step()
    return float(loss.detach())


def held_by(engine: Any) -> dict[str, torch.Tensor]:
    """Masters and moments by `KIND/NAME`, from DeepSpeed's own calls, or at stage 0 its optimizer's state."""
    found = {}
    optimizer = engine.optimizer
    masters: dict[Any, torch.Tensor] = {}
    if engine.zero_optimization_stage() == 0 and hasattr(optimizer, "fp32_groups"):
        for own, group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= dict(zip(own, group, strict=True))
        optimizer = optimizer.optimizer
    if engine.zero_optimization_stage() in (1, 2) and hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links moments to parameters after the first group's first step, when the others have none.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage():
            found[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            master = masters.get(parameter, parameter)
            state = optimizer.state[master]
            found |= {f"master/{name}": master} | {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}


def main(store_path: str, run: str, out: str) -> None:
    torch.set_num_threads(1)
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    folder = Path(out)
    store, recipe = TokenStore(Path(store_path)), small_recipe()
    (path,) = CheckpointFolder(Path(run) / "checkpoints", keep=1).paths()
    checkpoint = load_checkpoint(path)
    with join_ranks() as ranks:
        for stage in (1, 2, 3):
            more = {"round_robin_gradients": True} if stage == 2 else {}
            more |= {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0} if stage == 3 else {}
            for precision in PRECISIONS:
                values = config(stage, precision, **more)
                with plain_engine(model_for(store, recipe), values) as engine:
                    train(engine, store)
                    engine.save_checkpoint(str(folder / f"plain-{stage}-{precision}"))
                    held = held_by(engine)
                if ranks.is_main:
                    save_file(held, folder / f"plain-{stage}-{precision}.safetensors")
                native = folder / f"ours-{stage}-{precision}"
                json = folder / f"{stage}-{precision}.json"
                if ranks.is_main:
                    json.write_text(repr(values).replace("'", '"').replace("True", "true"))
                ranks.gather(None)
                export_deepspeed(Path(run), native, str(json), ranks)
                with plain_engine(model_for(store, recipe), values) as engine:
                    engine.load_checkpoint(str(native))
                    held = held_by(engine)
                    for name in checkpoint.tensors:
                        assert torch.equal(held[name], checkpoint.tensors[name]), (stage, precision, name)
                    assert train(engine, store) < 1000
            frozen = model_for(store, recipe)
            table = frozen.discriminator.embeddings.position_embeddings.weight.requires_grad_(False)
            given = table.detach().clone()
            groups = parameter_groups([(n, p) for n, p in frozen.named_parameters() if p.requires_grad], 0.01)
            with plain_engine(frozen, config(stage, "fp32", **more), groups) as engine:
                train(engine, store)
                engine.save_checkpoint(str(folder / f"frozen-{stage}"))
            if ranks.is_main:
                save_file({"table": given}, folder / f"frozen-{stage}.safetensors")
