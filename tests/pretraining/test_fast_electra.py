"""Fast-ELECTRA: the temperature of a step, a generator that stays as it was given, and where runs begin."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import electra_ds
from electra_ds import Callback, Run
from electra_ds.cli import main
from electra_ds.config.recipe import FastElectraRecipe, load_recipe, recipe_yaml
from electra_ds.core.errors import CheckpointError, ConfigError, InterruptedBySignalError
from electra_ds.core.keyed_random import hash64
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.evaluation import held_out_batch, load_trained
from electra_ds.pretraining.masked_batch import MaskedBatch
from electra_ds.sweep.sweep_file import as_spec
from electra_ds.sweep.trials import expand
from electra_ds.training.callbacks import Metrics, Progress
from electra_ds.training.checkpoint import open_checkpoint
from tests import forks
from tests.helpers import SMALL, builder_for
from tests.pretraining.test_pretrain import train_losses

OF_GENERATOR = ("generator.", "discriminator.", "masking.")
SHARED = [each for each in SMALL if not each.startswith(OF_GENERATOR)]
SAME_SIZES = ("generator.width_multiplier=1", "generator.depth_multiplier=1", "generator.intermediate_size=64")
FAST = [*SHARED, *SAME_SIZES, "optimizer.weight_decay=0.1"]
SETTINGS = ("--threads", "1", "--log-every", "5", "--eval-every", "15", "--save-every", "10", "--eval-windows", "16")
STEPS = ("schedule.total_steps=30", "schedule.warmup_steps=2")


def fast_recipe(*overrides: str) -> FastElectraRecipe:
    recipe = load_recipe("tiny-fast-electra", [*FAST, *overrides])
    assert isinstance(recipe, FastElectraRecipe)
    return recipe


def pretrain(store: TokenStore, run: Path, recipe: str, overrides: list[str], *more: str, stage: int = 0) -> Path:
    ds_config = run.parent / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4}))
    main([
        "pretrain", "--recipe", recipe, "--ds-config", str(ds_config), "--data", str(store.path), "--run-dir",
        str(run), *more, *SETTINGS, "--set", *overrides, *STEPS,
    ])  # fmt: skip
    return run


def latest(run: Path) -> Mapping[str, torch.Tensor]:
    return open_checkpoint(run / "checkpoints" / "latest").tensors


@pytest.fixture(scope="module")
def auxiliary(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of masked language modelling."""
    return pretrain(store, tmp_path_factory.mktemp("auxiliary") / "mlm", "tiny-mlm", SHARED)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (2.0, 1 + math.exp(-5), 1 + math.exp(-10))),
        (("temperature.start=3", "temperature.tau=0.5"), (3.0, 1 + 2 * math.exp(-1), 1 + 2 * math.exp(-2))),
        (("temperature.schedule=linear",), (2.0, 1.5, 1.0)),
        (("temperature.schedule=polynomial", "temperature.power=3"), (2.0, 1.125, 1.0)),
        (("temperature.schedule=constant", "temperature.start=1.5"), (1.5, 1.5, 1.5)),
    ],
)
def test_the_temperature_at_the_beginning_the_middle_and_the_end(
    store: TokenStore, overrides: tuple[str, ...], expected: tuple[float, ...]
) -> None:
    recipe = fast_recipe("schedule.total_steps=400", *overrides)
    builder = builder_for(store, recipe)
    for share, temperature in zip((0.0, 0.5, 1.0), expected, strict=True):
        assert recipe.temperature.at(share) == pytest.approx(temperature)
        batch = builder.build(int(share * 400))
        assert isinstance(batch, MaskedBatch)
        assert batch.temperature == pytest.approx(temperature)
        tensor = batch.micro_batch(0, 2).temperature
        assert temperature == 1.0 if tensor is None else tensor.item() == pytest.approx(temperature)


