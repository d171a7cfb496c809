"""Write the pages of docs/reference/ that follow from the code: options, recipe keys, and keys of a DeepSpeed JSON.

    python docs/generate.py

A test compares the pages with what this writes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from electra_ds.config import deepspeed_keys, deepspeed_sections
from electra_ds.config.commands import COMMANDS
from electra_ds.config.deepspeed_keys import ZERO_OLD_NAMES
from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.monitors import MONITOR_SECTIONS
from electra_ds.config.names import FINETUNE_RECIPES, RECIPES, shipped_text
from electra_ds.config.option import Option, options_of, value_type
from electra_ds.config.options import FinetuneOptions, PretrainOptions
from electra_ds.config.recipe import OUR_RECIPES, ElectraRecipe, Recipe, load_recipe
from electra_ds.config.run_record import FinetuneSettings, RunSettings
from electra_ds.config.sections import Section

FOLDER = Path(__file__).parent / "reference"


def escaped(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- options

OPTIONS = """\
# Options

This page lists all options of all commands.

In Python the options of pretrain, finetune, build-data, plan and checkpoint import are arguments of the function, under
the names in the last column. The keys of a sweep's stages have these names too, unless a note says otherwise.
`run_sweep` and `report_runs` have arguments of their own: see [From Python](../python.md).

- **recorded**: written into the run's `run.json`; a resumed run keeps it until you give another value.
- **new runs only**: not allowed with `--resume`, which takes the value from the run.
- **in a sweep**: not an option of a sweep's stage; the note says what to use instead.
"""


def options_page() -> str:
    return OPTIONS + "".join(options_of_command(name, kind) for name, kind in COMMANDS.items())


def options_of_command(name: str, kind: Any) -> str:
    settings: dict[type, type] = {PretrainOptions: RunSettings, FinetuneOptions: FinetuneSettings}
    trains = kind in settings
    recorded = {each.name for each in fields(settings[kind])} if trains else set()
    text = f"\n## {name}\n\n{kind.__doc__}\n"
    for group, titles in ({"": ""} | kind.GROUPS).items():
        given = [
            (key, of) for key, of in options_of(kind).items() if of.group == group and of.help != argparse.SUPPRESS
        ]
        if not given:
            continue
        title, *more = [titles] if isinstance(titles, str) else titles
        text += f"\n### {name}: {title}\n" if title else ""
        text += "".join(f"\n{line}\n" for line in more)
        rows = []
        for key, of in given:
            notes = [
                *(["recorded"] if key in recorded else []),
                *(["new runs only"] if trains and of.new_run_only else []),
                *([f"in a sweep: {of.instead}"] if trains and of.instead else []),
            ]
            help = of.help + (f" **{'; '.join(notes)}**" if notes else "")
            rows.append([escaped(flag(of, value_type(kind, key))), escaped(help), f"`{key}`"])
        text += table(["option", "what it does", "Python"], rows)
    return text


def flag(of: Option, kind: Any) -> str:
    flags = "`, `".join(filter(None, [of.flag or of.metavar, of.off]))
    value = "|".join(get_args(kind)) if get_origin(kind) is Literal else of.metavar if of.flag else None
    return f"`{flags}`" + (f" {value}" if value else "")


# --- recipe keys

RECIPE_PAGE = """\
# Recipe keys

A recipe holds every value that changes the mathematics of a run. It is a YAML file; a wrong key is an error that names the
nearest valid one. `bin/recipes NAME` prints a shipped recipe, `extends: NAME` at the top of a file starts from one, and
`--set model.hidden_size=512` changes a single key. [Recipes](../recipes.md) describes the shipped recipes and how to write
your own.

"required" in the column of defaults means that a recipe must give the key, itself or through `extends`. The last two columns
have the values of two shipped recipes and the sources that their files name. There, "Table" and "the code" mean the study's
(Mercier 2021) in `rc2020-small` and `rc2020`, and the original's (Clark et al. 2020) in `electra-small` and `original`.

## Pretraining

These are the keys of the objectives `electra` and `electra-15`. Every other objective has the sections `tokenizer`, `data`,
`model`, `optimizer` and `schedule` too. [Objectives](../objectives.md) describes the objectives, and how to write your own.
"""
OTHER_OBJECTIVES = """
## Sections of other objectives

{rows}
"""
FINETUNE_PAGE = """
## Finetuning

These are the keys of the recipes of `bin/finetune`. The section `by_task` of a file has values for single tasks, such as
`rte: {schedule.epochs: 10}`.
"""
PRETRAINING_SOURCES, FINETUNING_SOURCES = ("rc2020-small", "electra-small"), ("rc2020", "original")
_COMMENTED = re.compile(r"( *)([a-z_0-9]+):(?: +([^#\n]*?))?(?: +# *(.*))?$")


def sources(folder: str, name: str) -> dict[str, tuple[str, str]]:
    """Return the value and the comment of each key in a shipped recipe, by dotted key."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in shipped_text(folder, name).partition("\nby_task:")[0].splitlines():
        match = _COMMENTED.fullmatch(line)
        if match is None:
            continue
        indent, key, value, comment = match.groups()
        if not indent:
            section = "" if value else f"{key}."
        found[(section if indent else "") + key] = (value or "", comment or "")
    return found


