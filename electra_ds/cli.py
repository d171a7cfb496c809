"""The parser behind every bin/ script and the `electra-ds` command.

What needs torch, numpy or another large package is imported inside the handlers, so that --help and bad arguments
answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from electra_ds import __version__
from electra_ds.config.deepspeed import ds_config_names
from electra_ds.config.manifest import RunDirectory
from electra_ds.config.overrides import load_recipe
from electra_ds.config.recipe import Recipe, TokenizerSection, recipe_names
from electra_ds.errors import ConfigError, ElectraError, FailedElsewhereError, InterruptedBySignalError
from electra_ds.launcher import detect

if TYPE_CHECKING:
    from electra_ds.data.corpus import Source
    from electra_ds.data.token_store import TokenStore
    from electra_ds.data.tokenizer import Tokenizer

_STARTED = time.monotonic()  # what a time limit counts from
_DEFAULT_RECIPE = "rc2020-small"
_HUB_MODEL = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_BUILTIN, _HUB = "builtin", "hub:"
_CORPUS_ARGUMENTS = ("corpus", "document_boundary", "text_key", "streaming", "revision", "tokenizer", "cased")
_PRETRAIN_EPILOG = """\
examples:
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny
      a first run, on documentation text that every machine has
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus my_texts/
      the reproduction study's ELECTRA-Small on your own text, on a 6 GB card
  bin/pretrain --ds-config ds_configs/gtx1060-6gb.json --corpus 'hub:wikimedia/wikipedia#20231101.sw' --corpus news/
      a dataset of the Hugging Face Hub, and a folder
  bin/pretrain --ds-config cpu --recipe tiny --wandb offline --tensorboard
      with curves to watch; ds_configs/cpu.json is known by its name too
  bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny --set optimizer.learning_rate=1e-3 seed=3
  bin/pretrain --resume runs/tiny-20260101-120000
  bin/pretrain --resume runs/tiny-20260101-120000 --ds-config ds_configs/rtx3090-24gb.json
      the same run goes on under another DeepSpeed JSON: same batch, schedule, data, masks and samples

several GPUs, several nodes:
  torchrun --nproc_per_node 4 bin/pretrain --ds-config ds_configs/zero1.json
  deepspeed --num_gpus 4 bin/pretrain --ds-config ds_configs/zero1.json
  srun --ntasks-per-node 4 --gpus-per-task 1 --kill-on-bad-exit=1 bin/pretrain --ds-config ds_configs/zero1.json

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint at the next step and leave; a second one, 5 s later or more, leaves at
once.
"""
_BUILD_DATA_EPILOG = """\
examples:
  bin/build-data --corpus my_texts/ --recipe rc2020-small --out stores/mine
      trains the recipe's tokenizer on the text and tokenises it
  bin/build-data --corpus dump.jsonl.zst --text-key body --tokenizer vocab.txt --out stores/dump
  bin/build-data --corpus 'hub:wikimedia/wikipedia#20231101.en' --streaming --corpus books/ --out stores/both \\
      --tokenizer google-bert/bert-base-multilingual-cased

Each --corpus is one source of text, and data.corpus_weights has one number for each. A source is files and folders
(read recursively), `builtin`, or hub:NAME#CONFIG@SPLIT, a dataset of the Hugging Face Hub (the split is `train` where
none is given; a local folder in the Hub's layout is hub:./FOLDER). Files are text (one document each, or
--document-boundary blank-line), JSON lines, WikiExtractor's <doc> files, each also as .gz, .bz2, .xz or .zst, and
Parquet. An interrupted build goes on where it stopped when run again.
"""
_EXPORT_EPILOG = """\
example:
  bin/export runs/tiny-20260101-120000 --out my-electra
      then: AutoModel.from_pretrained("my-electra/discriminator")
