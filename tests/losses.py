"""The losses of a few short runs, which a change that leaves the mathematics alone must repeat bit for bit.

    python -m tests.losses          compare with tests/losses.json
    python -m tests.losses record   write it anew, after a change that is meant to change losses
    python -m tests.losses full     print them, those of the study's recipe at its own batch size too (20 minutes)

The text is made here from a seed, so nothing else is needed. Products of matrices differ in their last bits between
kinds of CPU and versions of torch: on the machine and torch that wrote the file losses are equal, elsewhere close.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests import forks

FILE = Path(__file__).with_name("losses.json")
STEPS = 50
_TINY = ("pretrain", "--recipe", "tiny")
_SMALL = ("pretrain", "--recipe", "rc2020-small")
_FEW = ("--set", "global_batch_size=8")
_FP32, _BF16, _STAGE_2 = {"fp16": {"enabled": False}}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 2}}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "tiny, fp32": (_TINY, _FP32, 1),
    "tiny, bf16": (_TINY, _BF16, 1),
    "tiny, stage 2, two ranks": (_TINY, _STAGE_2, 2),
    "rc2020-small at batch 8, fp32": (_SMALL + _FEW, _FP32, 1),
    "rc2020-small at batch 8, bf16": (_SMALL + _FEW, _BF16, 1),
    "rc2020-small at batch 8, stage 2, two ranks": (_SMALL + _FEW, _STAGE_2, 2),
    "finetuning": (("finetune",), _FP32, 1),
}
"""(command, DeepSpeed JSON, ranks) by name."""
FULL: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "rc2020-small, fp32": (_SMALL, _FP32, 1),
    "rc2020-small, bf16": (_SMALL, _BF16, 1),
    "rc2020-small, stage 2, two ranks": (_SMALL, _STAGE_2, 2),
}
_SUBJECTS = [
    "the miller",
    "a grey cat",
    "our neighbour",
    "the old captain",
    "every child",
    "a young fox",
    "the baker",
    "nobody",
]
_VERBS = ["carries", "forgets", "paints", "follows", "mends", "hides", "remembers", "sells"]
_OBJECTS = [
    "a lantern",
    "the long letter",
    "two apples",
    "an empty boat",
    "the red door",
    "some bread",
    "a map of the hills",
]
_PLACES = ["by the river", "in the rain", "before dawn", "at the market", "under the bridge", "without a word"]


def sentences(seed: int, count: int) -> list[str]:
    """Return made-up sentences, the same for a seed everywhere."""
    rng = random.Random(seed)
    kinds = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)
    return [" ".join(rng.choice(kind) for kind in kinds).capitalize() + "." for _ in range(count)]


def make_inputs(folder: Path, recipes: Sequence[str] = ("tiny", "rc2020-small")) -> None:
    """Write the text and the labelled examples that all cases share, and build the recipes' token stores."""
    for document in range(60):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{document}.txt").write_text("\n".join(sentences(document, 400)) + "\n")
    for name, seed, count in (("train", 1, 200), ("dev", 2, 40)):
        rows = [f"{text}\t{int('river' in text or 'rain' in text)}" for text in sentences(seed, count)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    for recipe in recipes:
        _run([
            "build-data", "--corpus", str(folder / "text"), "--recipe", recipe, "--out", str(folder / recipe),
            "--workers", "1",
        ])  # fmt: skip


def losses_of(name: str, folder: Path) -> dict[str, list[float]]:
    """Run a case and return its losses and gradient norms, a value for each step."""
    command, document, ranks = (CASES | FULL)[name]
    run = folder / "runs" / name.replace(" ", "-").replace(",", "")
    (folder / "ds.json").write_text(json.dumps(document))
    where = ["--run-dir", str(run), "--ds-config", str(folder / "ds.json"), "--threads", "1", "--log-every", "10"]
    if command[0] == "finetune":
        encoder = folder / "runs" / "tiny-fp32"
        own = ["--model", str(encoder), "--train", str(folder / "train.tsv"), "--dev", str(folder / "dev.tsv")]
        _run([*command, *own, *where, "--set", "schedule.epochs=3", "schedule.min_steps=1"])
    else:
        store = folder / command[2]
        _run([*command, *where, "--data", str(store), "--stop-at", str(STEPS), "--eval-windows", "8"], ranks)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    names = [name for name in train[0] if name.endswith("loss") or name == "grad_norm"]
    return {name: [line[name] for line in train] for name in names}


def _run(arguments: Sequence[str], ranks: int = 1) -> None:
    done = forks.run(*arguments, ranks=ranks, environment={"OMP_NUM_THREADS": "1"}, timeout_s=3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}")


def machine() -> dict[str, str]:
    """Return what the last bits of a loss depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    of_cpu = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    return {
        "cpu": of_cpu.get("model name", platform.processor()),
        "cache": of_cpu.get("cache size", ""),
        "flags": hashlib.sha256(of_cpu.get("flags", "").encode()).hexdigest()[:12],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def differences(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a line for each series that is not as recorded.

    On the same kind of machine every value must be equal. Elsewhere losses must be close, and gradient norms are not
    compared: a last bit decides now and then which token is drawn, and one other token of 500 is felt at once.
    """
    recorded = json.loads(FILE.read_text())
    is_same = recorded["machine"] == machine()
    lines = []
    for case, series in found.items():
        for name, values in series.items():
            before = recorded["cases"][case][name]
            tolerance = 0.0 if is_same else 0.15 if "bf16" in case else 0.02
            worst, step = max(
                (abs(new - old) / max(abs(old), 1e-6), step)
                for step, (old, new) in enumerate(zip(before, values, strict=True))
            )
            if (is_same or name != "grad_norm") and not worst <= tolerance:
                lines.append(f"{case}: {name} differs by {worst:.2g} of its value at step {step + 1}")
    return lines


def main() -> None:
    mode = sys.argv[1] if len(sys.argv) > 1 else "compare"
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_inputs(folder)
        names = [*CASES, *(FULL if mode == "full" else ())]
        found = {name: losses_of(name, folder) for name in names}
    document = {"machine": machine(), "cases": found}
    if mode == "full":
        print(json.dumps(document, indent=1))
    elif mode == "record":
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    else:
        told = differences(found)
        print("\n".join(told) or f"All losses are as in {FILE.name}.")
        sys.exit(bool(told))


if __name__ == "__main__":
    main()
