"""Kinds of tasks for one's own examples: their heads, their examples, their scores, their runs and their exports."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    ElectraForMultipleChoice,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    pipeline,
)

from electra_ds import cli
from electra_ds.config.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from electra_ds.config.options import TaskSource
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import DataError
from electra_ds.data.tokenizer import train_tokenizer
from electra_ds.finetuning.heads import TaskModel, fill, make_encoder
from electra_ds.finetuning.inputs import GroupedInputs, TaskBatchBuilder, TaskInputs
from electra_ds.finetuning.load_task import load_task
from electra_ds.finetuning.tasks.base import FinetuneTask, Scale
from electra_ds.finetuning.tasks.find import task_class
from electra_ds.finetuning.tasks.multi_label import constant_answer, scores
from electra_ds.finetuning.tasks.sentence_embeddings import retrieval
from electra_ds.finetuning.tasks.token_classification import TokenClassificationTask, _encoded
from tests.finetune_runs import (
    BAD,
    GOOD,
    NO_DROPOUT,
    PLAIN,
    arguments_of,
    electra_config,
    finetune,
    in_own_process,
    losses_of,
    scores_of,
    tiny_electra,
    wordpiece,
    write_squad,
)

KINDS = ("token-classification", "multi-label", "multiple-choice", "sentence-embeddings", "scored")
"""`scored` is sentence embeddings of pairs with scores."""


def kind_of(name: str) -> str:
    return "sentence-embeddings" if name == "scored" else name


def sentence(rng: random.Random, *telling: str) -> str:
    words = rng.choices(PLAIN, k=rng.randint(2, 9))
    for word in telling:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def examples(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that a model can learn."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        good = [word for word in (rng.choice(GOOD),) if rng.random() < 0.7]
        bad = [word for word in (rng.choice(BAD),) if rng.random() < 0.5]
        text = sentence(rng, *good, *bad)
        if kind == "token-classification":
            words = text.split()
            tags = ["B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O" for word in words]
            rows.append({"id": str(index), "tokens": words, "labels": tags})
        elif kind == "multi-label":
            rows.append({"text": text, "labels": ["good"] * bool(good) + ["bad"] * bool(bad)})
        elif kind == "multiple-choice":
            choices = [sentence(rng, rng.choice(BAD)) for _ in range(2 + index % 3)]
            answer = rng.randrange(len(choices))
            choices[answer] = sentence(rng, rng.choice(GOOD))
            rows.append({"question": text, "choices": choices, "label": answer})
        elif kind == "scored":
            is_same = rng.random() < 0.5
            second = sentence(rng, rng.choice(GOOD if is_same else BAD))
            rows.append({"sentence1": sentence(rng, rng.choice(GOOD)), "sentence2": second, "score": 5.0 * is_same})
        else:
            word = rng.choice((*GOOD, *BAD))
            rows.append({"anchor": sentence(rng, word), "positive": sentence(rng, word)})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path


def source_of(kind: str, folder: Path, count: int = 12) -> TaskSource:
    folder.mkdir(exist_ok=True)
    paths = {
        name: write(folder / f"{name}.jsonl", examples(kind, count, seed)) for seed, name in enumerate(("train", "dev"))
    }
    return TaskSource(**{name: str(path) for name, path in paths.items()})


def recipe_for(kind: str, *overrides: str) -> FinetuneRecipe:
    return load_finetune_recipe("own", kind_of(kind), ["head.dropout=0", "data.max_length=32", *overrides])


def task_of(kind: str, folder: Path, *overrides: str) -> FinetuneTask:
    data = load_task(kind_of(kind), source_of(kind, folder))
    return task_class(kind_of(kind))(data, wordpiece(), recipe_for(kind, *overrides), has_segments=True)


def model_of(kind: str, task: FinetuneTask, seed: int = 3) -> TaskModel:
    config = electra_config(**NO_DROPOUT, initializer_range=0.3)
    head = task.new_head(recipe_for(kind), config.hidden_size, task.num_outputs)
    model = TaskModel(make_encoder(config, seed), head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return model


# --- batches and losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_of_micro_batches_add_up_to_that_of_the_batch(kind: str, tmp_path: Path) -> None:
    """Drawn negatives included, which are those of the example and not of the micro-batch."""
    task = task_of(kind, tmp_path)
    model = model_of(kind, task)
    batch = TaskBatchBuilder(task.train, 7, seed=5).build(3)  # of two epochs
    whole = model(batch.micro_batch(0, 7)).loss_sum
    assert whole is not None
    for size in (1, 2, 4):
        parts = [model(batch.micro_batch(first, min(size, 7 - first))).loss_sum for first in range(0, 7, size)]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    again = TaskBatchBuilder(task.train, 7, seed=5).build(3)
    assert torch.equal(model(again.micro_batch(0, 7)).loss_sum, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, tmp_path: Path) -> None:
    task = task_of(kind, tmp_path)
    model = model_of(kind, task).double()
    batch = TaskBatchBuilder(task.train, 4, seed=1).build(0).micro_batch(0, 4)

    def loss() -> torch.Tensor:
        found = model(batch).loss_sum
        assert found is not None
        return found

    loss().backward()
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not (name.startswith("head.") or "layer.1.output" in name):
            continue
        place = tuple(int(rng.integers(size)) for size in parameter.shape)
        step, differences = 1e-3, []  # the heads compute scores in fp32
        with torch.no_grad():
            for sign in (1, -1):
                parameter[place] += sign * step
                differences.append(loss().item())
                parameter[place] -= sign * step
        found = (differences[0] - differences[1]) / (2 * step)
        assert found == pytest.approx(parameter.grad[place].item(), rel=0.03, abs=0.03)


def test_the_loss_of_tags_is_that_of_transformers(tmp_path: Path) -> None:
    task = task_of("token-classification", tmp_path)
    model = model_of("token-classification", task)
    theirs = ElectraForTokenClassification(electra_config(**NO_DROPOUT, num_labels=3))
    tensors = {f"electra.{name}": value for name, value in model.encoder.named_parameters()}
    fill(theirs, tensors | {f"classifier.{name}": value for name, value in model.head.out_proj.named_parameters()})
    rows = np.arange(6)
    batch = task.train.micro_batch(rows)
    expected = theirs(**model.encoder_inputs(batch), labels=batch.labels)
    found = model(batch)
    assert task.train.targets is not None
    torch.testing.assert_close(found.loss_sum / task.train.targets.count(rows), expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores["logits"], expected.logits, rtol=1e-4, atol=1e-4)


def test_the_loss_of_several_labels_is_that_of_transformers(tmp_path: Path) -> None:
    task = task_of("multi-label", tmp_path)
    model = model_of("multi-label", task)
    config = electra_config(**NO_DROPOUT, num_labels=2, problem_type="multi_label_classification")
    theirs = task.to_transformers(model, config, task.labels, Scale())
    assert isinstance(theirs, ElectraForSequenceClassification)
    batch = task.train.micro_batch(np.arange(6))
    expected = theirs(**model.encoder_inputs(batch), labels=batch.labels)
    torch.testing.assert_close(model(batch).loss_sum / 6, expected.loss, rtol=1e-5, atol=1e-5)


def test_the_loss_of_choices_is_that_of_transformers(tmp_path: Path) -> None:
    task = task_of("multiple-choice", tmp_path)
    model = model_of("multiple-choice", task)
    theirs = task.to_transformers(model, electra_config(**NO_DROPOUT), (), Scale())
    assert isinstance(theirs, ElectraForMultipleChoice)
    inputs = task.train
    assert isinstance(inputs, GroupedInputs)
    of_three = np.flatnonzero(np.diff(inputs.groups) == 3)
    batch = inputs.micro_batch(of_three)
    ours = model.encoder_inputs(batch)
    expected = theirs(**{key: value.view(len(of_three), 3, -1) for key, value in ours.items()}, labels=batch.labels)
    torch.testing.assert_close(model(batch).loss_sum / len(of_three), expected.loss, rtol=1e-5, atol=1e-5)
    mixed = inputs.micro_batch(np.arange(6))
    alone = [model(inputs.micro_batch(np.array([row]))).scores["logits"][0] for row in range(6)]
    for row, logits in zip(model(mixed).scores["logits"], alone, strict=True):
        torch.testing.assert_close(row[: len(logits)], logits, rtol=1e-4, atol=1e-4)
        assert (row[len(logits) :] == -1e4).all()


def vectors_of(model: TaskModel, text: str, tokenizer: Any) -> torch.Tensor:
    """By transformers alone."""
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        vector = model.encoder(**inputs).last_hidden_state.mean(1)[0]
    return vector / vector.norm()


def test_pairs_are_compared_with_the_seconds_of_other_examples(tmp_path: Path) -> None:
    """The loss by loops over texts; another example's equal second text is not wrong."""
    rows = examples("sentence-embeddings", 9, 0)
    rows[4]["positive"] = rows[1]["positive"]
    for row in rows:
        row["negative"] = f"awful {row['positive']}"
    source = TaskSource(train=str(write(tmp_path / "train.jsonl", rows)), dev=str(write(tmp_path / "dev.jsonl", rows)))
    data = load_task("sentence-embeddings", source)
    tokenizer = wordpiece()
    recipe = recipe_for("sentence-embeddings", "data.negatives=4", "head.cosine_scale=8")
    task = task_class("sentence-embeddings")(data, tokenizer, recipe, has_segments=False)
    model = TaskModel(
        make_encoder(electra_config(**NO_DROPOUT, initializer_range=0.3), 3), task.new_head(recipe, 32, None)
    )
    batch = TaskBatchBuilder(task.train, 9, seed=2).build(1)
    assert batch.draws is not None
    assert batch.draws.shape == (9, 4)
    assert set(batch.draws.ravel()) <= set(range(9))
    assert any(rows[drawn]["positive"] == rows[row]["positive"]
               for row, of_row in zip(batch.rows_B, batch.draws, strict=True) for drawn in of_row)  # fmt: skip
    expected = 0.0
    for row, drawn in zip(batch.rows_B, batch.draws, strict=True):
        right = rows[row]["positive"]
        wrong = [
            rows[row]["negative"],
            *(rows[other]["positive"] for other in drawn if rows[other]["positive"] != right),
        ]
        anchor = vectors_of(model, rows[row]["anchor"], tokenizer)
        cosines = torch.stack([anchor @ vectors_of(model, text, tokenizer) for text in (right, *wrong)])
        expected -= (8 * cosines).log_softmax(0)[0].item()
    found = model(batch.micro_batch(0, 9)).loss_sum
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-4)
    other = TaskBatchBuilder(task.train, 9, seed=2).build(2)
    assert other.draws is not None
    assert not np.array_equal(batch.draws, other.draws)


