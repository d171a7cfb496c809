"""One run of the benchmark on this machine, with what it ran on."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.suite import Settings, Suite
from electra_ds.config.cards import check_gpu, detect_hardware
from electra_ds.config.recipe import load_recipe
from electra_ds.config.run_record import versions
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command
from electra_ds.core.ranks import join_ranks
from electra_ds.data.build import build_store
from electra_ds.data.corpus import BUILTIN, open_corpus
from electra_ds.data.token_store import TokenStore
from electra_ds.training.engine import has_bf16


def measure(
    *,
    recipe: str,
    micro_batches: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    rounds: int,
    steps: int,
    sections: Sequence[str],
    threads: int,
    console: Console,
) -> dict[str, Any]:
    """The whole document; where it was interrupted or memory ran out, the sections before that, and `incomplete`.

    Raises ConfigError for a dtype that the device cannot compute in.
    """
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise ConfigError(f"{command('bench')} measures one process; start it without a launcher.")
        device = devices.device(ranks.launch)
        check_gpu(detect_hardware(torch), device.index)
        on_gpu = device.type == "cuda"
        threads = devices.set_threads(threads, ranks.launch)
        settings = Settings(
            recipe=recipe,
            micro_batches=tuple(micro_batches or _micro_batches(device)),
            dtypes=tuple(dtypes or _dtypes(device)),
            rounds=rounds,
            steps=steps,
            sections=tuple(sections),
            device=device,
        )
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip

        def begin(name: str, turns: int) -> None:
            gc.collect()
            progress.add_task(name, total=turns)

        suite = Suite(settings, begin, lambda: progress.advance(progress.task_ids[-1]))
        results: dict[str, Any] = {}
        with _terminated_as_interrupted(), contextlib.ExitStack() as stack:
            # Before the progress display, for the building of a store has its own.
            corpus = stack.enter_context(_real_text(recipe)) if "precisions" in sections else None
            stack.enter_context(progress)
            try:
                suite.run(results, corpus)
            except KeyboardInterrupt:
                results["incomplete"] = "interrupted"
            except torch.OutOfMemoryError as error:
                results["incomplete"] = f"{max(settings.micro_batches)} rows do not fit; --micro-batches: {error}"
        return {
            "made_by": "electra-ds bench",
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": ["bin/bench", *sys.argv[1:]],
            "versions": versions(),
            "hardware": {
                "device": devices.device_name(device),
                "cpu": _cpu_model(),
                "threads": threads,
                "clock": "wall" if on_gpu else "CPU time of the process",
            },
            "recipe": recipe,
            "rounds": rounds,
        } | results


@contextlib.contextmanager
def _real_text(recipe: str) -> Iterator[TokenStore]:
    """The built-in corpus under the recipe's tokenizer."""
    with tempfile.TemporaryDirectory(prefix="electra-ds-bench-") as folder:
        yield build_store(open_corpus([BUILTIN]), load_recipe(recipe).tokenizer, Path(folder) / BUILTIN)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which ends a process on the spot and its temporary files stay, as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _micro_batches(device: torch.device) -> tuple[int, ...]:
    """128 rows of transformers' logits in fp32, with their gradient and softmax, are 8 GB alone."""
    if device.type != "cuda":
        return 8, 32
    return (128,) if torch.cuda.get_device_properties(device).total_memory > 20 * 10**9 else (32,)


def _dtypes(device: torch.device) -> list[str]:
    halves = ["fp16"] if device.type == "cuda" else []
    return ["fp32", *halves, *(["bf16"] if has_bf16(device) else [])]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
