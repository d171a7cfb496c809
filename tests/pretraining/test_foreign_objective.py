"""An objective that another package brings does everything that ours do, without a line changed in electra_ds."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from electra_ds_cloze.objective import Cloze, ClozeRecipe
from transformers import AutoTokenizer, BertForMaskedLM

from electra_ds.cli import main
from electra_ds.config.plugins import find
from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.init_from import read_initial_weights
from electra_ds.pretraining.evaluation import load_trained
from electra_ds.pretraining.objectives.base import Objective, TextBatch
from electra_ds.report.tables import Table
from electra_ds.sweep.forecast import plan_sweep
from electra_ds.sweep.sweep_file import load_sweep
from tests.helpers import SMALL
from tests.launching import ENVIRONMENT
from tests.pretraining.test_pretrain import final_tensors, train_losses
from tests.sweeping import STEPS as TRIAL_STEPS
from tests.sweeping import run_sweep, small_sweep, write_sweep

PATH = "electra_ds_cloze.objective:Cloze"
STEPS = 20
OF_ELECTRA = ("generator.", "discriminator.", "masking.")
SIZES = [override for override in SMALL if not override.startswith(OF_ELECTRA)]
SETTINGS = [
    "--threads", "1", "--log-every", "5", "--eval-every", "10", "--save-every", "5", "--eval-windows", "16", "--set",
    *SIZES, f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2", "cloze.masked_share=0.3",
]  # fmt: skip


class Incomplete(Objective[Recipe]):
    """An objective whose methods are not written yet."""


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an installed package that registers the objective `cloze`."""
    folder = tmp_path / "site-packages"
    info = folder / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[electra_ds.objectives]\ncloze = {PATH}\n")
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    find.cache_clear()


def own_recipe(folder: Path, objective: str = PATH) -> str:
    """A recipe file as its user would write it."""
    path = folder / "cloze.yaml"
    path.write_text(yaml.safe_dump({"extends": "tiny", "objective": objective, "cloze": {"masked_share": 0.2}}))
    return str(path)


def pretrain(store: TokenStore, run: Path, recipe: str, document: dict[str, Any], *more: str) -> None:
    ds_config = run.parent / f"{run.name}.json"
    ds_config.write_text(json.dumps(document))
    arguments = ["--recipe", recipe, "--ds-config", str(ds_config), "--data", str(store.path), "--run-dir", str(run)]
    main(["pretrain", *arguments, *more, *SETTINGS])


def test_a_recipe_that_extends_ours_leaves_out_the_sections_of_our_objective(tmp_path: Path) -> None:
    recipe = load_recipe(own_recipe(tmp_path), ["cloze.temperature=2"])
    assert isinstance(recipe, ClozeRecipe)
    assert (recipe.cloze.masked_share, recipe.cloze.temperature) == (0.2, 2.0)
    assert recipe.model == load_recipe("tiny").model
    with pytest.raises(ConfigError, match=r"generator\.width_multiplier: unknown key"):
        load_recipe(own_recipe(tmp_path), ["generator.width_multiplier=0.5"])


def test_initial_weights_of_electra_are_refused_before_they_are_read(tmp_path: Path) -> None:
    recipe = load_recipe(own_recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"--init-from needs an objective with a generator, but the recipe cloze has"):
        read_initial_weights([str(tmp_path / "nowhere")], recipe)


def test_an_unknown_objective_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no objective 'elektra'; did you mean 'electra'\? The registered ones are .*electra"
    ):
        load_recipe("tiny", ["objective=elektra"])
    with pytest.raises(ConfigError, match=r"cannot be loaded: No module named 'nowhere'\. Install its package"):
        load_recipe("tiny", ["objective=nowhere.at_all:Thing"])
    with pytest.raises(ConfigError, match=r"has no Cloz; did you mean 'Cloze'"):
        load_recipe("tiny", ["objective=electra_ds_cloze.objective:Cloz"])
    with pytest.raises(ConfigError, match=r"is not a subclass of electra_ds\.Objective"):
        load_recipe("tiny", ["objective=electra_ds_cloze.objective:ClozeModel"])
    with pytest.raises(
        ConfigError,
        match=r"lacks build_model, encoder, exports, key_metrics, loss_names, main_metric",
    ):
        load_recipe("tiny", ["objective=tests.pretraining.test_foreign_objective:Incomplete"])


@pytest.mark.parametrize("stage", [0, 2])
def test_it_pretrains_resumes_reports_and_exports(
    store: TokenStore, tmp_path: Path, process_group: Ranks, stage: int, capsys: pytest.CaptureFixture[str],
    registered: Path,
) -> None:  # fmt: skip
    """By its dotted path at stage 0, by its entry point at stage 2."""
    document = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4}
    recipe = own_recipe(tmp_path, "cloze" if stage == 2 else PATH)
    pretrain(store, tmp_path / "straight", recipe, document)
    said = capsys.readouterr().out
    assert f"held out at step {STEPS}: cloze loss" in said
    assert "accuracy at masked tokens" in said  # the summary's row
    pretrain(store, tmp_path / "resumed", recipe, document, "--stop-at", "12")
    main(["pretrain", "--resume", str(tmp_path / "resumed")])
    assert train_losses(tmp_path / "resumed") == train_losses(tmp_path / "straight")
    straight, resumed = final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [loss for _, loss in train_losses(tmp_path / "straight")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

    recipe_file = tmp_path / "resumed" / "recipe.yaml"
    recipe_file.write_text(re.sub("objective: .*", "objective: uninstalled.module:Cloze", recipe_file.read_text()))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "resumed")])
    assert "Install its package" in capsys.readouterr().err  # rather than that the file is damaged

    main(["export", str(tmp_path / "straight")])
    folder = tmp_path / "straight" / "export" / "masked_lm"
    inputs = AutoTokenizer.from_pretrained(folder)("some text", return_tensors="pt")
    ours = load_trained(tmp_path / "straight").model.bert
    with torch.no_grad():
        exported = BertForMaskedLM.from_pretrained(folder).eval()(**inputs).logits
        torch.testing.assert_close(exported, ours(**inputs).logits)
    assert (tmp_path / "straight" / "curves.png").is_file()