# --- words and tokens


WORDS = st.text(st.characters(codec="utf8", exclude_categories=("Z", "C")), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=60), longest=st.integers(8, 20), is_bytes=st.booleans())
def test_every_word_with_a_token_is_in_one_input(words: list[str], longest: int, is_bytes: bool) -> None:
    """Once and in order, at its first token, however long the text is."""
    tokenizer = BYTES if is_bytes else PIECES
    seen: list[int] = []
    for ids, numbers, positions in _encoded(words, tokenizer, longest):
        assert len(ids) <= longest
        assert ids[0] == tokenizer.cls_token_id
        assert ids[-1] == tokenizer.sep_token_id
        assert all(0 < position < len(ids) - 1 for position in positions)
        seen += numbers.tolist()
    assert seen == sorted(set(seen))
    alone = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert {number for number, ids in enumerate(alone) if ids} <= set(seen)


def _byte_level() -> Any:
    lines = ["the quick brown fox jumps over the lazy dog " * 3] * 40
    backend = train_tokenizer(lines, TokenizerSection(kind="byte-level-bpe", vocab_size=400)).backend
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


BYTES, PIECES = _byte_level(), wordpiece()


def test_right_logits_give_full_scores_also_for_texts_of_several_inputs(tmp_path: Path) -> None:
    source = source_of("token-classification", tmp_path)
    rows = examples("token-classification", 3, 8)
    long = {
        "id": "long",
        "tokens": [w for r in rows * 6 for w in r["tokens"]],
        "labels": [t for r in rows * 6 for t in r["labels"]],
    }
    write(Path(str(source.dev)), [*rows, long])
    data = load_task("token-classification", source)
    task = TokenClassificationTask(data, PIECES, recipe_for("token-classification"), has_segments=False)
    inputs: TaskInputs = task.dev["dev"]
    assert len(inputs) > 4
    outputs = []
    for row in range(len(inputs)):
        labels = inputs.micro_batch(np.array([row])).labels
        assert labels is not None
        outputs.append({"logits": np.eye(3)[labels[0].clamp(min=0).numpy()]})
    result = task.evaluate("dev", outputs)
    assert result.metrics == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    assert result.rows == sum(len(row["tokens"]) for row in (*rows, long))
    lines = [json.loads(line) for line in result.files["predictions/dev.jsonl"].decode().splitlines()]
    assert [line["prediction"] for line in lines] == [row["labels"] for row in (*rows, long)]
    assert [line["id"] for line in lines] == ["0", "1", "2", "long"]


