"""Encoders that a finetuning may begin with: transformers' own of several kinds, runs of ours, and broken ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import load_recipe
from electra_ds.config.run_directory import RunDirectory
from electra_ds.core.errors import CheckpointError, DataError
from electra_ds.core.files import is_hub_model
from electra_ds.core.ranks import Ranks
from electra_ds.data.given_tokenizer import Casing, load_given_tokenizer
from electra_ds.data.token_store import TokenStore
from electra_ds.finetuning.encoder_source import EncoderSource, read_encoder
from electra_ds.finetuning.heads import make_encoder
from electra_ds.interop.export import export_run
from electra_ds.interop.init_from import read_initial_weights
from electra_ds.pretraining import prepare
from electra_ds.pretraining.pretrain import pretrain
from electra_ds.training.preemption import Preemption
from electra_ds.training.prepare import plan_new
from tests.finetune_runs import (
    NO_DROPOUT,
    POSITIONS,
    SMALL,
    arguments_of,
    electra_config,
    finetune,
    logits_of,
    losses_of,
    save_encoder,
    scores_of,
    tiny_electra,
    wordpiece,
    write_glue,
    write_squad,
)
from tests.helpers import REPOSITORY, small_recipe

pytestmark = pytest.mark.usefixtures("process_group")
PAIR = ("the film is dull", "a superb play and its end")


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), train=24, dev=12, test=4)


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_electra(tmp_path_factory.mktemp("electra"))


def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's, whose padding is 1 and whose pairs have no segments."""
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([" ".join(PAIR)] * 5, vocab_size=300, special_tokens=special, show_progress=False)
    trained._tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


def others() -> dict[str, tuple[PretrainedConfig, PreTrainedTokenizerFast]]:
    words, pieces = wordpiece(), byte_level()
    size = {"vocab_size": len(words)}
    shape = {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS}
    offset = SMALL | {"max_position_embeddings": POSITIONS + 2}
    return {
        "bert": (BertConfig(**size, **SMALL), words),
        "distilbert": (DistilBertConfig(**size, **shape), words),
        "roberta": (RobertaConfig(vocab_size=len(pieces), type_vocab_size=1, pad_token_id=1, **offset), pieces),
        "albert": (AlbertConfig(**size, **SMALL, embedding_size=16), words),
    }


# --- others' encoders


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "albert"])
def test_another_encoder_goes_through_a_whole_run_on_pairs(kind: str, glue: Path, tmp_path: Path) -> None:
    config, tokenizer = others()[kind]
    model = save_encoder(tmp_path / "model", config, tokenizer)
    arguments = arguments_of(model, glue, "mrpc", tmp_path / "run", "data.segment_ids=true", predict_test=True)
    if kind == "albert":  # one layer for all depths
        said = finetune(*arguments, status=2)
        assert "Add --set optimizer.layer_decay=1" in said
        assert not (tmp_path / "run").exists()
        arguments.append("optimizer.layer_decay=1")
    finetune(*arguments)
    assert len(losses_of(tmp_path / "run")) == 9
    assert scores_of(tmp_path / "run")["sets"]["dev"]["rows"] == 12
    assert (tmp_path / "run" / "submission" / "MRPC.tsv").exists()
    begun, trained = read_encoder(str(model)), read_encoder(str(tmp_path / "run"))
    assert begun.tensors.keys() == trained.tensors.keys()
    moved = [name for name, tensor in trained.tensors.items() if not torch.equal(tensor, begun.tensors[name])]
    assert len(moved) > 0.9 * len(trained.tensors)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "albert"])
def test_an_encoder_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    """Hidden states of a padded pair; without the pooler, which no head of ours uses."""
    config, tokenizer = others()[kind]
    theirs = AutoModel.from_pretrained(save_encoder(tmp_path, config, tokenizer)).eval()
    source = read_encoder(str(tmp_path))
    assert not any(name.startswith("pooler.") for name in source.tensors)
    assert (source.num_layers, source.hidden_size, source.max_length) == (2, 32, POSITIONS)
    assert source.has_segments == (kind in ("bert", "albert"))
    encoded = tokenizer(*PAIR, return_tensors="pt", padding="max_length", max_length=40, return_token_type_ids=True)
    if kind == "distilbert":  # which has no such argument
        encoded.pop("token_type_ids")
    elif kind == "roberta":
        assert not encoded["token_type_ids"].any()
    torch.testing.assert_close(hidden_of(source, encoded), theirs(**encoded).last_hidden_state, rtol=0, atol=0)


