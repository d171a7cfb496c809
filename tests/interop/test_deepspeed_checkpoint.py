"""DeepSpeed's own checkpoints, in and out: the same bits, whoever wrote them, and nothing of theirs is run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.config.options import PretrainOptions
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.core.errors import CheckpointError, ConfigError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.interop.deepspeed_checkpoint import DeepSpeedCheckpoint, read_deepspeed_checkpoint
from electra_ds.interop.deepspeed_files import find_files
from electra_ds.interop.export import export_run
from electra_ds.interop.export_deepspeed import export_deepspeed
from electra_ds.interop.import_deepspeed import _state_of_export, folder_of_export, import_deepspeed
from electra_ds.interop.init_from import write_first_checkpoint
from electra_ds.pretraining import prepare
from electra_ds.pretraining.convert import (
    discriminator_tensors,
    from_discriminator_tensors,
    from_generator_tensors,
    generator_tensors,
    transformers_config,
)
from electra_ds.training.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint
from electra_ds.training.optimizer import FRESH_COUNTERS
from electra_ds.training.prepare import plan_new
from tests import forks, native_worker
from tests.helpers import REPOSITORY, free_port, model_for, small_recipe
from tests.launching import ENVIRONMENT
from tests.native_worker import PRECISIONS, STEPS, config, held_by, plain_engine, train
from tests.pretrain_runs import CPU_JSON, run, start_arguments

# Every stage and every precision is quick; all combinations take some time.
QUICK = ((0, "fp32"), (0, "bf16"), (0, "fp16"), (1, "fp32"), (2, "fp16"), (3, "bf16"))
PLANS = [
    pytest.param(stage, precision, marks=() if (stage, precision) in QUICK else pytest.mark.slow)
    for stage in (0, 1, 2, 3)
    for precision in PRECISIONS
]
KINDS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def _ranks(process_group: Ranks, half_on_cpu: None) -> None:
    pass


def new_job(store: TokenStore, run_dir: Path, ranks: Ranks, recipe: Recipe | None = None) -> Any:
    recipe = recipe or small_recipe()
    options = PretrainOptions(ds_config="cpu")
    plan = plan_new(options, recipe, RunDirectory(run_dir), ranks)
    return prepare.prepare_new(options, recipe, plan, store, RunDirectory(run_dir), ranks)


def brought_in(
    native: Path | DeepSpeedCheckpoint, store: TokenStore, run_dir: Path, ranks: Ranks, recipe: Recipe | None = None
) -> tuple[Checkpoint, str]:
    """(the one checkpoint of the new run, what was told)."""
    export = None
    if isinstance(native, Path):
        files = find_files(native)
        native, export = read_deepspeed_checkpoint(files), folder_of_export(files)
    run_dir.mkdir()
    told = import_deepspeed(native, new_job(store, run_dir, ranks, recipe), export)
    return only_checkpoint(run_dir), told


def only_checkpoint(run_dir: Path) -> Checkpoint:
    (path,) = CheckpointFolder(run_dir / "checkpoints", keep=1).paths()
    return load_checkpoint(path)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("step", "tokens", "optimizer"):
        assert found[key] == expected[key]


@pytest.fixture(scope="module")
def portable(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of made-up tensors, in which no two are alike."""
    path = tmp_path_factory.mktemp("portable") / "run"
    path.mkdir()
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for name, parameter in model_for(store, small_recipe()).named_parameters():
        tensors |= {f"{kind}/{name}": torch.randn(parameter.shape, generator=rng) / 50 for kind in KINDS}
        tensors[f"exp_avg_sq/{name}"].square_()
    counters = {
        "taken_steps": 38.0, "skipped_steps": 2.0, "consecutive_skips": 0.0, "is_scaled": 1.0, "loss_scale": 512.0,
        "good_steps": 11.0, "hysteresis_left": 1.0,
    }  # fmt: skip
    write_first_checkpoint(new_job(store, path, process_group), tensors, step=40, tokens=9_000, counters=counters)
    return path


