"""Heads against transformers' own and against loops written here; padding, precision, first weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import ElectraForQuestionAnswering, ElectraForSequenceClassification

from electra_ds.config.finetune_recipe import HeadSection, load_finetune_recipe
from electra_ds.finetuning.heads import (
    JointSpanHead,
    SequenceHead,
    SpanHead,
    TaskModel,
    TaskOutput,
    initialise,
    make_encoder,
)
from electra_ds.finetuning.inputs import Labels, SpanTargets, TaskBatch, TaskInputs, TaskMicroBatch
from electra_ds.finetuning.tasks.question_answering import QuestionAnsweringTask
from electra_ds.finetuning.tasks.sequence import SequenceTask
from electra_ds.training.step import StepLosses
from tests.finetune_runs import NO_DROPOUT, electra_config

VOCABULARY = 40
LIKE_TRANSFORMERS = HeadSection(pooling="first", num_layers=2, hidden_size=None, dropout_at="each")
lengths = st.lists(st.integers(3, 21), min_size=1, max_size=5)


def inputs_of(sizes: list[int], seed: int, labels: np.ndarray | None = None, is_pair: bool = True) -> TaskInputs:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCABULARY, sum(sizes)).astype(np.int32)
    segments = np.concatenate([(np.arange(size) > size // 2).astype(np.int8) for size in sizes])
    targets = None if labels is None else Labels(labels)
    return TaskInputs(ids, segments if is_pair else None, np.concatenate([[0], np.cumsum(sizes)]), 0, targets)


def theirs_of(batch: TaskMicroBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.ids_BT, "attention_mask": batch.attended_BT.long(), "token_type_ids": batch.segments_BT,
    }  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            parameter.data.normal_(0.0, 0.15)


def pair_of(head: nn.Module, theirs: nn.Module, part: str) -> TaskModel:
    """Our model with the weights of transformers', whose head is called `part`."""
    randomise(theirs)
    encoder = make_encoder(electra_config(**NO_DROPOUT), seed=0)
    encoder.load_state_dict(theirs.electra.state_dict())
    head.load_state_dict(getattr(theirs, part).state_dict() if part == "classifier" else theirs_head(theirs, part))
    return TaskModel(encoder, head)


def theirs_head(theirs: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in getattr(theirs, part).state_dict().items()}


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


# --- transformers' heads


