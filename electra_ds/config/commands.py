"""All commands by name, and the options of those that do not train, each declared once, as in `options.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from electra_ds.config.names import (
    GPU_RECIPE,
    RECIPE_NOTE,
    SWEEPS,
    finetune_recipe_names,
    recipe_names,
    shipped_names,
)
from electra_ds.config.option import Options, duration_s, gibibytes, option
from electra_ds.config.options import (
    WHAT,
    CorpusOptions,
    FinetuneOptions,
    PretrainOptions,
    corpus_option,
    ds_config_option,
    micro_batch_option,
    overrides_option,
    seed_option,
)
from electra_ds.core.errors import ConfigError
from electra_ds.core.program import command

_RECIPES = ", ".join(recipe_names())
_RAY, _SCORES, _UNKNOWN, _CORRUPT, _HUB = "ray", "scores", "unknown", "corrupt", "hub"
_corrupt = partial(option, group=_CORRUPT)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """Predict what fits on a GPU or this CPU, and how long it takes."""

    recipe: str | Mapping[str, Any] | None = option(f"{_RECIPES}, or a YAML file ({RECIPE_NOTE})", metavar="NAME|FILE")
    overrides: list[str] | None = overrides_option("data.sequence_length=512")
    ds_config: str | None = ds_config_option()
    card: str | None = option(
        "a GPU, installed here or not, such as 'GTX 1060 6GB', RTX4090, 'RTX 5070 Ti', A6000, L4, L40S or A10; or cpu "
        "for this machine's CPU (default: the card that the JSON is named after, or this machine)",
        metavar="NAME",
        exclusive="where",
    )
    memory_gb: float | None = option(
        "plan for a GPU with this much free memory, in GiB",
        metavar="N",
        parse=gibibytes,
        exclusive="where",
    )
    vocab_size: int | None = option("vocabulary size of your tokenizer (default: the recipe's)", metavar="N")
    micro_batch: int | Literal["auto"] | None = micro_batch_option(
        "instead of the JSON's; auto: the largest that fits", group=""
    )
    ranks: int = option("number of GPUs (default: 1)", metavar="N", default=1)
    all: bool | None = option("print a table of every card, with every recipe of ELECTRA or with --recipe")
    json: bool | None = option("print the plan as JSON")

    def check(self) -> None:
        only_one = (self.ds_config, self.card, self.memory_gb, self.vocab_size, self.micro_batch)
        if self.all and (any(only_one) or self.ranks > 1):
            raise ConfigError(
                "--all shows each card alone with its own JSON, so it can only be combined with --recipe and --set."
            )
        if self.all and self.overrides and self.recipe is None:
            raise ConfigError("--all shows every recipe unchanged; name the one that --set changes with --recipe.")


@dataclass(frozen=True, kw_only=True)
class BuildDataOptions(CorpusOptions):
    """Tokenise a corpus into a token store, or draw the replacements of a Fast-ELECTRA run for a store."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {
        WHAT: "the text and its tokenizer",
        _CORRUPT: "replacements that a frozen generator draws before a run",
    }

    corpus: list[list[str]] | None = corpus_option("`builtin` for the built-in corpus")
    out: Path = option("folder to create", metavar="STORE", required=True)
    recipe: str | Mapping[str, Any] | None = option(
        f"recipe whose tokenizer to train (default: {GPU_RECIPE}); with --corrupt: the recipe of the run (default: "
        f"fast-electra-small)",
        metavar="NAME|FILE",
    )
    overrides: list[str] | None = overrides_option("tokenizer.vocab_size=16000")
    workers: int | None = option("processes (default: one per core)", metavar="N")
    corrupt: Path | None = _corrupt("draw replacements for this store, instead of tokenising text", metavar="STORE")
    init_from: str | None = _corrupt(
        "the generator: a run, a transformers folder or a name on the Hub", metavar="SOURCE"
    )
    ds_config: str | None = ds_config_option(group=_CORRUPT)
    micro_batch: int | None = _corrupt("sequences per forward pass (default: the JSON's)", metavar="N")
    eval_windows: int | None = _corrupt(
        "held-out sequences of an evaluation; the run must use the same number (default: 512)", metavar="N"
    )
    threads: int | None = _corrupt("CPU threads (default: torch's choice)", metavar="N")

    def check(self) -> None:
        if (self.corpus is None) == (self.corrupt is None):
            raise ConfigError("Give either --corpus, to tokenise text, or --corrupt, to draw replacements for a store.")
        only_then = (self.init_from, self.ds_config, self.micro_batch, self.eval_windows, self.threads)
        if self.corrupt is None and any(each is not None for each in only_then):
            raise ConfigError(
                "--init-from, --ds-config, --micro-batch, --eval-windows and --threads can be used only with --corrupt."
            )
        if self.corrupt is not None and (self.tokenizer is not None or self.workers is not None):
            raise ConfigError(
                "--corrupt takes the tokenizer of the store, and one process: leave out --tokenizer and --workers."
            )
        super().check()


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Run a study: one command over seeds, tasks and hyperparameters."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {_RAY: "where to run it"}

    what: list[str] = option(
        f"{', '.join(shipped_names(SWEEPS))}, or a YAML file; status DIR", flag="", nargs="*", metavar="NAME|FILE"
    )
    overrides: list[str] | None = option(
        "change the file, e.g. --set finetune.model=RUN finetune.seeds=[0,1] resources.gpus=0.5",
        flag="--set",
        metavar="KEY=VALUE",
    )
    out: Path | None = option("the sweep's folder (default: runs/sweep-NAME)", metavar="DIR", aliases=("--run-dir",))
    resume: Path | None = option("run what is missing in this sweep", metavar="DIR")
    retry_failed: bool | None = option("with --resume: also run the failed trials again")
    dry_run: bool | None = option("list the trials and what they cost, and run nothing")
    local: bool | None = option("run one trial after the other, without Ray", group=_RAY)
    address: str | None = option("a Ray cluster: auto, or HOST:6379", metavar="ADDRESS", group=_RAY)
    time_limit: float | None = option("save and exit after this time", metavar="TIME", parse=duration_s, group=_RAY)
    storage: str | None = option(argparse.SUPPRESS, metavar="DIR")  # once a place for Tune's own records

    def check(self) -> None:
        what = self.what or []  # None from Python
        if what[:1] == ["status"]:
            if len(what) != 2 or len(self.given()) > 1:
                raise ConfigError(f"Give a sweep's folder, and nothing else: {command('sweep')} status DIR")
            return
        if self.retry_failed and self.resume is None:
            raise ConfigError("--retry-failed works only with --resume.")
        if (self.resume is None) == (not what) or len(what) > 1:
            raise ConfigError("Give one sweep to run, by name or file, or --resume DIR to continue one.")
        if self.resume is not None and self.out is not None:
            raise ConfigError("--resume names the sweep's folder, so leave out --out.")
        if self.storage is not None:
            raise ConfigError("--storage has no effect any more, since Tune's own records are removed. Leave it out.")
        if self.local and self.address:
            raise ConfigError("--local runs without Ray, so leave out --address.")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Summarise a pretraining, a sweep, or the scores of finetunings over seeds and tasks."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {_SCORES: "for runs of bin/finetune"}

    run: list[Path] = option("run directories, finished or not, or a sweep's folder", flag="", nargs="+", metavar="RUN")
    data: Path | None = option("new location of the token store, if a pretraining's has moved", metavar="STORE")
    compare: list[str] | None = option(
        "published rows to show next to them, such as mercier2021 and clark2020-small-owt; docs/glue-scores.md has the "
        "others",
        metavar="NAME",
        group=_SCORES,
    )
    csv: Path | None = option("write every run's scores to this file", metavar="FILE", group=_SCORES)
    submission: Path | None = option("write the zip for gluebenchmark.com to this file", metavar="FILE", group=_SCORES)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Write a model as transformers folders, or a run for DeepSpeed."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {_HUB: "publishing"}

    run: Path = option("a run directory, or one of its checkpoints", flag="", metavar="RUN")
    to: Literal["transformers", "deepspeed"] = option(
        "transformers (default): generator and discriminator, or a finetuned model with its head, to load with "
        "from_pretrained. deepspeed: a pretraining's weights and optimizer as DeepSpeed's own checkpoint",
        default="transformers",
    )
    out: Path | None = option("default: RUN/export, or RUN/native for DeepSpeed", metavar="DIR")
    ds_config: str | None = option(
        "the JSON with the ZeRO stage and precision to write for (default: the run's)", metavar="NAME|FILE"
    )
    encoder_only: bool | None = option("write only the encoder of a finetuned model, to load with AutoModel")
    push_to_hub: str | None = option(
        "upload it to the Hugging Face Hub as NAME or OWNER/NAME, or the networks of a pretraining as "
        "NAME-discriminator and so on",
        metavar="NAME",
        group=_HUB,
    )
    private: bool | None = option("create private repositories", group=_HUB)
    license: str | None = option("for the model card, such as apache-2.0", metavar="ID", group=_HUB)
    language: list[str] | None = option(
        "of the text, for the model card, such as en de", nargs="+", metavar="CODE", group=_HUB
    )
    dataset: list[str] | None = option(
        "names on the Hub of the text and their licences, for the model card, such as wikimedia/wikipedia=cc-by-sa-4.0",
        nargs="+",
        metavar="NAME[=LICENCE]",
        group=_HUB,
    )
    dry_run: bool | None = option("write the folder and say what would be uploaded, but upload nothing", group=_HUB)

    def check(self) -> None:
        if self.push_to_hub is None and (self.private or self.dry_run):
            raise ConfigError("--private and --dry-run belong to --push-to-hub NAME.")
        if self.push_to_hub is not None and self.to == "deepspeed":
            raise ConfigError("--push-to-hub is for transformers folders, not for --to deepspeed.")


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(Options):
    """List the recipes that come with the program, or print one."""

    name: str | None = option(
        ", ".join([*recipe_names(), *finetune_recipe_names()]), flag="", nargs="?", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Report whether this machine can pretrain, and how to fix what is wrong."""

    json: bool | None = option("print the report as JSON")


@dataclass(frozen=True, kw_only=True)
class PluginsOptions(Options):
    """List the objectives and callbacks that can be used by name, with their packages, and check that each can be
    loaded."""


@dataclass(frozen=True, kw_only=True)
class ListOptions(Options):
    """List a run's checkpoints."""

    run: Path = option("a run directory", flag="", metavar="RUN")
    json: bool | None = option("print JSON, sizes in bytes")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Read every byte of checkpoints and compare hashes."""

    run: Path = option("a run directory, or one of its checkpoints", flag="", metavar="RUN|CHECKPOINT")


@dataclass(frozen=True, kw_only=True)
class PruneOptions(Options):
    """Remove old checkpoints and the leftovers of interrupted saves."""

    run: Path = option("a run directory in which no training is running", flag="", metavar="RUN")
    keep: int | None = option("number of checkpoints to keep (default: the run's --keep)", metavar="N")
    damaged: bool | None = option("also remove checkpoints that were set aside as damaged")
    dry_run: bool | None = option("list what would be removed, and remove nothing")


@dataclass(frozen=True, kw_only=True)
class ImportOptions(CorpusOptions):
    """Turn a native DeepSpeed checkpoint into a run that can be resumed."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {
        WHAT: "what was trained (default: recorded in our own exports)",
        _UNKNOWN: (
            "what the files may not record",
            "The tensors do not show the number of heads, layer_norm_eps, the activation and the position type. They "
            "are taken from the recipe (--set generator.num_attention_heads=4 model.layer_norm_eps=1e-6) and checked "
            "against the config.json files that you give, or the recipe of our own export.",
        ),
    }

    corpus: list[list[str]] | None = corpus_option("default: the exported run's token store")
    native: Path = option("the checkpoint's folder", flag="", metavar="NATIVE")
    trusted: bool | None = option(argparse.SUPPRESS)  # once needed, now without effect
    run_dir: Path = option("folder of the run to create", metavar="RUN", required=True)
    ds_config: str | None = ds_config_option()
    micro_batch: int | Literal["auto"] | None = micro_batch_option("instead of the JSON's", group="")
    recipe: str | Mapping[str, Any] | None = option(f"{_RECIPES}, or a YAML file", metavar="NAME|FILE", group=WHAT)
    overrides: list[str] | None = overrides_option("schedule.total_steps=5000 generator.sharing=none", group=WHAT)
    seed: int | None = seed_option("of data order, masks, samples and dropout from here on")
    data: Path | None = option("a token store that bin/build-data made", metavar="STORE", group=WHAT)
    generator_config: Path | None = option(
        "the generator's config.json, or the folder it is in", metavar="FILE", group=_UNKNOWN
    )
    discriminator_config: Path | None = option(
        "the discriminator's config.json, or the folder it is in", metavar="FILE", group=_UNKNOWN
    )
    frozen: list[str] | None = option(
        "prefixes of the names of frozen parameters, if a stage 0 checkpoint does not record them",
        metavar="NAME",
        group=_UNKNOWN,
    )

    def check(self) -> None:
        self.check_store(self.data)


COMMANDS: dict[str, type[Options]] = {
    "pretrain": PretrainOptions, "finetune": FinetuneOptions, "sweep": SweepOptions, "build-data": BuildDataOptions,
    "plan": PlanOptions, "recipes": RecipesOptions, "report": ReportOptions, "export": ExportOptions,
    "checkpoint ls": ListOptions, "checkpoint verify": VerifyOptions, "checkpoint prune": PruneOptions,
    "checkpoint import": ImportOptions, "doctor": DoctorOptions,
    "plugins": PluginsOptions,
}  # fmt: skip
