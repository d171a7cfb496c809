"""What a trial costs in Ray Tune, beside the same command by itself: `python benchmarks/sweep_overhead.py OUT.json`.

All are run in turn, on one CPU thread, with the recipe `mini` (1.4 M parameters, 32 x 64 tokens a step). Of each the
time from the first logged step to the last is compared, which is training, and what comes before and after it, which is
start-up: Python's imports in both, and the trial's actor and placement group in Tune.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROUNDS, STEPS = 3, 200
REPOSITORY = Path(__file__).resolve().parent.parent
# Each logged step has its tokens per second since the one before, of which the run's own time is made.
_PRETRAIN = {"recipe": "mini", "ds_config": "cpu", "log_every": 10, "eval_every": 100, "eval_windows": 64}


def measure(command: list[str], run: Path, log: Path) -> dict[str, float]:
    """Seconds: in all, of training, and of the rest."""
    began = time.perf_counter()
    with log.open("ab") as output:
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=output, stderr=subprocess.STDOUT)
    whole = time.perf_counter() - began
    lines = [json.loads(line) for line in next(iter(run.glob("**/metrics.jsonl"))).read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train" and "tokens_per_s" in line]
    seconds = sum(
        (line["tokens_seen"] - before["tokens_seen"]) / line["tokens_per_s"]
        for before, line in itertools.pairwise(train)
    )
    return {"all_s": whole, "training_s": seconds, "rest_s": whole - seconds}


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {"command": [], "local": [], "ray": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = folder / "store"
        subprocess.run(
            [sys.executable, "bin/build-data", "--corpus", "builtin", "--recipe", "mini", "--out", str(store)],
            cwd=REPOSITORY, check=True,
        )  # fmt: skip
        settings = {"schedule.total_steps": STEPS, "schedule.warmup_steps": 30}
        sweep: dict[str, Any] = {"name": "overhead", "pretrain": _PRETRAIN | {"data": str(store), "set": settings}}
        spec = folder / "overhead.yaml"
        spec.write_text(yaml.safe_dump(sweep))
        for number in range(ROUNDS):
            bare = [sys.executable, "bin/pretrain", "--threads", "1", "--data", str(store)]
            for name, value in _PRETRAIN.items():
                bare += [f"--{name.replace('_', '-')}", str(value)]
            bare += ["--set", *(f"{key}={value}" for key, value in settings.items()), "seed=0"]
            for kind in found:
                out = folder / f"{kind}-{number}"
                command = {
                    "command": [*bare, "--run-dir", str(out)],
                    "local": [sys.executable, "bin/sweep", str(spec), "--out", str(out), "--local"],
                    "ray": [sys.executable, "bin/sweep", str(spec), "--out", str(out)],
                }[kind]
                found[kind].append(measure(command, out, folder / "log"))
                print(number, kind, {name: round(value, 2) for name, value in found[kind][-1].items()}, flush=True)
    ratios = {
        kind: statistics.median(
            mine["training_s"] / theirs["training_s"]
            for mine, theirs in zip(found[kind], found["command"], strict=True)
        )
        for kind in ("local", "ray")
    }
    result = {
        "what": "one trial of recipe mini beside the same command, in turn, one CPU thread",
        "steps": STEPS, "rounds": ROUNDS, "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
        "median_training_ratio_to_command": ratios,
        "median_rest_s": {kind: statistics.median(each["rest_s"] for each in runs) for kind, runs in found.items()},
        "rounds_s": found,
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median_training_ratio_to_command"]), json.dumps(result["median_rest_s"]))


if __name__ == "__main__":
    main()
