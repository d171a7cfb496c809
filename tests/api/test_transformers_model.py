"""The networks as a transformers model, in Trainer: the numbers of electra_ds.pretrain, and exact resuming."""

from __future__ import annotations

import os
import pickle
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoTokenizer,
    DataCollatorWithPadding,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import electra_ds
from electra_ds.api.transformers_model import ElectraForJointPreTraining, NamedLosses, StoreRows
from electra_ds.config.recipe import load_recipe
from electra_ds.config.run_directory import read_metrics
from electra_ds.core.compat import leave_out_shared_memory_collective
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from tests.helpers import REPOSITORY, SMALL, small_recipe

STEPS = 30
SHORT = (f"schedule.total_steps={STEPS}", "schedule.warmup_steps=3")


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """Accelerate finds neither the process group of other tests, which it would take for a launcher's, nor what it has
    written into the environment itself."""
    given = dict(os.environ)
    os.environ.pop("LOCAL_RANK", None)
    yield
    os.environ.clear()
    os.environ.update(given)
    AcceleratorState._reset_state(reset_partial_state=True)


class Losses:
    """Keeps what every forward pass in training returned."""

    def __init__(self, model: ElectraForJointPreTraining) -> None:
        self.seen: list[dict[str, float]] = []
        model.register_forward_hook(self._keep)

    def _keep(self, model: torch.nn.Module, given: Any, output: Any) -> None:
        if model.training:
            named = {name: value.item() for name, value in output.losses.items()}
            self.seen.append({"loss": output.loss.item()} | named)


def trainer_for(
    model: ElectraForJointPreTraining,
    rows: StoreRows,
    folder: Path,
    *,
    own_optimizer: bool = True,
    evaluated: StoreRows | None = None,
    **settings: Any,
) -> Trainer:
    arguments = model.training_arguments() | {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(**arguments | settings),
        train_dataset=rows,
        eval_dataset=evaluated,
        callbacks=[NamedLosses()],
        optimizers=(model.make_optimizer() if own_optimizer else None, None),
    )


def test_trainer_has_the_losses_and_weights_of_a_run_on_the_same_rows(store: TokenStore, tmp_path: Path) -> None:
    run = electra_ds.pretrain(
        "tiny", data=store.path, ds_config="cpu", run_dir=tmp_path / "run", overrides=[*SMALL, *SHORT], log_every=1,
        threads=1, quiet=True,
    )  # fmt: skip
    recipe = small_recipe(*SHORT)
    model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
    losses = Losses(model)
    trainer_for(model, StoreRows(recipe, store), tmp_path / "trainer").train()
    expected = [line for line in read_metrics(run.path / "metrics.jsonl") if line["kind"] == "train"]
    assert len(expected) == len(losses.seen) == STEPS
    for ours, theirs in zip(losses.seen, expected, strict=True):
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-5)