def recipes_page() -> str:
    return (
        RECIPE_PAGE
        + keys_of(ElectraRecipe, {name: sources(RECIPES, name) for name in PRETRAINING_SOURCES})
        + other_objectives()
        + FINETUNE_PAGE
        + keys_of(FinetuneRecipe, {name: sources(FINETUNE_RECIPES, name) for name in FINETUNING_SOURCES})
    )


def other_objectives() -> str:
    """Return the sections that our other objectives have, each described once."""
    described = {section_of(field) for field in ElectraRecipe.model_fields.values()}
    lists, text = [], ""
    for objective, kind in OUR_RECIPES.items():
        own = {name: section_of(field) for name, field in kind.model_fields.items() if name not in Recipe.model_fields}
        lists.append(f"- `{objective}`: " + ", ".join(f"`{name}`" for name in own))
        for name, section in own.items():
            if section is not None and section not in described:
                described.add(section)
                inner = [(key, f"{name}.{key}", each) for key, each in section.model_fields.items()]
                text += f"\n### {name} of {objective}\n" + keys_table(inner, {})
    return OTHER_OBJECTIVES.format(rows="\n".join(lists)) + text


def keys_of(kind: type[Section], shipped: dict[str, dict[str, tuple[str, str]]]) -> str:
    top = [(name, name, field) for name, field in kind.model_fields.items() if section_of(field) is None]
    text = keys_table(top, shipped)
    for name, field in kind.model_fields.items():
        section = section_of(field)
        if section is not None:
            inner = [(key, f"{name}.{key}", each) for key, each in section.model_fields.items()]
            about = (
                f"\n{inspect.cleandoc(section.__doc__)}\n"
                if section.__doc__ and section.__doc__ != Section.__doc__
                else ""
            )
            text += f"\n### {name}\n{about}" + keys_table(inner, shipped)
    return text


def section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def keys_table(keys: list[tuple[str, str, FieldInfo]], shipped: dict[str, dict[str, tuple[str, str]]]) -> str:
    rows = []
    for name, dotted, field in keys:
        row = [f"`{name}`", escaped(type_of(field)), default_of(field), escaped(field.description or MEANINGS[dotted])]
        for found in shipped.values():
            value, comment = found.get(dotted, ("", ""))
            shown = "" if name in ("name", "description") else f"`{value}`" if value else ""
            row.append(escaped(f"{shown}<br>{comment}" if comment else shown))
        rows.append(row)
    return table(["key", "type", "default", "what it is", *shipped], rows)


MEANINGS = {
    "name": "Name of the recipe.",
    "description": "One sentence about the recipe, which `bin/recipes` prints.",
    "model.embedding_size": "Width of the embedding tables; a matrix brings it to `hidden_size` if they differ.",
    "model.hidden_size": "Width of the layers.",
    "model.num_hidden_layers": "Number of layers.",
    "model.num_attention_heads": "Number of attention heads, which must divide `hidden_size`.",
    "model.intermediate_size": "Width of the feed-forward part of a layer.",
    "model.max_position_embeddings": "Size of the position table, at least `data.sequence_length`.",
    "model.hidden_dropout_prob": "Dropout after the embeddings, the attention and the feed-forward part.",
    "model.attention_probs_dropout_prob": "Dropout on the attention probabilities.",
    "model.initializer_range": "Standard deviation of the initial weights of matrices and embedding tables.",
    "model.layer_norm_eps": "Epsilon of LayerNorm.",
    "generator.loss_weight": "Weight of the generator's loss.",
    "optimizer.learning_rate": "Peak learning rate.",
    "optimizer.beta1": "Decay rate of AdamW's first moment.",
    "optimizer.beta2": "Decay rate of AdamW's second moment.",
    "optimizer.epsilon": "Epsilon of AdamW.",
    "optimizer.weight_decay": "Decoupled weight decay.",
    "schedule.total_steps": "Number of optimizer steps.",
    "head.initializer_range": "Standard deviation of the head's initial weights if `initializer` is `normal`.",
}
"""The keys whose names say it, so that their declarations do not."""


def type_of(field: FieldInfo) -> str:
    kind = field.annotation
    options = [each for each in get_args(kind) if each is not type(None)] if get_origin(kind) is not Literal else []
    can_be_null = len(options) < len(get_args(kind)) and get_origin(kind) in (Union, type(int | None))
    if can_be_null:
        (kind,) = options
    if get_origin(kind) is Literal:
        text = ", ".join(f"`{value}`" for value in get_args(kind))
    else:
        names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
        is_mapping = get_origin(kind) is dict
        text = (
            "name, file or mapping"
            if is_mapping
            else names.get(kind, "list of names" if "str" in str(kind) else "list of numbers")
        )  # type: ignore[arg-type]
    limits = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    for bound in field.metadata:
        if type(bound) in limits:
            (limit,) = (getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name))
            text += f", {limits[type(bound)]} {number(limit)}"
    return text + (", or null" if can_be_null else "")