def test_held_out_text_is_corrupted_at_temperature_1(store: TokenStore) -> None:
    recipe = fast_recipe()
    batch = held_out_batch(store, split_holdout(store.documents, recipe.data, recipe.seed), recipe, 16)
    assert isinstance(batch, MaskedBatch)
    assert batch.temperature == 1.0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_replacements_have_the_frequencies_of_the_tempered_softmax(store: TokenStore, share: float) -> None:
    """Drawn by the model itself, again and again with other noise, at one position of one sequence."""
    recipe = fast_recipe("temperature.start=3", "schedule.total_steps=400", "model.initializer_range=0.3")
    builder = builder_for(store, recipe)
    batch = builder.build(int(share * 400))
    assert isinstance(batch, MaskedBatch)
    micro = batch.micro_batch(0, 1, packed=False)
    model = builder.objective.build_model().eval()
    place = micro.selected_M[:1]
    draws = 20_000
    many = micro._replace(
        selected_M=place.expand(draws).clone(),
        replaced_M=torch.ones(draws, dtype=torch.bool),
        noise_keys_M=torch.from_numpy(hash64(3, np.arange(draws)).astype(np.uint32).view(np.int32)),
    )
    with torch.no_grad():
        samples = model(many).samples_M.numpy()
        hidden = model.generator(micro.masked_ids_BT, None if micro.sequences_BT is None else micro.attention_mask())
        logits = model.generator_head.transform(hidden.flatten(0, 1)[place]) @ model.generator_head.decoder.weight.T
        logits = (logits + model.generator_head.decoder.bias).double().squeeze(0)
    expected = torch.softmax(logits / recipe.temperature.at(share), -1).numpy() * draws
    often = expected >= 5
    counts = np.bincount(samples, minlength=len(expected))
    assert often.mean() > 0.8
    wanted = expected[often] * counts[often].sum() / expected[often].sum()
    assert stats.chisquare(counts[often], wanted).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_the_generator_stays_as_it_was_given_and_has_no_optimizer_state(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, stage: int
) -> None:
    """With a weight decay of 0.1. A run that stops and goes on ends bit for bit like one that does not."""
    given = ("--init-from", str(auxiliary))
    straight = pretrain(store, tmp_path / "straight", "tiny-fast-electra", FAST, *given, stage=stage)
    resumed = pretrain(store, tmp_path / "resumed", "tiny-fast-electra", FAST, *given, "--stop-at", "17", stage=stage)
    main(["pretrain", "--resume", str(resumed)])
    assert train_losses(resumed) == train_losses(straight)
    tensors, others = latest(straight), latest(resumed)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    lm = load_trained(auxiliary).model.state_dict()
    generator = {name: tensor for name, tensor in tensors.items() if "/generator" in name}
    assert generator
    for name, tensor in generator.items():
        assert name.startswith("master/"), "moments of a frozen parameter"
        assert torch.equal(tensor, lm[name.removeprefix("master/").replace("generator", "encoder")]), name
    assert any(name.startswith("exp_avg/discriminator.") for name in tensors)
    losses = [loss for _, loss in train_losses(straight)]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


@pytest.mark.parametrize("start", ["random", "embeddings", "generator"])
def test_the_discriminator_begins_as_the_recipe_says(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, start: str
) -> None:
    overrides = [*FAST, f"discriminator.starts_from={start}"]
    run = pretrain(
        store, tmp_path / "run", "tiny-fast-electra", overrides, "--init-from", str(auxiliary), "--keep", "9"
    )
    first = open_checkpoint(min((run / "checkpoints").glob("step-*"))).tensors
    names = [name.removeprefix("master/generator.") for name in first if name.startswith("master/generator.")]
    equal = {
        name for name in names if torch.equal(first[f"master/generator.{name}"], first[f"master/discriminator.{name}"])
    }
    matrices = {name for name in names if first[f"master/generator.{name}"].dim() == 2}
    expected = {
        "random": set(),
        "embeddings": {name for name in names if name.startswith("embeddings.")},
        "generator": set(names),
    }[start]
    assert equal & matrices == expected & matrices
    assert expected <= equal