def test_trainers_own_optimizer_has_the_recipes_settings(store: TokenStore, tmp_path: Path) -> None:
    recipe = small_recipe(*SHORT, "schedule.total_steps=6")
    losses = []
    for own in (True, False):
        model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
        kept = Losses(model)
        trainer_for(model, StoreRows(recipe, store), tmp_path, own_optimizer=own).train()
        losses.append([each["loss"] for each in kept.seen])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_trainer_resumes_exactly(store: TokenStore, tmp_path: Path, strategy: str) -> None:
    """With dropout, and with gradient accumulation over batches of unequal length."""
    recipe = small_recipe(*SHORT, "schedule.total_steps=12", "model.hidden_dropout_prob=0.1")
    rows = StoreRows(recipe, store)
    settings = {"save_strategy": "steps", "save_steps": 5, "train_sampling_strategy": strategy}
    straight = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer, forward_passes_per_step=2)
    trainer_for(straight, rows, tmp_path, **settings).train()
    resumed = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer, forward_passes_per_step=2)
    trainer_for(resumed, rows, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.num_forward_passes == 24
    expected = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_evaluations_report_a_loss_that_depends_neither_on_training_nor_on_earlier_evaluations(
    store: TokenStore, tmp_path: Path
) -> None:
    recipe = small_recipe(*SHORT, "schedule.total_steps=4")
    rows = StoreRows(recipe, store)
    plain = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
    trainer_for(plain, rows, tmp_path / "plain").train()
    model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
    kept = Losses(model)
    trainer = trainer_for(
        model,
        rows,
        tmp_path / "evaluated",
        evaluated=StoreRows(recipe, store, held_out_rows=20),
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
    )
    trainer.train()
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(found) == 4
    named = [line for line in trainer.state.log_history if "generator_loss" in line]
    assert [line["generator_loss"] for line in named] == pytest.approx([each["generator_loss"] for each in kept.seen])
    assert found[-1] == pytest.approx(trainer.evaluate()["eval_loss"])
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sharing", ["embeddings", "tokens", "none"])
def test_a_saved_model_is_loaded_by_auto_model_with_its_ties(store: TokenStore, tmp_path: Path, sharing: str) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer, {"generator.sharing": sharing})
    row = StoreRows(small_recipe(), store)[0]
    batch = {name: value[None] for name, value in row.items()}
    model.train()(**batch)
    model.save_pretrained(tmp_path)
    for kind in (AutoModel, AutoModelForPreTraining):
        again = kind.from_pretrained(tmp_path)
        assert isinstance(again, ElectraForJointPreTraining)
        assert again.recipe == model.recipe
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        tables = [
            each.embeddings.word_embeddings.weight for each in (again.network.generator, again.network.discriminator)
        ]
        assert (tables[0] is tables[1]) == (sharing != "none")
        assert again.train()(**batch).loss == model.train()(**batch).loss
        model.num_forward_passes -= 1


def test_the_networks_are_plain_transformers_models(store: TokenStore, tmp_path: Path) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)
    model.networks()["discriminator"].save_pretrained(tmp_path)
    loaded = ElectraForPreTraining.from_pretrained(tmp_path)
    table = model.network.discriminator.embeddings.word_embeddings.weight
    assert torch.equal(loaded.electra.embeddings.word_embeddings.weight, table)


@pytest.mark.slow
def test_trainer_with_a_deepspeed_json_has_the_same_losses_and_resumes_exactly(
    store: TokenStore, tmp_path: Path, process_group: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_shared_memory_collective()
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 1},
    }  # fmt: skip
    recipe = small_recipe(*SHORT, "schedule.total_steps=8")
    rows, settings = StoreRows(recipe, store), {"save_strategy": "steps", "save_steps": 5}
    seen, weights = [], []
    for more, checkpoint in (({}, None), ({"deepspeed": config}, None), ({"deepspeed": config}, "checkpoint-5")):
        model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
        losses = Losses(model)
        trainer = trainer_for(model, rows, tmp_path, **settings, **more)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        seen.append([each["loss"] for each in losses.seen])
        weights.append(model.state_dict())
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    assert seen[2] == seen[1][5:]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[2].items())


# --- in other trainers


class BrokenOffError(Exception):
    """Raised in place of an interruption."""


