"""AdamW with fp32 masters, loss scale, overflow check and clipping, all on the device.

At stage 0 this module handles mixed precision, since DeepSpeed 0.19.8 divides by a loss scale that it never applied,
takes a phantom step at the start, and reads some 300 values back from the device per step. A step here reads nothing
back: overflow is a tensor that torch's fused AdamW accepts as `found_inf`. AdamW is called as a function, since torch's
class would import torch's compiler, which takes 1.2 CPU-seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim.adamw import adamw

from electra_ds.config.deepspeed_sections import LossScaling
from electra_ds.config.plugins import OPTIMIZER, find
from electra_ds.config.sections import OptimizerSection
from electra_ds.core import compat

# With a fixed scale of 1 the same arithmetic works for fp32 and bf16, which need no scaling.
NO_SCALING = LossScaling(initial_scale=1.0, is_dynamic=False)
# The first scale when a run without loss scaling continues in fp16, unless the JSON's is smaller: at DeepSpeed's 2^16
# the first updates would be lost until the scale fits (docs/experiments.md). It grows as every scale does.
FIRST_SCALE = 2.0**8
MOMENTS = ("exp_avg", "exp_avg_sq")
# At this step count 1 - beta^count is 1 for every usual beta, and in fp32 adding 1 does not change the count.
STEP_WITHOUT_CORRECTION = 2.0**24

FRESH_COUNTERS = {
    "taken_steps": 0.0, "skipped_steps": 0.0, "consecutive_skips": 0.0, "is_scaled": 0.0, "loss_scale": 1.0,
    "good_steps": 0.0, "hysteresis_left": 1.0,
}  # fmt: skip
"""The `MasterAdamW.counters` of a run that has not begun."""


class ParameterRates(NamedTuple):
    """One parameter's own learning rate, schedule, decay rates of the moments, weight decay and clipping."""

    lr_scale: float = 1.0
    """Its learning rate divided by the schedule's."""
    decays: bool = True
    max_grad_norm: float | None = None
    """The norm to which the gradients of all parameters with this value are clipped together, apart from the others;
    None for the recipe's, with all that have None."""
    betas: tuple[float, float] | None = None
    """Its decay rates of the moments; None for the recipe's."""
    total_steps: int | None = None
    """The step at which its own learning rate reaches 0; None for the schedule's."""


def pretraining_rates(name: str) -> ParameterRates:
    """Return the rates of a parameter in pretraining: only matrices and tables decay (google-research/electra)."""
    return ParameterRates(decays=not (name.endswith("bias") or "norm" in name.lower()))


Rates = Callable[[str], ParameterRates]


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, rates: Rates = pretraining_rates
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with the same rates: groups with weight decay first, otherwise in the
    order of first occurrence. Frozen parameters (`requires_grad=False`) are in no group."""
    groups: dict[ParameterRates, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault(rates(name), []).append(parameter)
    return [
        {
            "params": alike,
            "weight_decay": weight_decay if kind.decays else 0.0,
            "lr_scale": kind.lr_scale,
            "clipped_to": kind.max_grad_norm,
            "schedule_ends": kind.total_steps,
            **({} if kind.betas is None else {"betas": kind.betas}),
        }
        for kind, alike in sorted(groups.items(), key=lambda item: not item[0].decays)
    ]


def put_learning_rate(groups: Iterable[dict[str, Any]], rate: Callable[[int | None], float]) -> None:
    """Set the learning rate of an optimizer's groups to the schedule's, times each group's scale.

    rate: returns the schedule's rate, given the step at which it reaches 0, or None for the recipe's.
    """
    for group in groups:
        group["lr"] = rate(group["schedule_ends"]) * group["lr_scale"]


def adamw_state(parameter: torch.Tensor, *, bias_correction: bool, taken_steps: float = 0.0) -> dict[str, torch.Tensor]:
    """Return the state of torch's AdamW for one parameter, with zero moments.

    Without bias correction the step count is so high that the correction is 1, so that torch's own kernels compute the
    original's update. `taken_steps` then has no effect.
    """
    step = taken_steps if bias_correction else STEP_WITHOUT_CORRECTION
    return {
        "step": torch.full((), step, device=parameter.device, dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


class UpdateRule(ABC):
    """A custom optimizer, which updates weights from their gradients. A recipe selects it with `optimizer.rule`.

    It works element by element, because ZeRO gives it slices of parameters, and keeps at most two states of the
    weights' shape, which begin at 0. Loss scale, clipping, schedule, checkpoints and resuming are those of AdamW.
    """

    def __init__(self, section: OptimizerSection) -> None:
        """section: the recipe's `optimizer`."""
        self.section = section

    @abstractmethod
    def update(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        step: torch.Tensor,
    ) -> None:
        """Change a weight and its two states in place.

        All tensors are fp32 and of one shape, perhaps flat. The gradient is unscaled and clipped. learning_rate,
        betas, weight_decay: of this weight at this step. step: fp32 scalar, the number of updates with this one.
        """


