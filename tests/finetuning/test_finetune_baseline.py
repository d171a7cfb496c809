"""Scores are shown next to their baseline, with a warning if a model is no better; the defaults learn from few examples
of your own; and what cannot be exported is announced before training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from electra_ds.config.finetune_recipe import FinetuneRecipe, Finetuning, load_finetune_recipe
from electra_ds.config.names import finetune_recipe_names
from electra_ds.core.errors import ConfigError
from electra_ds.interop.export_finetuned import export_finetuned
from electra_ds.report.score_files import read_run
from tests.finetune_runs import (
    arguments_of,
    evaluations_of,
    finetune,
    predictions_of,
    reviews,
    scores_of,
    tiny_electra,
    write_csv,
    write_glue,
    write_squad,
)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many positions as every recipe's defaults take."""
    return tiny_electra(tmp_path_factory.mktemp("electra"), max_position_embeddings=512, hidden_size=64)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def own(folder: Path, rows: int = 240, labels: tuple[object, object] = ("bad", "good")) -> tuple[Path, Path]:
    """(train, dev): the label follows from a word of the text."""
    header = ("text", "label")
    train = write_csv(folder / "train.csv", header, reviews(rows, 1, labels))
    return train, write_csv(folder / "dev.csv", header, reviews(40, 2, labels))


def alike(folder: Path, rows: int = 64, share: float = 0.6) -> tuple[Path, Path]:
    """(train, dev) whose texts are all the same, so that nothing tells the labels apart."""
    labels = ["bad"] * round(share * rows) + ["good"] * (rows - round(share * rows))
    random.Random(0).shuffle(labels)
    lines = [("the film is a film", label) for label in labels]
    return tuple(write_csv(folder / name, ("text", "label"), lines) for name in ("train.csv", "dev.csv"))  # type: ignore[return-value]


def with_defaults(model: Path, train: Path, dev: Path, run: Path, *arguments: object) -> str:
    return finetune("--model", model, "--train", train, "--dev", dev, "--run-dir", run, "--threads", 1, *arguments)


def lines_of(said: str, *begin: str) -> list[str]:
    """The printed lines that begin so, each with what was wrapped."""
    return [line for line in said.splitlines() if line.startswith(begin)]


# --- defaults


@pytest.mark.slow
def test_the_defaults_learn_a_small_separable_set(electra: Path, tmp_path: Path) -> None:
    train, dev = own(tmp_path)
    said = with_defaults(electra, train, dev, tmp_path / "run")
    scores = scores_of(tmp_path / "run")
    of_dev = scores["sets"]["dev"]
    assert scores["step"] == 500
    assert of_dev["metrics"]["accuracy"] >= of_dev["baseline"]["accuracy"] + 0.25
    assert of_dev["metrics"]["accuracy"] > 0.9
    assert "warning" not in of_dev
    assert "Warning" not in said
    assert "3 epochs of 240 examples are 45 steps" in " ".join(said.split())
    assert len(evaluations_of(tmp_path / "run")) == 10
    export_finetuned(tmp_path / "run", tmp_path / "model", encoder_only=False)
    accuracy, baseline = of_dev["metrics"]["accuracy"], of_dev["baseline"]["accuracy"]
    card = (tmp_path / "model" / "README.md").read_text("utf8")
    assert f"| dev | 40 | accuracy | {accuracy:.4f} | {baseline:.4f} ({of_dev['baseline_prediction']}) |" in card


@pytest.mark.slow
def test_the_defaults_learn_a_regression_on_your_own_scores(electra: Path, tmp_path: Path) -> None:
    train, dev = own(tmp_path, labels=(-20.5, 71.25))
    with_defaults(electra, train, dev, tmp_path / "run")
    of_dev = scores_of(tmp_path / "run")["sets"]["dev"]
    assert of_dev["metrics"]["pearson"] > 0.7
    assert of_dev["metrics"]["mse"] < of_dev["baseline"]["mse"] / 2