def test_entities_are_scored_as_by_conlleval(tmp_path: Path) -> None:
    """Known numbers: two of three predicted entities are right, and two of four are found."""
    rows = [{"tokens": ["a"] * 6, "labels": ["B-X", "I-X", "O", "B-Y", "B-X", "B-Y"]}]
    source = TaskSource(train=str(write(tmp_path / "train.jsonl", rows)), dev=str(write(tmp_path / "dev.jsonl", rows)))
    task = TokenClassificationTask(
        load_task("token-classification", source), PIECES, recipe_for("token-classification"), has_segments=False
    )
    predicted = ["B-X", "I-X", "B-Y", "B-Y", "O", "O"]
    logits = np.zeros((8, len(task.labels)))
    logits[np.arange(1, 7), [task.labels.index(tag) for tag in predicted]] = 1
    result = task.evaluate("dev", [{"logits": logits}])
    assert result.metrics["precision"] == pytest.approx(2 / 3)
    assert result.metrics["recall"] == pytest.approx(2 / 4)
    assert result.metrics["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert result.baseline["f1"] < result.metrics["f1"]


# --- scores


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=12))
def test_the_constant_answer_has_the_best_score_of_all(rows: list[tuple[bool, ...]]) -> None:
    truth = np.array(rows)

    def micro(answer: tuple[bool, ...]) -> float:
        predicted = np.broadcast_to(np.array(answer), truth.shape)
        total = predicted.sum() + truth.sum()
        return 2 * (predicted & truth).sum() / total if total else 0.0

    best = max(micro(answer) for answer in itertools.product((False, True), repeat=4))
    found = tuple(bool(each) for each in constant_answer(truth))
    assert micro(found) == pytest.approx(best)
    assert scores(truth, np.broadcast_to(np.array(found), truth.shape))["f1_micro"] == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), kinds=st.integers(1, 30))