"""
_DOCTOR_EPILOG = """\
example:
  bin/doctor
      versions, memory, GPUs, and one real training step in each precision; exit status 0 where pretraining can run
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="electra-ds", description="Pretrain ELECTRA text encoders with DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"electra_ds {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pretrain(commands)
    _add_build_data(commands)
    _add_report(commands)
    _add_export(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def _add_pretrain(commands) -> None:  # type: ignore[no-untyped-def]
    command = _add_command(commands, "pretrain", "Pretrain generator and discriminator.", _PRETRAIN_EPILOG)
    command.set_defaults(handler=_pretrain)
    what = command.add_argument_group("what to train")
    what.add_argument("--recipe", metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file")
    _add_overrides(what, "schedule.total_steps=5000 model.hidden_size=256")
    what.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this directory")
    _add_corpus_arguments(what, default_note="default: the built-in corpus")
    what.add_argument("--data", type=Path, metavar="STORE", help="a token store that bin/build-data made")
    # What the deepspeed launcher adds, and what people who know its scripts give.
    command.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    command.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    how = command.add_argument_group("how to run it")
    how.add_argument(
        "--ds-config", "--deepspeed_config", metavar="NAME|FILE",
        help=f"{', '.join(ds_config_names())}, or a DeepSpeed JSON",
    )  # fmt: skip
    how.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run lives (default: runs/RECIPE-TIME)")
    how.add_argument("--stop-at", type=_positive, metavar="STEP", help="save and leave at this step of the schedule")
    how.add_argument(
        "--time-limit", type=_duration_s, metavar="TIME",
        help="save and leave after this time, e.g. 90m, 3.5h or 23:55:00, and leave the file `requeue` in the run",
    )  # fmt: skip
    how.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    how.add_argument("--log-every", type=_positive, metavar="STEPS", help="default: 10")
    how.add_argument("--eval-every", type=_positive, metavar="STEPS", help="default: a tenth of it, at most 5000")
    how.add_argument("--save-every", type=_positive, metavar="STEPS", help="default: a tenth of it, at most 2000")
    how.add_argument("--keep", type=_positive, metavar="N", help="checkpoints to retain (default: 3)")
    how.add_argument("--eval-windows", type=_positive, metavar="N", help="held-out sequences (default: 512)")
    _add_tracking(command.add_argument_group("where to watch it (metrics.jsonl is always written)"))


def _add_tracking(group) -> None:  # type: ignore[no-untyped-def]
    group.add_argument(
        "--wandb", choices=("off", "online", "offline"),
        help="Weights & Biases; offline needs no account and is uploaded later by `wandb sync` (default: off)",
    )  # fmt: skip
    group.add_argument("--wandb-project", metavar="NAME", help="default: electra_ds")
    group.add_argument("--wandb-entity", metavar="NAME", help="the user or team (default: that of the account)")
    group.add_argument("--wandb-group", metavar="NAME", help="shows runs together")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, help="write RUN/tensorboard (default: no)"
    )


def _add_build_data(commands) -> None:  # type: ignore[no-untyped-def]
    command = _add_command(commands, "build-data", "Tokenise a corpus into a token store.", _BUILD_DATA_EPILOG)
    command.set_defaults(handler=_build_data)
    _add_corpus_arguments(command, default_note="`builtin` for the built-in corpus", required=True)
    command.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder to make")
    command.add_argument("--recipe", default=_DEFAULT_RECIPE, metavar="NAME|FILE", help="whose tokenizer to train")
    _add_overrides(command, "tokenizer.vocab_size=16000")
    command.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")


def _add_report(commands) -> None:  # type: ignore[no-untyped-def]
    command = _add_command(
        commands, "report", "Summarise a run: table, curves, sample sentences.", "example:\n  bin/report runs/tiny-…\n"
    )
    command.set_defaults(handler=_report)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")


def _add_export(commands) -> None:  # type: ignore[no-untyped-def]
    command = _add_command(
        commands, "export", "Write generator and discriminator as transformers folders.", _EXPORT_EPILOG
    )
    command.set_defaults(handler=_export)
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")


def _add_doctor(commands) -> None:  # type: ignore[no-untyped-def]
    command = _add_command(
        commands, "doctor", "Say what this machine can pretrain with, and how to mend what is wrong.", _DOCTOR_EPILOG
    )
    command.set_defaults(handler=_doctor)
    command.add_argument("--json", action="store_true", help="print it as JSON")


def _add_overrides(group, example: str) -> None:  # type: ignore[no-untyped-def]
    group.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help=f"override the recipe, e.g. --set {example}",
    )  # fmt: skip


def _add_corpus_arguments(group, default_note: str, required: bool = False) -> None:  # type: ignore[no-untyped-def]
    group.add_argument(
        "--corpus", nargs="+", action="append", metavar="SOURCE", required=required,
        help=f"text files and folders, or hub:NAME#CONFIG@SPLIT; once for each source ({default_note})",
    )  # fmt: skip
    group.add_argument(
        "--document-boundary", choices=("file", "blank-line"),
        help="where a document ends in a text file (default: file)",
    )  # fmt: skip
    group.add_argument(
        "--text-key", metavar="KEY", help="field of JSON lines, column of Parquet and datasets (default: text)"
    )
    group.add_argument(
        "--streaming", action="store_true", default=None, help="read Hub datasets without downloading them whole"
    )
    group.add_argument("--revision", metavar="REV", help="commit, branch or tag of the Hub dataset")
    group.add_argument(
        "--tokenizer", metavar="PATH|NAME",
        help="use this tokenizer.json or vocab.txt, a folder with one, or that of a model on the Hub, such as "
        "FacebookAI/xlm-roberta-base, instead of training one",
    )  # fmt: skip
    group.add_argument("--cased", action="store_true", default=None, help="the vocab.txt was made from cased text")


def _positive(text: str) -> int:
    value = int(text) if text.lstrip("+").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _duration_s(text: str) -> float:
    """Seconds of `90m`, `3.5h`, `2d`, `300s`, or Slurm's `[D-]HH:MM:SS`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return float(match[1]) * units[match[2]]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90m, 3.5h or 23:55:00")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn our errors into one message and an exit status (2; 128 + N after signal N).

    What every rank of a node meets alike is said by its first one; what one rank meets, by that rank.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without → must not end a run
    try:
        speaks = detect(os.environ).local_rank == 0
    except ConfigError as error:
        print(f"electra-ds: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.nullcontext() if speaks else contextlib.redirect_stderr(io.StringIO()):
        options = build_parser().parse_args(arguments)
    try:
        options.handler(options)
    except FailedElsewhereError:
        sys.exit(2)
    except InterruptedBySignalError as stop:
        if speaks:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except ElectraError as error:
        if speaks or error.rank is not None:
            where = f" (rank {error.rank})" if error.rank else ""
            print(f"electra-ds {options.command}{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if speaks:
            print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def _pretrain(options: argparse.Namespace) -> None:
    _check_pretrain_arguments(options)
    recipe = None if options.resume else load_recipe(options.recipe or _DEFAULT_RECIPE, options.overrides)

    from rich.console import Console

    from electra_ds import runtime
    from electra_ds.data.token_store import TokenStore
    from electra_ds.report.run_report import report_run
    from electra_ds.train import launch
    from electra_ds.train.pretrain import pretrain

    wanted = launch.Options(**{name: getattr(options, name) for name in launch.Options.__dataclass_fields__})
    with runtime.ranks() as ranks, contextlib.ExitStack() as held:
        console = Console(quiet=not ranks.is_main)
        run = RunDirectory(ranks.from_main(_run_path(options, recipe)))
        with ranks.together():
            plan = launch.plan_new(wanted, recipe, run, ranks) if recipe else launch.plan_resume(wanted, run, ranks)
        store = None
        with ranks.together():
            if ranks.is_main and recipe:
                store = _open_store(options, recipe)
        store_path = ranks.from_main(store and store.path.resolve())
        with ranks.together():
            if recipe:
                job = launch.prepare_new(wanted, recipe, plan, store or TokenStore(store_path), run, ranks)
            else:
                job = launch.prepare_resume(wanted, plan, run, ranks)
        with ranks.together():
            if ranks.is_main:
                held.enter_context(run.locked())
        launch.announce(job, console)
        time_limit = None if options.time_limit is None else options.time_limit - (time.monotonic() - _STARTED)
        if pretrain(job, ranks, console, time_limit) and ranks.is_main:
            report_run(run, console)


def _run_path(options: argparse.Namespace, recipe: Recipe | None) -> Path:
    default = Path("runs") / f"{recipe.name if recipe else ''}-{datetime.now():%Y%m%d-%H%M%S}"
    path: Path = options.resume or options.run_dir or default
    return path


def _check_pretrain_arguments(options: argparse.Namespace) -> None:
    if options.resume is not None:
        new_run_only = ("recipe", "overrides", "data", *_CORPUS_ARGUMENTS, "run_dir")
        given = [name for name in new_run_only if getattr(options, name)]
        if given:
            flags = ", ".join("--" + name.replace("overrides", "set").replace("_", "-") for name in given)
            raise ConfigError(f"--resume takes recipe and data from the run, so {flags} cannot be given with it.")
    elif options.ds_config is None:
        raise ConfigError("Say how to run it with --ds-config, for instance: --ds-config cpu")
    elif options.data is not None and any(getattr(options, name) for name in _CORPUS_ARGUMENTS):
        raise ConfigError("--data is a finished token store; give either it or --corpus and what belongs to that.")


def _open_store(options: argparse.Namespace, recipe: Recipe) -> TokenStore:
    """The store that --data names, or one built in stores/ for --corpus or the built-in corpus."""
    from electra_ds.data.token_store import TokenStore

    if options.data is not None:
        return TokenStore(options.data)
    options.corpus = options.corpus or [[_BUILTIN]]
    return _build_store(options, recipe, Path("stores") / _store_name(options, recipe))


def _store_name(options: argparse.Namespace, recipe: Recipe) -> str:
    """A name for people, after the first source and the tokenizer, and a hash of all that was asked for."""
    first = options.corpus[0][0]
    if first.startswith(_HUB):
        dataset, *config_and_split = re.split("[#@]", first.removeprefix(_HUB))
        name = re.sub(r"[^\w.-]+", "_", "-".join([Path(dataset).resolve().name, *config_and_split])).strip("_")
    else:
        name = Path(first).resolve().name if first != _BUILTIN else _BUILTIN
    kind = (
        Path(options.tokenizer).stem if options.tokenizer else f"{recipe.tokenizer.kind}-{recipe.tokenizer.vocab_size}"
    )
    if options.corpus == [[_BUILTIN]]:
        return f"{name}-{kind}"
    corpus = [
        [word if word.startswith(_HUB) else str(Path(word).resolve()) for word in words] for words in options.corpus
    ]
    given = (
        corpus, options.document_boundary, options.text_key, options.revision, options.tokenizer, options.cased,
        None if options.tokenizer else recipe.tokenizer.lowercase,
    )  # fmt: skip
    return f"{name}-{kind}-{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}"


def _build_store(options: argparse.Namespace, recipe: Recipe, out: Path, workers: int | None = None) -> TokenStore:
    from electra_ds.data.build import build_store
    from electra_ds.data.corpus import Corpus

    if (options.streaming or options.revision) and not any(
        word.startswith(_HUB) for words in options.corpus for word in words
    ):
        raise ConfigError("--streaming and --revision are for datasets of the Hub; give one as --corpus hub:NAME.")
    tokenizer = _tokenizer(options, recipe)
    corpus = Corpus(tuple(_source(options, words) for words in options.corpus))
    return build_store(corpus, tokenizer, out, workers=workers)


def _source(options: argparse.Namespace, words: list[str]) -> Source:
    """What one --corpus asks for."""
    text_key = options.text_key or "text"
    if not any(word.startswith(_HUB) for word in words):
        if len(words) > 1 and _BUILTIN in words:
            raise ConfigError(f"Give `{_BUILTIN}` a --corpus of its own.")
        from electra_ds.data.corpus import open_source

        return open_source(words, options.document_boundary or "file", text_key)
    if len(words) > 1:
        raise ConfigError(f"Give each Hub dataset a --corpus of its own, not {' '.join(words)}.")
    from electra_ds.data.hub import HubSource

    return HubSource(words[0], text_key, streaming=bool(options.streaming), revision=options.revision)


def _tokenizer(options: argparse.Namespace, recipe: Recipe) -> Tokenizer | TokenizerSection:
    """The given tokenizer, from here or from the Hub, or the recipe's section to train one from."""
    if options.tokenizer is None:
        if options.cased:
            raise ConfigError("--cased says how a given vocab.txt was made; it needs --tokenizer.")
        return recipe.tokenizer
    path = Path(options.tokenizer)
    if path.exists() or path.suffix in (".json", ".txt") or not _HUB_MODEL.fullmatch(options.tokenizer):
        from electra_ds.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(path, lowercase=False if options.cased else None)
    else:
        if options.cased:
            raise ConfigError(f"--cased is for a vocab.txt; {options.tokenizer} from the Hub says itself what it is.")
        from electra_ds.data.hub import load_hub_tokenizer

        tokenizer = load_hub_tokenizer(options.tokenizer)
    if tokenizer.added:
        added = ", ".join(tokenizer.added)
        print(f"The tokenizer {options.tokenizer} lacked {added}; new pieces at the end of its vocabulary play them.")
    return tokenizer


def _build_data(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    store = _build_store(options, recipe, options.out, options.workers)
    info = store.info
    print(
        f"{store.path}: {info.num_documents:,} documents, {info.num_tokens:,} tokens of {info.vocab_size:,} kinds "
        f"({info.dtype}, {sum(info.file_bytes.values()) / 1e6:,.1f} MB). "
        f"Train on it with: bin/pretrain --data {store.path} --recipe … --ds-config …"
    )


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    from electra_ds.report.run_report import report_run

    report_run(RunDirectory(options.run), Console())


def _export(options: argparse.Namespace) -> None:
    from electra_ds.train.export import export_run

    print(export_run(options.run, options.out))


def _doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from electra_ds.train.doctor import doctor

    sys.exit(doctor(Console(), as_json=options.json))
