"""An exported finetuned model gives the run's own scores, or the export says why there is none."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    ElectraModel,
    EsmConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    pipeline,
)

from electra_ds import cli
from electra_ds.config.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from electra_ds.config.sections import TokenizerSection
from electra_ds.core.errors import CheckpointError, ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data.tokenizer import train_tokenizer
from electra_ds.finetuning.heads import SpanHead, TaskModel, make_encoder
from electra_ds.finetuning.tasks import sequence
from electra_ds.finetuning.tasks.base import Scale
from electra_ds.finetuning.tasks.question_answering import QuestionAnsweringTask
from electra_ds.finetuning.tasks.sequence import SequenceTask, one_layer_as_two
from electra_ds.interop import export_finetuned as module
from electra_ds.interop.export_finetuned import export_finetuned
from electra_ds.training.checkpoints import kept_checkpoint

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
TEXT = "the keeper of lamp lit a ship saw it and went home by sea at night while nobody thanked him"
WORDS = TEXT.split()
QUICK = ("schedule.epochs=2", "global_batch_size=6", "optimizer.learning_rate=1e-3", "data.max_length=32")
FIRST = ("head.pooling=first", "head.hidden_size=null")
CLASSES = ("night", "sea", "harbour")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12)))


def write_task_files(folder: Path) -> None:
    """MRPC and STS-B in GLUE's layout, SQuAD 1.1's and 2.0's JSON, and own CSV files of three classes."""
    rng = random.Random(0)

    def table(path: Path, header: list[str], rows: list[list[Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]), "utf8")

    ids = ["#1 ID", "#2 ID"]
    parts = ["genre", "filename", "year", "old_index", "source1", "source2"]
    for name, count in (("train", 18), ("dev", 7)):
        pairs = [(sentence(rng), sentence(rng)) for _ in range(count)]
        mrpc = [[index % 2, index, index, *pair] for index, pair in enumerate(pairs)]
        table(folder / "MRPC" / f"{name}.tsv", ["Quality", *ids, "#1 String", "#2 String"], mrpc)
        sts = [[index, *"xxxxxx", *pair, f"{rng.uniform(0, 5):.3f}"] for index, pair in enumerate(pairs)]
        table(folder / "STS-B" / f"{name}.tsv", ["index", *parts, "sentence1", "sentence2", "score"], sts)
        with (folder / f"own-{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([[pair[0], CLASSES[index % 3]] for index, pair in enumerate(pairs)])
        for version in ("1.1", "2.0"):
            paragraphs = []
            for index in range(count):
                context, word = sentence(rng), rng.choice(WORDS)
                answers = [{"text": word, "answer_start": context.index(word)}] if word in context else []
                if not answers and version == "1.1":
                    answers = [{"text": context.split()[1], "answer_start": len(context.split()[0]) + 1}]
                entry = {"id": f"{name}{index}", "question": f"who {word}?", "answers": answers}
                paragraphs.append({"context": context, "qas": [entry | {"is_impossible": not answers}]})
            content = {"version": version, "data": [{"title": "Lindau", "paragraphs": paragraphs}]}
            (folder / f"{name}-v{version}.json").write_text(json.dumps(content), "utf8")


def tiny(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and LayerNorms away from 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@dataclass
class Bench:
    """A folder with models and data, and the runs that were made there."""

    folder: Path

    def finetune(self, name: str, model: str, recipe: str, what: list[str], *overrides: str, more: str = "") -> Path:
        run = self.folder / "runs" / name
        if not run.exists():
            cli.main([
                "finetune", "--model", str(self.folder / model), "--recipe", recipe, "--run-dir", str(run),
                "--seed", "7", *what, "--set", *QUICK, *overrides, *more.split(),
            ])  # fmt: skip
        return run

    def task(self, name: str) -> list[str]:
        return ["--task", name, "--data-dir", str(self.folder / "data")]

    @property
    def own(self) -> list[str]:
        return [word for part in ("train", "dev") for word in (f"--{part}", str(self.folder / f"data/own-{part}.csv"))]

    def mrpc(self) -> Path:
        return self.finetune("mrpc", "electra", "original", self.task("mrpc"))

    def two_layers(self) -> Path:
        return self.finetune(
            "two", "electra", "rc2020", self.own, *FIRST, "data.segment_ids=false", more="--best --eval-every 2"
        )

    def mean(self) -> Path:
        return self.finetune("mean", "electra", "rc2020", self.own)

    def bert(self) -> Path:
        return self.finetune("bert", "bert", "rc2020", self.own, *FIRST)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, process_group: Ranks) -> Bench:
    folder = tmp_path_factory.mktemp("finetuned")
    write_task_files(folder / "data")
    torch.manual_seed(0)
    section = TokenizerSection(kind="wordpiece", vocab_size=300, lowercase=True)
    tokenizer = train_tokenizer([" ".join(WORDS) + " who?"] * 3, section)
    vocab = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    tiny(ElectraModel(ElectraConfig(embedding_size=16, **vocab, **SIZES))).save_pretrained(folder / "electra")
    tiny(BertModel(BertConfig(**vocab, **SIZES))).save_pretrained(folder / "bert")
    for name in ("electra", "bert"):
        tokenizer.save(folder / name)
    return Bench(folder)


def predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions" / "dev.jsonl").read_text().splitlines()]


def texts(bench: Bench, name: str) -> list[dict[str, str]]:
    if name == "own":
        with (bench.folder / "data" / "own-dev.csv").open() as file:
            return [{"text": row["text"]} for row in csv.DictReader(file)]
    lines = [line.split("\t") for line in (bench.folder / "data" / name / "dev.tsv").read_text().splitlines()[1:]]
    first = 3 if name == "MRPC" else 7
    return [{"text": line[first], "text_pair": line[first + 1]} for line in lines]


def logits_of(folder: Path, inputs: list[dict[str, str]]) -> torch.Tensor:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [text["text_pair"] for text in inputs] if "text_pair" in inputs[0] else None
    batch = tokenizer([text["text"] for text in inputs], pairs, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def check_labels(run: Path, folder: Path, inputs: list[dict[str, str]]) -> None:
    classifier = pipeline("text-classification", model=str(folder))
    told = [classifier(text, truncation=True)["label"] for text in inputs]
    assert told == [line["prediction"] for line in predictions(run)]


def own_logits(run: Path) -> torch.Tensor:
    return torch.tensor([line["logits"] for line in predictions(run)])


def test_one_layer_on_pairs_is_exported_with_its_logits_labels_and_card(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, inputs = bench.mrpc(), texts(bench, "MRPC")
    cli.main(["export", str(run), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert f"pipeline('text-classification', model='{tmp_path / 'out'}')" in told
    torch.testing.assert_close(logits_of(tmp_path / "out", inputs), own_logits(run), atol=1e-4, rtol=0)
    check_labels(run, tmp_path / "out", inputs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ElectraForSequenceClassification"]
    assert config["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a", "b")["token_type_ids"][-1] == 1
    card = (tmp_path / "out" / "README.md").read_text()
    accuracy = json.loads((run / "scores.json").read_text())["sets"]["dev"]["metrics"]["accuracy"]
    for part in (
        "mrpc",
        "recipe original, seed 7",
        "36 training examples, pairs in both",
        f"| dev | 7 | accuracy | {accuracy:.4f} |",
    ):
        assert part in card
    (result, *_) = [each for each in ModelCard(card).data.eval_results if each.metric_type == "accuracy"]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "mrpc", "validation")
    assert result.metric_value == pytest.approx(accuracy, abs=1e-6)
    for file in ("config.json", "tokenizer_config.json", "README.md"):
        assert str(bench.folder) not in (tmp_path / "out" / file).read_text()
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_a_regression_gives_scores_in_the_tasks_own_range(bench: Bench, tmp_path: Path) -> None:
    run = bench.finetune("sts", "electra", "original", bench.task("sts-b"))
    export_finetuned(run, tmp_path / "out")
    told = torch.tensor([line["prediction"] for line in predictions(run)])
    scores = logits_of(tmp_path / "out", texts(bench, "STS-B"))[:, 0]
    torch.testing.assert_close(scores, told, atol=1e-4, rtol=0)
    torch.testing.assert_close(own_logits(run)[:, 0] * 5, told, atol=1e-5, rtol=1e-5)
    score = pipeline("text-classification", model=str(tmp_path / "out"))(texts(bench, "STS-B")[0], truncation=True)
    assert score == {"label": "score", "score": pytest.approx(told[0].item(), abs=1e-4)}


def test_the_range_of_own_scores_is_read_from_the_examples_again(bench: Bench, tmp_path: Path) -> None:
    files = {part: tmp_path / f"{part}.csv" for part in ("train", "dev")}
    for path in files.values():
        rows = [f"{text['text']},{index * 2.5 - 4}" for index, text in enumerate(texts(bench, "own"))]
        path.write_text("\n".join(["text,label", *rows]) + "\n")
    given = [word for part, path in files.items() for word in (f"--{part}", str(path))]
    run = bench.finetune("scores", "electra", "original", given)
    export_finetuned(run, tmp_path / "out")
    told = torch.tensor([line["prediction"] for line in predictions(run)])
    assert not torch.equal(told, own_logits(run)[:, 0])
    scores = logits_of(tmp_path / "out", texts(bench, "own"))[:, 0]
    torch.testing.assert_close(scores, told, atol=1e-4, rtol=1e-5)


def test_two_layers_go_in_as_they_are_and_the_best_weights_are_taken(bench: Bench, tmp_path: Path) -> None:
    run, inputs = bench.two_layers(), texts(bench, "own")
    told = export_finetuned(run, tmp_path / "out")
    best = next((run / "best").glob("step-*"))
    assert f"step {int(best.name.removeprefix('step-'))}" in told
    torch.testing.assert_close(logits_of(tmp_path / "out", inputs), own_logits(run), atol=1e-4, rtol=0)
    check_labels(run, tmp_path / "out", inputs)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "out")("a", "b")  # not trained on them
    assert "so these scores are not those of an independent test" in (tmp_path / "out" / "README.md").read_text()
    export_finetuned(best, None)
    assert (run / "export" / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_class_names_are_read_from_the_examples_again_where_scores_are_gone(bench: Bench, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bench.two_layers(), tmp_path / "run"))
    for damaged in ("", '{"sets": '):
        (run / "scores.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"scores\.json cannot be read.*Restore it, or move it away"):
            export_finetuned(run, tmp_path / "out")
    (run / "scores.json").unlink()
    export_finetuned(run, tmp_path / "out")
    names = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label
    assert names == dict(enumerate(sorted(CLASSES)))
    record = json.loads((next((run / "best").glob("step-*")) / "run.json").read_text())
    assert record["source"]["train"] == str(bench.folder / "data" / "own-train.csv")
    examples = Path(record["source"]["train"])
    before = examples.read_text()
    try:
        examples.write_text(before + "home,sea\n")
        with pytest.raises(DataError, match="has changed since"):
            export_finetuned(run, tmp_path / "other")
        examples.unlink()
        with pytest.raises(DataError, match="cannot be read again"):
            export_finetuned(run, tmp_path / "other")
    finally:
        examples.write_text(before)


@pytest.mark.parametrize(("task", "model"), [("squad1", "electra"), ("squad2", "bert")])
def test_the_code_on_a_question_answering_card_gives_the_runs_answers(
    bench: Bench, tmp_path: Path, task: str, model: str
) -> None:
    run = bench.finetune(task, model, "rc2020", bench.task(task))
    told = export_finetuned(run, tmp_path / "out")
    assert "AutoModelForQuestionAnswering" in told
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace('"PATH"', repr(str(tmp_path / "out"))), scope)
    version = {"squad1": "1.1", "squad2": "2.0"}[task]
    dev = json.loads((bench.folder / "data" / f"dev-v{version}.json").read_text())["data"][0]["paragraphs"]
    answers = {each["qas"][0]["id"]: scope["answer"](each["qas"][0]["question"], each["context"]) for each in dev}
    assert answers == json.loads((run / "predictions" / "dev.json").read_text())
    assert any(answers.values())


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(vocab_size=50, **SIZES),
        RobertaConfig(vocab_size=50, pad_token_id=1, **SIZES),
        DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64),
    ],
    ids=lambda config: config.model_type,
)
def test_one_matrix_for_spans_is_held_by_other_encoders_classes(config: PretrainedConfig, tmp_path: Path) -> None:
    config.num_labels = 3  # of what it was finetuned on before
    trained = span_model(config)
    exported = QuestionAnsweringTask.to_transformers(trained, config, (), Scale())
    exported.save_pretrained(tmp_path)
    module._check_same(trained, tmp_path, exported, Scale(), False, QuestionAnsweringTask)
    assert type(AutoModelForQuestionAnswering.from_pretrained(tmp_path)) is type(exported)
    with torch.no_grad():
        trained.head.qa_outputs.bias.add_(0.01)  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="does not compute what was trained"):
        module._check_same(trained, tmp_path, exported, Scale(), False, QuestionAnsweringTask)


