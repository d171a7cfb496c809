"""`bin/bench`: how fast a step is on this machine, compared with transformers."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_ds import cli
from electra_ds.cli.arguments import add_command, wide_console
from electra_ds.config.names import GPU_RECIPE
from electra_ds.config.option import positive
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command

if TYPE_CHECKING:
    from electra_ds.cli.arguments import Commands

_DTYPES = ("fp32", "bf16", "fp16")
_SECTIONS = {  # and what is in the results if they were measured
    "step": ("step",),
    "parts": ("parts",),
    "mixed": ("mixed_lengths", "unpadded"),
    "data": ("data_path",),
    "startup": ("start_up",),
    "memory": ("memory",),
    "checkpoints": ("checkpoints",),
    "precisions": ("precisions",),
}
_WHEN_NAMED = ("memory", "checkpoints", "precisions")
_STEPS = 500
_MEASURING = {
    "recipe": GPU_RECIPE, "sections": [name for name in _SECTIONS if name not in _WHEN_NAMED],
    "micro_batches": None, "dtypes": None, "rounds": 5, "steps": _STEPS, "threads": 1,
}  # fmt: skip
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
  bin/bench --sections memory precisions
      sections that have to be named: the memory model beside what steps really take, on a GPU under the memory of each
      card that a DeepSpeed JSON is shipped for; and loss curves of the recipe by precision, on the same real text
  bin/bench --sections checkpoints
      saving and loading, beside DeepSpeed's own checkpoints, of ELECTRA-Small and of 110 M parameters (5 GB of disk)
"""


def main(arguments: Sequence[str]) -> None:
    """Run `bin/bench` with these arguments."""
    cli.main(["bench", *arguments], [add_bench])


def add_bench(commands: Commands) -> None:
    """The parser of `bench`."""
    command = add_command(commands, "bench", "Time our step beside transformers', part by part.", _EPILOG)
    command.set_defaults(handler=_bench, **_MEASURING)
    command.add_argument("--recipe", metavar="NAME|FILE", help="default: %(default)s")
    command.add_argument(
        "--sections", nargs="+", choices=_SECTIONS, metavar="NAME",
        help=f"of {', '.join(_SECTIONS)}; default: all but {', '.join(_WHEN_NAMED)}",
    )  # fmt: skip
    command.add_argument(
        "--micro-batches", nargs="+", type=positive, metavar="N",
        help="rows of a step; default: 8 32, on a GPU 128, on a small one 32",
    )  # fmt: skip
    command.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, metavar="NAME",
        help="of fp32, bf16, fp16; default: fp32, and bf16 where the hardware has it; on a GPU fp16 too",
    )  # fmt: skip
    command.add_argument(
        "--rounds", type=positive, metavar="N", help="that count; one more warms up; default: %(default)s"
    )
    command.add_argument(
        "--steps", type=positive, metavar="N", help="of the section precisions, in each; default: %(default)s"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: %(default)s")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios, parts and loss curves as a PNG")
    command.add_argument("--from", dest="source", type=Path, metavar="FILE", help="take a JSON file; measure nothing")
    command.add_argument("--compare", type=Path, metavar="OLD", help="a JSON file: say what got slower since")


def _bench(options: argparse.Namespace) -> None:
    _check_arguments(options)

    from benchmarks.compare import compare
    from benchmarks.show import print_results
    from electra_ds.core.terminal import say

    old = None if options.compare is None else _read(options.compare)
    console = wide_console()
    if options.source is not None:
        results = _read(options.source)
    else:
        if old is not None:
            _check_comparable(old, options)

        from benchmarks.run import measure

        results = measure(**{name: getattr(options, name) for name in _MEASURING}, console=console)
    with _whole(options.source):
        print_results(results, console)
    _write(results, options)
    if "incomplete" in results:
        say(console, f"Incomplete: {results['incomplete']}")
        raise SystemExit(1)
    if old is not None:
        found = compare(old, results)
        lines = [f"on other hardware: {difference}" for difference in found.differences]
        lines += [f"not measured now: {name}" for name in found.missing]
        for line in (*lines, *(f"slower: {line}" for line in found.slower)):
            say(console, line)
        if found.slower:
            raise SystemExit(1)
        console.print(f"Nothing that was measured got slower since {options.compare}.", highlight=False)


def _check_arguments(options: argparse.Namespace) -> None:
    """ConfigError for what could only fail after minutes of measuring."""
    given = [name for name, default in _MEASURING.items() if getattr(options, name) != default]
    if options.source is not None and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--from measures nothing, so {flags} cannot be given with it.")
    if options.steps != _STEPS and "precisions" not in options.sections:
        raise ConfigError("--steps is for the section precisions; name it: --sections precisions.")
    for path in (options.json, options.picture):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            problem = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ConfigError(f"{path} cannot be written: {problem}.")
    if options.picture is not None and options.picture.suffix != ".png":
        raise ConfigError(f"--picture draws a PNG; call it {options.picture.with_suffix('.png')}.")


def _check_comparable(old: dict[str, Any], options: argparse.Namespace) -> None:
    """Raise ConfigError if nothing that is to be measured stands in the older results."""
    from benchmarks.compare import check_recipe, figures

    check_recipe(old, options.recipe)
    asked = {key: old[key] for section in options.sections for key in _SECTIONS[section] if key in old}
    if not figures(asked):
        raise ConfigError(f"{options.compare} has nothing to compare of the sections {', '.join(options.sections)}.")


def _write(results: dict[str, Any], options: argparse.Namespace) -> None:
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n", "utf8")
        if options.picture is not None:
            from benchmarks.picture import draw

            with _whole(options.source):
                draw(results, options.picture)
    except OSError as error:
        raise ConfigError(f"Cannot write the results: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A file that --json wrote. Raises ConfigError."""
    from benchmarks.compare import figures

    try:
        results = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a result of {command('bench')} --json: {error}") from error
    with _whole(path):
        has_any = figures(results) or any(section in results for section in _WHEN_NAMED)
        if results["made_by"] == "electra-ds bench" and isinstance(results["recipe"], str) and has_any:
            return dict(results)
    raise ConfigError(f"{path} is not a result of {command('bench')} --json.")


@contextlib.contextmanager
def _whole(path: Path | None) -> Iterator[None]:
    """Raise ConfigError if a file, which may come from anywhere, lacks something or has it in another form."""
    try:
        yield
    except (
        ConfigError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        StopIteration,
    ) as error:
        if path is None:
            raise
        raise ConfigError(f"{path} is not a whole result of {command('bench')} --json: {error}") from error
