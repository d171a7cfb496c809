from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from electra_ds.core.errors import ConfigError, DataError
from electra_ds.finetuning.metrics import evaluate_squad1, normalize
from electra_ds.finetuning.squad import (
    NOT_FOUND,
    Question,
    SquadData,
    load_squad,
    load_squad_hub,
    locate,
)
from electra_ds.finetuning.squad_features import (
    BERT_THRESHOLD,
    Candidate,
    Window,
    best_answers,
    independent_candidates,
    joint_candidates,
    make_features,
    window_spans,
)
from tests.data_files import DataFiles

CONTEXT = "The keeper  of Lindau lit the lamp in 1856.\nNobody thanked him; he kept the lamp for 30 years."


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it prepared; not in the user's own cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


# --- files


def entry(identity: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    texts = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": identity, "question": f"What is {identity}?", "answers": texts} | more


def document(*entries: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"version": "x", "data": [{"title": "Lindau", "paragraphs": [{"context": context, "qas": list(entries)}]}]}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf8")
    return path.parent


LAMP = ("lamp", CONTEXT.index("lamp"))


def test_the_official_files_are_read(tmp_path: Path) -> None:
    write(tmp_path / "train-v1.1.json", document(entry("a", LAMP), entry("b", ("1856", CONTEXT.index("1856")))))
    write(tmp_path / "dev-v1.1.json", document(entry("c", LAMP, ("the lamp", LAMP[1] - 4))))
    write(tmp_path / "dev-v1.1.part1.json", document(entry("other", LAMP)))  # the official name goes before it
    data = load_squad("squad1", tmp_path)
    assert [question.id for question in data.train] == ["a", "b"]
    texts, starts = ("lamp", "the lamp"), (LAMP[1], LAMP[1] - 4)
    assert data.dev == [Question("c", "Lindau", "What is c?", CONTEXT, texts, starts)]
    assert data.name == "squad1"
    assert str(tmp_path / "dev-v1.1.json") in data.source
    assert data.notes == (
        "train has 2 questions, the published file of squad1 has 87,599.",
        "dev has 1 questions, the published file of squad1 has 10,570.",
    )
    again = load_squad("squad1", tmp_path)
    assert again == data
    write(tmp_path / "dev-v1.1.json", document(entry("d", LAMP)))
    assert load_squad("squad1", tmp_path).fingerprint != data.fingerprint


def test_parts_are_found_by_their_names_and_training_data_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path / "dev-v1.1.part1.json", document(entry("c", LAMP)))
    data = load_squad("squad1", tmp_path)
    assert (data.train, len(data.dev)) == ([], 1)
    write(tmp_path / "train_v1.1.json", document(entry("a", LAMP)))
    write(tmp_path / "train-v2.0.json", document(entry("b", LAMP)))
    assert [question.id for question in load_squad("squad1", tmp_path).train] == ["a"]


def test_squad2_has_impossible_questions(tmp_path: Path) -> None:
    plausible = {"plausible_answers": [{"text": "lamp", "answer_start": LAMP[1]}], "is_impossible": True}
    questions = document(entry("a", LAMP, is_impossible=False), entry("b", **plausible), entry("c"))
    folder = write(tmp_path / "dev-v2.0.json", questions)
    write(tmp_path / "train-v2.0.json", document(entry("d", is_impossible=True)))
    data = load_squad("squad2", folder)
    assert [(each.id, each.is_impossible, each.answers) for each in data.dev] == [
        ("a", False, ("lamp",)),
        ("b", True, ()),
        ("c", True, ()),
    ]
    assert [each.id for each in data.train] == ["d"]