@pytest.fixture(scope="module")
def plain(store: TokenStore, process_group: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain engine's checkpoint at stage 1 in fp32."""
    path = tmp_path_factory.mktemp("plain") / "native"
    with plain_engine(model_for(store, small_recipe()), config(1, "fp32")) as engine:
        train(engine, store, 1)
        engine.save_checkpoint(str(path))
    return path


@pytest.mark.parametrize(("stage", "precision"), PLANS)
def test_a_plain_engines_checkpoint_comes_in_bit_for_bit(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, precision: str
) -> None:
    with plain_engine(model_for(store, small_recipe()), config(stage, precision)) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        expected = held_by(engine)
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group)
    assert_same(checkpoint.tensors, expected)
    # DeepSpeed takes a step with zero gradients when it makes stage 0's fp16 and bf16 optimizer, and Adam counts it.
    phantom = stage == 0 and precision != "fp32"
    counters = checkpoint.state["optimizer"]
    assert checkpoint.state["step"] == STEPS
    assert checkpoint.state["tokens"] == STEPS * 8 * 32
    assert (counters["taken_steps"], counters["skipped_steps"]) == (STEPS + phantom, 0)
    assert (counters["is_scaled"], counters["loss_scale"]) == ((1, 256) if precision == "fp16" else (0, 1))
    assert counters["good_steps"] == (STEPS if precision == "fp16" else 0)
    assert f"stage {stage}, {precision}, 1 rank(s)" in told
    assert "both of AdamW's, complete" in told
    assert f"electra-ds pretrain --resume {tmp_path / 'run'}" in told


@pytest.mark.parametrize(("stage", "precision"), PLANS)
def test_a_plain_engine_loads_our_export_and_it_comes_back_the_same(
    store: TokenStore, portable: Path, process_group: Ranks, tmp_path: Path, stage: int, precision: str
) -> None:
    values = config(stage, precision) | {"train_micro_batch_size_per_gpu": 8}
    (tmp_path / "ds.json").write_text(json.dumps(values))
    native = tmp_path / "native"
    told = export_deepspeed(portable, native, str(tmp_path / "ds.json"), process_group)
    assert f"stage {stage}, {precision}" in told
    assert (native / "latest").read_text() == "global_step40"
    expected = only_checkpoint(portable)
    with plain_engine(model_for(store, small_recipe()), json.loads((native / "deepspeed.json").read_text())) as engine:
        engine.load_checkpoint(str(native))
        assert_same(held_by(engine), expected.tensors)
        assert (engine.global_steps, engine.skipped_steps) == (40, 2)
        scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
        if precision == "fp16":
            assert (scaler.cur_scale, scaler.scale_window) == (512, 1000)
            assert scaler.cur_iter - scaler.last_overflow_iter - 1 == 11
        train(engine, store)
        after = held_by(engine)
        assert not torch.equal(after["master/discriminator_head.dense.weight"], expected.tensors[
            "master/discriminator_head.dense.weight"])  # fmt: skip
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
    back, _ = brought_in(native, store, tmp_path / "run", process_group)
    assert_same(back.tensors, expected.tensors)
    assert_same_state(back.state, expected.state)