def test_retrieval_is_scored_as_by_counting_ranks(seed: int, count: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = [f"text {rng.integers(kinds)}" for _ in range(count)]
    vectors = rng.normal(size=(count, 2, 4))
    of_text = {text: vectors[row, 1] for row, text in reversed(list(enumerate(seconds)))}
    ranks = np.array([
        1 + sum(vectors[row, 0] @ other > vectors[row, 0] @ of_text[text] for other in of_text.values())
        for row, text in enumerate(seconds)
    ])  # fmt: skip
    found, by_chance, ours = retrieval(vectors, seconds)
    assert ours.tolist() == ranks.tolist()
    assert found["mrr"] == pytest.approx((1 / ranks).mean())
    assert found["accuracy_at_1"] == pytest.approx((ranks == 1).mean())
    assert found["recall_at_10"] == pytest.approx((ranks <= 10).mean())
    assert by_chance["accuracy_at_1"] == pytest.approx(1 / len(of_text))


# --- files


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
CONLLU = """# sent_id = 1
# text = Don't go.
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
3\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
3.1\tthere\tthere\tADV\tRB\t_\t_\t_\t_\t_
4\t#\t#\tPUNCT\t.\t_\t3\tpunct\t_\t_
"""


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("a.conll", CONLL, {}, [(("EU", "rejects"), ("B-ORG", "O")), (("Peter", "Blackburn"), ("B-PER", "I-PER"))]),
        ("a.txt", CONLL.replace(" ", "\t"), {"label": "2"},
         [(("EU", "rejects"), ("NNP", "VBZ")), (("Peter", "Blackburn"), ("NNP", "NNP"))]),
        ("a.conllu", CONLLU, {}, [(("Do", "n't", "go", "#"), ("AUX", "PART", "VERB", "PUNCT"))]),
        ("a.conllu", CONLLU, {"text": "3", "label": "5"}, [(("do", "not", "go", "#"), ("VB", "RB", "VB", "."))]),
        ("a.jsonl", '{"words": ["a", "b"], "ner_tags": ["O", "B-X"]}\n', {}, [(("a", "b"), ("O", "B-X"))]),
    ],
)  # fmt: skip
def test_words_and_tags_are_read_from_the_usual_files(
    name: str, text: str, columns: dict[str, str], expected: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text, "utf8")
    data: Any = load_task("token-classification", TaskSource(train=str(path), dev=str(path), **columns))
    assert [(each.words, each.tags) for each in data.sets["train"]] == expected


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "message"),
    [
        ("token-classification", [{"tokens": ["a", "b"], "labels": ["O"]}], {}, "row 1: 2 words but 1 tags"),
        ("token-classification", [{"tokens": "a b", "labels": ["O"]}], {}, "'tokens' is 'a b'. It must be a list"),
        ("token-classification", [{"tokens": ["a"], "labels": ["O"]}], {}, "fewer than two different tags"),
        ("token-classification", [{"tokens": ["a"]}], {}, r"no label column.*--label COLUMN"),
        ("multi-label", [{"text": "a", "x": "1", "y": "2"}], {"label": "x,y"}, "row 1: 'y' is '2'. With several"),
        ("multi-label", [{"text": "a", "labels": []}], {}, "no row has a label"),
        ("multi-label", [{"labels": ["x"]}], {}, "no text column"),
        ("multiple-choice", [{"question": "a", "choices": ["b", "c"], "label": 2}], {}, "the answer '2' is none of"),
        ("multiple-choice", [{"question": "a", "choices": ["b"], "label": 0}], {}, "needs two or more choices"),
        ("multiple-choice", [{"question": "a", "label": 0}], {}, "no choices.*choice0 and choice1"),
        ("sentence-embeddings", [{"anchor": "a"}], {}, "no pair column"),
        ("sentence-embeddings", [{"anchor": "a", "positive": "b", "score": "high"}], {}, "score 'high' in 'score'"),
        ("sentence-embeddings", [{"anchor": "a", "positive": "b", "score": 1}] * 2, {}, "every pair has the same"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_learned_are_refused(
    kind: str, rows: list[dict[str, Any]], columns: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=message):
        load_task(kind, TaskSource(train=path, dev=path, **columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n\n", "line 2: 1 columns, but earlier lines have 2"),
        ("a\nb\n\nc\n", "has one column, so its words have no tags"),
        ("token tag\na B-X\nb O\nc I-X\n", "the tag 'tag' of 'token' marks no entity, as 'B-X'"),
        ("\n\n", "has no words"),
    ],
)
def test_columns_that_cannot_be_read_are_named_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_task("token-classification", TaskSource(train=str(path), dev=str(path)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1", ["1", "2"])], "can be read as numbers from 0 or as texts"),
        ([("A", ["x", "y"]), ("0", ["x", "y"])], "the answers are written in different ways"),
    ],
)
def test_answers_that_can_be_read_in_two_ways_are_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"question": "q", "choices": c, "label": label} for label, c in rows]))
    with pytest.raises(DataError, match=message):
        load_task("multiple-choice", TaskSource(train=path, dev=path))