def hidden_of(source: EncoderSource, encoded: Any) -> torch.Tensor:
    encoder = make_encoder(source.config, seed=5).eval()
    encoder.load_state_dict(source.tensors, strict=True)
    hidden: torch.Tensor = encoder(**encoded).last_hidden_state
    return hidden


def test_robertas_positions_end_two_before_its_table(glue: Path, tmp_path: Path) -> None:
    config, tokenizer = others()["roberta"]
    model = save_encoder(tmp_path / "model", config, tokenizer)
    arguments = arguments_of(model, glue, "sst-2", tmp_path / "run", stop_at=1)
    said = finetune(*arguments, f"data.max_length={POSITIONS + 1}", status=2)
    assert f"takes {POSITIONS} tokens. Add --set data.max_length={POSITIONS}" in said
    finetune(*arguments, f"data.max_length={POSITIONS}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=130), "has a decoder (t5)"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=130, n_positions=POSITIONS), "has a decoder (gpt2)"),
        (BertConfig(vocab_size=130, **SMALL, is_decoder=True), "has a decoder (bert)"),
    ],
    ids=["t5", "gpt2", "bert that writes"],
)
def test_what_is_no_encoder_is_refused(config: PretrainedConfig, said: str, glue: Path, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", config)
    refused = finetune(*arguments_of(model, glue, "sst-2", tmp_path / "run"), status=2)
    assert said in refused
    assert "needs an encoder" in refused
    assert not (tmp_path / "run").exists()


# --- damaged folders


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{index}" for index in range(3)])
    tokenizer.save_pretrained(folder)


def _lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["encoder.layer.1.output.dense.weight"]


def _many_lost(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("encoder.layer.1.")]:
        del tensors[name]


def _of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embeddings.word_embeddings.weight"] = torch.zeros(7, 16)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["encoder.layer.0.output.dense.weight"][3, 3] = float("nan")


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def _pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": _Code(folder / "was-run")}, file, protocol=2)


def _torch_saved_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": _Code(folder / "was-run")}, folder / "pytorch_model.bin")


def _cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return apply


def _edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values |= changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return apply


def _misnamed(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "vocab.txt")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (_without_tokenizer, "No tokenizer at"),
    "tokenizer larger than the table": (_larger_tokenizer, "but its token table"),
    "tokenizer cut": (_cut("tokenizer.json"), "Its files may be damaged, or its class"),
    "tokenizer misnamed": (_misnamed, "Its files may be damaged, or its class"),
    "no [CLS]": (_edited("tokenizer_config.json", cls_token=None), "does not begin a text with a token such as [CLS]"),
    "weight lost": (_weights(_lost), "missing are encoder.layer.1.output.dense.weight. Download or export it again."),
    "layer lost": (_weights(_many_lost), "more. Download or export it again."),
    "weight of another shape": (
        _weights(_of_another_shape), "of other sizes than config.json says are embeddings.word_embeddings.weight"
    ),
    "nan": (_weights(_nan), "not finite are encoder.layer.0.output.dense.weight"),
    "weights cut": (_cut("model.safetensors"), "Cannot read the weights of"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "Cannot read the weights of"),
    "pickled code": (_pickled_code, "holds more than tensors"),
    "pickled code in torch's zip": (_torch_saved_code, "holds more than tensors"),
    "config cut": (_cut("config.json"), "Cannot read the model"),
    "config of no model": (_edited("config.json", model_type=None), "Cannot read the model"),
    "config of an unknown model": (_edited("config.json", model_type="never-heard"), "Cannot read the model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "another size in config": (_edited("config.json", hidden_size=48), "of other sizes than config.json says"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_what_is_wrong(damage: str, electra: Path, glue: Path, tmp_path: Path) -> None:
    """By one message, before anything is written; no code out of it is run."""
    harm, said = DAMAGE[damage]
    shutil.copytree(electra, tmp_path / "model")
    harm(tmp_path / "model")
    refused = finetune(*arguments_of(tmp_path / "model", glue, "sst-2", tmp_path / "run"), status=2)
    message = refused[refused.index("electra-ds finetune: ") :]
    assert said in message, message
    assert str(tmp_path / "model") in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "model" / "was-run").exists()


def test_where_there_is_no_model_the_message_says_what_may_be_named(glue: Path, tmp_path: Path) -> None:
    refused = finetune(*arguments_of(tmp_path / "nowhere", glue, "sst-2", tmp_path / "run"), status=2)
    assert "does not exist. Give a run directory" in refused
    assert (
        "Give a run directory, a folder that transformers' save_pretrained wrote, or OWNER/NAME on the Hub" in refused
    )
    (tmp_path / "empty").mkdir()
    refused = finetune(*arguments_of(tmp_path / "empty", glue, "sst-2", tmp_path / "run"), status=2)
    assert "has no config.json, so it is not a transformers model" in refused


def test_a_file_of_tensors_alone_is_read_though_it_is_pickled(electra: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(electra, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert read_encoder(str(folder)).fingerprint == read_encoder(str(electra)).fingerprint


def test_the_fingerprint_is_that_of_names_shapes_and_values(electra: Path, tmp_path: Path) -> None:
    before = read_encoder(str(electra))
    shutil.copytree(electra, tmp_path / "model")
    assert read_encoder(str(tmp_path / "model")).fingerprint == before.fingerprint
    _weights(lambda tensors: tensors["embeddings.LayerNorm.bias"][:1].add_(1e-6))(tmp_path / "model")
    assert read_encoder(str(tmp_path / "model")).fingerprint != before.fingerprint


# --- runs of ours


@pytest.fixture(scope="module")
def pretrained(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain_on(64, store, process_group, tmp_path_factory.mktemp("pretrained") / "run")


def pretrain_on(length: int, store: TokenStore, process_group: Ranks, run_dir: Path) -> Path:
    """Three steps on sequences of so many tokens."""
    recipe = small_recipe("schedule.total_steps=3", "schedule.warmup_steps=1", f"data.sequence_length={length}")
    run = RunDirectory(run_dir)
    options = PretrainOptions(
        ds_config=str(REPOSITORY / "ds_configs/cpu.json"), threads=1, save_every=3, eval_windows=4, compile="off"
    )
    with run.locked():
        plan = plan_new(options, recipe, run, process_group)
        job = prepare.prepare_new(options, recipe, plan, store, run, process_group)
        assert pretrain(job, process_group, Preemption(process_group))
    return run.path


def test_a_pretraining_run_is_the_encoder_that_it_exports(pretrained: Path, tmp_path: Path) -> None:
    """The run, its checkpoint, the folder of the export and the discriminator in it: one model and one tokenizer."""
    export_run(pretrained, tmp_path / "export")
    theirs = AutoModel.from_pretrained(tmp_path / "export" / "discriminator").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export" / "discriminator")
    checkpoint = next((pretrained / "checkpoints").glob("step-00000003"))
    encoded = tokenizer(*PAIR, return_tensors="pt", padding="max_length", max_length=60)
    encoded["token_type_ids"] = torch.tensor([[index % 2 for index in range(60)]])
    expected = theirs(**encoded).last_hidden_state
    sources = [
        read_encoder(str(path))
        for path in (pretrained, checkpoint, tmp_path / "export", tmp_path / "export" / "discriminator")
    ]
    assert len({source.fingerprint for source in sources}) == 1
    for source in sources:
        torch.testing.assert_close(hidden_of(source, encoded), expected, rtol=0, atol=0)
        assert source.tokenizer(*PAIR)["input_ids"] == tokenizer(*PAIR)["input_ids"]
        assert source.has_segments


def test_positions_that_pretraining_never_saw_are_told(
    store: TokenStore, process_group: Ranks, glue: Path, tmp_path: Path
) -> None:
    run = pretrain_on(8, store, process_group, tmp_path / "pretrained")
    assert read_encoder(str(run)).trained_length == 8
    said = finetune(*arguments_of(run, glue, "mrpc", tmp_path / "run", stop_at=1))
    assert "longer than the 8 tokens that the encoder was pretrained on" in said
    said = finetune(*arguments_of(run, glue, "mrpc", tmp_path / "cut", "data.max_length=8", stop_at=1))
    assert "pretrained on" not in said


def test_a_pretraining_run_and_its_export_are_finetuned_alike(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    export_run(pretrained, tmp_path / "export")
    for name, model in (("run", pretrained), ("folder", tmp_path / "export")):
        finetune(*arguments_of(model, glue, "mrpc", tmp_path / name, "data.segment_ids=true"))
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "folder")
    assert logits_of(tmp_path / "run") == logits_of(tmp_path / "folder")


def test_the_generator_of_an_export_is_an_encoder_too(pretrained: Path, tmp_path: Path) -> None:
    export_run(pretrained, tmp_path / "export")
    assert read_encoder(str(tmp_path / "export" / "generator")).hidden_size == 16


def test_a_finetuned_run_is_finetuned_on_another_task(electra: Path, glue: Path, tmp_path: Path) -> None:
    """With its encoder, and a new head of the other task's size."""
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "first"))
    finetune(*arguments_of(tmp_path / "first", glue, "mnli", tmp_path / "second", stop_at=1))
    source = read_encoder(str(tmp_path / "first"))
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    assert record["model_fingerprint"] == source.fingerprint != read_encoder(str(electra)).fingerprint
    (tmp_path / "squad").mkdir()
    write_squad(tmp_path / "squad")
    finetune(
        *arguments_of(tmp_path / "second", tmp_path / "squad", "squad2", tmp_path / "third", "data.max_length=48"),
        *("head.beam_size=3", "head.span=joint", "head.span_hidden_size=8"),
    )
    assert 0 <= scores_of(tmp_path / "third")["sets"]["dev"]["metrics"]["f1"] <= 1


def test_a_run_without_a_checkpoint_is_no_model_yet(electra: Path, glue: Path, tmp_path: Path) -> None:
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "run", discard_weights=True))
    with pytest.raises(CheckpointError, match="no longer has weights: it was run with --discard-weights"):
        read_encoder(str(tmp_path / "run"))


