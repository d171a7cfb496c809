"""What a training step needs of any model: a forward pass, batches that can be cut, and losses as named sums.

A loss is a sum over a micro-batch, which is divided by a count over the whole global batch. So a batch may be cut into
any micro-batches, accumulation steps and ranks, and its losses stay the same.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from electra_ds.config.deepspeed import DeepSpeedPlan


class LossTerm(NamedTuple):
    """One of a step's losses."""

    weight: float
    """Its weight in the loss that is differentiated."""
    divisor: int
    """What its sum is divided by: the number of its terms in the global batch."""


class StepBatch(Protocol):
    """The global batch of one step, of whatever a model is trained on."""

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        """The step's losses by name, in the order in which they are reported."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens without padding."""

    def micro_batch(self, first: int, size: int) -> Any:
        """Return examples `first` to `first + size` as something with `to(device)` that the model takes."""


class StepOutput(Protocol):
    """What a model returns for a micro-batch."""

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
        for name, term in self._terms.items():
            loss_sum = losses[name]
            self._sums[name].append(loss_sum.detach())
            shares.append(term.weight / term.divisor * loss_sum)
        share = shares[0]
        for another in shares[1:]:
            share = share + another
        return share

    def result(self, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the step's scalars, still on the device so that nobody waits for them.

        `loss` is the weighted sum that was differentiated, and each loss's mean stands under its own name; a term named
        `loss` is reported as its mean. All are this rank's share: the sum over ranks is that of the global batch.
        `grad_norm`, the last one, is that of all ranks together before clipping; not finite if the step was skipped.
        """
        means = {name: torch.stack(sums).sum() / self._terms[name].divisor for name, sums in self._sums.items()}
        total = None
        for name, mean in means.items():
            weighted = self._terms[name].weight * mean
            total = weighted if total is None else total + weighted
        assert total is not None
        return {"loss": total} | means | {"grad_norm": grad_norm}


_WEIGHTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_AUTOCAST = {"autocast-fp16": torch.float16, "autocast-bf16": torch.bfloat16}


class TrainableModel(Protocol):
    """What any engine can train: a `torch.nn.Module` that lets itself be set up."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """autocast_dtype: for its forward pass, None for none. checkpointed_layers: how many of each encoder, from the
        first, keep their input alone for the backward pass."""

    def named_parameters(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


class AutocastModel(nn.Module, ABC):
    """A model that runs its own forward pass under torch.autocast, since DeepSpeed's engine switches off an autocast
    that it was called under."""

    autocast_dtype: torch.dtype | None = None
    """The dtype of the forward pass; None for that of the weights."""
    checkpointed_layers: int = 0
    """Layers of each encoder, from the first, that keep only their input for the backward pass."""

    def set_up(self, autocast_dtype: torch.dtype | None, checkpointed_layers: int) -> None:
        """Take what an engine's plan says of the model itself."""
        self.autocast_dtype, self.checkpointed_layers = autocast_dtype, checkpointed_layers

    def forward(self, batch: Any, replayed: Any = None) -> Any:
        """Return the losses of one micro-batch, as a `training.step.StepOutput`.

        replayed: what another run drew at random, to be taken in place of own draws; None to draw.
        """
        with torch.autocast(batch.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.run(batch, replayed)

    @abstractmethod
    def run(self, batch: Any, replayed: Any) -> Any:
        """Do what `forward` says, under its autocast. An engine may put a compiled form in the place of this method."""


def set_up_model(model: TrainableModel, plan: DeepSpeedPlan) -> torch.dtype:
    """Autocast and activation checkpointing as planned; returns the dtype that the weights are to have in a step."""
    model.set_up(_AUTOCAST.get(plan.precision.name), plan.checkpointed_layers)
    return _WEIGHTS.get(plan.precision.name, torch.float32)


class Builder(Protocol):
    """Builds the batch of any step, of whatever kind."""

    def build(self, step: int) -> Any: ...


def prefetched(builder: Builder, first_step: int, stop_step: int) -> Iterator[tuple[int, Any]]:
    """(step, batch) in order, built one or two steps ahead in a thread."""
    ready: queue.Queue[tuple[int, Any] | BaseException | None] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: tuple[int, Any] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in range(first_step, stop_step):
                if stopped.is_set():
                    return
                put((step, builder.build(step)))
            put(None)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