@pytest.mark.parametrize(
    ("examples", "overrides", "steps"),
    [
        (80, [], 500),  # 3 x 80 / 16 = 15 are too few
        (16_000, [], 3_000),  # 3 x 16,000 / 16
        (80, ["schedule.epochs=5"], 25),  # what is asked for is not raised
        (80, ["schedule.min_steps=40"], 40),
        (80, ["schedule.epochs=5", "schedule.min_steps=40"], 40),
        (80, ["schedule.min_steps=0"], 15),
    ],
)
def test_few_examples_are_trained_on_for_more_epochs_unless_epochs_are_given(
    examples: int, overrides: list[str], steps: int
) -> None:
    assert Finetuning(load_finetune_recipe("own", "", overrides), examples, 2).schedule.total_steps == steps


def test_published_recipes_keep_their_epochs_and_what_identifies_them(tmp_path: Path) -> None:
    """A key that they do not use would make other trials of the same sweep."""
    for name in ("rc2020", "original"):
        recipe = load_finetune_recipe(name, "rte")
        assert Finetuning(recipe, 80, 2).schedule.total_steps == 25  # 10 epochs x 80 / 32
        assert "min_steps" not in recipe.model_dump()["schedule"]
    dumped = load_finetune_recipe("own", "").model_dump()
    assert dumped["schedule"]["min_steps"] == 500
    assert FinetuneRecipe.model_validate(dumped) == load_finetune_recipe("own", "")


# --- the baseline, and a model that is no better


def test_every_score_is_printed_and_written_next_to_its_baseline(electra: Path, glue: Path, tmp_path: Path) -> None:
    said = finetune(*arguments_of(electra, glue, "mrpc", tmp_path / "run", eval_every=8))
    of_dev = scores_of(tmp_path / "run")["sets"]["dev"]
    labels = [line["label"] for line in predictions_of(tmp_path / "run")]
    most = max(set(labels), key=labels.count)
    share, positive = labels.count(most) / len(labels), of_dev["labels"][1]
    f1 = 2 * labels.count(positive) / (len(labels) + labels.count(positive))  # precision is the share, recall 1
    assert of_dev["baseline"] == pytest.approx({"f1": f1, "accuracy": share})
    answer = f"'{most}'" + ("" if most == positive else f" (f1: '{positive}')")
    assert of_dev["baseline_prediction"] == answer
    shown = lines_of(said, "dev at step", "dev, 24 rows")
    assert len(shown) == 4
    assert all(f"(baseline {share:.4f})" in line and f"(baseline {f1:.4f})" in line for line in shown)
    assert f"baseline: {answer} for every row" in said


def test_a_model_that_predicts_one_class_gets_a_warning_with_what_to_do(electra: Path, tmp_path: Path) -> None:
    train, dev = alike(tmp_path)
    said = with_defaults(electra, train, dev, tmp_path / "few", "--set", "schedule.epochs=3")
    warning = scores_of(tmp_path / "few")["sets"]["dev"]["warning"]
    assert {line["prediction"] for line in predictions_of(tmp_path / "few")} == {"bad"}
    assert warning.startswith("all 64 predictions of dev are 'bad'")
    assert "12 steps are too few to train a new head; add --set schedule.min_steps=500" in warning
    assert f"Warning: {warning}" in " ".join(said.split())
    assert all(line.endswith("; every prediction is 'bad'") for line in lines_of(said, "dev at step"))
    assert read_run(tmp_path / "few").scores.warnings == [warning]


@pytest.mark.slow
def test_a_set_that_cannot_be_learnt_ends_with_that_warning_under_the_defaults_too(
    electra: Path, tmp_path: Path
) -> None:
    train, dev = alike(tmp_path, share=0.9)
    said = " ".join(with_defaults(electra, train, dev, tmp_path / "run").split())
    assert "Warning: all 64 predictions of dev are 'bad'" in said
    assert "91% of the training examples are 'bad'; add examples of the other classes" in said
    assert "too few to train a new head; add" not in said


