"""The FLOPs of a step, and the predicted time of a run before it starts, as a range of likely times.

FLOPs are 2 m n k for each product of an m x k and a k x n matrix, and nothing else. Recomputation (activation
checkpointing, the backward pass of fused attention) is not counted, so that the number does not depend on how a model
is run. Look-ups, norms, GELU and dropout are left out: below 2 % in ELECTRA-Small. google-research/electra counts
differently: its flops_computation.py counts look-ups as products with one-hot matrices, and a backward pass as one
forward pass.

Time on a known card is a roofline: a step's matrix products run at a share of the card's peak, everything else at a
share of its memory bandwidth, and no step is faster than the host launches operations. Published runs differ from the
roofline of our step, each by a different factor, so the prediction is the range that contains all of them. Time on this
machine's CPU is the model's FLOPs at the rate of one large product, plus the operations of a step at the time that each
takes in a small layer, since a small model's operations take longer to call than to compute. Both are measured in a
fifth of a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from electra_ds.config.cards import Card, find_card, peak_flops
from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.core import devices
from electra_ds.model.encoder import EncoderConfig
from electra_ds.pretraining.memory import encoder_bytes, head_pieces
from electra_ds.pretraining.step_shape import StepShape

# The backward pass of a product has two products, one for each factor's gradient. In a trained network neither can be
# left out anywhere, since even the first product's input, the embeddings, is trained.
_PASSES = 3


class NetworkFlops(NamedTuple):
    """FLOPs of one network's forward pass, by part."""

    encoder: int
    """Products with the layers' weights."""
    attention: int
    """Products of queries with keys, and of attention weights with values."""
    head: int
    projection: int
    """From the embedding size to the hidden size; 0 if the sizes are equal."""


class StepFlops(NamedTuple):
    """FLOPs of a step."""

    networks: dict[str, NetworkFlops]
    """The FLOPs of each network's forward pass."""
    forward: int
    forward_and_backward: int
    """A network that is not trained has no backward pass."""


def step_flops(shape: StepShape, lengths_B: Sequence[int] | np.ndarray, selected: int) -> StepFlops:
    """Return the FLOPs of a step over B sequences of these lengths, with `selected` selected tokens.

    Padding does not count, even if it is computed. transformers' classes compute vocabulary logits at every position,
    so for them `selected` is the number of tokens.
    """
    tokens, pairs = int(np.sum(lengths_B)), int(np.square(lengths_B, dtype=np.int64).sum())
    networks, forward, everything = {}, 0, 0
    for network in shape.networks:
        config = network.config
        predicted = shape.positions(network, tokens, selected)
        head = 2 * predicted * config.embedding_size * (config.hidden_size + config.vocab_size)
        head += 2 * tokens * config.hidden_size * (config.hidden_size + 1) if network.judges else 0
        head += 2 * tokens * config.hidden_size if network.copies else 0
        parts = NetworkFlops(_encoder(config, tokens), _attention(config, pairs), head, _projection(config, tokens))
        networks[network.name] = parts
        forward += sum(parts)
        everything += sum(parts) * (_PASSES if network.is_trained else 1)
    return StepFlops(networks, forward, everything)


def _encoder(config: EncoderConfig, tokens: int) -> int:
    """Return the FLOPs of the products for query, key, value and output, and the two of the feed-forward."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner)


def _attention(config: EncoderConfig, pairs: int) -> int:
    """Return the FLOPs of attention. Over all heads a product is as wide as the hidden size. pairs: (query, key)."""
    return config.num_hidden_layers * 2 * (2 * pairs * config.hidden_size)


def _projection(config: EncoderConfig, tokens: int) -> int:
    if config.embedding_size == config.hidden_size:
        return 0
    return 2 * tokens * config.embedding_size * config.hidden_size


PRODUCT_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.7, 0.75
"""Assumed shares of the manufacturers' figures that a step reaches."""
LAUNCH_S = 5e-6
"""Assumed: the host's time for one operation."""
SLOWER = (0.9, 7.0)
"""Times of the fastest and the slowest published run divided by the roofline of our step. A test compares both with all
runs in tests/report/published/, and docs/performance.md lists them."""
# Memory traffic, counted over an eager step: inputs and outputs of every operation that is not a matrix product or
# attention, as multiples of the bytes saved for the backward pass and, for the head and its noise, of the fp32 logits.
TRAFFIC_OF_SAVED, TRAFFIC_OF_LOGITS = 7, 41
_TRAFFIC_OF_PARAMETER = 36  # bytes: weights, gradients, masters and moments read and written
# Operations of a micro-batch, counted the same way: per layer, per piece of a head, and the rest of a network.
OPERATIONS = (36, 22, 65)
_COMPUTED_AGAIN = 0.37  # share of a step's time to recompute all layers; measured on a CPU, docs/launching.md