@settings(max_examples=10)
@given(sizes=lengths, seed=st.integers(0, 10**6), outputs=st.sampled_from([1, 2, 3]), is_pair=st.booleans())
def test_a_two_layer_head_on_the_first_token_is_transformers_sequence_classification(
    sizes: list[int], seed: int, outputs: int, is_pair: bool
) -> None:
    """Logits with padding and pairs; loss and gradients in training mode without dropout; regression and classes."""
    is_regression = outputs == 1
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=len(sizes)).astype(np.float32) if is_regression else rng.integers(0, outputs, len(sizes))
    section = LIKE_TRANSFORMERS.model_copy(update={"dropout": 0.0})
    theirs = ElectraForSequenceClassification(electra_config(**NO_DROPOUT, num_labels=outputs))
    ours = pair_of(SequenceHead(section, 32, outputs, is_regression), theirs, "classifier")
    batch = inputs_of(sizes, seed, labels, is_pair).micro_batch(np.arange(len(sizes)))
    expected = theirs.eval()(**theirs_of(batch)).logits
    torch.testing.assert_close(ours.eval()(batch).scores["logits"], expected, rtol=1e-5, atol=1e-5)
    theirs_loss = theirs.train()(**theirs_of(batch), labels=batch.labels).loss
    ours_loss = ours.train()(batch).loss_sum / len(sizes)
    torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-5, atol=1e-6)
    wanted = gradients(theirs_loss, theirs)
    for name, found in gradients(ours_loss, ours).items():
        other = name.replace("encoder.", "electra.", 1) if name.startswith("encoder.") else f"classifier.{name[5:]}"
        torch.testing.assert_close(found, wanted[other], rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_of_the_sequence_head_is_transformers_own_draw_for_draw() -> None:
    theirs = ElectraForSequenceClassification(electra_config(**NO_DROPOUT, classifier_dropout=0.3, num_labels=2))
    section = LIKE_TRANSFORMERS.model_copy(update={"dropout": 0.3})
    ours = pair_of(SequenceHead(section, 32, 2, False), theirs, "classifier")
    batch = inputs_of([9, 5, 12], 0).micro_batch(np.arange(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        expected = theirs.train()(**theirs_of(batch)).logits
        torch.manual_seed(4)
        found = ours.train()(batch).scores["logits"]
        torch.manual_seed(5)
        another = ours(batch).scores["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(another, expected)


@settings(max_examples=10)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_the_independent_span_head_is_transformers_question_answering(sizes: list[int], seed: int) -> None:
    """Scores at attended positions of a padded batch; each input's loss, which transformers would let padding into,
    is that of the input alone."""
    theirs = ElectraForQuestionAnswering(electra_config(**NO_DROPOUT))
    ours = pair_of(SpanHead(HeadSection(), 32), theirs, "qa_outputs").eval()
    theirs.eval()
    inputs = with_spans(inputs_of(sizes, seed), seed)
    batch = inputs.micro_batch(np.arange(len(sizes)))
    found, expected = ours(batch), theirs(**theirs_of(batch))
    for name, scores in (("start", expected.start_logits), ("end", expected.end_logits)):
        torch.testing.assert_close(
            found.scores[name][batch.attended_BT], scores[batch.attended_BT], rtol=1e-5, atol=1e-5
        )
        assert (found.scores[name][~batch.attended_BT] == -1e4).all()
    alone = 0.0
    for row, size in enumerate(sizes):
        unpadded = {key: value[row : row + 1, :size] for key, value in theirs_of(batch).items()}
        target = {
            "start_positions": batch.targets["starts"][row : row + 1],
            "end_positions": batch.targets["ends"][row : row + 1],
        }
        alone += theirs(**unpadded, **target).loss.item()
    assert found.loss_sum.item() == pytest.approx(alone, rel=1e-5)


# --- the joint head


def with_spans(inputs: TaskInputs, seed: int) -> TaskInputs:
    """A question of one token, then its context; some windows without an answer, some answers of one token."""
    rng = np.random.default_rng(seed)
    sizes = inputs.lengths
    context = np.stack([np.minimum(2, sizes - 1), sizes - (sizes > 3)], 1)
    starts = np.array([rng.integers(first, stop) for first, stop in context])
    ends = np.array([rng.integers(start, stop) for start, (_, stop) in zip(starts, context, strict=True)])
    is_impossible = rng.random(len(sizes)) < 0.4
    spans = SpanTargets(np.where(is_impossible, 0, starts), np.where(is_impossible, 0, ends), is_impossible, context)
    return TaskInputs(inputs.ids, inputs.segments, inputs.bounds, inputs.pad_id, spans)


def gelu(value: np.ndarray) -> np.ndarray:
    return np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in value.flatten()]).reshape(value.shape)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    top = scores.max()
    return scores - top - math.log(np.exp(scores - top).sum())


class Looped:
    """The joint head of one input in numpy's doubles, position by position."""

    def __init__(self, head: JointSpanHead, hidden_TH: torch.Tensor, may: np.ndarray) -> None:
        self.weights = {name: tensor.detach().double().numpy() for name, tensor in head.state_dict().items()}
        self.hidden, self.may = hidden_TH.detach().double().numpy(), may
        scores = [self.dense("start", vector)[0] if ok else -1e4 for vector, ok in zip(self.hidden, may, strict=True)]
        self.start = log_softmax(np.array(scores))

    def dense(self, name: str, vector: np.ndarray) -> np.ndarray:
        return self.weights[f"{name}.weight"] @ vector + self.weights[f"{name}.bias"]

    def end(self, start: int) -> np.ndarray:
        scores = []
        for vector, ok in zip(self.hidden, self.may, strict=True):
            features = gelu(self.dense("end_hidden", np.concatenate([self.hidden[start], vector])))
            scores.append(self.dense("end", features)[0] if ok else -1e4)
        return log_softmax(np.array(scores))

    def unanswerable(self) -> float:
        expected = sum(math.exp(chance) * vector for chance, vector in zip(self.start, self.hidden, strict=True))
        features = gelu(self.dense("answerable_hidden", np.concatenate([self.hidden[0], expected])))
        return float(self.dense("answerable", features)[0])

    def loss(self, start: int, end: int, is_impossible: float, weight: float) -> float:
        logit = self.unanswerable()
        answerable = max(logit, 0) - logit * is_impossible + math.log1p(math.exp(-abs(logit)))
        return -(self.start[start] + self.end(start)[end]) / 2 + weight * answerable


@settings(max_examples=10)
@given(sizes=lengths, seed=st.integers(0, 10**6), beam=st.integers(1, 30), weight=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_joint_head_is_what_loops_make_of_it(sizes: list[int], seed: int, beam: int, weight: float) -> None:
    """Loss in training; in evaluation the beam, and whether there is an answer."""
    section = HeadSection(span="joint", span_hidden_size=12, beam_size=beam, answerable_weight=weight)
    head = JointSpanHead(section, 16)
    randomise(head, seed)
    batch = with_spans(inputs_of(sizes, seed), seed).micro_batch(np.arange(len(sizes)))
    hidden = torch.randn(*batch.ids_BT.shape, 16, generator=torch.Generator().manual_seed(seed))
    loops = [Looped(head, hidden[row], batch.targets["answerable"][row].numpy()) for row in range(len(sizes))]
    expected = sum(
        loop.loss(int(start), int(end), float(impossible), weight)
        for loop, start, end, impossible in zip(
            loops, batch.targets["starts"], batch.targets["ends"], batch.targets["is_impossible"], strict=True
        )
    )  # fmt: skip
    trained = head.train()(hidden, batch)
    assert trained.loss_sum.item() == pytest.approx(expected, rel=1e-4)
    assert trained.scores == {}
    scores = {name: tensor.detach() for name, tensor in head.eval()(hidden, batch).scores.items()}
    size = min(beam, batch.ids_BT.shape[1])
    for row, loop in enumerate(loops):
        assert scores["unanswerable"][row].item() == pytest.approx(loop.unanswerable(), rel=1e-4, abs=1e-4)
        allowed = min(size, int(loop.may.sum()))  # beyond them, all the excluded are alike
        best = np.argsort(-loop.start, kind="stable")[:allowed]
        np.testing.assert_array_equal(scores["start_index"][row, :allowed], best)
        np.testing.assert_allclose(scores["start_top"][row, :allowed], loop.start[best], rtol=1e-4, atol=1e-4)
        for place, start in enumerate(best):
            ends = loop.end(int(start))
            ranked = np.argsort(-ends, kind="stable")[:allowed]
            np.testing.assert_array_equal(scores["end_index"][row, place, :allowed], ranked)
            np.testing.assert_allclose(scores["end_top"][row, place, :allowed], ends[ranked], rtol=1e-4, atol=1e-4)


# --- padding


@settings(max_examples=15, deadline=None)
@given(sizes=lengths, seed=st.integers(0, 10**6), more=st.integers(1, 24), pooling=st.sampled_from(["mean", "first"]))
def test_padding_changes_nothing(sizes: list[int], seed: int, more: int, pooling: str) -> None:
    """Whatever ids stand there, and however much of it there is."""
    section = HeadSection(pooling=pooling, num_layers=2, hidden_size=8, dropout=0.0)  # type: ignore[arg-type]
    model = TaskModel(make_encoder(electra_config(), seed=seed), SequenceHead(section, 32, 3, False)).eval()
    randomise(model, seed)
    batch = inputs_of(sizes, seed).micro_batch(np.arange(len(sizes)))
    rng = torch.Generator().manual_seed(seed)

    def padded(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, value], 1)

    rows = len(sizes)
    noise = torch.randint(0, VOCABULARY, (rows, more), generator=rng)
    longer = batch._replace(
        ids_BT=padded(batch.ids_BT, noise),
        attended_BT=padded(batch.attended_BT, torch.zeros(rows, more, dtype=torch.bool)),
        segments_BT=padded(batch.segments_BT, noise % 2),
    )
    expected = model(batch).scores["logits"]
    torch.testing.assert_close(model(longer).scores["logits"], expected, rtol=1e-4, atol=1e-5)
    for row in range(rows):
        alone = inputs_of(sizes, seed).micro_batch(np.array([row]))
        torch.testing.assert_close(model(alone).scores["logits"][0], expected[row], rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_the_mean_is_over_the_tokens_alone(sizes: list[int], seed: int) -> None:
    head = SequenceHead(HeadSection(pooling="mean", dropout=0.0), 6, 2, False)
    randomise(head)
    batch = inputs_of(sizes, seed).micro_batch(np.arange(len(sizes)))
    hidden = torch.randn(*batch.ids_BT.shape, 6, generator=torch.Generator().manual_seed(seed))
    logits = head(hidden, batch).scores["logits"]
    for row, size in enumerate(sizes):
        torch.testing.assert_close(logits[row], head.out_proj(hidden[row, :size].mean(0)), rtol=1e-5, atol=1e-5)


# --- precision, and the memory of layers


def heads() -> dict[str, nn.Module]:
    return {
        "first": SequenceHead(LIKE_TRANSFORMERS, 32, 3, False),
        "mean": SequenceHead(HeadSection(pooling="mean", num_layers=2, hidden_size=24), 32, 3, False),
        "regression": SequenceHead(HeadSection(), 32, 1, True),
        "independent": SpanHead(HeadSection(), 32),
        "joint": JointSpanHead(HeadSection(span="joint", span_hidden_size=24, beam_size=64), 32),
    }


def model_and_batch(name: str) -> tuple[TaskModel, TaskMicroBatch]:
    model = TaskModel(make_encoder(electra_config(), seed=1), heads()[name])
    randomise(model)
    sizes = [17, 5, 11, 24]
    labels = np.array([0.5, 1.5, 2.5, 4.0], np.float32) if name == "regression" else np.array([0, 1, 2, 1])
    inputs = inputs_of(sizes, 2, labels)
    if name in ("independent", "joint"):
        inputs = with_spans(inputs, 2)
    return model, inputs.micro_batch(np.arange(4))


def check_close(found: Any, expected: Any, bound: float) -> None:
    """Scores of every position; of the beam, which ranks close ones in another order, what belongs to no position."""
    assert found.loss_sum.dtype == torch.float32
    assert found.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=bound)
    for key in ("logits", "start", "end", "unanswerable"):
        if key in expected.scores:
            assert found.scores[key].dtype == torch.float32
            torch.testing.assert_close(found.scores[key].cpu(), expected.scores[key], rtol=bound, atol=bound)


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bf16_stays_close_to_fp32(head: str, way: str) -> None:
    model, batch = model_and_batch(head)
    with torch.no_grad():
        expected = model.eval()(batch)
        if way == "autocast":
            model.set_up(torch.bfloat16, 0)
        else:
            model.to(torch.bfloat16)
        found = model(batch)
    check_close(found, expected, 0.05)
    assert any(not torch.equal(found.scores[key], expected.scores[key]) for key in expected.scores)  # it was used


@pytest.mark.gpu
@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-3), (torch.float16, 0.02), (torch.bfloat16, 0.05)], ids=str)
def test_a_gpu_computes_what_the_cpu_does(head: str, dtype: torch.dtype | None, bound: float) -> None:
    model, batch = model_and_batch(head)
    with torch.no_grad():
        expected = model.eval()(batch)
        model.set_up(dtype, 0)
        found = model.to("cuda")(batch.to(torch.device("cuda")))
    check_close(found, expected, bound)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("head", ["mean", "joint"])