def test_answers_are_looked_for_where_they_do_not_stand(tmp_path: Path) -> None:
    second = CONTEXT.rindex("lamp")
    write(
        tmp_path / "train-v1.1.json",
        document(
            entry("near", ("lamp", second + 3)),
            entry("spaced", ("keeper of", 4)),
            entry("line", ("1856. Nobody", 0)),
            entry("gone", ("lantern", 3)),
            entry("half", ("lantern", 3), LAMP),
            entry("blank", ("  ", 3)),
        ),
    )
    write(tmp_path / "dev-v1.1.json", document(entry("dev", ("lantern", 3))))
    data = load_squad("squad1", tmp_path)
    assert [(each.id, each.answers, each.starts) for each in data.train] == [
        ("near", ("lamp",), (second,)),
        ("spaced", ("keeper  of",), (4,)),
        ("line", ("1856.\nNobody",), (CONTEXT.index("1856"),)),
        ("half", ("lantern", "lamp"), (NOT_FOUND, LAMP[1])),
    ]
    assert data.dev[0].answers == ("lantern",)  # still what predictions are judged by
    assert data.dev[0].starts == (NOT_FOUND,)
    assert [note.split()[0] for note in data.notes] == ["train", "dev", "3", "4", "2"]
    assert "gone, blank" in data.notes[-1]


@given(st.text("ab \n", max_size=30), st.text("ab ", min_size=1, max_size=4), st.integers(-2, 32))
def test_the_nearest_place_is_found(context: str, answer: str, start: int) -> None:
    text, found = locate(answer, start, context)
    pieces = answer.split()
    spans = {
        (begin, stop)
        for begin in range(len(context))
        for stop in range(begin + 1, len(context) + 1)
        if pieces and context[begin:stop].split() == pieces and context[begin:stop].strip() == context[begin:stop]
    }
    if not spans:
        assert (text, found) == (answer, NOT_FOUND)
    else:
        assert (found, found + len(text)) in spans
        assert abs(found - start) == min(abs(begin - start) for begin, _ in spans)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', "dev-v1.1.json is not JSON, or is cut off"),
        ("[]", "not in SQuAD's layout at the first question (TypeError"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{}]}]}]}', "(KeyError: 'answers')"),
        (
            json.dumps(document(entry("a", LAMP), {"id": "b", "question": "?"})),
            "after question a (KeyError: 'answers')",
        ),
        (json.dumps(document({"id": 3, "question": "?", "answers": [{"text": "a", "answer_start": 0}]})), "layout at"),
        (json.dumps(document(entry("a"))), "question a has no answers"),
        (json.dumps(document(entry("a", is_impossible=True))), "which SQuAD 1.1 does not have"),
        (json.dumps(document(entry("a", LAMP), entry("a", LAMP))), "two questions have the id a"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "dev-v1.1.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_squad("squad1", tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_or_with_too_many_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        load_squad("squad1", tmp_path / "none")
    with pytest.raises(DataError, match=r"has no dev-v1\.1\.json for squad1; the JSON files there: none"):
        load_squad("squad1", tmp_path)
    write(tmp_path / "dev-v1.1.a.json", document(entry("a", LAMP)))
    with pytest.raises(DataError, match=r"has no dev-v2\.0\.json for squad2; the JSON files there: dev-v1\.1\.a\.json"):
        load_squad("squad2", tmp_path)
    write(tmp_path / "dev-v1.1.b.json", document(entry("a", LAMP)))
    with pytest.raises(DataError, match=r"several files for dev: dev-v1\.1\.a\.json, dev-v1\.1\.b\.json"):
        load_squad("squad1", tmp_path)
    contradiction = tmp_path / "2"
    contradiction.mkdir()
    write(contradiction / "dev-v2.0.json", document(entry("a", LAMP, is_impossible=True)))
    with pytest.raises(DataError, match="question a is impossible but has answers"):
        load_squad("squad2", contradiction)
    write(contradiction / "dev-v2.0.json", document(entry("a", LAMP)))
    write(contradiction / "train-v2.0.json", document(entry("a", LAMP)))
    with pytest.raises(DataError, match="two questions have the id a"):
        load_squad("squad2", contradiction)


def test_a_lone_surrogate_moves_no_offset(tmp_path: Path) -> None:
    content = json.dumps(document(entry("a", ("lamp", 3)), context="\ud83d, lamp"))
    (tmp_path / "dev-v1.1.json").write_text("\ufeff" + content, "utf8")
    question = load_squad("squad1", tmp_path).dev[0]
    assert (question.context, question.starts) == ("?, lamp", (3,))


# --- the Hub's layout


def write_table(path: Path, rows: Sequence[tuple[str, list[str], list[int]]], **other: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = pa.array(
        [{"text": texts, "answer_start": starts} for _, texts, starts in rows],
        pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())}),
    )
    columns: dict[str, Any] = {
        "id": [row[0] for row in rows],
        "title": ["Lindau"] * len(rows),
        "context": [CONTEXT] * len(rows),
        "question": [f"What is {row[0]}?" for row in rows],
        "answers": answers,
    }
    pq.write_table(pa.table({key: value for key, value in (columns | other).items() if value is not None}), path)