def update_rule(section: OptimizerSection) -> UpdateRule | None:
    """Return the recipe's update rule, or None for AdamW. Raises PluginError if it cannot be loaded."""
    rule: UpdateRule | None = None if section.rule == "adamw" else find(OPTIMIZER, section.rule)(section)
    return rule


def counts_updates(section: OptimizerSection) -> bool:
    """Return whether the number of updates changes an update."""
    return section.bias_correction or section.rule != "adamw"


class RuleOptimizer(torch.optim.Optimizer):
    """An update rule as an optimizer of torch's, for DeepSpeed to shard."""

    def __init__(self, groups: list[dict[str, Any]], section: OptimizerSection, rule: UpdateRule) -> None:
        super().__init__(groups, {"lr": section.learning_rate, "betas": (section.beta1, section.beta2)})
        self._rule = rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        compat.add_param_group(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.state[weight]["step"] += 1
                    run_rule(self._rule, group, weight, weight.grad, self.state[weight])


def run_rule(
    rule: UpdateRule, group: Mapping[str, Any], weight: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any]
) -> None:
    """Update one weight of a parameter group."""
    rule.update(
        weight,
        gradient,
        state["exp_avg"],
        state["exp_avg_sq"],
        learning_rate=group["lr"],
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        step=state["step"],
    )


