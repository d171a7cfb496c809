"""A run that begins with transformers' weights has their function, or is refused before anything long."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForSequenceClassification,
    PreTrainedModel,
)

from electra_ds import cli
from electra_ds.config.options import PretrainOptions
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data import hub
from electra_ds.data.token_store import TokenStore
from electra_ds.data.tokenizer import train_tokenizer
from electra_ds.interop.export import export_run
from electra_ds.interop.init_from import InitialWeights, read_initial_weights, write_first_checkpoint
from electra_ds.pretraining import prepare
from electra_ds.pretraining.convert import (
    discriminator_tensors,
    from_discriminator_tensors,
    from_generator_tensors,
    generator_tensors,
)
from electra_ds.pretraining.electra import Electra
from electra_ds.pretraining.evaluation import load_trained
from electra_ds.pretraining.plain import PlainEngine
from electra_ds.pretraining.pretrain import PretrainJob
from electra_ds.training.checkpoint import load_checkpoint
from electra_ds.training.prepare import plan_new
from tests.helpers import SMALL, builder_for, model_for, small_recipe, to_transformers
from tests.pretrain_runs import CPU_JSON, has_trained, kill_when, run, start_arguments, train_losses
from tests.pretraining.test_pretrain import imported

ALL = ("generator.sharing=all", "generator.width_multiplier=1", "generator.depth_multiplier=1")
SIZES = {
    "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.2,
}  # fmt: skip
GENERATOR_SIZES = SIZES | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
Pair = dict[str, PreTrainedModel]


def make_pair(vocab_size: int, shared: str, **sizes: Any) -> Pair:
    """Transformers' own models, of the sizes of SMALL, with random weights; `shared`: a prefix of what is equal."""
    torch.manual_seed(len(shared))
    pair: Pair = {
        "generator": ElectraForMaskedLM(ElectraConfig(vocab_size=vocab_size, **GENERATOR_SIZES | sizes)),
        "discriminator": ElectraForPreTraining(ElectraConfig(vocab_size=vocab_size, **SIZES | sizes)),
    }
    with torch.no_grad():
        for model in pair.values():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and LayerNorms away from 0 and 1
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs = pair["discriminator"].state_dict()
        for name, tensor in pair["generator"].state_dict().items():
            if name.startswith(shared):
                tensor.copy_(theirs[name])
    return {kind: model.eval() for kind, model in pair.items()}


