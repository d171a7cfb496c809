"""Keys of a DeepSpeed JSON that the recipe owns: global batch, clipping, optimizer and schedule.

They may be absent or "auto", and then the recipe's values are filled in. A concrete value must be the recipe's.
"""

from __future__ import annotations

from typing import Any

from electra_ds.config.recipe import TrainingRecipe
from electra_ds.core.errors import did_you_mean

OWNED_BY_RECIPE = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler")
_OPTIMIZERS = ("adam", "adamw")
"""DeepSpeed compares these in lower case; both are AdamW to it unless `adam_w_mode` is false. Schedulers are compared
as they are written."""
_OPTIMIZERS_GONE = ("onebitadam", "onebitlamb", "zerooneadam")
"""Optimizers that DeepSpeed 0.19 no longer has."""
SCHEDULERS = ("WarmupLR", "WarmupDecayLR")
_HOW_IT_IS_COMPUTED = ("torch_adam", "foreach", "fused", "set_grad_none")
"""Parameters of the optimizer that choose an implementation and change no result. Ours is chosen here."""
_OPEN_SCHEDULE: dict[str, Any] = {"warmup_min_lr": 0, "last_batch_iteration": -1, "warmup_type": "linear"}
"""Values with which a scheduler still leaves its numbers open: DeepSpeed's defaults, and every recipe's shape."""


def check_recipe_owned(values: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> None:
    """Add to `problems` what contradicts the recipe, each fault once, and to `notes` what was read as the recipe's."""
    owners = _owners(recipe)
    for name in ("train_batch_size", "gradient_clipping"):
        _check(name, values.get(name, "auto"), owners, problems)
    for name, check_type in (("optimizer", _check_optimizer), ("scheduler", _check_scheduler)):
        section = values.get(name, "auto")
        if section == "auto":
            continue
        if not isinstance(section, dict) or not isinstance(section.get("params", {}), (dict, str)):
            problems.append(f"{name}: must be an object with type and params")
        elif check_type(section, recipe, problems, notes):
            for key, value in section.items():
                if key == "params" and isinstance(value, dict):
                    for parameter, each in value.items():
                        if not _is_unread(section, parameter):
                            _check(f"{name}.params.{parameter}", each, owners, problems)
                elif key != "type":
                    _check(f"{name}.{key}", value, owners, problems)


def _owners(recipe: TrainingRecipe) -> dict[str, tuple[Any, str]]:
    """Return the value that each key may have, and what in the recipe owns it."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    return {
        "train_batch_size": (recipe.global_batch_size, "global_batch_size"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.legacy_fusion": (False, "the optimizer, which is torch's AdamW"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": ([optimizer.beta1, optimizer.beta2], "optimizer.beta1 and beta2"),
        "optimizer.params.eps": (optimizer.epsilon, "optimizer.epsilon"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.params.bias_correction": (optimizer.bias_correction, "optimizer.bias_correction"),
        "optimizer.params.max_grad_norm": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "optimizer.params.adam_w_mode": (True, "the optimizer, which is AdamW"),
        "optimizer.params.amsgrad": (False, "the optimizer, which is AdamW"),
        "optimizer.params.fp32_optimizer_states": (True, "the optimizer, whose moments are fp32"),
        "scheduler.params.warmup_min_lr": (0, "the schedule, which starts at 0"),
        "scheduler.params.warmup_max_lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "scheduler.params.warmup_num_steps": (schedule.warmup_steps, "schedule.warmup_steps"),
        "scheduler.params.total_num_steps": (schedule.total_steps, "schedule.total_steps"),
        "scheduler.params.warmup_type": ("linear", "the schedule, whose warm-up is linear"),
        "scheduler.params.last_batch_iteration": (-1, "the schedule, which counts the run's own steps"),
    }


def _is_unread(section: dict[str, Any], parameter: str) -> bool:
    """Return whether a parameter only chooses how the optimizer is computed. DeepSpeed's AdamW is the same in any
    mode."""
    decided = parameter == "adam_w_mode" and str(section.get("type")).lower() == "adamw"
    return decided or parameter in _HOW_IT_IS_COMPUTED


def _check(key: str, value: Any, owners: dict[str, tuple[Any, str]], problems: list[str]) -> None:
    if value == "auto":
        return
    if key not in owners:
        known = [name.rpartition(".")[2] for name in owners if name.rpartition(".")[0] == key.rpartition(".")[0]]
        problems.append(f"{key}: unknown key{did_you_mean(key.rpartition('.')[2], known)}")
    elif not _same(value, owners[key][0]):
        ours, owner = owners[key]
        problems.append(
            f'{key}: {value!r} contradicts the recipe ({owner} is {ours!r}); write "auto" or leave it out, '
            f"and change the recipe instead"
        )


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_same, value, ours))
    if isinstance(ours, (bool, str)) or isinstance(value, bool):
        return bool(value == ours)
    return isinstance(value, (int, float)) and abs(value - ours) <= 1e-12 * abs(ours)


def _is_open(parameter: str, value: Any) -> bool:
    return value == "auto" or (parameter in _OPEN_SCHEDULE and _same(value, _OPEN_SCHEDULE[parameter]))


def _check_optimizer(section: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> bool:
    """Return whether the parameters are worth checking: those of another optimizer would only repeat the fault."""
    kind = section.get("type", "auto")
    name = kind.lower() if isinstance(kind, str) else kind
    if name in (*_OPTIMIZERS, "auto"):
        return True
    remedy = 'remove the section, or write AdamW with params "auto"'
    if name in _OPTIMIZERS_GONE:
        problems.append(f"optimizer.type: DeepSpeed 0.19 no longer has {kind}, and the recipe runs AdamW; {remedy}")
    else:
        problems.append(f"optimizer.type: {kind!r} is not the recipe's optimizer (Adam or AdamW); {remedy}")
    return False


def _check_scheduler(section: dict[str, Any], recipe: TrainingRecipe, problems: list[str], notes: list[str]) -> bool:
    """Return whether the parameters of a scheduler are worth checking.

    A scheduler whose numbers are all "auto", as in transformers' files, stands for the recipe's own schedule. One with
    numbers must match the recipe.
    """
    kind, params = section.get("type", "auto"), section.get("params", {})
    schedule = f"the recipe's {recipe.schedule.kind} schedule"
    if kind not in (*SCHEDULERS, "auto"):
        problems.append(
            f"scheduler.type: {kind!r} is not {schedule}; remove the section, or write WarmupDecayLR"
            f"{did_you_mean(str(kind), SCHEDULERS)}"
        )
    elif not isinstance(params, dict) or all(_is_open(key, value) for key, value in params.items()):
        if kind != "auto":
            notes.append(f"scheduler {kind} leaves its numbers to the recipe, so {schedule} is used")
    elif kind == "WarmupLR":
        problems.append(
            f"scheduler.type: WarmupLR stays at its peak after the warm-up, which contradicts {schedule}; "
            f'make its params "auto" or remove the section'
        )
        return False
    elif recipe.schedule.kind != "linear":
        problems.append(f"scheduler.type: {kind} contradicts {schedule}; remove the section")
        return False
    elif params.get("warmup_type", "log") in ("log", "auto"):
        problems.append(
            'scheduler.params.warmup_type: DeepSpeed\'s default, "log", contradicts the recipe, whose warm-up is '
            'linear; write "linear", or make all params "auto"'
        )
        return False
    return kind in (*SCHEDULERS, "auto")