@pytest.mark.slow
def test_the_script_of_an_export_loads_it(portable: Path, process_group: Ranks, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto"}}))
    told = export_deepspeed(portable, tmp_path / "native", str(tmp_path / "ds.json"), process_group)
    assert 'Note: fp16.enabled is "auto", which here means' in told
    assert told.splitlines()[-2].startswith("Written at ZeRO stage 2, fp32, for 1 rank(s)")
    assert "torchrun --nproc_per_node 1 resume.py" in (tmp_path / "native" / "README.md").read_text()
    script = tmp_path / "native" / "resume.py"
    script.write_text(
        script.read_text()
        + "from safetensors.torch import save_file\n"
        + "from tests.native_worker import held_by\n"
        + f"save_file(held_by(engine), {str(tmp_path / 'held.safetensors')!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port()),
         "resume.py"],
        cwd=script.parent, env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "step 40" in result.stdout
    assert_same(load_file(tmp_path / "held.safetensors"), only_checkpoint(portable).tensors)
    with pytest.raises(CheckpointError, match="already exists"):
        export_deepspeed(portable, tmp_path / "native", str(tmp_path / "ds.json"), process_group)


def test_no_half_written_export_is_left(
    portable: Path, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> Any:
        def fail(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    (tmp_path / ".native.partial").mkdir()
    (tmp_path / ".native.partial" / "mine").touch()
    monkeypatch.setattr(shutil, "copyfile", failing(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"No space left.*Free some space"):
        export_deepspeed(portable, tmp_path / "native", "cpu", process_group)
    monkeypatch.setattr(shutil, "copyfile", failing(errno.EACCES))
    with pytest.raises(CheckpointError, match="Permission denied") as denied:
        export_deepspeed(portable, tmp_path / "native", "cpu", process_group)
    assert "Free some space" not in str(denied.value)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        ".native.partial", ".native.partial/mine",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "file"])
def test_an_export_replaces_neither_links_nor_files(
    portable: Path, process_group: Ranks, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.touch()
    message = "is a link or a file, but an export is a folder"
    with pytest.raises(CheckpointError, match=message):
        export_deepspeed(portable, out, "cpu", process_group)
    with pytest.raises(CheckpointError, match=message):
        export_run(portable, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_of_another_recipe_is_not_exported(portable: Path, process_group: Ranks, tmp_path: Path) -> None:
    source = Path(shutil.copytree(only_checkpoint(portable).path, tmp_path / "copy"))
    recipe = (source / "recipe.yaml").read_text().replace("num_hidden_layers: 2", "num_hidden_layers: 1")
    (source / "recipe.yaml").write_text(recipe)
    manifest = json.loads((source / "manifest.json").read_text())
    content = recipe.encode()
    manifest["files"]["recipe.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not fit the run's recipe.*is not part of the model"):
        export_deepspeed(source, tmp_path / "native", "cpu", process_group)
    assert not (tmp_path / "native").exists()


class Joint(nn.Module):
    """As somebody else might pretrain ELECTRA: transformers' two models in one module, with tied tables."""

    def __init__(self, store: TokenStore, *, is_tied: bool) -> None:
        super().__init__()
        ours = model_for(store, small_recipe())
        self.gen = ElectraForMaskedLM(transformers_config(ours.generator.config))
        self.disc = ElectraForPreTraining(transformers_config(ours.discriminator.config))
        if is_tied:
            self.gen.electra.embeddings = self.disc.electra.embeddings
            self.gen.generator_lm_head.weight = self.disc.electra.embeddings.word_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        masked = self.gen(input_ids=ids, labels=ids)
        return masked.loss.float() + self.disc(input_ids=ids, labels=(ids % 2)).loss.float()


def train_joint(engine: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        engine.backward(engine(torch.randint(5, 400, (4, 16), generator=rng)))
        engine.step()


@pytest.mark.parametrize(
    ("stage", "precision", "is_tied"),
    [(0, "fp32", True), (0, "fp16", False), (2, "bf16", True), (1, "fp32", False), (3, "fp32", True)],
)
def test_a_joint_module_of_transformers_comes_in_with_its_moments(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, precision: str, is_tied: bool
) -> None:
    model = Joint(store, is_tied=is_tied)
    exempt = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(e in n for e in exempt)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if any(e in n for e in exempt)], "weight_decay": 0.0},
    ]
    with plain_engine(model, config(stage, precision), groups) as engine:
        train_joint(engine)
        engine.save_checkpoint(str(tmp_path / "native"))
        held = held_by(engine)
    recipe = small_recipe() if is_tied else small_recipe("generator.sharing=none")
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group, recipe)
    assert "transformers (gen., disc.)" in told
    assert "both of AdamW's, complete" in told
    for kind in KINDS:
        names = [name.removeprefix(f"{kind}/") for name in checkpoint.tensors if name.startswith(f"{kind}/")]
        ours = {name: checkpoint.tensors[f"{kind}/{name}"] for name in names}
        theirs = {f"gen.{name}": t for name, t in generator_tensors(ours).items()}
        theirs |= {f"disc.{name}": t for name, t in discriminator_tensors(ours).items()}
        for name, tensor in theirs.items():  # shared tables go out under the discriminator's name
            twin = name.replace("disc.", "gen.", 1)
            assert torch.equal(held.get(f"{kind}/{name}", held.get(f"{kind}/{twin}")), tensor), name  # type: ignore[arg-type]
        assert len(theirs) == sum(name.startswith(f"{kind}/") for name in held)
    if is_tied:
        return
    with pytest.raises(CheckpointError, match=r"they differ.*generator\.sharing=none"):
        brought_in(tmp_path / "native", store, tmp_path / "other", process_group, small_recipe())


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any) -> Any:
        return self.inner(*arguments)