SHARED = {
    "embeddings": "electra.embeddings.", "tokens": "electra.embeddings.word_embeddings.", "none": "nothing",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(store: TokenStore) -> dict[str, Pair]:
    return {sharing: make_pair(store.tokenizer.vocab_size, shared) for sharing, shared in SHARED.items()}


@pytest.fixture(scope="module")
def folders(store: TokenStore, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SHARING/generator and SHARING/discriminator, with the corpus's tokenizer, and the encoder alone as `bare`."""
    root = tmp_path_factory.mktemp("published")
    for sharing, pair in pairs.items():
        for kind, model in pair.items():
            model.save_pretrained(root / sharing / kind)
            store.tokenizer.save(root / sharing / kind)
    pairs["embeddings"]["discriminator"].electra.save_pretrained(root / "bare")
    store.tokenizer.save(root / "bare")
    return root


def changed(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a model's folder with other values in its config.json."""
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def beginning_of(*sources: Path, recipe: Any = None) -> InitialWeights:
    return read_initial_weights([str(source) for source in sources], recipe or small_recipe())


def begun(beginning: InitialWeights, store: TokenStore, *overrides: str) -> Electra:
    """The model with the masters of step 0."""
    recipe = small_recipe(*overrides)
    tensors = beginning.tensors(recipe, store.tokenizer)
    model = model_for(store, small_recipe("seed=5", *overrides))  # other random weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"master/{name}"])
            assert not tensors[f"exp_avg/{name}"].any()
            assert not tensors[f"exp_avg_sq/{name}"].any()
    assert len(tensors) == 3 * len([*model.parameters()])
    return model.eval()


@torch.no_grad()
def logits(model: Electra, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    head = model.generator_head
    return {
        "generator": head.decoder(head.transform(model.generator(ids, None))),
        "discriminator": model.discriminator_head(model.discriminator(ids, None)),
    }


@torch.no_grad()
def assert_same_logits(model: Electra, theirs: Pair, *kinds: str) -> None:
    vocab_size = model.discriminator.embeddings.word_embeddings.num_embeddings
    ids = torch.randint(5, vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    found = logits(model, ids)
    for kind in kinds:
        torch.testing.assert_close(found[kind], theirs[kind](ids).logits[..., :vocab_size], rtol=1e-5, atol=1e-5)


# --- names


@pytest.mark.parametrize("embedding_size", [16, 32], ids=["projected", "same-size"])
@pytest.mark.parametrize("sharing", ["embeddings", "tokens", "none", "all"])
def test_names_go_to_transformers_and_back(store: TokenStore, sharing: str, embedding_size: int) -> None:
    sizes = ALL[1:] if sharing == "all" else ()
    recipe = small_recipe(f"generator.sharing={sharing}", f"model.embedding_size={embedding_size}", *sizes)
    ours = dict(model_for(store, recipe).state_dict())
    back = from_generator_tensors(generator_tensors(ours)) | from_discriminator_tensors(discriminator_tensors(ours))
    assert back.keys() == ours.keys() - {"generator_head.decoder.weight"}
    assert all(torch.equal(back[name], ours[name]) for name in back)
    for model, there, here in zip(
        to_transformers(model_for(store, recipe)),
        (generator_tensors, discriminator_tensors),
        (from_generator_tensors, from_discriminator_tensors),
        strict=True,
    ):
        theirs = dict(model.state_dict())
        again = there(here(theirs))
        assert again.keys() == theirs.keys() - {"generator_lm_head.weight"}
        assert all(torch.equal(again[name], theirs[name]) for name in again)


# --- the same function


@pytest.mark.parametrize("sharing", ["embeddings", "tokens", "none"])
def test_step_0_has_the_logits_of_transformers_in_either_order(
    store: TokenStore, pairs: dict[str, Pair], folders: Path, sharing: str
) -> None:
    override = f"generator.sharing={sharing}"
    generator, discriminator = folders / sharing / "generator", folders / sharing / "discriminator"
    recipe = small_recipe(override)
    one, other = (
        beginning_of(generator, discriminator, recipe=recipe),
        beginning_of(discriminator, generator, recipe=recipe),
    )
    assert_same_logits(begun(one, store, override), pairs[sharing], "generator", "discriminator")
    ours, same = (beginning.tensors(recipe, store.tokenizer) for beginning in (one, other))
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert one.names == other.names == [str(generator), str(discriminator)]
    assert one.notes(recipe, store.tokenizer) == []


def test_a_pair_with_equal_embeddings_may_be_trained_apart(
    store: TokenStore, pairs: dict[str, Pair], folders: Path
) -> None:
    recipe = small_recipe("generator.sharing=none")
    model = begun(beginning_of(folders / "embeddings", recipe=recipe), store, "generator.sharing=none")
    assert_same_logits(model, pairs["embeddings"], "generator", "discriminator")


def test_all_of_the_encoder_may_be_shared(store: TokenStore, tmp_path: Path) -> None:
    pair = make_pair(store.tokenizer.vocab_size, "electra.", **{key: SIZES[key] for key in GENERATOR_SIZES})
    for kind, model in pair.items():
        model.save_pretrained(tmp_path / kind)
    recipe = small_recipe(*ALL)
    assert_same_logits(begun(beginning_of(tmp_path, recipe=recipe), store, *ALL), pair, "generator", "discriminator")


@pytest.mark.parametrize("sharing", ["embeddings", "tokens", "none", "all"])
def test_a_discriminator_alone_brings_what_the_generator_shares(
    store: TokenStore, pairs: dict[str, Pair], folders: Path, sharing: str
) -> None:
    overrides = ALL if sharing == "all" else (f"generator.sharing={sharing}",)
    recipe = small_recipe(*overrides)
    beginning = beginning_of(folders / "none" / "discriminator", recipe=recipe)
    model, fresh = begun(beginning, store, *overrides), model_for(store, recipe)
    assert_same_logits(model, pairs["none"], "discriminator")
    shared_prefix = {"none": "-", "tokens": "generator.embeddings.word", "embeddings": "generator.emb", "all": "gen"}
    random = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("generator"):
            is_random = torch.equal(tensor, random[name])
            is_decoder = name == "generator_head.decoder.weight"
            is_head = name.startswith("generator_head") and not is_decoder
            is_shared = name.startswith(shared_prefix[sharing]) and not is_head
            assert is_random != (is_shared or (is_decoder and sharing != "none")), name
    assert beginning.notes(recipe, store.tokenizer)[0].startswith("the generator begins with random weights")


def test_an_encoder_alone_gets_a_fresh_head_and_it_is_said(
    store: TokenStore, pairs: dict[str, Pair], folders: Path
) -> None:
    recipe = small_recipe()
    beginning = beginning_of(folders / "bare", folders / "embeddings" / "generator")
    model = begun(beginning, store)
    assert_same_logits(model, pairs["embeddings"], "generator")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = pairs["embeddings"]["discriminator"].electra(ids).last_hidden_state
        torch.testing.assert_close(model.discriminator(ids, None), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.discriminator_head.dense.weight, model_for(store, recipe).discriminator_head.dense.weight)
    assert (
        "only an encoder: the discriminator's head begins with random weights"
        in beginning.notes(recipe, store.tokenizer)[0]
    )


def test_half_precision_and_old_pickles_are_read_by_the_weights_names(
    store: TokenStore, pairs: dict[str, Pair], folders: Path, tmp_path: Path
) -> None:
    """pytorch_model.bin as transformers 4 wrote it, with position ids; config.json without, or with wrong,
    architectures."""
    for kind, architectures in (("generator", None), ("discriminator", ["ElectraForMaskedLM"])):
        folder = changed(folders / "embeddings" / kind, tmp_path / kind, architectures=architectures)
        (folder / "model.safetensors").unlink()
        tensors = dict(pairs["embeddings"][kind].state_dict())
        tensors["electra.embeddings.position_ids"] = torch.arange(512)[None]
        torch.save(tensors, folder / "pytorch_model.bin")
    model = begun(beginning_of(tmp_path), store)
    assert_same_logits(model, pairs["embeddings"], "generator", "discriminator")
    half = tmp_path / "half"
    ElectraForPreTraining.from_pretrained(folders / "none" / "discriminator").half().save_pretrained(half)
    tensors = beginning_of(half).tensors(small_recipe(), store.tokenizer)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_rows_without_a_piece_are_left_out(store: TokenStore, tmp_path: Path) -> None:
    """Tables are often rounded up to a multiple of 8 or 64."""
    pair = make_pair(store.tokenizer.vocab_size + 13, SHARED["embeddings"])
    for kind, model in pair.items():
        model.save_pretrained(tmp_path / kind)
    without = beginning_of(tmp_path)
    with pytest.raises(DataError, match=r"token table has 413 rows: it has 400 pieces\..*that they were trained with"):
        without.check_vocabulary(store.tokenizer)
    store.tokenizer.save(tmp_path / "discriminator")
    beginning = beginning_of(tmp_path)
    beginning.check_vocabulary(store.tokenizer)
    assert_same_logits(begun(beginning, store), pair, "generator", "discriminator")
    assert "the last 13 rows" in beginning.notes(small_recipe(), store.tokenizer)[0]


# --- a run of ours as a source


def prepared(
    store: TokenStore, run_dir: Path, ranks: Ranks, beginning: InitialWeights | None, *overrides: str
) -> PretrainJob:
    recipe, directory = small_recipe(*overrides), RunDirectory(run_dir)
    options = PretrainOptions(ds_config=CPU_JSON, threads=1)
    plan = plan_new(options, recipe, directory, ranks)
    names = beginning.names if beginning else ()
    return prepare.prepare_new(options, recipe, plan, store, directory, ranks, names)


def test_our_own_export_is_a_source_and_step_0_its_equal(
    store: TokenStore, folders: Path, tmp_path: Path, process_group: Ranks
) -> None:
    beginning = beginning_of(folders / "embeddings")
    job = prepared(store, tmp_path / "run", process_group, beginning)
    path = write_first_checkpoint(job, beginning.tensors(job.recipe, store.tokenizer))
    assert path.name == "step-00000000"
    record = job.run.read_record()
    assert record.initialised_from == [str(folders / "embeddings" / part) for part in ("generator", "discriminator")]
    export_run(tmp_path / "run", tmp_path / "export")
    card = (tmp_path / "export" / "discriminator" / "README.md").read_text("utf8")
    assert "began with the weights of embeddings/generator and embeddings/discriminator." in card
    assert str(folders) not in card
    again = beginning_of(tmp_path / "export").tensors(job.recipe, store.tokenizer)
    trained = load_trained(path)
    assert load_checkpoint(path).state["step"] == 0
    assert trained.tokenizer.fingerprint == store.tokenizer.fingerprint
    assert all(torch.equal(again[f"master/{name}"], parameter) for name, parameter in trained.model.named_parameters())
    of_run = beginning_of(tmp_path / "run").tensors(job.recipe, store.tokenizer)
    assert all(torch.equal(again[name], of_run[name]) for name in again)


def test_a_start_that_died_is_gone_on_with_and_never_taken_for_another(
    store: TokenStore, folders: Path, tmp_path: Path, process_group: Ranks
) -> None:
    beginning = beginning_of(folders / "embeddings")
    job = prepared(store, tmp_path / "run", process_group, beginning)
    write_first_checkpoint(job, beginning.tensors(job.recipe, store.tokenizer))
    with pytest.raises(ConfigError, match="already holds a run"):
        prepared(store, tmp_path / "run", process_group, None)
    for name in ("recipe.yaml", "deepspeed.json", "run.json"):  # as before they were written
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume, or choose another --run-dir"):
        prepared(store, tmp_path / "run", process_group, None)
    options = PretrainOptions()
    plan = prepare.plan_resume(options, job.run, process_group)
    assert prepare.prepare_resume(options, plan, job.run, process_group).record.initialised_from == beginning.names


def test_a_run_that_lost_its_first_checkpoint_does_not_begin_with_random_weights(
    store: TokenStore, folders: Path, tmp_path: Path, process_group: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    beginning = beginning_of(folders / "embeddings")
    job = prepared(store, tmp_path / "run", process_group, beginning)
    write_first_checkpoint(job, beginning.tensors(job.recipe, store.tokenizer))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "its checkpoints are gone" in refusal(capsys, "--resume", str(tmp_path / "run"))


# --- what is refused, before anything is tokenised


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(["pretrain", *arguments])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


Sources = Callable[[Path, Path], Sequence[Path]]
REFUSED: list[tuple[str, Sources, str]] = [
    ("two generators", lambda at, _: [at / "none" / "generator"] * 2, "takes at most one generator"),
    ("two discriminators", lambda at, _: [at / "none" / "discriminator", at / "bare"], "takes at most one generator"),
    ("pair and one more", lambda at, _: [at / "none", at / "bare"], "takes at most one generator"),
    ("nowhere", lambda at, _: [at / "nowhere"], "There is no folder"),
    ("no model", lambda at, _: [at], "There is no config.json in"),
    ("BERT", lambda at, tmp: [changed(at / "bare", tmp / "x", model_type="bert")], "a model of type bert, not electra"),
    ("relative positions", lambda at, tmp: [changed(at / "bare", tmp / "x", position_embedding_type="relative_key")],
     "has relative_key positions"),
    ("config of another", lambda at, tmp: [changed(at / "bare", tmp / "x", hidden_size=40)],
     "of other sizes than config.json says are electra.embeddings_project.bias"),
    ("config with words", lambda at, tmp: [changed(at / "bare", tmp / "x", hidden_size="wide")], "Cannot read the"),
    ("other shares", lambda at, _: [at / "none"],
     "differ in weights that generator.sharing: embeddings shares Add: --set generator.sharing=none"),
    ("tokens alone", lambda at, _: [at / "tokens"], "Add: --set generator.sharing=tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sources", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_sources_that_cannot_serve_are_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, sources: Sources, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [str(source) for source in sources(folders, tmp_path)]
    before = {*tmp_path.iterdir()}
    arguments = ["--ds-config", CPU_JSON, "--recipe", "tiny", "--init-from", *given, "--set", *SMALL]
    assert message in refusal(capsys, *arguments)
    assert {*tmp_path.iterdir()} == before  # no run, no store


def test_configs_that_are_nothing_are_refused(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = changed(folders / "bare", tmp_path / "cut")
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(DataError, match="Download the model again"):
        beginning_of(folder)
    with pytest.raises(DataError, match="Padding_idx"):
        beginning_of(changed(folders / "none" / "discriminator", tmp_path / "padded", pad_token_id=10**6))
    assert "Model config" not in capfd.readouterr().err


def test_weights_that_are_not_whole_are_refused_by_name(
    store: TokenStore, pairs: dict[str, Pair], folders: Path, tmp_path: Path
) -> None:
    whole = pairs["none"]["discriminator"].state_dict()
    folder = changed(folders / "none" / "discriminator", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    layer = "electra.encoder.layer.1.output.dense.bias"
    for tensors, message in (
        ({name: t for name, t in whole.items() if name != layer}, f"missing are {layer}"),
        ({name: t for name, t in whole.items() if "prediction.bias" not in name}, "missing are discriminator_pred"),
        (whole | {"extra.weight": torch.zeros(2)}, "unknown are extra.weight"),
        (whole | {layer: torch.full((32,), float("nan"))}, f"not finite are {layer}"),
    ):
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        with pytest.raises(DataError, match=message):
            beginning_of(folder)
    finetuned = tmp_path / "finetuned"
    ElectraForSequenceClassification(ElectraConfig(vocab_size=400, **SIZES)).save_pretrained(finetuned)
    with pytest.raises(DataError, match=r"unknown are classifier.*pretrained model, not a finetuned one"):
        beginning_of(finetuned)
    untied = changed(folders / "none" / "generator", tmp_path / "untied")
    (untied / "model.safetensors").unlink()
    tensors = dict(pairs["none"]["generator"].state_dict())
    tensors["generator_lm_head.weight"] = tensors["generator_lm_head.weight"] + 1
    torch.save(tensors, untied / "pytorch_model.bin")
    with pytest.raises(DataError, match="has different tables for reading"):
        beginning_of(untied)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_damaged_files_are_refused_and_no_pickle_runs(folders: Path, tmp_path: Path) -> None:
    damaged = changed(folders / "bare", tmp_path / "damaged")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"Cannot read the weights of .*Download or export it again"):
        beginning_of(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"Cannot read the weights of .*no file named model.safetensors"):
        beginning_of(damaged)
    for payload in ({"a": Malicious(tmp_path / "ran")}, Malicious(tmp_path / "ran")):
        torch.save(payload, damaged / "pytorch_model.bin")
        with pytest.raises(DataError, match="holds more than tensors: it could run any program and is not opened"):
            beginning_of(damaged)
    assert not (tmp_path / "ran").exists()
    (damaged / "config.json").write_text('{"model_type": "electra", "auto_map": {"AutoConfig": "evil.Config"}')
    with pytest.raises(DataError, match=r"Cannot read .*config\.json"):
        beginning_of(damaged)


@pytest.mark.parametrize("how", ["tokenizer", "data"])
def test_another_vocabulary_is_refused(
    store: TokenStore, folders: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], how: str,
) -> None:  # fmt: skip
    """Of the same size, so that nothing but the pieces tells."""
    monkeypatch.chdir(tmp_path)
    lines = [path.read_text("utf8") for path in sorted(corpus_folder.iterdir())[:20]]
    other = train_tokenizer(lines, small_recipe("tokenizer.kind=wordpiece").tokenizer)
    model = shutil.copytree(folders / "embeddings" / "discriminator", tmp_path / "model")
    arguments = ["--ds-config", CPU_JSON, "--recipe", "tiny", "--init-from", str(model), "--set", *SMALL]
    if how == "tokenizer":
        other.save(tmp_path / "other")
        more = ["--tokenizer", str(tmp_path / "other"), "--corpus", str(corpus_folder)]
    else:
        other.save(model)
        more = ["--data", str(store.path)]
    error = refusal(capsys, *arguments, *more)
    assert "The tokenizer does not fit the weights" in error
    assert "pieces have other ids, such as" in error
    assert not (tmp_path / "stores").exists()
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_of_more_pieces_than_rows_is_refused_even_where_it_came_along(
    store: TokenStore, tmp_path: Path
) -> None:
    make_pair(store.tokenizer.vocab_size - 1, SHARED["none"])["discriminator"].save_pretrained(tmp_path)
    store.tokenizer.save(tmp_path)
    with pytest.raises(DataError, match=r"token table has 399 rows: it has 400 pieces, including those that"):
        beginning_of(tmp_path).check_vocabulary(store.tokenizer)


def test_weights_without_a_tokenizer_need_one(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(folders / "embeddings" / "discriminator", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    arguments = ["--ds-config", CPU_JSON, "--recipe", "tiny", "--init-from", str(model), "--set", *SMALL]
    assert "Give the tokenizer that it was trained with: --tokenizer PATH" in refusal(capsys, *arguments)


def test_a_pair_of_two_vocabularies_is_refused(folders: Path, tmp_path: Path, store: TokenStore) -> None:
    pair = make_pair(store.tokenizer.vocab_size + 1, SHARED["embeddings"])
    pair["generator"].save_pretrained(tmp_path / "generator")
    with pytest.raises(ConfigError, match=r"401 rows in the first token table and 400 in the second"):
        beginning_of(tmp_path / "generator", folders / "embeddings" / "discriminator")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "run", "--init-from", "a"], "cannot be combined with --init-from"),
        (["--ds-config", "cpu", "--init-from", "a", "b", "c"], "3 models are given"),
    ],
)
def test_arguments_that_cannot_go_together_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainOptions.parsed(cli.build_parser().parse_args(["pretrain", *arguments])).check()


# --- the Hub, out of a test's reach but for what its client does


def gone(kind: type[Exception]) -> Exception:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/some/name"))
    return kind("Cannot find it", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (gone(RepositoryNotFoundError), "Check the name; if it is private or gated"),
        (gone(GatedRepoError), "ask for access on its page and run: hf auth login"),
        (LocalEntryNotFoundError("No network"), "Check the connection"),
    ],
    ids=["unknown", "gated", "offline"],
)
def test_a_hub_name_that_cannot_be_had_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=f"Cannot read the model some/name, which is not a local path .*{message}"):
        read_initial_weights(["some/name"], small_recipe())


def test_a_hub_names_pickle_is_fetched_only_where_there_is_nothing_better(
    store: TokenStore, folders: Path, pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders / "embeddings" / "discriminator"
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        asked.extend(allow_patterns)
        for file in source.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, folder)
        if name == "an/old-one" and "pytorch_model*.bin" in allow_patterns:
            torch.save(pairs["embeddings"]["discriminator"].state_dict(), folder / "pytorch_model.bin")
        elif name == "a/new-one":
            shutil.copy(source / "model.safetensors", folder)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    new = read_initial_weights(["a/new-one"], small_recipe())
    assert "pytorch_model*.bin" not in asked
    old = read_initial_weights(["an/old-one"], small_recipe())
    assert (new.names, new.own_tokenizer(), old.names) == (["a/new-one"], "a/new-one", ["an/old-one"])
    ours, same = (beginning.tensors(small_recipe(), store.tokenizer) for beginning in (new, old))
    assert all(torch.equal(ours[name], same[name]) for name in ours)


# --- the command


def test_a_run_without_it_imports_nothing_of_it() -> None:
    assert imported("import electra_ds.api.pretrain", {"transformers"}) == set()


def test_the_command_begins_with_the_weights_and_their_tokenizer(
    folders: Path, store: TokenStore, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The first loss is that of the weights on the first batch; the corpus is tokenised by their tokenizer."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("schedule.total_steps=4", "schedule.warmup_steps=1")
    beginning = beginning_of(folders / "embeddings", recipe=recipe)
    expected = begun(beginning, store)
    engine = PlainEngine(expected.train(), recipe, recipe.global_batch_size, torch.device("cpu"))
    first, _ = engine.train_step(builder_for(store, recipe).build(0), 0)
    cli.main([
        "pretrain", "--ds-config", CPU_JSON, "--recipe", "tiny", "--corpus", str(corpus_folder), "--run-dir", "run",
        "--init-from", str(folders / "embeddings"), "--threads", "1", "--log-every", "1", "--eval-windows", "16",
        "--set", *SMALL, "schedule.total_steps=4", "schedule.warmup_steps=1",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert f"initial weights: {folders / 'embeddings' / 'generator'}\n" in out
    losses = train_losses(tmp_path / "run")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert losses[0][1] == pytest.approx(first["loss"].item(), rel=1e-6)
    assert load_trained(tmp_path / "run").tokenizer.fingerprint == store.tokenizer.fingerprint
    assert RunDirectory(tmp_path / "run").status() == "done"


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_save_goes_on_from_the_weights(
    store: TokenStore, folders: Path, tmp_path: Path
) -> None:
    sources = ["--init-from", str(folders / "embeddings" / "discriminator"), str(folders / "embeddings" / "generator")]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    never = ["--save-every", "1000"]
    result = run("pretrain", *start_arguments(store, straight), *never, *sources)
    assert result.stderr == ""
    kill_when(lambda: has_trained(killed, 3), killed, *start_arguments(store, killed), *never, *sources)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-00000000", "latest"}
    assert f"initial weights: {folders}" in run("pretrain", "--resume", str(killed)).stdout
    assert train_losses(killed) == train_losses(straight)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_ranks_begin_with_the_same_weights_as_one(store: TokenStore, folders: Path, tmp_path: Path) -> None:
    """Dropout off, so that the plan changes no loss."""
    sources = ["--init-from", str(folders / "embeddings"), "--stop-at", "10"]
    one, two = tmp_path / "one", tmp_path / "two"
    run("pretrain", *start_arguments(store, one), *sources)
    run("pretrain", *start_arguments(store, two), *sources, ranks=2)
    np.testing.assert_allclose([x for _, x in train_losses(two)], [x for _, x in train_losses(one)], rtol=1e-5)
    bad = [*start_arguments(store, tmp_path / "bad"), "--init-from", str(folders / "none")]
    refused = run("pretrain", *bad, ranks=2, status=2)
    assert refused.stderr.count("Add: --set generator.sharing=none") == 1
    assert not (tmp_path / "bad").exists()