@pytest.mark.parametrize(
    ("kind", "row", "unlabelled"),
    [
        ("token-classification", {"tokens": ["a", "b"], "labels": ["O", "B-X"]}, {"labels": []}),
        ("token-classification", {"tokens": ["a", "b"], "labels": ["O", "B-X"]}, {"labels": ["_", "_"]}),
        ("multi-label", {"text": "a", "labels": ["x"]}, {"labels": ""}),
        ("multiple-choice", {"question": "a", "choices": ["x", "y"], "label": "0"}, {"label": "-1"}),
        ("sentence-embeddings", {"anchor": "a", "positive": "b", "score": "-1"}, {"score": None}),
    ],
)
def test_a_test_set_may_lack_labels_in_the_ways_of_published_sets(
    kind: str, row: dict[str, Any], unlabelled: dict[str, Any], tmp_path: Path
) -> None:
    other = row | ({"labels": ["x", "y"]} if kind == "multi-label" else {"score": "1"} if "score" in row else {})
    paths = {"train": [row, other], "dev": [row, other], "test": [row | unlabelled]}
    source = TaskSource(**{name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in paths.items()})
    data = load_task(kind, source)
    task = task_class(kind)(data, wordpiece(), recipe_for(kind), has_segments=False)
    assert task.test["test"].targets is None
    assert list(data.sizes.values()) == [2, 2, 1]
    labelled = load_task(kind, TaskSource(train=source.train, dev=source.dev, test=source.dev))
    assert task_class(kind)(labelled, wordpiece(), recipe_for(kind), has_segments=False).test["test"].targets


