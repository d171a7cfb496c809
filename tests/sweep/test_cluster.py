"""A sweep on a cluster of two simulated nodes with made-up GPUs: packing, a trial across nodes, a node that goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from electra_ds.data.token_store import TokenStore
from tests.helpers import REPOSITORY
from tests.sweeping import ours, small_sweep, start_sweep, wait_until, write_sweep


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes of two CPUs and a GPU each, which is a number and no card."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    found.add_node(**node)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def groups() -> list[dict[str, Any]]:
    """The placement groups that stand, with their bundles' nodes."""
    return [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def nodes_of(group: dict[str, Any]) -> set[str]:
    return set(group["bundles_to_node_id"].values())


@pytest.mark.nightly
def test_shares_of_gpus_are_packed_and_a_lost_nodes_trials_continue(
    cluster: Cluster, store: TokenStore, tmp_path: Path
) -> None:
    values = small_sweep(store.path, resources={"cpus": 1, "gpus": 0.5})
    out, log = tmp_path / "sweep", tmp_path / "log"
    values["pretrain"]["set"] |= {"schedule.total_steps": 1500}  # long enough to be met
    values["pretrain"]["eval_every"] = 500
    del values["pretrain"]["stop_at_share"]
    spec = write_sweep(tmp_path, values)
    driver = start_sweep(spec, "--out", out, "--address", cluster.address, log=log)
    wait_until(lambda: len(groups()) == 4, 120, told=log.read_text)  # two to a card, on two nodes
    assert len(set().union(*map(nodes_of, groups()))) == 2
    wait_until(lambda: len(list(out.glob("runs/*/metrics.jsonl"))) == 4, 120, told=log.read_text)
    cluster.remove_node(cluster.list_all_nodes()[-1])
    assert driver.wait(400) == 0, log.read_text()
    assert "4 done of 4 trials" in log.read_text()
    table = pd.read_csv(out / "results.csv")
    assert (table["attempts"] > 1).sum() == 2, table[["trial", "attempts"]]
    assert (table["metric.step"] == 1500).all()
    assert not ours(out)


@pytest.mark.nightly
def test_a_trial_of_two_workers_spans_two_nodes(cluster: Cluster, store: TokenStore, tmp_path: Path) -> None:
    values = small_sweep(store.path, resources={"workers": 2, "cpus": 1, "gpus": 1})
    values["pretrain"] |= {"space": {}, "seeds": [0]}
    out, log = tmp_path / "sweep", tmp_path / "log"
    spec = write_sweep(tmp_path, values)
    driver = start_sweep(spec, "--out", out, "--address", cluster.address, log=log)
    seen: set[str] = set()
    while driver.poll() is None:
        for group in groups():
            seen |= nodes_of(group)
        time.sleep(0.2)
    assert driver.returncode == 0, log.read_text()
    assert len(seen) == 2
    assert set(pd.read_csv(out / "results.csv")["world_size"]) == {2}
    assert "1 stopped as planned of 1 trial" in log.read_text()
