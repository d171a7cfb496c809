"""Predicting the memory that a training step needs, from sizes alone, before anything runs.

Memory peaks at one of three moments: while a head processes its logits, when the backward pass begins and
every activation still exists, or in the optimizer's update. Tensors saved for the backward pass are counted one by one
for full rows (the longest batch), and tests compare the counts with autograd's. The memory of DeepSpeed at ZeRO stages
1 to 3 follows its documentation and is less accurate.

Shape suffixes: N tokens of a micro-batch, M selected positions, H hidden size, F feed-forward size, E embedding size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from electra_ds.config.deepspeed import DeepSpeedPlan
from electra_ds.model.encoder import EncoderConfig
from electra_ds.model.heads import CPU_NOISE_BYTES, CPU_PIECE_BYTES, GPU_PIECE_BYTES
from electra_ds.pretraining.step_shape import Network, StepShape

Kernels = Literal["cpu", "cuda"]
"""The device whose kernels run: on a CPU attention with dropout keeps its probabilities, on a GPU it is fused."""

CONTEXT_BYTES = 400 * 2**20
"""Assumed: the CUDA context with the kernels of torch, cuBLAS and cuDNN, outside torch's allocator."""
FRAGMENTATION = 0.05
"""Assumed: memory that torch's allocator reserves but cannot use, relative to the memory in use."""
CPU_SHARE = 0.8
"""Assumed: the share of a CPU machine's free memory that a run may use."""
_MASK = 1  # bytes of an element that dropout keeps or not
_FP32, _HALF, _INT64 = 4, 2, 8
# torch's default on Hopper, 8 MiB elsewhere (aten/src/ATen/cuda/CUDABlas.cpp). Forward and backward pass run in
# different threads, so each has its own.
_CUBLAS_WORKSPACE = 2 * 32 * 2**20


class SavedBytes(NamedTuple):
    """Bytes that autograd keeps for the backward pass of one micro-batch, excluding parameters."""

    encoders: tuple[int, ...]
    """One number per network, with its head that computes one logit per position; 0 if it is frozen."""
    heads: tuple[int, ...]
    """One number per network, for its head that predicts tokens; mostly the gradient of the token table."""
    weight_copies: int
    """Half-precision copies of fp32 weights, which autocast makes."""

    @property
    def total(self) -> int:
        return sum(self.encoders) + sum(self.heads) + self.weight_copies