def test_a_test_set_of_columns_may_have_words_alone(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(CONLL)
    (tmp_path / "test.conll").write_text("EU\nrejects\n")
    train, test = str(tmp_path / "train.conll"), str(tmp_path / "test.conll")
    for label in (None, "4"):
        data: Any = load_task("token-classification", TaskSource(train=train, dev=train, test=test, label=label))
        assert data.sets["test"][0].tags is None


def test_a_test_set_with_tags_keeps_them_whatever_its_comments_look_like(tmp_path: Path) -> None:
    for name, text, label in (("a.conllu", f"# newpar\n{CONLLU}", None), ("a.conll", f"# x=1\n{CONLL}", "4")):
        path = str(tmp_path / name)
        Path(path).write_text(text)
        other = str(tmp_path / f"test-{name}")
        Path(other).write_text(text)
        data: Any = load_task("token-classification", TaskSource(train=path, dev=path, test=other, label=label))
        assert data.sets["test"] == data.sets["dev"]


def test_unique_names_of_an_entitys_last_and_only_word_are_scored(tmp_path: Path) -> None:
    """seqeval itself knows only S- and E-."""
    rows = [{"tokens": ["a"] * 5, "labels": ["U-X", "U-X", "O", "B-X", "L-X"]}]
    path = str(write(tmp_path / "a.jsonl", rows))
    task = TokenClassificationTask(
        load_task("token-classification", TaskSource(train=path, dev=path)), PIECES,
        recipe_for("token-classification"), has_segments=False,
    )  # fmt: skip
    logits = np.zeros((8, len(task.labels)))
    logits[np.arange(1, 6), [task.labels.index(tag) for tag in ("U-X", "O", "O", "B-X", "L-X")]] = 1
    found = task.evaluate("dev", [{"logits": logits}]).metrics
    assert (found["precision"], found["recall"]) == (1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"}, (("x", "y"), 0)),
        ({"premise": "q", "question": "why", "choice1": "x", "choice2": "y", "label": 0}, (("why x", "why y"), 0)),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, (("x", "y"), 1)),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, (("x", "y"), 1)),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, (("x", "y"), 1)),
        ({"sent1": "q", "sent2": "he", "ending0": "x", "ending1": "y", "label": 0}, (("he x", "he y"), 0)),
    ],
)
def test_choices_are_read_as_published_sets_write_them(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [row]))
    data: Any = load_task("multiple-choice", TaskSource(train=path, dev=path))
    (found,) = data.sets["train"]
    assert (found.text, (found.choices, found.answer)) == ("q", expected)