class StepTime(NamedTuple):
    """The roofline of one optimizer step, in seconds."""

    products_s: float
    traffic_s: float
    host_s: float

    @property
    def roofline_s(self) -> float:
        return max(self.products_s + self.traffic_s, self.host_s)


def step_time(shape: StepShape, plan: DeepSpeedPlan, card: Card) -> StepTime | None:
    """Return the time of a step with full rows on such cards; None if the card lacks the precision.

    It ignores torch.compile, which fuses operations, offloading, and communication between ranks.
    """
    peak = peak_flops(card, plan.precision.name)
    if peak is None:
        return None
    rows = shape.global_batch_size // plan.batch.world_size
    tokens, selected = rows * shape.length, shape.selected(rows)
    flops = step_flops(shape, [shape.length] * rows, selected).forward_and_backward
    traffic = float(_TRAFFIC_OF_PARAMETER * shape.trained_parameters)
    for network, saved in zip(shape.networks, encoder_bytes(shape, rows, plan.precision.name), strict=True):
        logits = 4 * shape.positions(network, tokens, selected) * network.config.vocab_size
        of_network = TRAFFIC_OF_SAVED * saved + TRAFFIC_OF_LOGITS * logits
        traffic += of_network if network.is_trained else of_network / _PASSES
    last = shape.networks[-1].config
    again = 1 + _COMPUTED_AGAIN * plan.checkpointed_layers / last.num_hidden_layers
    return StepTime(
        products_s=again * flops / (peak * PRODUCT_EFFICIENCY),
        traffic_s=again * traffic / (card.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY),
        host_s=again * step_operations(shape, plan) * LAUNCH_S,
    )


def step_operations(shape: StepShape, plan: DeepSpeedPlan) -> int:
    """Return the number of operations in the forward and backward passes of a step, on each rank."""
    of_layer, of_piece, of_network = OPERATIONS
    batch = plan.batch
    rows = shape.global_batch_size // batch.world_size
    tokens, selected = rows * shape.length, shape.selected(rows)
    operations = 0
    for network in shape.networks:
        predicted = shape.positions(network, tokens, selected) // batch.gradient_accumulation_steps
        pieces = head_pieces(network.config.vocab_size, predicted)
        of_one = of_layer * network.config.num_hidden_layers + of_piece * pieces + of_network
        operations += of_one if network.is_trained else of_one // _PASSES
    return operations * batch.gradient_accumulation_steps


CPU_SLOWER = (1.2, 6.0)
"""The range of a CPU step's time divided by the sum of two times: that of its products at the rate of one large
product, and that of its operations at the rate of those in `small_layer`."""
SLOWEST_CPU = (1e9, 1e-3)
"""FLOP/s and seconds per operation: one thread of any CPU on which one would train does better than both."""
YEAR_S = 365 * 86_400
_CALIBRATION, _CALIBRATION_S = 768, 0.1
LAYER_OPERATIONS = 60
"""Operations in the forward and backward passes of `small_layer`, which a test counts."""