def test_a_run_without_an_auxiliary_model_or_with_an_unfit_one_is_refused(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pretrain(store, tmp_path / "none", "tiny-fast-electra", FAST)
    assert "The objective fast-electra needs a trained generator" in capsys.readouterr().err
    narrow = [*FAST, "generator.width_multiplier=0.5"]
    with pytest.raises(SystemExit):
        pretrain(store, tmp_path / "narrow", "tiny-fast-electra", narrow, "--init-from", str(auxiliary))
    assert "Add: --set generator.width_multiplier=1.0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=r"starts_from: generator needs generator\.width_multiplier: 1\.0"):
        fast_recipe("generator.width_multiplier=0.5", "discriminator.starts_from=generator")
    with pytest.raises(ConfigError, match=r"starts_from: generator needs generator\.intermediate_size: 64"):
        fast_recipe("generator.intermediate_size=80", "discriminator.starts_from=generator")
    with pytest.raises(ConfigError, match=r"starts_from: generator needs generator\.num_attention_heads: 4"):
        fast_recipe("generator.num_attention_heads=2", "discriminator.starts_from=generator")


class StopAt(Callback):
    """Stop a run at a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.started = 0
        """The number of runs that have begun."""

    def on_start(self, progress: Progress) -> None:
        self.started += 1

    def on_step(self, progress: Progress, step: int, metrics: Metrics) -> None:
        if step == self.step:
            self.step = 0
            progress.stop("that is enough")


def test_a_generator_that_the_recipe_names_is_pretrained_first_as_if_by_a_command_of_its_own(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    """The run is stopped once during each of the two pretrainings, moved, and resumed."""
    of_generator, name = tmp_path / "cloze.yaml", "tiny-fast-electra"
    of_generator.write_text(recipe_yaml(load_recipe("tiny-mlm", [*SHARED, *STEPS])))
    how = ("--seed", "3")
    lm = pretrain(store, tmp_path / "lm", str(of_generator), [], *how)
    apart = pretrain(store, tmp_path / "apart", name, FAST, *how, "--init-from", str(lm))
    one, named = tmp_path / "one", [*FAST, f"generator.recipe={of_generator}"]
    first, second = StopAt(11), StopAt(13)
    common = {"threads": 1, "log_every": 5, "eval_every": 15, "save_every": 10, "eval_windows": 16, "quiet": True}
    stopped = electra_ds.pretrain(
        name, data=store.path, ds_config=apart / "deepspeed.json", run_dir=one, overrides=[*named, *STEPS], seed=3,
        callbacks=[first], **common,
    )  # fmt: skip
    assert (stopped.status, Run(one / "generator").status, first.started) == ("stopped", "stopped", 1)
    one = one.rename(tmp_path / "moved")
    stopped = Run(one)
    for use in (stopped.report, lambda: load_trained(one)):
        with pytest.raises(CheckpointError, match=f"because it waits for its generator, whose run is {one}/generator"):
            use()
    assert stopped.resume(callbacks=[second], quiet=True).status == "stopped"
    assert (Run(one / "generator").status, second.started) == ("done", 2)
    assert stopped.resume(quiet=True).status == "done"
    for ours, theirs in ((one / "generator", lm), (one, apart)):
        tensors, others = latest(ours), latest(theirs)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[each], others[each]) for each in tensors)
    assert train_losses(one) == train_losses(apart)
    shutil.rmtree(one / "checkpoints")
    (one / "status.json").unlink()
    with pytest.raises(CheckpointError, match="but its checkpoints are gone"):
        stopped.resume(quiet=True)


class InterruptAfterFirst(Callback):
    """Sends a signal once the generator is finished, before the discriminator's run begins."""

    def on_end(self, progress: Progress, status: str) -> None:
        if progress.run.name == "generator" and status == "done":
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_between_the_two_pretrainings_stops_the_run_and_says_how_to_resume_it(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    run = tmp_path / "run"
    first = "generator.recipe={extends: tiny-mlm, schedule: {total_steps: 4, warmup_steps: 0}}"
    with pytest.raises(InterruptedBySignalError, match=f"pretrain --resume {run}$"):
        electra_ds.pretrain(
            "tiny-fast-electra", data=store.path, run_dir=run, callbacks=[InterruptAfterFirst()],
            overrides=[*FAST, *STEPS, first], ds_config="cpu", threads=1, eval_windows=16, quiet=True,
        )  # fmt: skip
    assert (Run(run / "generator").status, Run(run).status) == ("done", "stopped")
    assert (run / "requeue").exists()
    assert Run(run).resume(quiet=True).status == "done"


@pytest.mark.slow
def test_two_ranks_pretrain_the_generator_first_and_begin_with_its_weights(store: TokenStore, tmp_path: Path) -> None:
    of_generator, run = tmp_path / "cloze.yaml", tmp_path / "run"
    of_generator.write_text(recipe_yaml(load_recipe("tiny-mlm", [*SHARED, *STEPS])))
    done = forks.run(
        "pretrain", "--recipe", "tiny-fast-electra", "--ds-config", "cpu", "--data", store.path, "--run-dir", run,
        *SETTINGS, "--set", *FAST, *STEPS, f"generator.recipe={of_generator}", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    name = "layers.0.output.weight"
    made = load_trained(run / "generator").model.state_dict()[f"encoder.{name}"]
    assert torch.equal(latest(run)[f"master/generator.{name}"], made)
    assert (Run(run).status, Run(run / "generator").status) == ("done", "done")


def test_the_recipe_of_a_generator_takes_sizes_text_and_seed_from_the_recipe_of_the_discriminator() -> None:
    recipe = load_recipe(
        "tiny-fast-electra",
        {
            "generator.recipe": {"extends": "tiny-mlm", "schedule": {"total_steps": 77}},
            "generator.width_multiplier": 0.25, "model.hidden_size": 128, "tokenizer.vocab_size": 999, "seed": 4,
            "data.sequence_length": 24,
        },
    )  # fmt: skip
    assert load_recipe(recipe.model_dump()) == recipe
    first, sizes = recipe.first_recipe(), recipe.generator_sizes
    assert (first.model.hidden_size, first.model.num_attention_heads) == (32, 1)
    assert (first.model.intermediate_size, first.model.embedding_size) == (sizes.intermediate_size, 64)
    assert (first.tokenizer, first.data, first.seed) == (recipe.tokenizer, recipe.data, 4)
    assert first.schedule.total_steps == 77
    assert first.optimizer == load_recipe("tiny-mlm").optimizer


def test_the_recipe_of_a_generator_replaces_the_one_that_the_extended_recipe_names(tmp_path: Path) -> None:
    """Whole, and a file is found beside the recipe that names it."""
    (tmp_path / "cloze.yaml").write_text("extends: tiny-mlm\nschedule: {total_steps: 77}\n")
    (tmp_path / "mine.yaml").write_text("extends: tiny-two-stage\ngenerator: {recipe: cloze.yaml}\n")
    values = {"extends": "tiny-mlm", "schedule": {"total_steps": 77}}
    of_values = load_recipe("tiny-two-stage", {"generator.recipe": values})
    for recipe in (load_recipe(tmp_path / "mine.yaml"), of_values):
        assert recipe.first_recipe().schedule.total_steps == 77
        assert recipe.first_recipe().masking.mlm_probability == 0.25  # not tiny-generator's 0.3
    again = load_recipe(of_values.model_dump(), {"generator.recipe": {"extends": "tiny-generator"}})
    assert again.first_recipe().schedule.total_steps == 3500


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("tiny", "must be the recipe of a masked language model, but tiny has the objective electra"),
        ("tiny-mml", "There is no recipe 'tiny-mml'"),
        ({"extends": "tiny-mlm", "masking": {"mlm_probability": 2}}, "masking.mlm_probability: Input should be less"),
    ],
)
def test_a_recipe_that_makes_no_generator_is_refused_before_anything_runs(
    store: TokenStore, tmp_path: Path, process_group: Ranks, recipe: Any, told: str
) -> None:
    changes = {"generator.recipe": recipe}
    with pytest.raises(ConfigError, match=told):
        electra_ds.pretrain(
            "tiny-fast-electra", data=store.path, run_dir=tmp_path / "run", overrides=changes, quiet=True
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=told):
        expand(as_spec({"name": "x", "pretrain": {"recipe": "tiny-fast-electra", "set": changes}}))


def test_the_generator_of_an_electra_is_taken_without_its_discriminator(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    """From its run, and from its export."""
    sizes = ["generator.width_multiplier=0.5", "generator.depth_multiplier=0.5"]
    joint = pretrain(store, tmp_path / "joint", "tiny", [*SHARED, *sizes])
    main(["export", str(joint)])
    trained = load_trained(joint).model.state_dict()
    for number, source in enumerate((joint, joint / "export")):
        run = pretrain(
            store,
            tmp_path / f"fast-{number}",
            "tiny-fast-electra",
            [*SHARED, *sizes],
            "--init-from",
            str(source),
            "--seed",
            "5",
        )
        tensors, name = latest(run), "layers.0.output.weight"
        assert torch.equal(tensors[f"master/generator.{name}"], trained[f"generator.{name}"])
        change = (tensors[f"master/discriminator.{name}"] - trained[f"discriminator.{name}"]).norm()
        assert change > trained[f"discriminator.{name}"].norm()


def test_a_dead_discriminator_is_a_collapse_although_its_generator_does_not_improve(store: TokenStore) -> None:
    builder = builder_for(store, fast_recipe("schedule.total_steps=400", "schedule.warmup_steps=4"))
    dead = {"discriminator_auc": 0.5, "discriminator_accuracy": 0.8, "discriminator_recall": 0.0, "replaced_share": 0.2}
    dead |= {"discriminator_logit_std": 0.001, "generator_masked_loss": 4.0}
    evaluations = [{**dead, "step": step} for step in range(20, 400, 20)]
    assert builder.objective.collapsed_at(evaluations) == 20
    said = builder.objective.describe_collapse(20, evaluations)
    assert "at chance since step 20: it has collapsed" in said
    assert "lower optimizer.learning_rate" in said


def test_the_export_of_a_masked_language_model_is_a_source_and_its_name_stands_once(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks
) -> None:
    main(["export", str(auxiliary), "--out", str(tmp_path / "export")])
    run = pretrain(store, tmp_path / "run", "tiny-fast-electra", FAST, "--init-from", str(tmp_path / "export"))
    name = "embeddings.word_embeddings.weight"
    given = load_trained(auxiliary).model.state_dict()[f"encoder.{name}"]
    assert torch.equal(latest(run)[f"master/generator.{name}"], given)
    other = pretrain(store, tmp_path / "other", "tiny-fast-electra", FAST, "--init-from", str(auxiliary))
    assert json.loads((other / "run.json").read_text())["initialised_from"] == [str(auxiliary)]


def test_an_objective_without_a_discriminator_takes_a_generator_alone(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [*SHARED, *SAME_SIZES]
    joint = pretrain(store, tmp_path / "joint", "tiny", sizes)
    with pytest.raises(SystemExit):
        pretrain(store, tmp_path / "refused", "tiny-replace-mlm", sizes, "--init-from", str(joint))
    assert "The objective replace-mlm has no discriminator, but --init-from gives" in capsys.readouterr().err
    run = pretrain(store, tmp_path / "run", "tiny-replace-mlm", sizes, "--init-from", str(auxiliary))
    assert (
        "the encoder begins with random weights, except for the embeddings, which it shares with the generator"
        in " ".join(capsys.readouterr().out.split())
    )
    fast = pretrain(store, tmp_path / "fast", "tiny-fast-electra", FAST, "--init-from", str(run))  # two masked LMs
    name = "layers.0.output.weight"
    assert torch.equal(latest(fast)[f"master/generator.{name}"], latest(run)[f"master/generator.{name}"])


def test_deepspeeds_own_checkpoints_are_for_electra_alone(
    auxiliary: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(auxiliary), "--to", "deepspeed", "--ds-config", "cpu", "--out", str(tmp_path / "native")])
    said = capsys.readouterr().err
    assert (
        "This supports only the objectives electra and electra-15, but the recipe tiny-mlm has the objective mlm"
        in said
    )
    assert not (tmp_path / "native").exists()


def test_a_generator_alone_warms_an_electra_up(
    store: TokenStore, auxiliary: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(store, tmp_path / "run", "tiny", [*SHARED, *SAME_SIZES], "--init-from", str(auxiliary))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "the discriminator begins with random weights, except for the embeddings, which it shares with the generator"
        in said
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mlm = [json.loads(line) for line in (auxiliary / "metrics.jsonl").read_text().splitlines()]
    first = next(line["generator_loss"] for line in metrics if line["kind"] == "train")
    fresh = next(line["mlm_loss"] for line in mlm if line["kind"] == "train")
    assert first < fresh - 0.2