def test_labels_are_read_from_lists_texts_and_columns(tmp_path: Path) -> None:
    lists = write(tmp_path / "lists.jsonl", [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}])
    (tmp_path / "texts.csv").write_text('text,label\na,"x, y"\nb,\n')
    (tmp_path / "columns.csv").write_text("text,x,y\na,1,1\nb,0,0\n")
    for path, label in ((lists, None), (tmp_path / "texts.csv", None), (tmp_path / "columns.csv", "x,y")):
        data: Any = load_task("multi-label", TaskSource(train=str(path), dev=str(path), label=label))
        assert data.labels == ("x", "y")
        assert data.sets["train"].labels.tolist() == [[1, 1], [0, 0]]


@pytest.mark.slow
def test_a_data_set_in_the_hubs_layout_is_read(tmp_path: Path) -> None:
    """Classes by their names, and both names that a development set may have."""
    import datasets

    tags = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [0]]}
    made = datasets.Dataset.from_dict(rows, features=tags)
    for split in ("train", "validation"):
        made.to_parquet(tmp_path / "ner" / "data" / f"{split}-00000-of-00001.parquet")
    data: Any = load_task("token-classification", TaskSource(hub=str(tmp_path / "ner")))
    assert [(each.words, each.tags) for each in data.sets["dev"]] == [(("a", "b"), ("O", "B-X")), (("c",), ("O",))]
    assert data.name == "ner"


# --- runs and exports


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_electra(tmp_path_factory.mktemp("encoder"))


def run_of(kind: str, model: Path, folder: Path, run: Path, *overrides: str, **flags: Any) -> list[str]:
    source = source_of(kind, folder, 40)
    files = {"train": source.train, "dev": source.dev}
    arguments = arguments_of(model, None, "", run, "schedule.min_steps=0", *overrides, **files, **flags)
    return ["--task", kind_of(kind), *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_exactly_exported_and_used_by_its_library(kind: str, electra: Path, tmp_path: Path) -> None:
    arguments = run_of(kind, electra, tmp_path / "data", tmp_path / "straight", "schedule.epochs=3", save_every=7)
    printed = finetune(*arguments)
    assert "baseline:" in printed
    broken = [word.replace("straight", "broken") for word in arguments]
    finetune(*broken[: broken.index("--set")], "--stop-at", 7, *broken[broken.index("--set") :])
    finetune("--resume", tmp_path / "broken")
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "straight")
    losses = losses_of(tmp_path / "straight")
    assert sum(losses[-4:]) < sum(losses[:4])
    assert scores_of(tmp_path / "broken")["sets"] == scores_of(tmp_path / "straight")["sets"]
    cli.main(["export", str(tmp_path / "straight"), "--out", str(tmp_path / "out")])
    rows = examples(kind, 40, 1)
    predicted = [json.loads(line) for line in (tmp_path / "straight/predictions/dev.jsonl").read_text().splitlines()]
    CHECKS[kind](tmp_path / "out", rows, predicted)
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("PATH", str(tmp_path / "out"))
    exec(compile(code, "card", "exec"), {})
    exec(compile(task_class(kind_of(kind)).usage.replace("PATH", str(tmp_path / "out")), "usage", "exec"), {})
    assert f"pipeline_tag: {task_class(kind_of(kind)).hub_task}" in card
    assert f"| dev | {scores_of(tmp_path / 'straight')['sets']['dev']['rows']}" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentence-embeddings", "multiple-choice"])
def test_two_ranks_at_zero_stage_2_train_as_one_does(kind: str, tmp_path: Path) -> None:
    """Examples of several inputs, and drawn negatives, are those of the example and not of the rank."""
    electra = tiny_electra(tmp_path / "encoder", **NO_DROPOUT)
    found = []
    for ranks, plan in ((1, "cpu"), (2, "zero2")):
        arguments = run_of(kind, electra, tmp_path / "data", tmp_path / plan, "schedule.epochs=1", "head.dropout=0")
        given = [plan if word.endswith("cpu.json") else word for word in arguments]
        in_own_process(given, ranks=ranks)
        found.append((losses_of(tmp_path / plan), scores_of(tmp_path / plan)["sets"]["dev"]["metrics"]))
    (losses, scores), (of_two, scores_of_two) = found
    assert of_two == pytest.approx(losses, rel=1e-5)
    assert scores_of_two == pytest.approx(scores, abs=1e-6)


