"""Published files have the permissions that the umask gives, whichever library wrote them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import save_file

from electra_ds.core.files import complete_file
from electra_ds.core.ranks import Ranks
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.interop.export import export_run, new_folder
from electra_ds.interop.export_deepspeed import export_deepspeed
from tests.helpers import small_recipe
from tests.interop.test_deepspeed_checkpoint import portable  # noqa: F401


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    found = {path: path.stat().st_mode & 0o666 for path in folder.rglob("*") if path.is_file()}
    assert found
    assert found == dict.fromkeys(found, 0o666 & ~umask)


def test_files_of_exports_have_the_mode_that_the_umask_gives(
    portable: Path,  # noqa: F811
    process_group: Ranks,
    tmp_path: Path,
    umask: int,
) -> None:
    export_run(portable, tmp_path / "export")
    assert (tmp_path / "export" / "discriminator" / "model.safetensors").is_file()
    assert_modes(tmp_path / "export", umask)
    export_deepspeed(portable, tmp_path / "native", "cpu", process_group)
    assert_modes(tmp_path / "native", umask)
    with new_folder(tmp_path / "finetuned") as partial:  # which export_finetuned writes into
        save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
    assert_modes(tmp_path / "finetuned", umask)


def test_files_that_are_written_to_a_temporary_file_first_have_that_mode_too(
    corpus_folder: Path, tmp_path: Path, umask: int
) -> None:
    for name in ("table.parquet", "table.csv"):
        with complete_file(tmp_path / name) as temporary:
            frame = pandas.DataFrame({"a": [1]})
            frame.to_parquet(temporary) if name.endswith("parquet") else frame.to_csv(temporary)
    with complete_file(tmp_path / "any.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    build_store(open_corpus([corpus_folder]), small_recipe().tokenizer, tmp_path / "store", workers=1)
    assert_modes(tmp_path, umask)