class Phase(NamedTuple):
    """The content of a device at one moment, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 masters if the weights are in half precision, and AdamW's two moments."""
    activations: int
    logits: int
    """The current piece of a head's logits, with its softmax and noise."""
    workspace: int
    """Gradients of activations, fp32 copies of gradients, cuBLAS."""
    buffers: int
    """Buffers for communication between ranks."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class PeakMemory:
    """A step's memory at its three peaks."""

    head: Phase
    backward: Phase
    update: Phase
    host_bytes: int = 0
    """Bytes in CPU memory because of offloading."""

    @property
    def phases(self) -> dict[str, Phase]:
        return {"head": self.head, "backward": self.backward, "update": self.update}

    @property
    def allocated_bytes(self) -> int:
        """The peak memory of tensors, as in `torch.cuda.max_memory_allocated`."""
        return max(phase.total for phase in self.phases.values())

    @property
    def card_bytes(self) -> int:
        """The bytes that must be free on a GPU, including the CUDA context and what the allocator cannot use."""
        return round(self.allocated_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES

    def needed_bytes(self, kernels: Kernels) -> int:
        """Return the bytes that must be free on a GPU or, since offloading saves nothing there, in CPU memory."""
        return self.card_bytes if kernels == "cuda" else self.allocated_bytes + self.host_bytes


def saved_bytes(
    shape: StepShape, rows: int, precision: str, kernels: Kernels, checkpointed_layers: int = 0
) -> SavedBytes:
    """Return the bytes for a micro-batch of full rows with `StepShape.selected` positions.

    precision: one of the names of `config.deepspeed_sections.Precision`.
    """
    return _Sizes(shape, rows, precision, kernels, checkpointed_layers).saved()


def encoder_bytes(shape: StepShape, rows: int, precision: str) -> list[int]:
    """Return the bytes of each network's activations on a GPU, as if every network were trained."""
    sizes = _Sizes(shape, rows, precision, "cuda", checkpointed_layers=0)
    return [sizes.encoder(network) for network in shape.networks]


class _Sizes:
    """The bytes that one micro-batch saves for the backward pass."""

    def __init__(self, shape: StepShape, rows: int, precision: str, kernels: Kernels, checkpointed_layers: int) -> None:
        self.shape, self.rows, self.length = shape, rows, shape.length
        self.tokens, self.selected = rows * shape.length, shape.selected(rows)
        self.element = _FP32 if precision == "fp32" else _HALF  # in matrix products
        self.is_autocast = precision.startswith("autocast")
        # Mean and reciprocal deviation of a LayerNorm's row: in half precision only on a CPU with half weights.
        self.statistics = 2 * (_FP32 if kernels == "cuda" or self.is_autocast else self.element)
        self.kernels = kernels
        self.checkpointed_layers = checkpointed_layers

    def saved(self) -> SavedBytes:
        return SavedBytes(
            encoders=tuple(self.encoder(network) if network.is_trained else 0 for network in self.shape.networks),
            heads=tuple(self._token_head(network) if network.is_trained else 0 for network in self.shape.networks),
            weight_copies=self._weight_copies() if self.is_autocast else 0,
        )

    def positions(self, network: Network) -> int:
        return self.shape.positions(network, self.tokens, self.selected)

    def encoder(self, network: Network) -> int:
        """Return the bytes of a network without its prediction of tokens, if it is trained."""
        config = network.config
        # The head that detects replaced tokens: its input, GELU's input and output; logits, labels, counted positions.
        detecting = self.tokens * (3 * config.hidden_size * self.element + 2 * _FP32 + 2 * _MASK)
        layers = config.num_hidden_layers
        again = min(self.checkpointed_layers, layers)
        inputs = again * self.tokens * config.hidden_size * self._norm_input(config)
        saved = self._embeddings(config) + inputs + (layers - again) * self.layer(config)
        # A copy head: its input, if autocast has cast it, then logits, labels and counted positions.
        copying = self.tokens * (config.hidden_size * self.element * self.is_autocast + 2 * _FP32 + 2 * _MASK)
        return saved + (detecting if network.judges else 0) + (copying if network.copies else 0)

    def _token_head(self, network: Network) -> int:
        positions, config = self.positions(network), network.config
        if not positions:
            return 0
        embedding, vocab_size = config.embedding_size, config.vocab_size
        head = positions * (config.hidden_size + 3 * embedding) * self.element
        return head + positions * (self.statistics + _INT64) + vocab_size * (embedding + 1) * _FP32

    def _weight_copies(self) -> int:
        """Return the bytes of the matrices that autocast casts."""
        elements = 0
        for network in self.shape.networks:
            if not network.is_trained:
                continue
            config = network.config
            elements += config.hidden_size * config.embedding_size if network.predicts_at != "none" else 0
            elements += config.hidden_size**2 if network.judges else 0
            if network.has_own_encoder:
                elements += config.num_hidden_layers * 4 * config.hidden_size**2
                if config.embedding_size != config.hidden_size:
                    elements += config.embedding_size * config.hidden_size
        return elements * _HALF

    def _embeddings(self, config: EncoderConfig) -> int:
        size = config.embedding_size
        of_element = _FP32 if self.is_autocast else self.element
        of_element += _MASK if config.hidden_dropout_prob else 0
        if size != config.hidden_size:
            of_element += self.element  # the projection's input
        return self.tokens * (size * of_element + self.statistics + _INT64)

    def layer(self, config: EncoderConfig) -> int:
        """Return the bytes of a layer: inputs of four products, queries, keys and values, inputs of LayerNorm, dropout
        masks, and GELU's input."""
        hidden = config.hidden_size
        of_element = 6 * self.element + 2 * self._norm_input(config) + (2 * _MASK if config.hidden_dropout_prob else 0)
        of_token = hidden * of_element + config.intermediate_size * self.element + 2 * self.statistics
        return self.tokens * of_token + self._attention(config)

    def _norm_input(self, config: EncoderConfig) -> int:
        """Return the bytes of an element in LayerNorm's input. Under autocast a GPU uses fp32; a CPU uses the input's
        dtype, which is half precision after a projection."""
        if not self.is_autocast or (self.kernels == "cpu" and config.embedding_size != config.hidden_size):
            return self.element
        return _FP32

    def _attention(self, config: EncoderConfig) -> int:
        """Return the bytes of attention, excluding input and output: logarithms of softmax's sums, or probabilities and
        dropout mask."""
        queries = self.rows * config.num_attention_heads * self.length
        if self.kernels == "cpu" and config.attention_probs_dropout_prob:
            return queries * self.length * (self.element + _MASK)
        return queries * _FP32


def peak_memory(shape: StepShape, plan: DeepSpeedPlan, kernels: Kernels = "cuda") -> PeakMemory:
    """Return the memory of a step with a plan, on each rank."""
    batch, precision = plan.batch, plan.precision.name
    sizes = _Sizes(shape, batch.micro_batch_size, precision, kernels, plan.checkpointed_layers)
    saved, last = sizes.saved(), shape.networks[-1].config
    state = training_state(shape.trained_parameters, plan, shape.frozen_parameters)
    accumulates = batch.gradient_accumulation_steps > 1 or plan.stage > 0
    early_gradients = state.gradients if accumulates else 0
    cublas = _CUBLAS_WORKSPACE if kernels == "cuda" else 0
    # In the feed-forward: GELU's result or gradient, and its input's gradient. The heads' memory is free by then.
    inner = 2 * sizes.tokens * (last.intermediate_size - last.hidden_size) * sizes.element
    again = sizes.layer(last) if plan.checkpointed_layers >= last.num_hidden_layers else 0

    def phase(gradients: int, activations: int = 0, logits: int = 0, workspace: int = 0) -> Phase:
        return Phase(state.weights, gradients, state.optimizer, activations, logits, cublas + workspace, state.buffers)

    heads = []
    for index, network in enumerate(shape.networks):
        positions, config = sizes.positions(network), network.config
        if positions:
            until_here = sum(saved.encoders[: index + 1]) + sum(saved.heads[: index + 1]) + saved.weight_copies
            # The head accumulates the token table's half-precision gradient in fp32, so both exist.
            accumulated = network.is_trained and sizes.element == _HALF
            product = config.vocab_size * config.embedding_size * _HALF if accumulated else 0
            logits = _logits(shape, network, positions, kernels)
            heads.append(phase(early_gradients, until_here, logits, workspace=product))
    return PeakMemory(
        head=max(heads, key=lambda each: each.total, default=phase(early_gradients)),
        backward=phase(early_gradients, saved.total, workspace=max(0, inner) + again),
        update=phase(state.gradients, workspace=state.update),
        host_bytes=state.host,
    )


def _logits(shape: StepShape, network: Network, positions: int, kernels: Kernels) -> int:
    """Return the bytes of fp32 logits, their softmax (two if the temperature is not 1), and the noise."""
    vocab_size = network.config.vocab_size
    piece = min(positions, _piece_rows(vocab_size, kernels)) * vocab_size * _FP32
    if not network.draws:
        return 2 * piece
    softmaxes = 2 if shape.has_temperature else 1
    return (1 + softmaxes) * piece + 2 * (piece if kernels == "cuda" else min(piece, CPU_NOISE_BYTES))


def _piece_rows(vocab_size: int, kernels: Kernels) -> int:
    return max(1, (CPU_PIECE_BYTES if kernels == "cpu" else GPU_PIECE_BYTES) // (_FP32 * vocab_size))


def head_pieces(vocab_size: int, selected: int) -> int:
    """Return the number of pieces in which a GPU processes the logits of this many positions."""
    return -(-selected // _piece_rows(vocab_size, "cuda"))


class TrainingState(NamedTuple):
    """Bytes that do not depend on the micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Buffers for communication."""
    update: int
    """Additional memory during the optimizer's update."""
    host: int

    @property
    def total(self) -> int:
        """The bytes on the device at any time: weights, gradients, and the optimizer's state."""
        return self.weights + self.gradients + self.optimizer


def training_state(parameters: int, plan: DeepSpeedPlan, frozen: int = 0) -> TrainingState:
    """Return the memory of the training state of any model with this many parameters.

    frozen: the number of further ones that are not trained, which every rank holds.
    """
    width = _HALF if plan.precision.name in ("fp16", "bf16") else _FP32
    ranks, zero = plan.batch.world_size, plan.document["zero_optimization"]
    masters = parameters * _FP32 if width == _HALF else 0
    moments = 2 * parameters * _FP32
    if plan.stage == 0:
        flat = parameters * _FP32 if width == _HALF else 0  # the gradients in fp32
        reduced = parameters * width if ranks > 1 else 0  # the flattened gradients for the collective
        weights = (parameters + frozen) * width
        return TrainingState(weights, parameters * width, masters + moments, 0, max(flat, reduced), 0)
    # Stages 1 to 3 follow DeepSpeed's ZeRO tutorial: fp32 masters in every precision, all state sharded. The weights of
    # stage 3 are sharded too, but gathered and kept while the card has room for them.
    weights = (parameters + frozen) * width
    gradients = parameters * width // (ranks if plan.stage >= 2 else 1)
    optimizer = (parameters * _FP32 + moments) // ranks
    copies = 2 if plan.stage < 3 and zero.get("overlap_comm") else 1
    buckets = copies * int(zero["reduce_bucket_size"]) * width  # allocated in full, however small the model is
    host = weights // ranks if "offload_param" in zero else 0
    if "offload_optimizer" in zero:
        host, optimizer = host + optimizer + gradients, 0
    return TrainingState(weights, gradients, optimizer, buckets, parameters * _FP32 // ranks, host)