def _tags(out: Path, rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    tagger = pipeline("token-classification", model=str(out), ignore_labels=[])
    for row, line in list(zip(rows, predicted, strict=True))[:6]:
        found = tagger(" ".join(row["tokens"]))
        assert [each["entity"] for each in found if not each["word"].startswith("##")] == line["prediction"]


def _labels(out: Path, rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    classifier = pipeline("text-classification", model=str(out), top_k=None)
    for row, line in list(zip(rows, predicted, strict=True))[:6]:
        found = {each["label"]: each["score"] for each in classifier([row["text"]])[0]}
        assert sorted(label for label, score in found.items() if score > 0.5) == line["prediction"]


def _choices(out: Path, rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForMultipleChoice.from_pretrained(out).eval()
    for row, line in list(zip(rows, predicted, strict=True))[:6]:
        size = len(row["choices"])
        inputs = tokenizer([row["question"]] * size, row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{key: value.unsqueeze(0) for key, value in inputs.items()}).logits[0]
        torch.testing.assert_close(logits, torch.tensor(line["logits"]), rtol=1e-4, atol=1e-4)


def _vectors(out: Path, rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(out), device="cpu")
    names = ("sentence1", "sentence2") if "score" in rows[0] else ("anchor", "positive")
    first, second = (model.encode([row[name] for row in rows]) for name in names)
    assert np.allclose((first * second).sum(-1), [line["cosine"] for line in predicted], atol=1e-5)


CHECKS = {
    "token-classification": _tags, "multi-label": _labels, "multiple-choice": _choices,
    "sentence-embeddings": _vectors, "scored": _vectors,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--task multi-label needs examples: --train FILE and --dev FILE, or --hub NAME"),
        (["--train", "a.jsonl"], "Your own examples need --dev FILE too"),
        (["--train", "a.jsonl", "--dev", "a.jsonl", "--hub", "x"], "--hub cannot be combined with --train and --dev"),
    ],
)
def test_options_that_do_not_fit_a_kind_of_task_are_refused(electra: Path, more: list[str], message: str) -> None:
    assert message in finetune("--model", electra, "--task", "multi-label", *more, status=2)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_ones_own_questions_in_squads_layout_are_trained_and_exported(
    version: str, electra: Path, tmp_path: Path
) -> None:
    """As SQuAD 2.0 if any of them has no answer."""
    folder = write_squad(tmp_path / "own", version)
    files = {name: str(folder / f"{name}-v{version}.json") for name in ("train", "dev")}
    arguments = arguments_of(electra, None, "", tmp_path / "run", "schedule.min_steps=0", "schedule.epochs=1", **files)
    finetune("--task", "question-answering", *arguments)
    scores = scores_of(tmp_path / "run")
    assert scores["task"] == f"question-answering-train-v{version}"
    assert ("NoAns_exact" in scores["sets"]["dev"]["metrics"]) == (version == "2.0")
    cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "pipeline_tag: question-answering" in (tmp_path / "out" / "README.md").read_text()
    again = [word.replace(str(tmp_path / "run"), str(tmp_path / "other")) for word in arguments]
    said = finetune("--task", "question-answering", "--test", files["dev"], *again, status=2)
    assert "--task question-answering does not take --test" in said


def test_an_own_head_without_a_class_is_told_before_training(tmp_path: Path) -> None:
    one = load_finetune_recipe("own", "multiple-choice", ["head.num_layers=1"])
    problem = task_class("multiple-choice").why_not_exportable(one, electra_config())
    assert problem is not None
    assert "head.num_layers=2" in problem.instead
    assert task_class("multiple-choice").why_not_exportable(recipe_for("multiple-choice"), electra_config()) is None
    mean = task_class("multi-label").why_not_exportable(
        load_finetune_recipe("rc2020", "multi-label", []), electra_config(), 3
    )
    assert mean is not None
    assert "head.pooling=first" in mean.instead