@pytest.mark.slow
@pytest.mark.parametrize("example", ["hf_trainer", "accelerate_loop", "plain_loop", "lightning_module"])
def test_every_trainer_has_the_weights_of_a_run_and_resumes_exactly(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    """Each example without dropout, straight, and broken off in step 13 of 20 and resumed from step 12."""
    steps = 20
    overrides = {"schedule.total_steps": steps, "model.hidden_dropout_prob": 0, "model.attention_probs_dropout_prob": 0}
    recipe = load_recipe("tiny", overrides)
    monkeypatch.setattr(electra_ds, "load_recipe", lambda name, changes: recipe)

    def run(out: Path) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("sys.argv", [example, str(store.path), str(out), "--steps", str(steps)])
        runpy.run_path(str(REPOSITORY / "examples" / f"{example}.py"), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = out / "networks" if example == "hf_trainer" else out
        return load_file(folder / "discriminator" / "model.safetensors")

    straight = run(tmp_path / "straight")
    whole = StoreRows.__getitem__

    def broken(rows: StoreRows, index: int) -> dict[str, torch.Tensor]:
        if index >= 12 * recipe.global_batch_size:
            raise BrokenOffError
        return whole(rows, index)

    with monkeypatch.context() as patch:
        patch.setattr(StoreRows, "__getitem__", broken)
        with pytest.raises(BrokenOffError):
            run(tmp_path / "resumed")
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = run(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    ours = electra_ds.pretrain(
        recipe, data=store.path, ds_config="cpu", run_dir=tmp_path / "run", threads=1, eval_windows=8, quiet=True
    )
    expected = load_file(electra_ds.export(ours, tmp_path / "ours") / "discriminator" / "model.safetensors")
    assert straight.keys() == expected.keys()
    for name, tensor in straight.items():
        if not name.endswith("key.bias"):  # whose gradient would be 0 without rounding errors, which Adam enlarges
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


# --- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[0, 0, 1, 1]])}, 'set padding_side="right"'),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, "A row has no tokens"),
        ({"input_ids": torch.full((1, 4), 10_000)}, "The text has id 10000, but the model has the 400 pieces from 0"),
        (
            {"input_ids": torch.zeros(1, 513, dtype=torch.int64)},
            "Rows have 513 tokens, but the model has 512 positions",
        ),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(store: TokenStore, changes: dict[str, Any], message: str) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)
    with pytest.raises(DataError, match=message):
        model(**{"input_ids": torch.full((1, 4), 7)} | changes)


def test_what_only_the_own_loop_has_is_refused(store: TokenStore) -> None:
    def model(*overrides: str, recipe: str = "tiny") -> ElectraForJointPreTraining:
        return ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer, overrides)

    with pytest.raises(ConfigError, match=r"supported only by electra_ds\.pretrain"):
        model("generator.max_grad_norm=1").make_optimizer()
    with pytest.raises(ConfigError, match=r"set schedule\.kind=linear"):
        model("schedule.kind=product").training_arguments()
    with pytest.raises(ConfigError, match="needs a trained generator: give a masked language model as `init_from`"):
        model(recipe="tiny-fast-electra")
    with pytest.raises(ConfigError, match="reads replacements from a token store"):
        model("discriminator.starts_from=random", "objective=fast-electra-offline", recipe="tiny-fast-electra")


def test_a_folder_that_is_not_such_a_model_says_how_to_begin_with_it(store: TokenStore, tmp_path: Path) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)
    model.networks()["discriminator"].save_pretrained(tmp_path / "discriminator")
    with pytest.raises(ConfigError, match=r"have no recipe.* use .*from_recipe\(\.\.\., init_from=\[FOLDER\]\)"):
        ElectraForJointPreTraining.from_pretrained(tmp_path / "discriminator")
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    del tensors["network.discriminator_head.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"lack network\.discriminator_head\.dense\.weight"):
        ElectraForJointPreTraining.from_pretrained(tmp_path / "whole")


def test_a_tokenizer_without_special_tokens_is_refused(store: TokenStore) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"PreTrainedTokenizerFast lacks \[CLS\], \[SEP\], \[MASK\]|lacks \[PAD\]"):
        ElectraForJointPreTraining.from_recipe("tiny", PreTrainedTokenizerFast(tokenizer_object=backend))


# --- what a model keeps