def span_model(config: PretrainedConfig) -> TaskModel:
    recipe = load_finetune_recipe("rc2020", "squad1")
    head = QuestionAnsweringTask.new_head(recipe, config.hidden_size, None)
    assert isinstance(head, SpanHead)
    return TaskModel(make_encoder(config, 0), head).eval()


@pytest.mark.parametrize(
    "config",
    [
        ModernBertConfig(
            vocab_size=50, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, **SIZES
        ),  # whose class has another head
        EsmConfig(vocab_size=50, pad_token_id=1, **SIZES),  # which has no class
    ],
)
def test_without_a_class_with_such_a_head_for_spans_the_export_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ConfigError, match=r"transformers has no such class.*--encoder-only"):
        QuestionAnsweringTask.to_transformers(span_model(config), config, (), Scale())


# --- one matrix as two


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), width=st.sampled_from([4, 8, 64, 256]), classes=st.integers(1, 6),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_one_matrix_passes_through_gelu(seed: int, width: int, classes: int, spread: float) -> None:
    """The error is one of rounding."""
    classes = min(classes, width // 2)
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(50, width, generator=rng) * spread
    weight, bias = torch.randn(classes, width, generator=rng), torch.randn(classes, generator=rng)
    wanted = x.double() @ weight.double().T + bias.double()
    size = (weight.abs().double() @ x.abs().amax(0).double() + bias.abs()).max()
    assert (scores_by_two(weight, bias, x) - wanted).abs().max() <= 2e-6 * size


def scores_by_two(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As transformers' head computes them, in the precision of x."""
    held = {name: tensor.to(x.dtype) for name, tensor in one_layer_as_two(weight, bias).items()}
    inner = functional.gelu(functional.linear(x, held["dense.weight"], held["dense.bias"]))
    return functional.linear(inner, held["out_proj.weight"], held["out_proj.bias"])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_pairs_of_rows_cost_no_precision_in_half(dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    x, weight = nn.LayerNorm(256)(torch.randn(500, 256)).detach(), torch.randn(3, 256) * 0.1
    wanted = x @ weight.T
    found = scores_by_two(weight, torch.zeros(3), x.to(dtype)).float()
    assert (found - wanted).abs().max() / wanted.abs().max() < most


def test_more_classes_than_half_the_width_are_refused_before_and_after_training() -> None:
    recipe, config = load_finetune_recipe("original", "own"), ElectraConfig(hidden_size=32)
    assert SequenceTask.why_not_exportable(recipe, config, 16) is None
    problem = SequenceTask.why_not_exportable(recipe, config, 17)
    assert problem is not None
    assert "at most 16 classes, half of the encoder's hidden size; this task has 17" in problem.why
    assert "Finetune with --set head.num_layers=2, or export" in str(problem)


# --- the encoder alone, and refusals


@pytest.mark.parametrize("kind", ["mean", "bert"])
def test_the_encoder_alone_reopens_with_automodel_and_is_finetuned_again(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    run = getattr(bench, kind)()
    cli.main(["export", str(run), "--encoder-only", "--out", str(tmp_path / "out")])
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    config = PretrainedConfig.from_pretrained(tmp_path / "out")
    trained = module._trained_model(
        kept_checkpoint(run), FinetuneRecipe.model_validate(recipe_of(run)), model.config, SequenceTask, len(CLASSES)
    )
    ours, theirs = dict(trained.encoder.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {name for name in theirs.keys() - ours.keys() if not name.startswith("pooler.")}
    assert config.architectures == [type(model).__name__]
    cli.main([
        "finetune", "--model", str(tmp_path / "out"), *bench.own, "--run-dir", str(tmp_path / "again"), "--set", *QUICK,
    ])  # fmt: skip
    assert (tmp_path / "again" / "scores.json").is_file()


def recipe_of(run: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((run / "recipe.yaml").read_text()))


def test_heads_that_transformers_does_not_have_are_refused_with_what_to_do(bench: Bench, tmp_path: Path) -> None:
    joint = bench.finetune("joint", "electra", "original", bench.task("squad1"))
    wide = bench.finetune("wide", "electra", "rc2020", bench.own, "head.pooling=first", "head.hidden_size=48")
    for run, message in (
        (bench.mean(), r"head.pooling is mean.*--set head.pooling=first head.hidden_size=null, or .*--encoder-only"),
        (joint, r"head.span is joint.*--set head.span=independent, or .*--encoder-only"),
        (bench.bert(), r"classes for bert have other layers.*--encoder-only"),
        (wide, r"head.hidden_size is 48.*--set head.hidden_size=null"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_finetuned(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_runs_without_weights_and_folders_in_use_are_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        export_finetuned(bench.mrpc(), tmp_path / "full")
    run = Path(shutil.copytree(bench.mrpc(), tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export_finetuned(run, None)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["discard_weights"] = True
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="run with --discard-weights"):
        export_finetuned(run, None)
    best = Path(shutil.copytree(bench.two_layers(), tmp_path / "best", symlinks=True))
    shutil.rmtree(best / "best")
    with pytest.raises(CheckpointError, match="should have kept its best evaluation's weights"):
        export_finetuned(best, None)
    for arguments, message in (
        ((str(bench.mrpc()), "--to", "deepspeed"), "--to deepspeed is for runs of electra-ds pretrain"),
        ((str(tmp_path / "nowhere"),), "is neither a run directory nor a checkpoint"),
        ((str(tmp_path / "nowhere"), "--encoder-only"), "--encoder-only is for runs of electra-ds finetune"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", *arguments])
        assert message in capsys.readouterr().err


def test_nothing_is_left_where_the_model_would_compute_something_else(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "one_layer_as_two", shifted)
    with pytest.raises(ConfigError, match="does not compute what was trained"):
        export_finetuned(bench.mrpc(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def shifted(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    held = one_layer_as_two(weight, bias)
    return held | {"out_proj.bias": held["out_proj.bias"] + 0.01}