def test_layers_that_are_computed_again_give_the_same_loss_and_gradients(head: str, layers: int) -> None:
    """Dropout included, to the bit."""

    def step(checkpointed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model, batch = model_and_batch(head)
        model.set_up(None, checkpointed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = model.train()(batch).loss_sum
            return loss.detach(), gradients(loss, model)

    loss, expected = step(0)
    again, found = step(layers)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- first weights


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("initializer", ["normal", "glorot-uniform"])
def test_first_weights_follow_the_seed_and_the_recipe(head: str, initializer: str) -> None:
    section = HeadSection(initializer=initializer, initializer_range=0.02)  # type: ignore[arg-type]

    def made(seed: int) -> dict[str, torch.Tensor]:
        module = heads()[head]
        torch.manual_seed(seed + 99)  # whatever torch's own generator says
        initialise(module, section, seed)
        return module.state_dict()

    first, again, other = made(1), made(1), made(2)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("bias"):
            assert not tensor.any()
            continue
        assert not torch.equal(tensor, other[name])
        if initializer == "normal":
            assert 0.5 < tensor.std() / 0.02 < 1.6
        else:
            bound = math.sqrt(6 / sum(tensor.shape))
            assert 0.7 * bound < tensor.abs().max() <= bound


def test_the_recipes_heads_are_those_of_their_sources() -> None:
    study = SequenceTask.new_head(load_finetune_recipe("rc2020", "mnli"), 32, 3)
    assert {name: tuple(tensor.shape) for name, tensor in study.state_dict().items()} == {
        "dense.weight": (32, 32), "dense.bias": (32,), "out_proj.weight": (3, 32), "out_proj.bias": (3,),
    }  # fmt: skip
    original = SequenceTask.new_head(load_finetune_recipe("original", "mnli"), 32, 3)
    assert {name: tuple(tensor.shape) for name, tensor in original.state_dict().items()} == {
        "out_proj.weight": (3, 32), "out_proj.bias": (3,),
    }  # fmt: skip
    assert isinstance(QuestionAnsweringTask.new_head(load_finetune_recipe("rc2020", "squad2"), 32, None), SpanHead)
    joint = QuestionAnsweringTask.new_head(load_finetune_recipe("original", "squad2"), 32, None)
    assert isinstance(joint, JointSpanHead)
    assert joint.end_hidden.weight.shape == (512, 64)


@settings(max_examples=10)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_losses_are_sums_over_the_inputs(sizes: list[int], seed: int) -> None:
    """So that micro-batches add up to the global batch's mean."""
    rng = np.random.default_rng(seed)
    inputs = inputs_of(sizes, seed, rng.integers(0, 3, len(sizes)))
    model = TaskModel(make_encoder(electra_config(), seed=0), heads()["mean"]).eval()
    whole = model(inputs.micro_batch(np.arange(len(sizes)))).loss_sum
    parts = sum(model(inputs.micro_batch(np.array([row]))).loss_sum for row in range(len(sizes)))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    logits = model(inputs.micro_batch(np.arange(len(sizes)))).scores["logits"]
    nats = functional.cross_entropy(logits, inputs.micro_batch(np.arange(len(sizes))).labels, reduction="sum")
    torch.testing.assert_close(whole, nats)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_a_sum_is_differentiated_as_one_and_told_as_a_mean(sizes: list[int], seed: int) -> None:
    """sizes: of the micro-batches."""
    rng = torch.Generator().manual_seed(seed)
    rows = np.zeros(sum(sizes), np.int64)
    sums = [size * torch.rand((), generator=rng) for size in sizes]
    told, shares = [], []
    for reduction in ("mean", "sum"):
        losses = StepLosses(TaskBatch(inputs_of([4], seed), rows, reduction).loss_terms)
        shares.append(sum(losses.add(TaskOutput(each, {})) for each in sums))
        told.append(losses.result(torch.zeros(()))["loss"])
    torch.testing.assert_close(shares[1], sum(sums))
    torch.testing.assert_close(shares[0] * sum(sizes), sum(sums))
    assert torch.equal(told[0], told[1])
    torch.testing.assert_close(told[0], sum(sums) / sum(sizes))
