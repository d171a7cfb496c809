"""The commands by name, and docs/reference/options.md, which is written from their options:

python -m electra_ds.config.options_page > docs/reference/options.md
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from electra_ds.config.option import Option, Options, described, value_type
from electra_ds.config.options import FinetuneOptions, PretrainOptions
from electra_ds.config.run_record import FinetuneSettings, RunSettings
from electra_ds.config.tool_options import (
    BuildDataOptions,
    DoctorOptions,
    ExportOptions,
    ImportOptions,
    ListOptions,
    PlanOptions,
    PruneOptions,
    RecipesOptions,
    ReportOptions,
    SweepOptions,
    VerifyOptions,
)

COMMANDS: dict[str, type[Options]] = {
    "pretrain": PretrainOptions, "finetune": FinetuneOptions, "sweep": SweepOptions, "build-data": BuildDataOptions,
    "plan": PlanOptions, "recipes": RecipesOptions, "report": ReportOptions, "export": ExportOptions,
    "checkpoint ls": ListOptions, "checkpoint verify": VerifyOptions, "checkpoint prune": PruneOptions,
    "checkpoint import": ImportOptions, "doctor": DoctorOptions,
}  # fmt: skip
_RECORDED = {PretrainOptions: RunSettings, FinetuneOptions: FinetuneSettings}
_BEGIN = """\
# Options

Every option of every command. This page is written by `python -m electra_ds.config.options_page`.

From Python the same options are arguments of `electra_ds.pretrain`, `electra_ds.finetune` and the other functions,
under the names in the last column. The keys of a sweep's stages have these names too.

- **recorded**: written into the run's `run.json`; a resumed run keeps it until you give another value.
- **new runs only**: refused with `--resume`, which takes it from the run.
- **in a sweep**: not an option of a sweep's stage; what to do in its place.
"""


def reference_page() -> str:
    """Return docs/reference/options.md."""
    return _BEGIN + "".join(_command(name, kind) for name, kind in COMMANDS.items())


def _command(name: str, kind: type[Options]) -> str:
    trains = kind in _RECORDED
    recorded = {each.name for each in fields(_RECORDED[kind])} if trains else set()
    text = f"\n## {name}\n\n{kind.__doc__}\n"
    for group, titles in ({"": ""} | kind.GROUPS).items():
        rows = [(key, of) for key, of in described(kind).items() if of.group == group and of.help != argparse.SUPPRESS]
        if not rows:
            continue
        title, *more = [titles] if isinstance(titles, str) else titles
        text += f"\n### {name}: {title}\n" if title else ""
        text += "".join(f"\n{line}\n" for line in more)
        text += "\n| option | what it does | Python |\n| --- | --- | --- |\n"
        for key, of in rows:
            notes = [
                *(["recorded"] if key in recorded else []),
                *(["new runs only"] if trains and of.new_run_only else []),
                *([f"in a sweep: {of.instead}"] if trains and of.instead else []),
            ]
            help = of.help + (f" **{'; '.join(notes)}**" if notes else "")
            text += f"| {_escaped(_flag(of, value_type(kind, key)))} | {_escaped(help)} | `{key}` |\n"
    return text


def _flag(of: Option, kind: Any) -> str:
    flags = "`, `".join(filter(None, [of.flag or of.metavar, of.off]))
    value = "|".join(get_args(kind)) if get_origin(kind) is Literal else of.metavar if of.flag else None
    return f"`{flags}`" + (f" {value}" if value else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