@pytest.mark.parametrize(("stage", "sharing"), [(0, "tokens"), (0, "all"), (2, "none"), (2, "tokens"), (3, "all")])
def test_every_sharing_comes_in_also_from_a_wrapped_module(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int, sharing: str
) -> None:
    sizes = ("generator.width_multiplier=1", "generator.depth_multiplier=1") if sharing == "all" else ()
    recipe = small_recipe(*sizes, f"generator.sharing={sharing}")
    with plain_engine(Wrapped(model_for(store, recipe)), config(stage, "fp32")) as engine:
        train(engine, store)
        expected = {name.replace("/inner.", "/"): t for name, t in saved(engine, tmp_path / "native").items()}
    checkpoint, _ = brought_in(tmp_path / "native", store, tmp_path / "run", process_group, recipe)
    assert_same(checkpoint.tensors, expected)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_without_a_step_that_was_not_skipped_there_are_no_moments(
    store: TokenStore, process_group: Ranks, tmp_path: Path, stage: int
) -> None:
    values = config(stage, "fp16") | {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    with plain_engine(model_for(store, small_recipe()), values) as engine:
        train(engine, store)
        engine.save_checkpoint(str(tmp_path / "native"))
        assert engine.skipped_steps == STEPS
    checkpoint, told = brought_in(tmp_path / "native", store, tmp_path / "run", process_group)
    counters = checkpoint.state["optimizer"]
    assert "none, so AdamW's start at zero" in told
    assert f"{STEPS} of them skipped, loss scale {2**37}" in told.replace("1.37439e+11", str(2**37))
    assert (counters["taken_steps"], counters["skipped_steps"], counters["loss_scale"]) == (0, STEPS, 2**37)
    fresh = dict(model_for(store, small_recipe()).named_parameters())
    for name, parameter in fresh.items():
        assert torch.equal(checkpoint.tensors[f"master/{name}"], parameter.half().float())
        assert not checkpoint.tensors[f"exp_avg/{name}"].any()


def test_a_device_without_fp16_writes_none(
    portable: Path, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    (tmp_path / "ds.json").write_text(json.dumps(config(1, "fp16") | {"train_micro_batch_size_per_gpu": 8}))
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        export_deepspeed(portable, tmp_path / "native", str(tmp_path / "ds.json"), process_group)
    assert not (tmp_path / "native").exists()


def test_names_from_transformers_are_the_inverse_of_names_to_it(store: TokenStore) -> None:
    state = model_for(store, small_recipe("generator.sharing=none", "generator.width_multiplier=0.75")).state_dict()
    back = from_generator_tensors(generator_tensors(state)) | from_discriminator_tensors(discriminator_tensors(state))
    assert back.keys() == state.keys() - {"generator_head.decoder.weight"}
    assert all(torch.equal(back[name], state[name]) for name in back)


def saved(engine: Any, folder: Path) -> dict[str, torch.Tensor]:
    engine.save_checkpoint(str(folder))
    return held_by(engine)


def test_other_optimizers_of_deepspeeds_come_in_too(
    store: TokenStore, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wraps FusedAdam at stage 0, and BF16_Optimizer at stage 1."""
    model = model_for(store, small_recipe())
    values = config(1, "bf16") | {"data_types": {"grad_accum_dtype": "fp32"}}
    with plain_engine(model, values) as engine:
        train(engine, store)
        assert type(engine.optimizer).__name__ == "BF16_Optimizer"
        expected = saved(engine, tmp_path / "bf16")
    checkpoint, _ = brought_in(tmp_path / "bf16", store, tmp_path / "run", process_group)
    assert_same(checkpoint.tensors, expected)

    import deepspeed.runtime.engine

    monkeypatch.setattr(deepspeed.runtime.engine, "FusedAdam", torch.optim.AdamW)
    with plain_engine(model_for(store, small_recipe()), config(0, "fp16")) as engine:
        train(engine, store)
        assert type(engine.optimizer).__name__ == "FP16_Optimizer"
        engine.save_checkpoint(str(tmp_path / "fused"))
        flat = torch.cat([group.detach() for group in engine.optimizer.fp32_groups_flat])
        states = engine.optimizer.optimizer.state.values()
        moments = {key: torch.cat([state[key] for state in states]) for key in KINDS[1:]}
    checkpoint, _ = brought_in(tmp_path / "fused", store, tmp_path / "run2", process_group)
    order = parameter_order(store)
    for kind, whole in {"master": flat, **moments}.items():
        assert torch.equal(torch.cat([checkpoint.tensors[f"{kind}/{name}"].flatten() for name in order]), whole)


def parameter_order(store: TokenStore) -> list[str]:
    """Names as `parameter_groups` puts them one after the other."""
    names = [name for name, _ in model_for(store, small_recipe()).named_parameters()]
    exempt = [name for name in names if name.endswith("bias") or "norm" in name.lower()]
    return [name for name in names if name not in exempt] + exempt


def test_stage_0_without_names_is_taken_only_if_it_is_certain(
    store: TokenStore, process_group: Ranks, tmp_path: Path
) -> None:
    def told(name: str, groups: Any, precision: str = "fp32") -> str:
        model = model_for(store, small_recipe())
        with plain_engine(model, config(0, precision), groups(model)) as engine:
            train(engine, store)
            expected = saved(engine, tmp_path / name)
        checkpoint, told = brought_in(tmp_path / name, store, tmp_path / f"run-{name}", process_group)
        masters = {key: value for key, value in expected.items() if key.startswith("master/")}
        assert_same({key: checkpoint.tensors[key] for key in masters}, masters)
        if "start at zero" not in told:
            assert_same(checkpoint.tensors, expected)
        else:
            assert checkpoint.state["optimizer"]["taken_steps"] == 0
            assert not any(checkpoint.tensors[key].any() for key in checkpoint.tensors if key not in masters)
        return told

    def halves(model: nn.Module) -> list[dict[str, Any]]:  # every other parameter, whatever it is
        parameters = list(model.parameters())
        return [{"params": parameters[::2]}, {"params": parameters[1::2]}]

    def networks(model: nn.Module) -> list[dict[str, Any]]:  # a learning rate for each
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            found.setdefault((name.startswith("discriminator"), name.endswith("bias") or "norm" in name.lower()), [])
            found[name.startswith("discriminator"), name.endswith("bias") or "norm" in name.lower()].append(parameter)
        return [{"params": found[key]} for key in sorted(found)]

    assert "complete" in told("one", lambda model: model.parameters())
    assert "complete" in told("named", lambda model: list(model.named_parameters())[::-1])
    assert "none or several of the usual ways to group parameters fit" in told("halves", halves)
    assert "complete" in told("networks", networks)


def test_what_is_missing_or_damaged_is_said(
    store: TokenStore, plain: Path, process_group: Ranks, tmp_path: Path
) -> None:
    def damaged(name: str) -> Path:
        shutil.copytree(plain, tmp_path / name)
        return tmp_path / name / "global_step1"

    folder = damaged("missing")
    next(folder.glob("*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"saved by 1 rank\(s\).*of these ranks: none"):
        read_deepspeed_checkpoint(find_files(folder))
    folder = damaged("more")
    file = next(folder.glob("*optim_states.pt"))
    shutil.copy(file, folder / file.name.replace("pp_rank_0", "pp_rank_1"))
    with pytest.raises(CheckpointError, match=r"of these ranks: 0, 1.*move others away"):
        read_deepspeed_checkpoint(find_files(folder))
    for part in ("optim", "model"):
        file = next(damaged(f"cut-{part}").glob(f"*{part}_states.pt"))
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
            read_deepspeed_checkpoint(find_files(file.parent))
    file = next(damaged("nan").glob("*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()[5] = float("nan")
    torch.save(content, file)
    with pytest.raises(
        CheckpointError, match=r"master/discriminator\.embeddings\.word_embeddings\.weight is not finite"
    ):
        read_deepspeed_checkpoint(find_files(file.parent))
    (tmp_path / "missing" / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match=r"The folder .*global_step9 does not exist"):
        find_files(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no \*_model_states\.pt"):
        find_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"The folder .* does not exist"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "cut-model" / "global_step1" / "layer_01-model_00-model_states.pt").touch()
    with pytest.raises(CheckpointError, match="pipeline"):
        find_files(tmp_path / "cut-model")
    with pytest.raises(CheckpointError, match=r"does not fit.*is \[\d+, 16\], but the recipe's is \[\d+, 24\]"):
        brought_in(plain, store, tmp_path / "sizes", process_group, small_recipe("model.embedding_size=24"))
    with pytest.raises(CheckpointError, match=r"model lacks: discriminator\.layers\.1"):
        brought_in(plain, store, tmp_path / "depth", process_group, small_recipe("model.num_hidden_layers=1"))
    native = read_deepspeed_checkpoint(find_files(plain))
    with pytest.raises(ConfigError, match=r"step 9999, beyond schedule\.total_steps 400"):
        brought_in(native._replace(step=9999), store, tmp_path / "steps", process_group)
    strange = native._replace(tensors={name.replace("_head", "_top"): t for name, t in native.tensors.items()})
    with pytest.raises(CheckpointError, match="neither those of electra_ds's joint module nor"):
        brought_in(strange, store, tmp_path / "strange", process_group)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (4, r"saved by 4 rank\(s\), but it has a \*_optim_states.pt of these ranks: 0. Copy the files of all ranks"),
        ("many", "does not have the layout of a DeepSpeed 0.19.8 checkpoint \\(ValueError"),
    ],
)
def test_files_of_ranks_that_are_missing_are_named(plain: Path, tmp_path: Path, ranks: Any, message: str) -> None:
    shutil.copytree(plain, tmp_path / "native")
    file = next((tmp_path / "native").glob("*/*model_states.pt"))
    torch.save(torch.load(file, weights_only=False) | {"dp_world_size": ranks}, file)
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed_checkpoint(find_files(tmp_path / "native"))


GOOD_STATE: dict[str, Any] = {"step": 1, "tokens": 5, "optimizer": FRESH_COUNTERS}


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", json.dumps(GOOD_STATE | {"tokens": "many"}), json.dumps(GOOD_STATE | {"optimizer": {}}),
        json.dumps(GOOD_STATE | {"optimizer": FRESH_COUNTERS | {"taken_steps": None}}),
    ],
)  # fmt: skip
def test_a_bad_state_in_an_export_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps(GOOD_STATE))
    assert _state_of_export(tmp_path, 1) == GOOD_STATE
    assert _state_of_export(tmp_path, 2) is None
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json .*Delete it to do without"):
        _state_of_export(tmp_path, 1)


def test_an_import_that_is_refused_leaves_no_run(
    store: TokenStore, plain: Path, process_group: Ranks, tmp_path: Path
) -> None:
    native, run_dir = read_deepspeed_checkpoint(find_files(plain)), tmp_path / "run"
    (tmp_path / "state.json").write_text(json.dumps(GOOD_STATE | {"tokens": "many"}))
    with pytest.raises(CheckpointError, match=r"state\.json is not what our export wrote .*'many'"):
        import_deepspeed(native, new_job(store, run_dir, process_group), tmp_path)
    assert not RunDirectory(run_dir).exists()
    ours = small_recipe().optimizer
    same = {"betas": (torch.tensor(ours.beta1), ours.beta2), "eps": torch.tensor(ours.epsilon)}
    other = {"betas": (torch.tensor(0.5), 0.25), "eps": 0.5}
    told = [
        brought_in(native._replace(adam=adam), store, tmp_path / name, process_group)[1]
        for name, adam in (("same", same), ("other", other))
    ]
    assert "its optimizer had" not in told[0]
    assert "had beta1 0.5, but the recipe" in told[1]
    assert f"had eps 0.5, but the recipe has {ours.epsilon:g}" in told[1]


def test_a_run_that_could_not_be_written_is_no_run(
    store: TokenStore, plain: Path, process_group: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("electra_ds.training.checkpoint._flush", full)
    with pytest.raises(CheckpointError, match="No space left"):
        brought_in(plain, store, tmp_path / "run", process_group)
    assert not RunDirectory(tmp_path / "run").exists()


@pytest.mark.nightly
def test_two_ranks_in_and_out(store: TokenStore, portable: Path, process_group: Ranks, tmp_path: Path) -> None:
    forks.on_ranks(native_worker.main, 2, str(store.path), str(portable), str(tmp_path))
    portable_tensors = only_checkpoint(portable)
    for stage in (1, 2, 3):
        for precision in PRECISIONS:
            name = f"{stage}-{precision}"
            checkpoint, told = brought_in(tmp_path / f"plain-{name}", store, tmp_path / f"a{name}", process_group)
            assert f"stage {stage}, {precision}, 2 rank(s)" in told
            assert_same(checkpoint.tensors, load_file(tmp_path / f"plain-{name}.safetensors"))
            back, _ = brought_in(tmp_path / f"ours-{name}", store, tmp_path / f"b{name}", process_group)
            assert_same(back.tensors, portable_tensors.tensors)
            assert_same_state(back.state, portable_tensors.state)
        checkpoint, told = brought_in(tmp_path / f"frozen-{stage}", store, tmp_path / f"f{stage}", process_group)
        name = "discriminator.embeddings.position_embeddings.weight"
        assert f"1 of its tensors were frozen and are trained from now on: {name}" in told
        given = load_file(tmp_path / f"frozen-{stage}.safetensors")["table"]
        assert torch.equal(checkpoint.tensors[f"master/{name}"], given)


@pytest.mark.slow
def test_a_run_goes_out_and_back_and_on_as_if_it_had_never_left(store: TokenStore, tmp_path: Path) -> None:
    straight, cut, back = tmp_path / "straight", tmp_path / "cut", tmp_path / "back"
    run("pretrain", *start_arguments(store, straight))
    run("pretrain", *start_arguments(store, cut), "--stop-at", "20")
    run("export", str(cut), "--to", "deepspeed", "--ds-config", CPU_JSON, "--out", str(tmp_path / "native"))
    told = run(
        "checkpoint", "import", str(tmp_path / "native"), "--run-dir", str(back), "--ds-config", CPU_JSON
    ).stdout  # fmt: skip
    assert f"Resume it with: {REPOSITORY}/bin/pretrain --resume {back}" in told
    run("pretrain", "--resume", str(back), "--threads", "1", "--log-every", "1")
    expected = [line for line in read_metrics(straight / "metrics.jsonl") if line["kind"] == "train"][20:]
    found = [line for line in read_metrics(back / "metrics.jsonl") if line["kind"] == "train"]
    for key in ("step", "loss", "generator_loss", "discriminator_loss", "grad_norm", "tokens_seen"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert_same(
        load_checkpoint(back / "checkpoints" / "step-00000040").tensors,
        load_checkpoint(straight / "checkpoints" / "step-00000040").tensors,
    )
    assert json.loads((back / "run.json").read_text())["initialised_from"] == [
        str(tmp_path / "native" / "global_step20")
    ]
