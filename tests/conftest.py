from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from electra_ds.core.ranks import Ranks, join_ranks
from electra_ds.data.build import build_store
from electra_ds.data.corpus import open_corpus
from electra_ds.data.token_store import TokenStore
from tests.budget import Costs, pytest_runtest_call  # noqa: F401  # a hook
from tests.data_files import DataFiles, write_stand_ins
from tests.helpers import SHARED_DATA, small_recipe, write_corpus

hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Costs())


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker for each core and one more, since many tests wait for processes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish() -> None:
    """Leave the modules that all tests share out of garbage collections, of which many tests make some."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # No process is to wait for a long file at the end. Sweeps wait more than they compute.
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: (not item.path.name.startswith(("test_sweep_", "test_launchers")), -slow[item.path]))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors run fastest so, and the number of threads is part of a plan


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def store(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    out = tmp_path_factory.mktemp("stores") / "small"
    return build_store(open_corpus([corpus_folder]), small_recipe().tokenizer, out, workers=1)


_BESIDE = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real files are not beside this checkout")


@pytest.fixture(scope="session", params=["stand-ins", pytest.param("real", marks=_BESIDE)])
def data_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataFiles:
    """Files as other people publish them, see tests/data_files.py."""
    if request.param == "real":
        return DataFiles(SHARED_DATA, is_real=True)
    return write_stand_ins(tmp_path_factory.mktemp("data-files"))


@pytest.fixture(scope="session")
def process_group() -> Iterator[Ranks]:
    """One for all tests of a process: meeting anew takes longer than most of them."""
    with join_ranks() as ranks:
        yield ranks


@pytest.fixture
def half_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed run fp16 on a CPU, which it refuses for speed; torch itself computes it correctly."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(kind, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16])
