"""Sweeps of very small runs, by the command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import psutil
import yaml

from electra_ds.config.values import parse_value
from tests import forks
from tests.helpers import REPOSITORY, SMALL
from tests.launching import ENVIRONMENT

STEPS = 30


def small_sweep(store: Path, **changes: Any) -> dict[str, Any]:
    """Four pretrainings of STEPS steps of a schedule of 40, which take a second each once Python has started."""
    given = dict(override.split("=", 1) for override in SMALL)
    settings = {key: parse_value(value) for key, value in given.items() if key != "generator.width_multiplier"}
    pretrain = {
        "recipe": "tiny", "ds_config": "cpu", "data": str(store), "log_every": 5, "eval_every": 10, "save_every": 5,
        "eval_windows": 16, "set": settings | {"schedule.total_steps": 40, "schedule.warmup_steps": 5},
        "stop_at_share": STEPS / 40,
        "space": {"generator.width_multiplier": {"grid": [0.5, 1.0]}}, "seeds": [0, 1],
    }  # fmt: skip
    return {"name": "small", "pretrain": pretrain} | changes


def write_sweep(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "sweep-given.yaml"
    path.write_text(yaml.safe_dump(values), "utf8")
    return path


def start_sweep(*arguments: object, log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "bin/sweep", *map(str, arguments)], cwd=REPOSITORY, stdout=output,
            stderr=subprocess.STDOUT, env=ENVIRONMENT | (environment or {}), start_new_session=True,
        )  # fmt: skip


def run_sweep(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. Ray wants an interpreter of its own."""
    if "--local" in arguments:
        return forks.run("sweep", *arguments, environment=environment, timeout_s=1000)
    return subprocess.run(
        [sys.executable, "bin/sweep", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
        env=ENVIRONMENT | (environment or {}), check=False, timeout=1000,
    )  # fmt: skip


def before_each_batch(folder: Path, *statements: str) -> dict[str, str]:
    """The environment in which every run executes these first, which may use `step`."""
    inner = "".join(f"        {statement}\n" for statement in statements)
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "if any('electra_ds' in word for word in sys.orig_argv):\n"
        "    import electra_ds.pretraining.batches as m\n"
        "    build = m.BatchBuilder.build\n"
        "    def changed(self, step, size=None):\n"
        f"{inner}"
        "        return build(self, step, size)\n"
        "    m.BatchBuilder.build = changed\n"
    )
    return {"PYTHONPATH": str(folder)}


def table_of(folder: Path) -> pd.DataFrame:
    """What the trials came to, by their key; without what differs from time to time."""
    table = pd.read_csv(folder / "results.csv").set_index("trial").sort_index()
    return table[[name for name in table if name == "state" or name.startswith(("metric.", "recipe.", "pretrain."))]]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the record that a sweep has written for each trial, by its key."""
    return {path.stem: json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")}


def ours(folder: Path, words: str = "") -> list[psutil.Process]:
    """Processes of a sweep's trials that are alive, by their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and words in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def line_of(process: psutil.Process) -> str:
    """Its command line; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def rays(driver: int) -> list[psutil.Process]:
    """Processes of the Ray that a driver has started, while the driver lives."""
    return [each for each in psutil.Process(driver).children(recursive=True) if "ray" in line_of(each)]


def wait_until(is_so: Callable[[], Any], seconds: float = 300.0, told: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)
    return found


def alive(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        if line_of(process):  # a zombie has none
            yield process