def test_the_temperature_of_a_step_reaches_the_model_as_a_tensor_of_its_batch(
    store: TokenStore, tmp_path: Path
) -> None:
    objective = Cloze(load_recipe(own_recipe(tmp_path), SIZES), store.tokenizer.vocab_size, store.tokenizer.pad_id)
    text = np.full((2, 8), 7)
    assert objective.make_batch(_text(text), 0, 0).micro_batch(0, 1).temperature == 1.5
    assert objective.make_batch(_text(text), 0, 400).micro_batch(0, 1).temperature == 1.0


def test_its_encoder_is_finetuned(store: TokenStore, tmp_path: Path, process_group: Ranks) -> None:
    """From the run, and from its export."""
    pretrain(store, tmp_path / "run", own_recipe(tmp_path), {}, "--stop-at", "5")
    main(["export", str(tmp_path / "run")])
    for name in ("train", "dev"):
        rows = "".join(f"{word} text,{label}\n" for word, label in (("good", 1), ("bad", 0)) for _ in range(8))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    for n, model in enumerate((tmp_path / "run", tmp_path / "run" / "export")):
        finetuned = tmp_path / f"finetuned-{n}"
        main([
            "finetune", "--model", str(model), "--train", str(tmp_path / "train.csv"), "--dev",
            str(tmp_path / "dev.csv"), "--ds-config", "cpu", "--threads", "1", "--run-dir", str(finetuned),
            "--set", "schedule.epochs=1", "global_batch_size=8",
        ])  # fmt: skip
    of_run, of_export = (json.loads((tmp_path / f"finetuned-{n}" / "scores.json").read_text()) for n in (0, 1))
    assert of_run["sets"] == of_export["sets"]
    assert of_run["model_fingerprint"] == of_export["model_fingerprint"]


def test_it_is_found_by_its_entry_point(
    store: TokenStore, tmp_path: Path, process_group: Ranks, registered: Path
) -> None:
    pretrain(store, tmp_path / "run", own_recipe(tmp_path, "cloze"), {}, "--stop-at", "5")
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recorded["objective"], recorded["cloze"]["masked_share"]) == ("cloze", 0.3)
    assert "generator" not in recorded


def test_its_plan_shows_the_memory_of_its_state_and_says_what_it_does_not_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", own_recipe(tmp_path), "--set", *SIZES]
    main(["plan", "--card", "RTX 3090", *arguments])
    said = " ".join(capsys.readouterr().out.split())
    assert "for weights, gradients and the optimizer's state" in said
    assert f"Time: not predicted by the objective {PATH}" in said
    main(["plan", "--card", "cpu", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    recipe = load_recipe(own_recipe(tmp_path), SIZES)
    parameters = sum(Cloze(recipe, recipe.tokenizer.vocab_size).parameter_counts().values())
    assert found["state_bytes"] == 16 * parameters  # fp32 weight, gradient and two moments
    assert (found["fits"], found["days"]) == (None, None)


@pytest.mark.slow
def test_it_is_swept_over_its_own_keys_and_by_its_own_metric(
    store: TokenStore, tmp_path: Path, registered: Path
) -> None:
    values = small_sweep(store.path)
    stage = values["pretrain"]
    stage["recipe"] = own_recipe(tmp_path, "cloze")
    stage["set"] = {key: value for key, value in stage["set"].items() if not key.startswith(OF_ELECTRA)}
    stage["space"], stage["seeds"] = {"cloze.masked_share": {"grid": [0.3]}}, [0]
    values["metric"] = {"name": "cloze_gain", "mode": "max"}
    table, *_ = plan_sweep(load_sweep(write_sweep(tmp_path, values)), tmp_path / "sweep")
    assert isinstance(table, Table)
    steps = str(TRIAL_STEPS)
    assert [row[4:] for row in table.rows] == [[steps, "?", ""]]  # its cost is not predicted
    environment = {"PYTHONPATH": f"{registered}:{ENVIRONMENT.get('PYTHONPATH', '')}"}
    done = run_sweep(write_sweep(tmp_path, values), "--out", tmp_path / "sweep", "--local", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cloze_gain" in (tmp_path / "sweep" / "results.csv").read_text().splitlines()[0]


def _text(ids_BT: np.ndarray) -> TextBatch:
    ones = np.ones(ids_BT.shape, dtype=bool)
    return TextBatch(ids_BT, ones.sum(1), None, ones, mask_token_id=4)