def number(value: float) -> str:
    return {2**63: "2^63"}.get(value) or (f"{value:,}" if isinstance(value, int) else f"{value:g}")  # type: ignore[call-overload]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default == "":
        return "empty"
    return (
        f"`{json.dumps(field.default) if field.default is None or isinstance(field.default, bool) else field.default}`"
    )


# --- keys of a DeepSpeed JSON

DEEPSPEED_PAGE = """\
# Keys of a DeepSpeed JSON

A DeepSpeed JSON says how a recipe is run. It remains a file that `deepspeed` itself accepts, and no key is silently ignored:
each is filled in, honoured, passed on to DeepSpeed, reported as having no effect, or refused. The keys and
defaults are those of DeepSpeed 0.19.8.

## Keys that belong to the recipe

If you leave these keys out or set them to `"auto"`, they are filled in. Any other value must agree with the recipe; one that
contradicts it is an error that names both. The values below are those of `tiny`.
"""
OURS = """
## Keys that are read here

| key | what it does here |
| --- | --- |
| `train_micro_batch_size_per_gpu` | Sequences that a rank processes at once; `"auto"` takes the largest that fits. |
| `gradient_accumulation_steps` | Micro-batches per step; follows from the global batch, the micro-batch and the number of ranks. |
| `zero_optimization` | ZeRO stage 0 to 3 and its options; offloaded optimizers are torch's AdamW, so nothing is compiled. |
| `fp16` | fp16 weights with fp32 master weights. At stage 0 our optimizer scales the loss. `"enabled": "auto"` means fp16 on a GPU, except on GTX 16xx cards. |
| `bf16` | bf16 weights with fp32 master weights. |
| `torch_autocast` | torch.autocast over fp32 weights; fp16 only at stage 0. |
| `activation_checkpointing` | `number_checkpoints`: how many layers of each encoder the backward pass recomputes. |
"""
_PASSED_THROUGH = """
## Keys that are passed on to DeepSpeed
"""
_UNUSED = """
## Keys without effect, and refused features

For all of these keys, DeepSpeed's default value and a switch that is off are accepted, and a note says that the key was left
out. The keys without effect are accepted with any value; for the others, any other value is an error. The older names
`cpu_offload`, `cpu_offload_param` and `stage3_gather_fp16_weights_on_model_save`, if they are true, are read as the keys that
replaced them: see [files for other trainers](../launching.md#files-for-other-trainers).
"""


def deepspeed_page() -> str:
    owners = deepspeed_keys._owners(load_recipe("tiny", []))
    owned = [[f"`{key}`", f"`{value}`".lower(), escaped(owner)] for key, (value, owner) in owners.items()]
    text = DEEPSPEED_PAGE + table(["key", "value", "owner"], owned) + OURS
    precision = [
        [f"`{section}`", ", ".join(f"`{key}`" for key in sorted(keys))]
        for section, keys in deepspeed_sections.PRECISION_KEYS.items()
    ]
    text += "\nThe precision sections have these keys:\n" + table(["section", "keys"], precision)
    text += _PASSED_THROUGH + table(
        ["key", "type"],
        [[f"`{key}`", deepspeed_keys._JSON_TYPES[kind]] for key, kind in deepspeed_keys.PASSED_THROUGH.items()],
    )
    text += (
        f"\nThe sections {', '.join(f'`{name}`' for name in MONITOR_SECTIONS)} choose trackers, as in DeepSpeed: see\n"
    )
    text += "[Tracking](../tracking.md).\n" + _UNUSED
    for place, unused in (("", deepspeed_keys.UNUSED), ("zero_optimization.", deepspeed_keys.UNUSED_IN_ZERO)):
        text += table(["key", "what happens"], list(unused_rows(place, unused)))
    return text


def unused_rows(place: str, unused: deepspeed_keys.Unused) -> Iterator[list[str]]:
    for key in sorted({*unused.defaults, *unused.without_effect, *unused.removed}):
        what = (
            f"the old name of `{ZERO_OLD_NAMES[key]}`, read as such where it is true" if place and key in ZERO_OLD_NAMES
            else "no effect with any value" if key in unused.without_effect
            else "DeepSpeed 0.19 no longer has the feature" if key in unused.removed
            else "the feature is not supported"
        )  # fmt: skip
        yield [f"`{place}{key}`", what]


PAGES = {"options.md": options_page, "recipes.md": recipes_page, "deepspeed.md": deepspeed_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), "utf8")
