"""What the tensors of a checkpoint do not show is printed, can be given, and is checked if a config is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.cli import main
from electra_ds.core.errors import ConfigError, DataError, ElectraError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.export_deepspeed import export_deepspeed
from electra_ds.interop.pretrained import find_sizes
from electra_ds.pretraining.convert import transformers_config
from electra_ds.pretraining.evaluation import load_model
from tests.helpers import SMALL, model_for, small_recipe, to_transformers
from tests.interop.test_deepspeed_checkpoint import Joint, only_checkpoint, portable, train_joint  # noqa: F401
from tests.native_worker import config, plain_engine

HEADS = 4
"""Heads of a generator 16 wide, to which a recipe gives 2 of its own accord."""


def foreign_models(store: TokenStore) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    ours = model_for(store, small_recipe())
    generator = transformers_config(ours.generator.config)
    assert generator.num_attention_heads == 2
    generator.num_attention_heads = HEADS
    discriminator = transformers_config(ours.discriminator.config)
    return ElectraForMaskedLM(generator), ElectraForPreTraining(discriminator)


@pytest.fixture(scope="module")
def foreign(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of somebody's joint module, whose generator has other heads than the recipe's."""
    path = tmp_path_factory.mktemp("foreign") / "native"
    torch.manual_seed(0)
    model = Joint(store, is_tied=False)
    model.gen, model.disc = foreign_models(store)
    with plain_engine(model, config(0, "fp32")) as engine:
        train_joint(engine)
        engine.save_checkpoint(str(path))
        torch.save(model.gen.state_dict(), path / "generator.pt")
    return path


def arguments(native: Path, store: TokenStore, run: Path, *more: str) -> list[str]:
    return [
        "checkpoint", "import", str(native), "--run-dir", str(run), "--ds-config", "cpu",
        "--recipe", "tiny", "--data", str(store.path), "--set", *SMALL, "generator.sharing=none", *more,
    ]  # fmt: skip


def test_what_the_tensors_do_not_show_is_printed_and_can_be_given(
    store: TokenStore, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(foreign, store, tmp_path / "plain"))
    told = capsys.readouterr().out
    assert "assumed  generator: 2 head(s) of 8, layer_norm_eps 1e-12, gelu, absolute positions\n" in told
    assert "assumed  discriminator: 4 head(s) of 8, layer_norm_eps 1e-12, gelu, absolute positions\n" in told
    assert "--generator-config" in told
    assert "generator.num_attention_heads=N" in told
    more = (f"generator.num_attention_heads={HEADS}", "model.layer_norm_eps=1e-6")
    main(arguments(foreign, store, tmp_path / "given", *more))
    assert "assumed  generator: 4 head(s) of 4, layer_norm_eps 1e-06, gelu" in capsys.readouterr().out


def test_with_the_right_heads_the_generator_has_the_logits_that_it_was_trained_with(
    store: TokenStore, foreign: Path, tmp_path: Path
) -> None:
    main(arguments(foreign, store, tmp_path / "run", f"generator.num_attention_heads={HEADS}"))
    ours, _ = to_transformers(load_model(only_checkpoint(tmp_path / "run"))[0])
    theirs, _ = foreign_models(store)
    theirs.load_state_dict(torch.load(foreign / "generator.pt"))
    ids = torch.arange(5, 37).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-5)
    assert ours.config.num_attention_heads == HEADS


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_given_config_is_checked(
    store: TokenStore, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_folder: bool
) -> None:
    generator, _ = foreign_models(store)
    generator.config.architectures = ["ElectraForMaskedLM"]
    file = tmp_path / "config.json"
    file.write_text(generator.config.to_json_string())
    given = ["--generator-config", str(tmp_path if is_folder else file)]
    with pytest.raises(SystemExit):
        main(arguments(foreign, store, tmp_path / "run") + given)
    told = capsys.readouterr().err
    assert f"num_attention_heads 4 as in {file}; the recipe's generator has 2" in told
    assert "Add: --set generator.num_attention_heads=4" in told
    assert not (tmp_path / "run" / "run.json").exists()
    main(arguments(foreign, store, tmp_path / "run", "generator.num_attention_heads=4") + given)
    told = capsys.readouterr().out
    assert f"checked  generator: 4 head(s) of 4, layer_norm_eps 1e-12, gelu, absolute positions, as in {file}" in told
    assert "assumed  discriminator: 4 head(s) of 8" in told
    assert "assumed  generator" not in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8}, r"num_attention_heads 8 as in .*discriminator has 4\nAdd: --set model.num_att"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps 1e-05 as in .*Add: --set model.layer_norm_eps=1e-05"),
        ({"hidden_act": "relu"}, r"hidden_act relu as in .*No recipe can have\n  hidden_act relu"),
        (
            {"position_embedding_type": "relative_key"},
            "has relative_key positions, but electra_ds has only absolute ones",
        ),
        ({"model_type": "bert"}, "is a model of type bert, not electra"),
        ({"architectures": ["ElectraForMaskedLM"]}, "is a generator's by its architectures"),
    ],
)
def test_everything_that_tensors_do_not_show_is_checked(
    store: TokenStore, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = transformers_config(model_for(store, small_recipe()).discriminator.config).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ElectraError, match=f"(?s){message}") as refused:
        find_sizes({"discriminator": tmp_path}, None, small_recipe())
    assert "alone, with --set" not in str(refused.value)


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*nowhere"):
        find_sizes({"generator": tmp_path / "nowhere"}, None, small_recipe())


def test_the_recipe_of_our_own_export_is_checked_too(
    portable: Path,  # noqa: F811
    process_group: Ranks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_deepspeed(portable, tmp_path / "native", "cpu", process_group)
    with pytest.raises(ConfigError, match=r"num_attention_heads 2 as in .*recipe\.yaml; the recipe's generator has 8"):
        find_sizes(
            {},
            tmp_path / "native",
            small_recipe("generator.num_attention_heads=8"),
        )
    main(["checkpoint", "import", str(tmp_path / "native"), "--trusted", "--run-dir", str(tmp_path / "run"),
          "--ds-config", "cpu"])  # fmt: skip
    told = capsys.readouterr().out
    assert (
        f"checked  discriminator: 4 head(s) of 8, layer_norm_eps 1e-12, gelu, absolute positions, as in {tmp_path}"
        in told
    )
    assert "assumed" not in told


def test_a_recipe_may_name_the_generators_heads() -> None:
    recipe = small_recipe("generator.num_attention_heads=4")
    assert recipe.generator.num_attention_heads == 4
    with pytest.raises(ConfigError, match="uses the main network's sizes, so leave out num_attention_heads"):
        small_recipe(
            "generator.sharing=all", "generator.width_multiplier=1", "generator.depth_multiplier=1",
            "generator.num_attention_heads=4",
        )  # fmt: skip