def test_the_hubs_layout_gives_what_the_files_give(tmp_path: Path) -> None:
    hub, files = tmp_path / "hub", tmp_path / "files"
    files.mkdir()
    write_table(hub / "data" / "train-00000-of-00001.parquet", [("a", ["lamp"], [LAMP[1] + 1]), ("b", [], [])])
    write_table(hub / "data" / "validation-00000-of-00001.parquet", [("c", ["lamp", "the lamp"], [LAMP[1], 0])])
    write(files / "train-v2.0.json", document(entry("a", ("lamp", LAMP[1] + 1)), entry("b", is_impossible=True)))
    write(files / "dev-v2.0.json", document(entry("c", LAMP, ("the lamp", 0))))
    from_hub, from_files = load_squad_hub("squad2", str(hub)), load_squad("squad2", files)
    assert (from_hub.train, from_hub.dev, from_hub.notes) == (from_files.train, from_files.dev, from_files.notes)
    assert from_hub.source == str(hub)
    assert load_squad_hub("squad2", str(hub)).fingerprint == from_hub.fingerprint
    with pytest.raises(DataError, match=r"train, question b has no answers"):
        load_squad_hub("squad1", str(hub))


def test_a_table_of_another_layout_is_refused(tmp_path: Path) -> None:
    name = "validation-00000-of-00001.parquet"
    write_table(tmp_path / "a" / name, [("a", ["lamp"], [3])], question=None)
    with pytest.raises(DataError, match=r"validation: not in SQuAD.s layout at the first question .KeyError"):
        load_squad_hub("squad1", str(tmp_path / "a"))
    write_table(tmp_path / "b" / name, [("a", ["lamp"], [3, 4])])
    with pytest.raises(DataError, match=r"not in SQuAD's layout at the first question .ValueError"):
        load_squad_hub("squad1", str(tmp_path / "b"))
    write_table(tmp_path / "c" / name, [("a", ["lamp"], [3])], answers=["lamp"])
    with pytest.raises(DataError, match=r"not in SQuAD's layout at the first question .TypeError"):
        load_squad_hub("squad1", str(tmp_path / "c"))
    write_table(tmp_path / "d" / "train-00000-of-00001.parquet", [("a", ["lamp"], [3])])
    with pytest.raises(DataError, match="no split 'validation'; its splits are train"):
        load_squad_hub("squad1", str(tmp_path / "d"))
    with pytest.raises(DataError, match="has no revisions"):
        load_squad_hub("squad1", str(tmp_path / "d"), "main")
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        load_squad_hub("squad1", str(tmp_path / "none"))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / name).write_bytes(b"not a table")
    with pytest.raises(DataError, match="Cannot read"):
        load_squad_hub("squad1", str(tmp_path / "e"))


# --- features

WORDS = ["the", "keeper", "Lindau", "lamp", "1856", "élan", "naïve", "U.S.", "(b)", "日本", "x-ray", "30%", "🙂", "ss"]
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60)


