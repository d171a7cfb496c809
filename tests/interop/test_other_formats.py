"""TensorFlow and Flax weights are recognised wherever a model can be named, with the way to convert them."""

from __future__ import annotations

from pathlib import Path

import pytest

from electra_ds.cli import main
from electra_ds.core.errors import DataError
from electra_ds.pretraining.convert import refuse_other_frameworks

CONFIG = '{"model_type": "electra"}'
ORIGINAL = (
    "checkpoint",
    "model.ckpt-100.index",
    "model.ckpt-100.meta",
    "model.ckpt-100.data-00000-of-00001",
    "vocab.txt",
)


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text(CONFIG if name == "config.json" else "", "utf8")
    return path


CASES = [
    (ORIGINAL, "", "TensorFlow checkpoint", "--tf_checkpoint_path {path}/model.ckpt-100 --config_file"),
    (ORIGINAL, "model.ckpt-100", "TensorFlow checkpoint", "--tf_checkpoint_path {path}/model.ckpt-100 "),
    (ORIGINAL, "model.ckpt-100.index", "TensorFlow checkpoint", "--tf_checkpoint_path {path}/model.ckpt-100 "),
    ((*ORIGINAL, "config.json"), "", "TensorFlow checkpoint", "--tf_checkpoint_path {path}/model.ckpt-100 "),
    (("config.json", "tf_model.h5"), "", "TensorFlow weights only", "from_pretrained('{path}', from_tf=True)"),
    (("config.json", "tf_model.h5"), "tf_model.h5", "TensorFlow weights", "from_pretrained('{path}', from_tf=True)"),
    (("config.json", "flax_model.msgpack"), "", "Flax weights only", "from_pretrained('{path}', from_flax=True)"),
    (("saved_model.pb",), "", "TensorFlow SavedModel", "Convert the checkpoint that it was made from"),
    (("model.gguf",), "model.gguf", "GGUF model", "Convert the checkpoint that it was made from"),
]


@pytest.mark.parametrize(("names", "inside", "what", "advice"), CASES)
def test_every_command_that_takes_a_model_recognises_other_formats_and_says_what_converts_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    inside: str,
    what: str,
    advice: str,
) -> None:
    path = folder(tmp_path / "theirs", *names)
    given = str(path / inside)
    (tmp_path / "text.txt").write_text("text", "utf8")
    (tmp_path / "train.csv").write_text("text,label\ngood,1\nbad,0\n", "utf8")
    for command in (
        ["pretrain", "--ds-config", "cpu", "--recipe", "tiny", "--corpus", str(tmp_path / "text.txt"),
         "--init-from", given],
        ["finetune", "--model", given, "--train", str(tmp_path / "train.csv"), "--dev", str(tmp_path / "train.csv"),
         "--ds-config", "cpu"],
        ["checkpoint", "import", given, "--run-dir", str(tmp_path / "run"), "--ds-config", "cpu"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(command)
        told = capsys.readouterr().err
        assert f"{given} is a " in told, command
        assert what in told, command
        assert advice.format(path=path) in told, command
        assert "pretrain --init-from" in told


def test_pytorch_weights_next_to_them_are_used_and_other_folders_are_left_to_their_readers(tmp_path: Path) -> None:
    for index, names in enumerate(
        [
            (*ORIGINAL, "pytorch_model.bin"), ("config.json", "tf_model.h5", "model.safetensors"), ("config.json",), (),
            ("model.index", "notes.data-00000-of-00001", "data.index"),
        ]
    ):  # fmt: skip
        refuse_other_frameworks(folder(tmp_path / str(index), *names), "theirs")
    refuse_other_frameworks(tmp_path / "nowhere", "theirs")


def test_a_hub_model_without_weights_of_pytorch_says_how_to_convert_it(tmp_path: Path) -> None:
    cached = folder(tmp_path / "cached", "config.json", "vocab.txt")
    with pytest.raises(DataError, match=r"(?s)without PyTorch weights.*from_pretrained\('some/model', from_tf=True\)"):
        refuse_other_frameworks(cached, "some/model")
