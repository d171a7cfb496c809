"""The interface between a training step and any model: a forward pass, divisible batches, and losses as named sums.

A loss is a sum over a micro-batch, divided by a count over the entire global batch. So a batch can be divided into any
micro-batches, accumulation steps and ranks, and its losses stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.core.errors import ConfigError


class LossTerm(NamedTuple):
    """One of a step's losses."""

    weight: float
    """Its weight in the loss that is differentiated."""
    divisor: int
    """The divisor of its sum: the number of its terms in the global batch."""


def moved(tensors: Mapping[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors that are not None on another device. Copies to a GPU use pinned memory, so that the host does
    not wait."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return {name: move(tensor) for name, tensor in tensors.items() if tensor is not None}


class StepBatch(Protocol):
    """The global batch of one step, for any kind of training data."""

    @property
    @abstractmethod
    def loss_terms(self) -> Mapping[str, LossTerm]:
        """The step's losses by name, in the order in which they are reported."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """The number of tokens without padding."""

    @abstractmethod
    def micro_batch(self, first: int, size: int) -> Any:
        """Return examples `first` to `first + size` as the model's input, an object with `to(device)`."""


class StepOutput(Protocol):
    """The output of a model for a micro-batch."""

    @property
    def losses(self) -> Mapping[str, torch.Tensor]:
        """Scalar sums over the micro-batch, by the names of the batch's `loss_terms`."""


class StepLosses:
    """The losses of a step's micro-batches, normalised over the global batch."""

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        self._terms = terms
        self._sums: dict[str, list[torch.Tensor]] = {name: [] for name in terms}

    def add(self, output: StepOutput) -> torch.Tensor:
        """Return the micro-batch's share of the global loss, to be differentiated."""
        shares, losses = [], output.losses
        if missing := [name for name in self._terms if name not in losses]:
            raise ConfigError(
                f"The batch has the loss {', '.join(missing)} in its loss_terms, but the model returned the losses "
                f"{', '.join(losses) or 'none'}."
            )
        for name, term in self._terms.items():
            loss_sum = losses[name]
            self._sums[name].append(loss_sum.detach())
            shares.append(term.weight / term.divisor * loss_sum)
        share = shares[0]
        for another in shares[1:]:
            share = share + another
        return share

    def means(self) -> dict[str, torch.Tensor]:
        """Return this rank's share of each loss's mean, by name, without gradients."""
        return {name: torch.stack(sums).sum() / self._terms[name].divisor for name, sums in self._sums.items()}

    def result(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the step's scalars, still on the device, so that nothing waits for them.

        `loss` is the weighted sum that was differentiated, and each loss's mean has the loss's own name; a term named
        `loss` is reported as its mean. Each is this rank's share: the sum over ranks is the global batch's value.
        `grad_norm`, the last one, is the norm over all ranks before clipping; not finite if the step was skipped.
        """
        means = self.means()
        total = None
        for name, mean in means.items():
            weighted = self._terms[name].weight * mean
            total = weighted if total is None else total + weighted
        assert total is not None
        return {"loss": total} | means | {"grad_norm": grad_norm}


_WEIGHTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOCAST = {"autocast-fp16": torch.float16, "autocast-bf16": torch.bfloat16}


class TrainableModel(Protocol):
    """A `torch.nn.Module` that any engine can set up and train."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """autocast_dtype: of the forward pass; None for no autocast. checkpointed_layers: number of layers of each
        encoder, from the first, that keep only their input for the backward pass."""

    def named_parameters(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


class AutocastModel(nn.Module, ABC):
    """A model that runs its own forward pass under torch.autocast, since DeepSpeed's engine switches off its caller's
    autocast."""

    autocast_dtype: torch.dtype | None = None
    """The dtype of the forward pass; None for the dtype of the weights."""
    checkpointed_layers: int = 0
    """Layers of each encoder, from the first, that keep only their input for the backward pass."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """Set what an engine's plan decides about the model itself."""
        self.autocast_dtype, self.checkpointed_layers = autocast_dtype, checkpointed_layers

    def forward(self, batch: Any, replayed: Any = None) -> Any:
        """Return the losses of one micro-batch, as a `training.step.StepOutput`.

        replayed: another run's random draws, to use instead of new ones; None to draw.
        """
        with self.autocast(batch.device):
            return self.run(batch, replayed)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @abstractmethod
    def run(self, batch: Any, replayed: Any) -> Any:
        """Compute what `forward` returns, under its autocast. An engine may replace this method by a compiled one."""


def set_up_model(model: TrainableModel, plan: DeepSpeedPlan) -> torch.dtype:
    """Set up autocast and activation checkpointing as planned; return the dtype of the weights in a step."""
    model.set_up(_AUTOCAST.get(plan.precision.name), plan.checkpointed_layers)
    return _WEIGHTS.get(plan.precision.name, torch.float32)


class Builder(Protocol):
    """Builds the batch of any step, for any kind of training."""

    def build(self, step: int) -> Any: ...


def prefetched(builder: Builder, first_step: int, stop_step: int) -> Iterator[tuple[int, Any]]:
    """Yield (step, batch) in order; a thread builds batches up to two steps ahead."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        ahead = deque(thread.submit(builder.build, step) for step in range(first_step, min(first_step + 2, stop_step)))
        for step in range(first_step, stop_step):
            batch = ahead.popleft().result()
            if step + 2 < stop_step:
                ahead.append(thread.submit(builder.build, step + 2))
            yield step, batch
    finally:
        thread.shutdown(cancel_futures=True)