def wordpiece() -> PreTrainedTokenizerFast:
    letters = sorted({char for word in "".join(WORDS).lower() for char in word} | set("abcdefghijklmnopqrstuvwxyz?en"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{char}" for char in letters), "the", "lamp"]
    backend = BertWordPieceTokenizer(
        {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, lowercase=True
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **names)


def byte_level() -> PreTrainedTokenizerFast:
    """Like RoBERTa's: two separators, no token types, spaces in front of words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


TOKENIZERS = {"wordpiece": wordpiece(), "byte-level": byte_level()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@st.composite
def asked(draw: st.DrawFn) -> Question:
    words = draw(SENTENCES)
    spaces = draw(st.lists(st.sampled_from([" ", "  ", "\n"]), min_size=len(words), max_size=len(words)))
    begin = draw(st.integers(0, len(words) - 1))
    stop = draw(st.integers(begin + 1, min(begin + 6, len(words))))
    pieces = [word + space for word, space in zip(words, spaces, strict=True)]
    start, answer = len("".join(pieces[:begin])), "".join(pieces[begin:stop]).strip()
    text = " ".join(draw(SENTENCES)[: draw(st.integers(0, 8))])
    return Question("q", "t", text, "".join(pieces), (answer,), (start,))


def text_at(question: Question, features: Sequence[Window], window: int, start: int, end: int) -> str:
    first = features[window].context[0]
    offsets = features[window].offsets_C2
    return question.context[offsets[start - first, 0] : offsets[end - first, 1]]


@each_tokenizer
@settings(max_examples=60)
@given(question=asked(), room=st.integers(1, 40), doc_stride=st.integers(1, 50), max_query=st.integers(1, 12))
def test_windows_are_berts(
    tokenizer: PreTrainedTokenizerFast, question: Question, room: int, doc_stride: int, max_query: int
) -> None:
    whole = tokenizer(question.context, add_special_tokens=False)["input_ids"]
    query = tokenizer(question.question, add_special_tokens=False)["input_ids"][:max_query]
    special = len(tokenizer("a", "b")["input_ids"]) - 2
    max_length = len(query) + special + room
    features = make_features(
        [question], tokenizer, max_length=max_length, max_query_length=max_query, doc_stride=doc_stride,
        for_training=True,
    )  # fmt: skip
    # Every token is in a window, each window starts doc_stride after the one before, and one is its best.
    start, best = 0, np.zeros(len(whole), int)
    for window, (first, stop) in enumerate(each.context for each in features):
        ids = features[window].input_ids_L.tolist()
        assert len(ids) <= max_length
        assert ids[first:stop] == whole[start : start + room]
        assert ids[1 : 1 + len(query)] == query
        assert len(features[window].token_type_ids_L) == len(ids)
        assert len(features[window].offsets_C2) == len(features[window].is_max_context_C) == stop - first
        best[start : start + room] += features[window].is_max_context_C
        assert (start + room >= len(whole)) == (window == len(features) - 1)
        start += min(room, doc_stride)
    assert (best == 1).all()
    # Where the answer is whole, its positions say it; the tokens are the words' own here.
    inside = [index for index, each in enumerate(features) if each.answer[0]]
    for window in inside:
        positions = int(features[window].answer[0]), int(features[window].answer[1])
        assert text_at(question, features, window, *positions) == question.answers[0]
    for window in [index for index, each in enumerate(features) if each.answer[0] == 0]:
        assert features[window].answer[1] == 0
    if room >= len(whole):
        assert len(inside) == len(features) == 1


@each_tokenizer
@settings(max_examples=40)
@given(question=asked(), room=st.integers(2, 30), doc_stride=st.integers(1, 30))
def test_windows_are_those_of_the_tokenizers_own_truncation(
    tokenizer: PreTrainedTokenizerFast, question: Question, room: int, doc_stride: int
) -> None:
    assume(question.question)
    query = tokenizer(question.question, add_special_tokens=False)["input_ids"]
    max_length = len(query) + len(tokenizer("a", "b")["input_ids"]) - 2 + room
    features = make_features(
        [question], tokenizer, max_length=max_length, max_query_length=999, doc_stride=doc_stride, for_training=False
    )
    own = tokenizer(
        question.question, question.context, truncation="only_second", max_length=max_length,
        stride=room - min(doc_stride, room), return_overflowing_tokens=True, return_offsets_mapping=True,
        return_token_type_ids=True,
    )  # fmt: skip
    assert [each.input_ids_L.tolist() for each in features] == own["input_ids"]
    for window, (first, stop) in enumerate(each.context for each in features):
        assert features[window].token_type_ids_L.tolist() == own["token_type_ids"][window]
        parts = own.sequence_ids(window)
        assert [place for place, part in enumerate(parts) if part == 1] == list(range(first, stop))
        theirs = own["offset_mapping"][window][first:stop]
        for (begin, end), (own_begin, own_end) in zip(features[window].offsets_C2.tolist(), theirs, strict=True):
            # RoBERTa's leaves the space before a window's first token, and trims a token of spaces alone otherwise.
            assert question.context[begin:end] == question.context[own_begin:own_end].strip()
            assert begin == end or begin >= own_begin
    assert not any(each.answer[0] for each in features)


def test_max_context_is_as_in_the_example_that_bert_gives() -> None:
    """Of windows of five words three apart, 'bought' has the most context in 'and bought a gallon of'."""
    context = "the man went to the store and bought a gallon of milk"
    question = Question("q", "t", "", context, ("bought",), (context.index("bought"),))
    words = {
        word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(context.split())])
    }
    backend = BertWordPieceTokenizer(words)._tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    features = make_features([question], tokenizer, max_length=5 + 3, doc_stride=3, for_training=True)
    assert window_spans(12, 5, 3) == [(0, 5), (3, 8), (6, 11), (9, 12)]
    assert [each.is_max_context_C.tolist() for each in features] == [
        [True, True, True, True, False],
        # 'the' has (1, 3) here and (4, 0) before, 'store' (2, 2), 'and' (3, 1) here and (0, 4) after; 'bought' (4, 0).
        [False, True, True, True, False],
        [False, True, True, True, False],
        # 'gallon' has (0, 2), and (3, 1) before; 'of' (1, 1), and (4, 0) before.
        [False, True, True],
    ]
    # [CLS] [SEP] and three tokens of the second window come before it, one of the third.
    assert [each.answer for each in features] == [(0, 0), (2 + 4, 2 + 4), (2 + 1, 2 + 1), (0, 0)]


def test_features_of_a_question_too_long_an_empty_context_and_an_impossible_question() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    long = Question("1", "t", "lamp " * 30, "the lamp", ("lamp",), (4,))
    empty = Question("2", "t", "lamp", "", (), (), True)
    impossible = Question("3", "t", "lamp", "the lamp", (), (), True)
    unfound = Question("4", "t", "lamp", "the lamp", ("lantern",), (NOT_FOUND,))
    told: list[int] = []
    features = make_features(
        [long, empty, impossible, unfound], tokenizer, max_length=16, max_query_length=8, for_training=True,
        progress=told.append,
    )  # fmt: skip
    assert told == [4]
    assert [each.question for each in features] == [0, 1, 2, 3]
    assert [len(each.input_ids_L) for each in features] == [8 + 3 + 2, 1 + 3, 3 + 3, 3 + 3]
    assert [each.context for each in features] == [(10, 12), (3, 3), (3, 5), (3, 5)]
    assert [each.answer[0] for each in features] == [11, 0, 0, 0]
    assert features[0].token_type_ids_L.tolist() == [0] * 10 + [1] * 3
    assert all(each.input_ids_L.dtype == np.int32 for each in features)
    assert len(make_features([], tokenizer, for_training=False)) == 0


def test_no_room_for_the_context_is_refused() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    question = Question("q7", "t", "lamp lamp lamp", "the lamp", ("lamp",), (4,))
    tokens = len(tokenizer(question.question, add_special_tokens=False)["input_ids"])
    make_features([question], tokenizer, max_length=tokens + 5, for_training=True)
    with pytest.raises(ConfigError, match=f"leaves no room .* {tokens} tokens of question q7 and 4 special"):
        make_features([question], tokenizer, max_length=tokens + 4, for_training=True)


def test_a_tokenizer_without_pairs_is_refused() -> None:
    backend = Tokenizer.from_str(TOKENIZERS["wordpiece"].backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair="$B [SEP] $A", special_tokens=[("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(DataError, match=r"does not make pairs as \[CLS\] question"):
        make_features([Question("1", "t", "lamp", "lamp", (), (), True)], tokenizer, for_training=False)
    dumb = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(DataError, match="makes no tokens"):
        make_features([Question("1", "t", "lamp", "lamp", (), (), True)], dumb, for_training=False)


# --- answers


def one_hot(features: Sequence[Window], window: int) -> tuple[np.ndarray, np.ndarray]:
    length = len(features[window].input_ids_L)
    start, end = np.zeros(length, np.float32), np.zeros(length, np.float32)
    start[features[window].answer[0]] = end[features[window].answer[1]] = 10
    return start, end


def decoded(
    questions: Sequence[Question],
    features: Sequence[Window],
    find: Callable[[Sequence[Window], int], list[Candidate]],
    nulls: Sequence[float] | None = None,
    **settings: Any,
) -> dict[str, str]:
    candidates = [find(features, window) for window in range(len(features))]
    return {key: each.text for key, each in best_answers(questions, features, candidates, nulls, **settings).items()}


def independent(features: Sequence[Window], window: int) -> list[Candidate]:
    limits = features[window].context, features[window].is_max_context_C
    return independent_candidates(*one_hot(features, window), *limits, max_answer_length=10_000)


def joint(features: Sequence[Window], window: int) -> list[Candidate]:
    start, end = one_hot(features, window)
    starts = np.argsort(-start, kind="stable")[:4]
    ends = np.broadcast_to(np.argsort(-end, kind="stable")[:4], (len(starts), min(4, len(end))))
    limits = features[window].context, features[window].is_max_context_C
    return joint_candidates(start[starts], starts, end[ends], ends, *limits, max_answer_length=10_000)


@each_tokenizer
@settings(max_examples=40)
@given(question=asked(), room=st.integers(30, 60))
def test_perfect_logits_give_the_answers(tokenizer: PreTrainedTokenizerFast, question: Question, room: int) -> None:
    special = len(tokenizer("a", "b")["input_ids"]) - 2
    query = len(tokenizer(question.question, add_special_tokens=False)["input_ids"])
    features = make_features(
        [question], tokenizer, max_length=special + query + room, max_query_length=999, doc_stride=room // 3,
        for_training=True,
    )  # fmt: skip
    # As in BERT, an answer that leaves the window in which its start has the most context cannot be found.
    assume(
        any(
            features[window].is_max_context_C[features[window].answer[0] - features[window].context[0]]
            for window in [index for index, each in enumerate(features) if each.answer[0]]
        )
    )
    for find in (independent, joint):
        assert decoded([question], features, find) == {"q": question.answers[0]}


def plain_features(contexts: int, windows: Sequence[int]) -> tuple[list[Question], list[Window]]:
    """Questions over 'one two three four', whose windows hold all four words at positions 2 to 5."""
    questions = [Question(str(index), "t", "", "one  two three four", (), ()) for index in range(contexts)]
    offsets = np.array([[0, 3], [5, 8], [9, 14], [15, 19]], np.int32)
    tokens, types = np.zeros(7, np.int32), np.zeros(7, np.int8)
    return questions, [Window(index, tokens, types, (2, 6), offsets, np.ones(4, bool)) for index in windows]


def test_the_best_span_of_all_windows_is_a_slice_of_the_context() -> None:
    questions, features = plain_features(2, [0, 0, 1])
    found = best_answers(
        questions,
        features,
        [[Candidate(2, 2, 1.0)], [Candidate(2, 3, 4.0), Candidate(2, 2, 0.5)], []],
    )
    assert found["0"].text == found["0"].span == "one  two"
    assert found["0"].n_best == [("one  two", 4.0), ("one", 1.0)]
    assert found["1"] == ("", [], -np.inf)
    assert found["1"].span == ""


def test_no_answer_by_berts_and_by_the_original_electras_rule() -> None:
    questions, features = plain_features(1, [0, 0])
    candidates = [[Candidate(2, 2, 4.0)], [Candidate(3, 3, 3.0)]]

    def text(nulls: list[float], threshold: float, against_best: bool = True) -> str:
        answer = best_answers(questions, features, candidates, nulls, threshold=threshold, against_best=against_best)[
            "0"
        ]
        assert answer.na_score == min(nulls) - (4.0 if against_best else 0)
        assert answer.span == "one"
        return answer.text

    # BERT: smallest null 3.5 - 4.0 = -0.5, 4.0 - 4.0 = 0 (not above 0), 4.5 - 4.0 = 0.5.
    assert text([3.5, 9.0], BERT_THRESHOLD) == "one"
    assert text([4.0, 9.0], BERT_THRESHOLD) == "one"
    assert text([4.5, 9.0], BERT_THRESHOLD) == ""
    assert text([4.5, 9.0], 1.0) == "one"
    # ELECTRA: the logit alone, whatever the span's score.
    assert text([-2.0, 5.0], -2.75, against_best=False) == ""
    assert text([-2.75, 5.0], -2.75, against_best=False) == "one"
    assert text([5.0, -3.0], -2.75, against_best=False) == "one"


# --- files as they are published


@pytest.fixture(scope="module")
def squad(data_files: DataFiles) -> SquadData:
    return load_squad("squad1", data_files.squad)


@pytest.fixture(scope="module")
def bert(data_files: DataFiles) -> PreTrainedTokenizerFast:
    backend = BertWordPieceTokenizer(str(data_files.vocabulary), lowercase=True)._tokenizer
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_published_files_have_their_questions(squad: SquadData, data_files: DataFiles) -> None:
    written = [path.read_text("utf8").count('"question":') for path in sorted(data_files.squad.iterdir())]
    assert [len(squad.dev), len(squad.train)] == written
    assert written == [4_961, 11_877] or not data_files.is_real
    assert all("published file" in note for note in squad.notes)
    for question in squad.train + squad.dev:
        for answer, start in zip(question.answers, question.starts, strict=True):
            assert question.context[start : start + len(answer)] == answer


def test_published_answers_stand_at_their_positions(squad: SquadData, bert: PreTrainedTokenizerFast) -> None:
    """But for those that begin or end inside a token, such as 'six' of 'sixth'."""
    features = make_features(squad.train, bert, max_length=384, for_training=True)
    matching, inside = 0, [index for index, each in enumerate(features) if each.answer[0]]
    for window in inside:
        question = squad.train[features[window].question]
        text = text_at(question, features, window, features[window].answer[0], features[window].answer[1])
        assert question.answers[0] in text
        matching += normalize(text) == normalize(question.answers[0])
    print(f"{matching} of {len(inside)} = {matching / len(inside):.2%}")
    assert {features[window].question for window in inside} == set(range(len(squad.train)))
    assert matching / len(inside) > 0.99


def test_perfect_logits_on_a_published_dev_part(squad: SquadData, bert: PreTrainedTokenizerFast) -> None:
    features = make_features(squad.dev, bert, max_length=384, for_training=True)
    golds = {question.id: question.answers for question in squad.dev}
    for find in (independent, joint):
        found = evaluate_squad1(golds, decoded(squad.dev, features, find))
        print(found)
        assert found["exact_match"] > 99.5
        assert found["f1"] > 99.6
        assert found["total"] == len(squad.dev)
