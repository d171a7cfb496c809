"""The machinery behind `config/options.py`: each option is declared once, and everything else is derived from that.

`option()` declares a field of a frozen dataclass. The field's type and metadata define

- the command line: `add_options` adds the arguments to a parser, and `Options.parsed` reads the parser's result;
- the Python API: `Options.of` checks the keyword arguments, and `Options.check` their combination;
- sweeps and the reference page, which read the metadata through `options_of`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from electra_ds.core.errors import ConfigError, did_you_mean

Names = Literal["", "name", "settings", "file", "folder", "model", "corpus"]
"""The kind of thing that an option's text refers to: `settings` is a recipe or a DeepSpeed JSON, a `model` is a name on
the Hub or a folder, and a `corpus` is a source of text."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """The description of one option: its flag, help text and parsing, and its treatment in sweeps and resumed runs."""

    help: str
    group: str = ""
    metavar: str | None = None
    flag: str | None = None
    """By default the field's name, such as `--micro-batch`; empty for a positional argument."""
    aliases: tuple[str, ...] = ()
    """Other accepted spellings, which --help does not show."""
    off: str = ""
    """The flag that sets a switch to False."""
    off_help: str = ""
    nargs: str | None = None
    parse: Callable[[str], Any] | None = None
    """Parses the text from the command line; by default the field's type does."""
    exclusive: str = ""
    """Options with the same word here are mutually exclusive."""
    required: bool = False
    names: Names = ""
    new_run_only: bool = False
    """True if it is not allowed with --resume."""
    is_how: bool = False
    """True if a run's result does not depend on it."""
    instead: str = ""
    """The replacement in a sweep's file; empty if a stage of a sweep accepts the option."""
    on: str = ""
    """The value that `true` means in a sweep's file, since YAML reads the word on as true; `false` means off."""


def option(help: str, *, default: Any = None, **described: Any) -> Any:
    """Declare a field of an `Options` class; the keyword arguments are the fields of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **described)})


# --- values on the command line


def positive(text: str) -> int:
    """Return a whole number above 0."""
    value = int(text) if text.lstrip("+").isdigit() else 0
    if not 1 <= value < 10**15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def positive_or_auto(text: str) -> int | Literal["auto"]:
    """Return a whole number above 0, or auto."""
    return "auto" if text == "auto" else positive(text)


def seed(text: str) -> int:
    """Return a whole number that is at least 0."""
    if not (text.isascii() and text.isdecimal()) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def duration_s(text: str) -> float:
    """Return the seconds of `90m`, `3.5h`, `2d`, `300s`, or Slurm's `[D-]HH:MM:SS`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return float(match[1]) * units[match[2]]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90m, 3.5h or 23:55:00")


def gibibytes(text: str) -> float:
    """Return a size in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB")
    return value


# --- the base of every command's options


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command, whose docstring is its summary in --help. None means that an option was not given."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {}
    """The titles of the groups in --help, in order, some with a description. The group "" has no title."""
    LAUNCHED: ClassVar[bool] = False
    """True if the command accepts the arguments that DeepSpeed's launcher and scripts add."""

    def check(self) -> None:
        """Raise ConfigError if options contradict each other."""

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> Self:
        """Return the options that a parser with `add_options` parsed."""
        return cls(**{each.name: getattr(arguments, each.name) for each in fields(cls)})

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the options from a mapping of names to Python values or command-line texts, as in `time_limit="90m"`.

        Raises ConfigError for an unknown name, with a suggestion, and for a value that is not allowed.
        """
        known = options_of(cls)
        problems = [
            f"{name}: there is no such option{did_you_mean(name, known) or '.'}" for name in given if name not in known
        ]
        values = {}
        for name, value in given.items():
            if name in known:
                try:
                    values[name] = _from_python(value, value_type(cls, name), known[name])
                except (argparse.ArgumentTypeError, TypeError) as error:
                    problems.append(f"{name}: {error}")
        by_group: dict[str, list[str]] = {}
        for name, value in values.items():
            if known[name].exclusive and value is not None:
                by_group.setdefault(known[name].exclusive or "", []).append(name)
        problems += [f"{' and '.join(names)}: give only one" for names in by_group.values() if len(names) > 1]
        if problems:
            raise ConfigError("These options cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """Return the given options by name. A switch that is False counts only if it has a flag for that."""
        return {
            name: value
            for name, each in options_of(type(self)).items()
            if (value := getattr(self, name)) is not None and value != [] and (value is not False or each.off)
        }


def options_of(kind: type[Options]) -> dict[str, Option]:
    """Return the options of a command by name, in the order of their declaration."""
    found = {each.name: each.metadata["option"] for each in fields(kind)}
    by_name = {name: "--" + name.replace("_", "-") for name in found}
    return {name: replace(of, flag=by_name[name]) if of.flag is None else of for name, of in found.items()}


_type_hints = cache(get_type_hints)


def value_type(kind: type[Options], name: str) -> Any:
    """Return the type of an option's value when given: `int` for a field `int | None`."""
    hint = _type_hints(kind)[name]  # type: ignore[arg-type]  # for mypy, the class has the __hash__ of its objects
    if get_origin(hint) in (Union, UnionType):
        types = tuple(each for each in get_args(hint) if each is not NoneType)
        return types[0] if len(types) == 1 else Union[types]  # noqa: UP007  # made at run time
    return hint