def test_a_frozen_generator_stays_frozen_when_it_is_saved_and_loaded(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    joint = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)
    for name, network in joint.networks().items():
        network.save_pretrained(tmp_path / name)
        store.tokenizer.save(tmp_path / name)
    changes = {"extends": "tiny-fast-electra", "optimizer": {"weight_decay": 0.1}}
    recipe = load_recipe(
        changes,
        [each for each in SMALL if not each.startswith(("generator.sharing", "discriminator.loss"))]
        + ["schedule.total_steps=4", "schedule.warmup_steps=1"],
    )
    first = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer, init_from=tmp_path / "generator")
    first.save_pretrained(tmp_path / "saved")
    model = ElectraForJointPreTraining.from_pretrained(tmp_path / "saved")
    assert not model.training
    before = {name: each.clone() for name, each in model.network.generator.state_dict().items()}
    engine, _, loader, _ = electra_ds.initialize(recipe=recipe, store=store, ds_config="zero1", model=model)
    assert model.training
    for micro_batch in loader:
        engine.backward(engine(**micro_batch).loss)
        engine.step()
    assert all(torch.equal(each, before[name]) for name, each in model.network.generator.state_dict().items())
    assert model.num_forward_passes == 4


def test_rows_of_a_store_are_opened_again_in_other_processes_not_copied(store: TokenStore) -> None:
    rows = StoreRows(small_recipe(), store)
    sent = pickle.dumps(rows)
    assert len(sent) < 10_000
    again = pickle.loads(sent)
    assert all(torch.equal(value, again[9][name]) for name, value in rows[9].items())


def test_gradient_checkpointing_changes_nothing_but_memory(store: TokenStore) -> None:
    recipe = small_recipe("model.hidden_dropout_prob=0.1")
    row = {name: value[None] for name, value in StoreRows(recipe, store)[0].items()}
    grads = []
    for enable in (False, True):
        model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer).train()
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is enable
        torch.manual_seed(0)
        model(**row).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_autocast_of_the_trainer_is_used(store: TokenStore) -> None:
    row = {name: value[None] for name, value in StoreRows(small_recipe(), store)[0].items()}
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.eval()(**row).loss
    full = model.eval()(**row).loss
    assert half != full
    assert half.item() == pytest.approx(full.item(), rel=1e-2)


def test_accumulation_divides_the_batch_and_counts_steps(store: TokenStore) -> None:
    model = ElectraForJointPreTraining.from_recipe(small_recipe(), store.tokenizer, forward_passes_per_step=4)
    found = model.training_arguments()
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 4)
    with pytest.raises(ConfigError, match=r"8 is not a multiple of 1 process\(es\) times 3 forward pass\(es\)"):
        ElectraForJointPreTraining.from_recipe(
            small_recipe(), store.tokenizer, forward_passes_per_step=3
        ).training_arguments()


def test_trainer_averages_the_losses_of_accumulated_forward_passes(store: TokenStore, tmp_path: Path) -> None:
    """It would add them up, for a model that counts the batch's items itself."""
    recipe = small_recipe("schedule.total_steps=3", "schedule.warmup_steps=1")

    def model_of() -> ElectraForJointPreTraining:
        return ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer, forward_passes_per_step=2)

    trained, expected, rows = model_of(), model_of().train(), StoreRows(recipe, store)
    trainer_for(trained, rows, tmp_path).train()
    optimizer = expected.make_optimizer()
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 3)
    for micro_batch in DataLoader(rows, 4):
        (expected(**micro_batch).loss / 2).backward()
        if expected.num_forward_passes % 2 == 0:
            torch.nn.utils.clip_grad_norm_(expected.parameters(), recipe.optimizer.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for (name, one), other in zip(trained.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_other_columns_of_a_dataset_are_left_out(store: TokenStore, tmp_path: Path) -> None:
    recipe = small_recipe("schedule.total_steps=2", "schedule.warmup_steps=1")
    model = ElectraForJointPreTraining.from_recipe(recipe, store.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(store.path / "tokenizer")
    table = Dataset.from_dict({"text": ["A few words.", "Many more words than before."] * 8, "id": [*range(16)]})
    rows = table.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=32), batched=True)
    arguments = TrainingArguments(**model.training_arguments(), output_dir=str(tmp_path), report_to=[], use_cpu=True)
    collator = DataCollatorWithPadding(tokenizer)
    state = Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    assert state.global_step == 2
    assert state.training_loss > 0