class RunTime:
    """The range of a run's likely time.

    It may depend on a measurement of this machine, which takes a fifth of a second and is made when it is needed.
    """

    def __init__(self, measure: Callable[[], tuple[float, float]], at_most_s: float = math.inf) -> None:
        """measure: returns the shortest and the longest time, in seconds. at_most_s: a bound of the longest, known
        without measuring."""
        self._measure, self._at_most_s = measure, at_most_s

    @classmethod
    def between(cls, low_s: float, high_s: float) -> RunTime:
        """Return a range that is known."""
        return cls(lambda: (low_s, high_s), high_s)

    def __add__(self, other: RunTime) -> RunTime:
        def measure() -> tuple[float, float]:
            (low, high), (more_low, more_high) = self.range_s, other.range_s
            return low + more_low, high + more_high

        return RunTime(measure, self._at_most_s + other._at_most_s)

    @cached_property
    def range_s(self) -> tuple[float, float]:
        """The shortest and the longest time, in seconds."""
        return self._measure()

    def __str__(self) -> str:
        return span(*self.range_s)

    @property
    def may_take_years(self) -> bool:
        """True for a run that nobody starts by accident; weeks and months on a GPU are normal."""
        return self._at_most_s > YEAR_S and self.range_s[1] > YEAR_S


def cpu_rates(threads: int) -> tuple[float, float]:
    """Measure the FLOP/s of a large fp32 product, and the seconds of a small operation, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        large = torch.ones(_CALIBRATION, _CALIBRATION)
        return 2.0 * _CALIBRATION**3 / shortest_s(lambda: large @ large), shortest_s(small_layer()) / LAYER_OPERATIONS
    finally:
        torch.set_num_threads(before)


def small_layer() -> Callable[[], None]:
    """Return the forward and backward passes of a layer that is too small for its products to matter."""
    with torch.random.fork_rng(devices=[]):
        layer = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0)
    hidden_TBH = torch.ones(8, 2, 64)
    return lambda: layer(hidden_TBH).sum().backward()


def shortest_s(call: Callable[[], object]) -> float:
    """Call a function for a tenth of a second and return its shortest time, in seconds, which others delay least."""
    call()
    times, end = [], time.perf_counter() + _CALIBRATION_S
    while (began := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def cpu_time(flops: float, operations: float, threads: int, world_size: int = 1) -> RunTime:
    """Return the time on this machine's CPU for this many model FLOPs over all ranks, and operations of each rank.

    threads: of each rank.
    """

    def seconds(rate: float, operation_s: float) -> float:
        return flops / (rate * world_size) + operations * operation_s

    def measure() -> tuple[float, float]:
        found = seconds(*cpu_rates(threads))
        return found * CPU_SLOWER[0], found * CPU_SLOWER[1]

    return RunTime(measure, seconds(*SLOWEST_CPU) * CPU_SLOWER[1])


def finetuning_time(
    weights: int, num_layers: int, tokens: float, plan: DeepSpeedPlan, device: torch.device, *, steps: int, threads: int
) -> RunTime | None:
    """Return the predicted time of a finetuning; None for a GPU whose rates are unknown.

    weights: number of the encoder's weights without the token table. Each is multiplied with each token of the batch,
    once in the forward pass and twice in the backward pass. tokens: per step, over all ranks.
    """
    flops = 6 * weights * tokens
    operations = (OPERATIONS[0] * num_layers + 2 * OPERATIONS[2]) * plan.batch.gradient_accumulation_steps
    if device.type == "cpu":
        return cpu_time(steps * flops, steps * operations, threads, plan.batch.world_size)
    card = find_card(devices.device_name(device))
    peak = None if card is None else peak_flops(card, plan.precision.name)
    if peak is None:
        return None
    products_s = flops / plan.batch.world_size / (peak * PRODUCT_EFFICIENCY)
    return time_of_steps(StepTime(products_s, 0.0, operations * LAUNCH_S), steps)


def time_of_steps(step: StepTime | None, steps: int) -> RunTime | None:
    """Return the time of this many steps on a card."""
    return None if step is None else RunTime.between(*(step.roofline_s * steps * factor for factor in SLOWER))


def span(low_s: float, high_s: float) -> str:
    """Return a range of times in a suitable unit, such as 2–8 min."""
    units = (("years", YEAR_S), ("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    unit, size = next((each for each in units if high_s >= 1.5 * each[1]), units[-1])
    first, last = (f"{value / size:.2g}" if value / size < 10 else f"{value / size:.0f}" for value in (low_s, high_s))
    return f"{first} {unit}" if first == last else f"{first}–{last} {unit}"