@pytest.mark.slow
def test_a_model_that_varies_its_answers_but_is_no_better_than_the_baseline_gets_a_warning(
    electra: Path, tmp_path: Path
) -> None:
    """The labels are random."""
    train, dev = own(tmp_path)
    rng = random.Random(0)
    write_csv(train, ("text", "label"), [(text, rng.choice(("bad", "good"))) for text, _ in reviews(80, 1)])
    write_csv(dev, ("text", "label"), [(text, "good" if rng.random() < 0.7 else "bad") for text, _ in reviews(40, 2)])
    said = " ".join(with_defaults(electra, train, dev, tmp_path / "run").split())
    of_dev = scores_of(tmp_path / "run")["sets"]["dev"]
    assert len({line["prediction"] for line in predictions_of(tmp_path / "run")}) == 2
    accuracy, baseline = of_dev["metrics"]["accuracy"], of_dev["baseline"]["accuracy"]
    assert accuracy <= baseline
    assert f"accuracy on dev is {accuracy:.4f}, no better than the {baseline:.4f} of answering" in said
    assert "(1) the labels may not follow from the texts" in said


def test_a_development_set_of_one_class_is_no_reason_to_warn(electra: Path, tmp_path: Path) -> None:
    train, dev = own(tmp_path)
    write_csv(dev, ("text", "label"), [row for row in reviews(40, 2) if row[1] == "good"])
    with_defaults(electra, train, dev, tmp_path / "run", "--set", "schedule.min_steps=250")
    of_dev = scores_of(tmp_path / "run")["sets"]["dev"]
    assert of_dev["baseline"]["accuracy"] == 1
    assert "warning" not in of_dev


@pytest.mark.parametrize(("task", "version"), [("squad1", "1.1"), ("squad2", "2.0")])
def test_the_baseline_of_squad_2_is_to_answer_no_question(
    task: str, version: str, electra: Path, tmp_path: Path
) -> None:
    data = write_squad(tmp_path / "squad", version)
    small = ("data.max_length=32", "data.doc_stride=4", "schedule.epochs=1")
    said = finetune(*arguments_of(electra, data, task, tmp_path / "run", *small))
    of_dev = scores_of(tmp_path / "run")["sets"]["dev"]
    if task == "squad1":
        assert "baseline" not in of_dev
        assert "(baseline" not in said
    else:
        assert of_dev["baseline"]["exact"] == of_dev["baseline"]["f1"] == 2 / 8  # every third has no answer
        assert of_dev["baseline"]["NoAns_exact"] == 1
        assert of_dev["baseline_prediction"] == "no answer"
        assert all("exact" in line and "(baseline 0.2500)" in line for line in lines_of(said, "dev at step"))


# --- the export


@pytest.mark.parametrize("recipe", finetune_recipe_names())
@pytest.mark.parametrize("task", ["mrpc", "squad2"])
def test_a_head_that_cannot_be_exported_is_announced_before_training_with_one_that_can(
    recipe: str, task: str, electra: Path, glue: Path, tmp_path: Path
) -> None:
    data = glue if task == "mrpc" else write_squad(tmp_path / "squad")
    arguments: dict[str, Any] = {"recipe": recipe, "max_train_examples": 8}
    of_run = ["data.max_length=32", "data.doc_stride=4", "head.span_hidden_size=8", "head.beam_size=2"]
    if recipe == "own":
        of_run.append("schedule.min_steps=4")

    def say_and_export(name: str, *overrides: str) -> tuple[str, bool]:
        """(what is said before anything is trained, whether the trained head can then be exported)"""
        whole = arguments_of(electra, data, task, tmp_path / name, *of_run, *overrides, **arguments)
        before = " ".join(finetune(*whole, "--dry-run").split())
        assert not (tmp_path / name).exists()
        finetune(*whole)
        try:
            export_finetuned(tmp_path / name, tmp_path / f"{name}-model", encoder_only=False)
        except ConfigError:
            return before, False
        return before, True

    said, can_export = say_and_export("run")
    assert can_export == ("cannot be exported" not in said)
    assert can_export == ((recipe, task) not in {("rc2020", "mrpc"), ("original", "squad2")})
    if not can_export:
        instead = said.partition("For a head that can be exported, add --set ")[2].partition(". ")[0].rstrip(".")
        said, can_export = say_and_export("instead", *instead.split())
        assert can_export
        assert "cannot be exported" not in said


def test_a_run_that_discards_its_weights_says_nothing_about_an_export(
    electra: Path, glue: Path, tmp_path: Path
) -> None:
    given = arguments_of(electra, glue, "mrpc", tmp_path / "run", discard_weights=True)
    assert "export" not in finetune(*given, "--dry-run")
