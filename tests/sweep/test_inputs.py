"""A sweep keeps copies of its recipes and DeepSpeed JSON files, so it is the same wherever and whenever it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from electra_ds.cli import main
from electra_ds.config.names import DS_CONFIGS, FINETUNE_RECIPES, RECIPES, shipped_text
from electra_ds.sweep.folder import SweepFolder
from electra_ds.sweep.spec import SweepSpec
from electra_ds.sweep.sweep_file import load_sweep, parse_sweep
from electra_ds.sweep.trials import expand, suggested
from tests.sweep.test_spec import pretraining
from tests.sweeping import write_sweep


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own files, two of them of one name."""
    folder = tmp_path / "own"
    (folder / "other").mkdir(parents=True)
    (folder / "mine.yaml").write_text(shipped_text(RECIPES, "tiny"))
    (folder / "other" / "mine.yaml").write_text(shipped_text(RECIPES, "mini"))
    (folder / "tuned.yaml").write_text(shipped_text(FINETUNE_RECIPES, "rc2020"))
    (folder / "mine.json").write_text(shipped_text(DS_CONFIGS, "cpu"))
    return folder


def sweep_of(own: Path) -> dict[str, Any]:
    recipes = {"recipe": {"grid": [str(own / "mine.yaml"), str(own / "other" / "mine.yaml"), "electra-small"]}}
    values = pretraining(
        ds_config=str(own / "mine.json"),
        space=recipes,
        set={"schedule.total_steps": 2000, "schedule.warmup_steps": 20},
        seeds=[1],
    )
    del values["pretrain"]["recipe"]
    finetune = {"task": "cola", "seeds": [0], "variants": {"a": {"recipe": str(own / "tuned.yaml")}}}
    return values | {"finetune": finetune}


def started(folder: SweepFolder, spec: SweepSpec) -> SweepSpec:
    with folder.locked():
        kept = folder.with_own_inputs(spec)
        folder.write(kept)
    return kept


def test_a_sweep_is_the_same_one_after_its_files_are_gone_and_its_folder_has_moved(own: Path, tmp_path: Path) -> None:
    values = sweep_of(own)
    spec = parse_sweep(values, "test")
    keys = [trial.key for trial in expand(spec, check=False)]
    assert len(keys) == 6
    started(SweepFolder(tmp_path / "sweep"), spec)
    for path in own.rglob("*.*"):
        path.unlink()
    moved = (tmp_path / "sweep").rename(tmp_path / "a folder: moved")
    again = SweepFolder(moved).read()
    assert [trial.key for trial in expand(again, check=False)] == keys
    assert SweepFolder(moved).with_own_inputs(again) == again
    assert not any(str(own) in str(trial.options) for trial in expand(again, check=False))


def test_the_copy_of_a_recipe_that_extends_another_is_complete(own: Path, tmp_path: Path) -> None:
    changes = "schedule: {total_steps: 2000, warmup_share: 0.1}\n"
    (own / "other" / "extends.yaml").write_text("extends: ../mine.yaml\n" + changes)
    (own / "tuned2.yaml").write_text("extends: rc2020\nschedule: {epochs: 1}\n")
    values = pretraining(recipe=str(own / "other" / "extends.yaml")) | {
        "finetune": {"task": "rte", "recipe": str(own / "tuned2.yaml")}
    }
    spec = parse_sweep(values, "test")
    keys = [trial.key for trial in expand(spec, check=False)]
    started(SweepFolder(tmp_path / "sweep"), spec)
    for path in own.rglob("*.*"):
        path.unlink()
    moved = (tmp_path / "sweep").rename(tmp_path / "moved")
    again = expand(SweepFolder(moved).read(), check=False)
    assert [trial.key for trial in again] == keys
    assert [trial.recipe.name for trial in again] == ["extends", "tuned2"]


