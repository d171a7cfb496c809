"""`electra-ds bench`: how fast a step is, beside transformers, on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds.cli.arguments import add_command
from electra_ds.errors import ConfigError

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_SECTIONS = ("step", "parts", "mixed", "data", "startup")
_DTYPES = ("fp32", "bf16", "fp16")
_EPILOG = """\
Times, interleaved in one run, our step through the DeepSpeed engine and the plain one, and a step of transformers'
ElectraForMaskedLM + ElectraForPreTraining; prints ratios with quartiles, which a busy machine hardly moves.

examples:
  bin/bench                                   a few minutes on two CPU cores
  bin/bench --json today.json --picture today.png
  bin/bench --compare benchmarks/results/cpu-1-thread.json
      says what got slower, and ends with status 1 if anything did
  bin/bench --from today.json --compare yesterday.json
      compares two files, without measuring
  bin/bench --sections step --dtypes bf16 --micro-batches 128
"""


def add_bench(commands: Commands) -> None:
    """The parser of `bench`."""
    command = add_command(commands, "bench", "Time our step beside transformers', part by part.", _EPILOG)
    command.set_defaults(handler=_bench)
    command.add_argument("--recipe", default="rc2020-small", metavar="NAME|FILE", help="default: %(default)s")
    command.add_argument(
        "--sections", nargs="+", choices=_SECTIONS, default=list(_SECTIONS), metavar="NAME",
        help=f"of {', '.join(_SECTIONS)}; default: all",
    )  # fmt: skip
    command.add_argument(
        "--micro-batches", nargs="+", type=_positive, metavar="N", help="rows of a step; default: 8 32, on a GPU 128"
    )
    command.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, metavar="NAME",
        help="of fp32, bf16, fp16; default: fp32, and bf16 where the hardware has it; on a GPU fp16 too",
    )  # fmt: skip
    command.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="that count; one more warms up; default: %(default)s"
    )
    command.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads; default: %(default)s")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios and parts as a PNG")
    command.add_argument("--from", dest="source", type=Path, metavar="FILE", help="take a JSON file; measure nothing")
    command.add_argument("--compare", type=Path, metavar="OLD", help="a JSON file: say what got slower since")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _bench(options: argparse.Namespace) -> None:
    old = None if options.compare is None else _read(options.compare)
    for path in (options.json, options.picture):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")

    from rich.console import Console

    from electra_ds.bench.show import draw, print_results, slower

    console = Console()
    if options.source is not None:
        results = _read(options.source)
    else:
        from electra_ds.bench.run import measure

        results = measure(
            recipe=options.recipe, micro_batches=options.micro_batches, dtypes=options.dtypes, rounds=options.rounds,
            sections=options.sections, threads=options.threads, console=console,
        )  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf8")
    print_results(results, console)
    if options.picture is not None:
        draw(results, options.picture)
    if old is not None:
        worse = slower(old, results)
        for line in worse:
            console.print(f"[red]slower[/] {line}", highlight=False, soft_wrap=True)
        if worse:
            raise SystemExit(1)
        console.print(f"Nothing got slower since {options.compare}.", highlight=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text("utf8"))
        if results["made_by"] != "electra-ds bench":
            raise ValueError("it says so nowhere")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a result of bin/bench --json: {error}") from error
    return results