def test_a_damaged_checkpoint_is_no_model(electra: Path, glue: Path, tmp_path: Path) -> None:
    finetune(*arguments_of(electra, glue, "sst-2", tmp_path / "run"))
    [checkpoint] = [path for path in (tmp_path / "run" / "checkpoints").glob("step-*") if not path.is_symlink()]
    weights = checkpoint / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        read_encoder(str(tmp_path / "run"))


def test_random_weights_follow_the_seed_whatever_torch_drew_before() -> None:
    config = electra_config(**NO_DROPOUT)

    def made(seed: int, before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(before)
        state: dict[str, torch.Tensor] = make_encoder(config, seed).state_dict()
        return state

    first, again, other = made(1, 10), made(1, 11), made(2, 10)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])


def test_a_made_encoder_takes_nothing_from_torchs_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    make_encoder(electra_config(), 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_missing_path_in_an_existing_folder_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("electra_ds.data.hub.snapshot_download", lambda *given, **how: pytest.fail("asked the Hub"))
    assert is_hub_model("google/electra-small-discriminator")
    with pytest.raises(DataError, match="The model runs/typo does not exist"):
        read_encoder("runs/typo")
    with pytest.raises(DataError, match="There is no folder runs/typo"):
        read_initial_weights(["runs/typo"], load_recipe("tiny"))
    with pytest.raises(DataError, match="No tokenizer at runs/typo"):
        load_given_tokenizer("runs/typo", Casing())


def test_data_errors_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The model .* does not exist"):
        read_encoder("no/such/thing/at/all")
    (tmp_path / "model.pt").touch()
    with pytest.raises(DataError, match=r"The model .* does not exist\. Give a run directory, a folder"):
        read_encoder(str(tmp_path / "model.pt"))
    with pytest.raises(DataError, match=r"not a transformers model\. Give a run directory, a folder"):
        read_encoder(str(tmp_path))


def test_a_config_that_the_weights_or_transformers_cannot_follow_is_refused(tmp_path: Path) -> None:
    folder = tiny_electra(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 1}, "more than config.json says"),
        ({"position_embedding_type": "relative_key"}, "relative_key positions"),
        ({"num_attention_heads": 0}, "json or the weights may be damaged"),
        ({"model_type": "own", "auto_map": {"AutoModel": "code.Model"}}, "code that comes with a model is not run"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=message):
            read_encoder(str(folder))