def test_the_copy_of_a_recipe_contains_its_generators_recipe(own: Path, tmp_path: Path) -> None:
    (own / "other" / "of_generator.yaml").write_text("extends: tiny-mlm\nschedule: {total_steps: 77}\n")
    (own / "other" / "named.yaml").write_text("extends: tiny-fast-electra\ngenerator: {recipe: of_generator.yaml}\n")
    (own / "other" / "in_values.yaml").write_text(
        "extends: tiny-fast-electra\nseed: 1\ngenerator: {recipe: {extends: of_generator.yaml, global_batch_size: 8}}\n"
    )
    spec = parse_sweep(
        {
            "name": "test",
            "pretrain": {
                "variants": {
                    "named": {"recipe": str(own / "other" / "named.yaml"), "schedule.total_steps": 70},
                    "in-values": {"recipe": str(own / "other" / "in_values.yaml")},
                    "set": {
                        "recipe": "tiny-fast-electra",
                        "generator.recipe": str(own / "other" / "of_generator.yaml"),
                    },
                },
            },
        },
        "test",
    )
    keys = [trial.key for trial in expand(spec, check=False)]
    started(SweepFolder(tmp_path / "sweep"), spec)
    for path in own.rglob("*.*"):
        path.unlink()
    again = expand(SweepFolder(tmp_path / "sweep").read(), check=False)
    assert [trial.key for trial in again] == keys
    for trial in again:
        first = trial.recipe.first_recipe()  # type: ignore[union-attr]
        assert first is not None
        assert first.schedule.total_steps == 77


def test_what_is_shipped_is_no_copy_and_what_is_given_anew_is_one_more(own: Path, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    kept = started(folder, parse_sweep(sweep_of(own), "test"))
    assert "electra-small" in kept.pretrain.space["recipe"].values  # type: ignore[union-attr]
    copies = {path.name for path in (folder.path / "inputs").rglob("*.*")}
    assert copies == {"mine.yaml", "mine.json", "tuned.yaml"}
    assert len(list((folder.path / "inputs").rglob("mine.yaml"))) == 2
    (own / "tuned.yaml").write_text(shipped_text(FINETUNE_RECIPES, "original"))
    changed = folder.read([f"finetune.variants.a.recipe={own / 'tuned.yaml'}"])
    assert [t.digest for t in expand(changed, check=False)] != [t.digest for t in expand(folder.read(), check=False)]
    started(folder, changed)
    assert len(list((folder.path / "inputs").rglob("tuned.yaml"))) == 2


def test_the_file_that_a_sweep_leaves_can_be_run_again(own: Path, tmp_path: Path) -> None:
    spec = parse_sweep(sweep_of(own), "test")
    started(SweepFolder(tmp_path / "sweep"), spec)
    again = load_sweep(str(tmp_path / "sweep" / "sweep.yaml"))
    assert [trial.key for trial in expand(again, check=False)] == [trial.key for trial in expand(spec, check=False)]


def test_what_lies_among_the_copies_and_is_none_stays_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "sweep" / "inputs" / "model"
    model.mkdir(parents=True)
    values = {"name": "x", "finetune": {"recipe": "rc2020", "model": str(model), "task": "cola"}}
    folder = SweepFolder(tmp_path / "sweep")
    started(folder, parse_sweep(values, "test"))
    assert folder.read().finetune.options["model"] == str(model)  # type: ignore[union-attr]


def test_what_optuna_suggested_is_known_after_the_folder_has_moved(own: Path, tmp_path: Path) -> None:
    space = {
        "recipe": {"choice": [str(own / "tuned.yaml"), "original"]},
        "optimizer.learning_rate": {"uniform": [0, 1]},
    }
    values: dict[str, Any] = {
        "name": "x", "finetune": {"model": "google/electra-small-discriminator", "task": "cola", "space": space},
        "search": {"kind": "optuna", "samples": 2}, "metric": {"name": "score"},
    }  # fmt: skip
    folder = SweepFolder(tmp_path / "sweep")
    spec = started(folder, parse_sweep(values, "test"))
    kept = spec.finetune.space["recipe"].values[0]  # type: ignore[union-attr]
    trial = suggested(spec, {"recipe": kept, "optimizer.learning_rate": 0.25}, check=False)
    folder.trial(trial.key).begin(trial, [], spec.resources)
    folder.trial(trial.key).end(0)
    moved = SweepFolder((tmp_path / "sweep").rename(tmp_path / "moved"))
    (again,) = moved.suggested_before(moved.read())
    assert again.key == trial.key
    assert again.values["recipe"] in moved.read().finetune.space["recipe"].values  # type: ignore[union-attr]


def test_the_status_of_a_sweep_needs_no_file_but_its_own(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, sweep_of(own))
    started(SweepFolder(tmp_path / "sweep"), load_sweep(str(path)))
    for each in own.rglob("*.*"):
        each.unlink()
    main(["sweep", "status", str(tmp_path / "sweep")])
    assert "of 6 trials" in capsys.readouterr().out