class MasterAdamW(torch.optim.Optimizer):
    """AdamW, or the recipe's update rule, over the model's parameters, which may be half precision.

    Non-finite gradients do not change weights and moments, in any precision: the step is skipped and counted.
    `param_groups` hold the model's own parameters; the update runs on fp32 masters (the parameters themselves if they
    are fp32) and is copied back. Frozen parameters (`requires_grad=False`) have no master, gradient or moments, and do
    not decay; checkpoints contain their weights.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        section: OptimizerSection,
        scaling: LossScaling | None,
        rates: Rates = pretraining_rates,
    ) -> None:
        named = list(parameters)
        defaults = {"lr": section.learning_rate, "betas": (section.beta1, section.beta2)}
        super().__init__(parameter_groups(named, section.weight_decay, rates), defaults)
        self.scaling = scaling or NO_SCALING
        self.names = {parameter: name for name, parameter in named}
        self._frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
        self.masters: dict[nn.Parameter, torch.Tensor] = {
            parameter: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for group in self.param_groups
            for parameter in group["params"]
        }
        self._has_masters = any(master is not parameter for parameter, master in self.masters.items())
        self._section, self._rule = section, update_rule(section)
        self._states = {
            parameter: adamw_state(master, bias_correction=counts_updates(section))
            for parameter, master in self.masters.items()
        }
        device = next(iter(self.masters)).device
        norms = [group["clipped_to"] for group in self.param_groups for _ in group["params"]]
        self._clipped_together: dict[float | None, torch.Tensor | None] = {
            clipped: torch.tensor([place for place, each in enumerate(norms) if each == clipped], device=device)
            for clipped in dict.fromkeys(norms)
        }
        """The places of the parameters whose gradients are clipped together, by their norm; None for all."""
        if len(self._clipped_together) == 1:
            self._clipped_together = dict.fromkeys(self._clipped_together)
        self.loss_scale = torch.tensor(self.scaling.initial_scale, device=device)
        self._taken_steps = torch.zeros((), device=device, dtype=torch.float64)
        self.skipped_steps = torch.zeros((), device=device)
        self.consecutive_skips = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), device=device)
        self._hysteresis_left = torch.tensor(float(self.scaling.hysteresis), device=device)
        self.can_repeat_step = True
        """False from the start of an update until the next step begins: a step cannot be repeated after that."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        compat.add_param_group(self, param_group)

    def set_learning_rate(self, rate: Callable[[int | None], float]) -> None:
        """rate: as in `put_learning_rate`."""
        put_learning_rate(self.param_groups, rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Unscale, check, clip and update, without reading anything back from the device."""
        norms = compat.norms(self._master_gradients())
        scaled_norm = torch.linalg.vector_norm(norms)
        found_inf = (~torch.isfinite(scaled_norm)).float()
        self.grad_norm = scaled_norm / self.loss_scale
        divisors = {
            clipped: self._divisor(
                self.grad_norm if places is None else torch.linalg.vector_norm(norms[places]) / self.loss_scale, clipped
            )
            for clipped, places in self._clipped_together.items()
        }
        self.can_repeat_step = False
        for group in self.param_groups:
            self._update(group, divisors[group["clipped_to"]], found_inf)
        self._copy_back()
        self._update_scale(found_inf)

    def _divisor(self, grad_norm: torch.Tensor, max_grad_norm: float | None) -> torch.Tensor:
        """Return the number by which gradients are divided, to unscale and clip them. grad_norm: unscaled."""
        most = self._section.max_grad_norm if max_grad_norm is None else max_grad_norm
        clipping = torch.clamp((grad_norm + 1e-6) / most, min=1.0)  # torch's clip_grad_norm_
        return (self.loss_scale * clipping).nan_to_num(1.0, 1.0, 1.0)

    def _update(self, group: dict[str, Any], divisor: torch.Tensor, found_inf: torch.Tensor) -> None:
        if self._rule is not None:
            self._update_by(self._rule, group, divisor, found_inf)
            return
        masters = [self.masters[parameter] for parameter in group["params"]]
        states = [self._states[parameter] for parameter in group["params"]]
        adamw(
            masters,
            [master.grad for master in masters if master.grad is not None],  # all have one by now
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            # The gradients are divided by grad_scale, and nothing changes where found_inf is 1 (GradScaler's protocol).
            grad_scale=divisor,
            found_inf=found_inf,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=self._section.epsilon,
            weight_decay=group["weight_decay"],
        )

    def _update_by(
        self, rule: UpdateRule, group: dict[str, Any], divisor: torch.Tensor, found_inf: torch.Tensor
    ) -> None:
        """Update a group by a rule, or leave everything as it was where a gradient is not finite."""
        for parameter in group["params"]:
            master, state = self.masters[parameter], self._states[parameter]
            assert master.grad is not None
            changed = [master, state["exp_avg"], state["exp_avg_sq"]]
            before = [tensor.clone() for tensor in changed]
            state["step"] += 1.0 - found_inf
            run_rule(rule, group, master, (master.grad / divisor).nan_to_num(0.0, 0.0, 0.0), state)
            for tensor, earlier in zip(changed, before, strict=True):
                torch.where(found_inf > 0, earlier, tensor, out=tensor)

    def _master_gradients(self) -> list[torch.Tensor]:
        """Return the gradients in fp32, and set them as the masters' gradients."""
        for parameter in self.masters:
            if parameter.grad is None:  # no position counted in this batch
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.masters if parameter.grad is not None]
        masters = list(self.masters.values())
        if self._has_masters:  # two operations, not two for each parameter
            flat = torch.empty(sum(master.numel() for master in masters), device=masters[0].device)
            pieces = flat.split([master.numel() for master in masters])
            in_fp32 = [piece.view_as(master) for piece, master in zip(pieces, masters, strict=True)]
            compat.copy_all(in_fp32, gradients)
            gradients = in_fp32
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
        return gradients

    def _copy_back(self) -> None:
        """Copy the masters into the model's half-precision parameters."""
        if self._has_masters:
            compat.copy_all([*self.masters], [*self.masters.values()])
            for master in self.masters.values():
                master.grad = None

    def _update_scale(self, found_inf: torch.Tensor) -> None:
        """Update the loss scale by DeepSpeed's rule (runtime/fp16/loss_scaler.py), without its blocking reads."""
        self._taken_steps += 1.0 - found_inf
        self.skipped_steps += found_inf
        self.consecutive_skips = (self.consecutive_skips + 1) * found_inf
        if not self.scaling.is_dynamic:
            return
        overflowed = found_inf > 0
        full_hysteresis = torch.full_like(self._hysteresis_left, float(self.scaling.hysteresis))
        backs_off = overflowed & (self._hysteresis_left <= 1)
        good = self._good_steps  # since the last overflow, before this step
        grows = ~overflowed & (good > 0) & (torch.remainder(good, self.scaling.window) == 0)
        self._good_steps = torch.where(overflowed, 0.0, good + 1)
        halved = torch.clamp(self.loss_scale / 2, min=self.scaling.min_scale)
        self.loss_scale = torch.where(backs_off, halved, torch.where(grows, self.loss_scale * 2, self.loss_scale))
        restored = grows | ~overflowed if self.scaling.consecutive_hysteresis else grows
        lowered = torch.where(overflowed & ~backs_off, self._hysteresis_left - 1, self._hysteresis_left)
        self._hysteresis_left = torch.where(restored, full_hysteresis, lowered)

    @property
    def taken_steps(self) -> int:
        """The number of updates that AdamW made. Reads one value back from the device."""
        return int(self._taken_steps.item())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return masters and moments by name: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`. Frozen parameters have
        only weights, in fp32, as `master/NAME`."""
        result = {f"master/{name}": parameter.detach().float() for name, parameter in self._frozen.items()}
        for parameter, master in self.masters.items():
            name, state = self.names[parameter], self._states[parameter]
            result[f"master/{name}"] = master.detach()
            result[f"exp_avg/{name}"] = state["exp_avg"]
            result[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
        return result

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters by name."""
        return {name: tuple(parameter.shape) for parameter, name in self.names.items()}

    def trained(self) -> set[str]:
        """Return the names of the parameters that are not frozen."""
        return {self.names[parameter] for parameter in self.masters}

    def snapshot(self, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Return copies of `tensors` in CPU memory, of the named parameters or of all."""
        return {
            key: tensor.to("cpu", copy=True)
            for key, tensor in self.tensors().items()
            if names is None or key.split("/")[1] in names
        }

    def counters(self) -> dict[str, float]:
        """Return everything else that the next step depends on."""
        return {
            "taken_steps": self.taken_steps,
            "skipped_steps": self.skipped_steps.item(),
            "consecutive_skips": self.consecutive_skips.item(),
            "is_scaled": float(self.scaling is not NO_SCALING),
            "loss_scale": self.loss_scale.item(),
            "good_steps": self._good_steps.item(),
            "hysteresis_left": self._hysteresis_left.item(),
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]) -> None:
        """Load the results of `snapshot` and `counters`, perhaps from another precision.

        A run that did not scale its loss before starts from `FIRST_SCALE`.
        """
        for name, frozen in self._frozen.items():
            frozen.copy_(tensors[f"master/{name}"])
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self._copy_back()
        if counts_updates(self._section):
            for state in self._states.values():
                state["step"].fill_(counters["taken_steps"])
        self._taken_steps.fill_(counters["taken_steps"])
        self.skipped_steps.fill_(counters["skipped_steps"])
        self.consecutive_skips.fill_(counters["consecutive_skips"])
        if self.scaling.is_dynamic and counters["taken_steps"] and not counters["is_scaled"]:
            self.loss_scale.fill_(min(self.scaling.initial_scale, FIRST_SCALE))
        if self.scaling.is_dynamic and counters["is_scaled"]:
            self.loss_scale.fill_(counters["loss_scale"])
            self._good_steps.fill_(counters["good_steps"])
            self._hysteresis_left.fill_(counters["hysteresis_left"])


def learning_rate_at(
    step: int, *, learning_rate: float, kind: Literal["linear", "product"], warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of optimizer step `step` (0 for the first one).

    `linear`: rises linearly from 0 over `warmup_steps`, then falls linearly to 0 at `total_steps`
    (transformers' `get_linear_schedule_with_warmup`, which the reproduction study used). `product`: the rise
    times a linear decay that begins at step 0, so that the peak lies below `learning_rate`
    (google-research/electra, model/optimization.py).
    """
    rise = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if kind == "product":
        return learning_rate * rise * max(0.0, 1.0 - step / total_steps)
    if step < warmup_steps:
        return learning_rate * rise
    return learning_rate * max(0.0, (total_steps - step) / (total_steps - warmup_steps))