def _from_python(value: Any, kind: Any, of: Option) -> Any:
    """Convert a Python value to the command line's form. Raises ArgumentTypeError or TypeError."""
    if value is None:
        return None
    if get_origin(kind) is list:
        values = value if isinstance(value, list | tuple) else [value]
        inner = get_args(kind)[0]
        if get_origin(inner) is list and not any(isinstance(each, list | tuple) for each in values):
            return [[_word(each) for each in values]]
        return [_from_python(each, inner, of) for each in values]
    if kind is Path:
        return Path(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(map(str, get_args(kind)))}")
        return value
    parse = of.parse or (positive if kind is int else None)
    if parse is not None and not (isinstance(value, float) and kind is float):
        return parse(str(value))
    return _word(value) if kind is str else value


def _word(value: Any) -> str:
    if not isinstance(value, str | Path):
        raise argparse.ArgumentTypeError(f"{value!r} is not a name or a path")
    return str(value)


# --- argparse


def add_options(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add all options of a command to its parser, in the groups of `kind`."""
    if kind.LAUNCHED:
        parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
        parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for key, title in kind.GROUPS.items():
        groups[key] = parser.add_argument_group(*((title,) if isinstance(title, str) else title))
    exclusive: dict[str, argparse._ActionsContainer] = {}
    defaults = {each.name: each.default for each in fields(kind)}
    for name, of in sorted(options_of(kind).items(), key=lambda item: [*groups].index(item[1].group)):
        home = groups[of.group]
        if of.exclusive:
            if of.exclusive not in exclusive:
                exclusive[of.exclusive] = home.add_mutually_exclusive_group()
            home = exclusive[of.exclusive]
        _add(home, name, of, value_type(kind, name), defaults[name])


def _add(home: argparse._ActionsContainer, name: str, of: Option, kind: Any, default: Any) -> None:
    words: dict[str, Any] = {"help": of.help, "default": default}
    if of.flag:
        words |= {"dest": name, "required": of.required}
    if kind is bool:
        _add_switch(home, of, words)
        return
    if of.nargs is not None:
        words["nargs"] = of.nargs
    elif get_origin(kind) is list:
        words["nargs"] = "+"
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        if of.flag:
            words["action"] = "append" if get_origin(kind) is list else "extend"
    if get_origin(kind) is Literal:
        words["choices"] = get_args(kind)
    elif of.metavar is not None:
        words["metavar"] = of.metavar
    parse = of.parse or {int: positive, Path: Path}.get(kind)
    if parse is not None:
        words["type"] = parse
    home.add_argument(of.flag or name, **words)
    for alias in of.aliases:
        home.add_argument(alias, **words | {"help": argparse.SUPPRESS, "required": False})


def _add_switch(home: argparse._ActionsContainer, of: Option, words: dict[str, Any]) -> None:
    assert of.flag is not None
    if of.off == of.flag.replace("--", "--no-", 1):
        home.add_argument(of.flag, action=argparse.BooleanOptionalAction, **words)
        return
    if of.off:
        home = home.add_mutually_exclusive_group()
    home.add_argument(of.flag, action="store_true", **words)
    if of.off:
        home.add_argument(of.off, action="store_false", **words | {"help": of.off_help})
