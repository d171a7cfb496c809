"""The options of `pretrain` and `finetune`, each declared once; those of the other commands are in `commands.py`.

Each command has one frozen dataclass. Its command line, its function in the Python API, the keys of a sweep's stages
and docs/reference/options.md are all derived from it (see `config/option.py`). Options that are also fields of
`RunSettings` or `FinetuneSettings` are recorded with the run, and a resumed run keeps their values unless you give new
ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from electra_ds.config.names import (
    DS_CONFIG_NOTE,
    FINETUNE_RECIPE,
    OWN_RECIPE,
    RECIPE_NOTE,
    TASKS,
    ds_config_names,
    finetune_recipe_names,
    recipe_names,
)
from electra_ds.config.option import (
    Options,
    duration_s,
    option,
    options_of,
    positive_or_auto,
    seed,
)
from electra_ds.config.plugins import TASK, registered_names
from electra_ds.core.errors import ConfigError, did_you_mean

SettingsT = TypeVar("SettingsT")
WandbMode = Literal["off", "online", "offline"]
Compile = Literal["auto", "on", "off"]
WHAT, HOW, WHERE, DATA, CHOICE = "what", "how", "where", "data", "choice"
_RECIPES, _JSONS = ", ".join(recipe_names()), ", ".join(ds_config_names())
_WATCH = "where to track it (metrics.jsonl is always written)"


_what = partial(option, group=WHAT, new_run_only=True)
_data = partial(option, group=DATA, new_run_only=True)
_how = partial(option, group=HOW)
_habit = partial(option, group=HOW, is_how=True)
_watch = partial(option, group=WHERE, is_how=True)


_OTHER_NAMES = {
    **dict.fromkeys(("ner", "pos", "tagging", "chunking"), "token-classification"),
    **dict.fromkeys(("qa", "squad"), "question-answering"),
    **dict.fromkeys(("embeddings", "retrieval", "similarity"), "sentence-embeddings"),
}


def task_name(text: str) -> str:
    """Return a task's name. The Hub's names, such as `stsb` and `sst2`, are accepted too, and `module:Class`."""
    if ":" in text:
        return text
    known = (*TASKS, *registered_names(TASK))
    plain = {task.replace("-", ""): task for task in known}
    task = plain.get(text.lower().replace("-", "").replace("_", ""))
    if task is None:
        hint = did_you_mean(_OTHER_NAMES.get(text.lower(), text.lower()), known) or "."
        raise argparse.ArgumentTypeError(f"there is no task {text!r}{hint} The tasks are {', '.join(known)}")
    return task


def overrides_option(example: str, **more: Any) -> Any:
    return option(f"override the recipe, e.g. --set {example}", flag="--set", nargs="+", metavar="KEY=VALUE", **more)


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """Return a recipe's overrides with the seed added. Raises ConfigError if they set a different seed."""
    others = [value for key, _, value in (each.partition("=") for each in overrides or ()) if key == "seed"]
    if seed is not None and any(value.strip() != str(seed) for value in others):
        raise ConfigError(f"--seed {seed} and --set seed={others[-1]} differ. Give one of them.")
    return [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]


def seed_option(of_what: str) -> Any:
    return option(
        f"{of_what}; the same as --set seed=S (default: 0)",
        metavar="S",
        parse=seed,
        group=WHAT,
        new_run_only=True,
        instead="write seeds: [0, 1]",
    )


def ds_config_option(**more: Any) -> Any:
    return option(
        f"{_JSONS}, or a DeepSpeed JSON ({DS_CONFIG_NOTE})", metavar="NAME|FILE", names="settings", is_how=True, **more
    )


def micro_batch_option(help: str, group: str = HOW) -> Any:
    return option(help, metavar="N|auto", parse=positive_or_auto, group=group, is_how=True)


def corpus_option(note: str, **more: Any) -> Any:
    return _what(
        f"text files and folders, hub:NAME#CONFIG@SPLIT, or READER:PLACE; repeat the option for each source ({note})",
        metavar="SOURCE",
        names="corpus",
        **more,
    )


def run_dir_option(default: str) -> Any:
    return option(
        f"the run's folder (default: {default})",
        metavar="DIR",
        group=HOW,
        new_run_only=True,
        instead="every trial has its own",
    )


@dataclass(frozen=True, kw_only=True)
class TrackingOptions(Options):
    """The trackers that receive a run's metrics in addition to metrics.jsonl."""

    wandb: WandbMode | None = _watch(
        "Weights & Biases; offline needs no account: upload later with `wandb sync` (default: off)", on="offline"
    )
    wandb_project: str | None = _watch("default: electra_ds", metavar="NAME")
    wandb_entity: str | None = _watch("the user or team (default: your account's)", metavar="NAME")
    wandb_group: str | None = _watch("group under which wandb shows runs together", metavar="NAME")
    tensorboard: bool | None = _watch("write RUN/tensorboard (default: no)", off="--no-tensorboard")
    callback: list[str] | None = _watch(
        "call these while training, such as a tracker of your own: names that bin/plugins lists, or module:Class",
        metavar="NAME",
        nargs="+",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrackingOptions):
    """The options that every kind of training has."""

    LAUNCHED: ClassVar[bool] = True

    recipe: str | Mapping[str, Any] | None = None
    overrides: list[str] | None = None
    seed: int | None = None
    resume: Path | None = option(
        "resume the run in this directory", metavar="RUN", group=WHAT, instead="resume the sweep itself with --resume"
    )
    ds_config: str | None = ds_config_option(group=HOW, aliases=("--deepspeed_config",))
    micro_batch: int | Literal["auto"] | None = None
    run_dir: Path | None = None
    stop_at: int | None = _how(
        "save and exit at this step of the schedule", metavar="STEP", instead="write stop_at_share"
    )
    time_limit: float | None = _how(
        "save and exit after this time, e.g. 90m, 3.5h or 23:55:00, and create the file `requeue` in the run",
        metavar="TIME",
        parse=duration_s,
        instead="give the sweep itself --time-limit",
    )
    dry_run: bool | None = _how(
        "check everything except the training itself, show what would run, and write nothing",
        instead="give the sweep itself --dry-run",
    )
    yes: bool | None = _habit("start even if the run is predicted to take a year or more")
    threads: int | None = _how("CPU threads (default: torch's choice)", metavar="N", instead="write resources.cpus")
    log_every: int | None = _habit("default: 10", metavar="STEPS")
    eval_every: int | None = None
    save_every: int | None = None
    keep: int | None = None

    def settings(self, defaults: SettingsT) -> SettingsT:
        """Return the settings to record: the given options, and `defaults` for the rest."""
        before: Any = defaults
        values = {each.name: getattr(self, each.name) for each in fields(before)}
        settings: SettingsT = replace(before, **{name: value for name, value in values.items() if value is not None})
        return settings

    def recipe_overrides(self) -> list[str]:
        """Return the recipe's overrides, including --seed. Raises ConfigError if they contradict each other."""
        return with_seed(self.overrides, self.seed)

    def check(self) -> None:
        if self.resume is None:
            self.recipe_overrides()
            self.check_new_run()
            return
        known = options_of(type(self))
        if flags := [str(known[name].flag) for name in self.given() if known[name].new_run_only]:
            raise ConfigError(
                f"--resume takes recipe and data from the run, so it cannot be combined with {', '.join(flags)}."
            )

    def check_new_run(self) -> None:
        """Raise ConfigError if options of a new run contradict each other."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """The options for the text and its tokenizer."""

    corpus: list[list[str]] | None = corpus_option("default: the built-in corpus")
    document_boundary: Literal["file", "blank-line"] | None = _what(
        "what ends a document in a text file (default: file)"
    )
    text_key: str | None = _what(
        "field of JSON lines, or column of Parquet files and datasets, with the text (default: text)", metavar="KEY"
    )
    streaming: bool | None = _what("read Hub datasets without downloading them completely")
    revision: str | None = _what("commit, branch or tag of the Hub dataset", metavar="REV")
    tokenizer: str | None = _what(
        "use this tokenizer.json or vocab.txt, the one in a folder, or the tokenizer of a model on the Hub, such as "
        "FacebookAI/xlm-roberta-base, instead of training one",
        metavar="PATH|NAME",
        names="model",
    )
    cased: bool | None = _what(
        "the vocab.txt was made from cased text",
        off="--uncased",
        off_help="the vocab.txt was made from lower-cased text (the default if unknown)",
    )
    strip_accents: bool | None = _what(
        "the vocab.txt was made from text without accents (default: yes if it is uncased)",
        off="--no-strip-accents",
    )
    allow_unknown: bool | None = _what("build a store even if the tokenizer turns nearly all of a source into [UNK]")

    def gives_corpus(self) -> bool:
        """Return whether any of these options is given."""
        return any(getattr(self, name) is not None for name in options_of(CorpusOptions))

    def check_store(self, data: Path | None) -> None:
        """Raise ConfigError if both a token store and a corpus are given."""
        if data is not None and self.gives_corpus():
            raise ConfigError("--data is a finished token store; give either --data, or --corpus and its options.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(CorpusOptions, RunOptions):
    """Pretrain a text encoder with the objective of a recipe, ELECTRA by default."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {WHAT: "what to train", HOW: "how to run it", WHERE: _WATCH}

    recipe: str | Mapping[str, Any] | None = _what(
        f"{_RECIPES}, or a YAML file ({RECIPE_NOTE})", metavar="NAME|FILE", names="settings"
    )
    overrides: list[str] | None = overrides_option(
        "schedule.total_steps=5000 model.hidden_size=256", group=WHAT, new_run_only=True, instead="write set"
    )
    seed: int | None = seed_option("of weights, data order, masks, samples and dropout")
    init_from: list[str] | None = _what(
        "start from the weights of a generator, a discriminator, or both: each a run, a transformers folder or a name "
        "on the Hub; a run, or a folder that bin/export made, may hold both",
        metavar="SOURCE",
        names="model",
    )
    data: Path | None = option(
        "a token store that bin/build-data made; with --resume: the new location of the run's own store",
        metavar="STORE",
        group=WHAT,
        names="folder",
    )
    micro_batch: int | Literal["auto"] | None = micro_batch_option(
        "sequences at a time, instead of the JSON's value; auto: the largest that fits, found by trying on a GPU"
    )
    run_dir: Path | None = run_dir_option("runs/RECIPE-TIME")
    compile: Compile | None = _habit(
        "torch.compile, with CUDA graphs if nothing is accumulated; auto: on GPUs of compute capability 7.0 and above",
        on="on",
    )
    eval_every: int | None = _how("default: a tenth of the schedule, at most 5000", metavar="STEPS")
    save_every: int | None = _habit("default: a tenth of the schedule, at most 2000", metavar="STEPS")
    keep: int | None = _habit("checkpoints to retain (default: 3)", metavar="N")
    keep_at: list[int] | None = _how(
        "steps whose checkpoints are retained regardless of --keep", metavar="STEP", instead="write checkpoints"
    )
    stop_on_collapse: bool | None = _how(
        "end the run if training collapses, as its objective defines it",
        instead="write it next to seeds, the same for all trials",
    )
    eval_windows: int | None = _how("held-out sequences (default: 512)", metavar="N")

    def check_new_run(self) -> None:
        if self.init_from is not None and len(self.init_from) > 2:
            raise ConfigError(
                f"--init-from takes a generator and a discriminator, but {len(self.init_from)} models are given."
            )
        self.check_store(self.data)


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """The source of a task's examples: a folder, the Hub or the user's own files."""

    folder: str | None = None
    """The folder with the official files."""
    hub: str | None = None
    """The name of a dataset on the Hub."""
    revision: str | None = None
    """The commit, branch or tag of that dataset."""
    train: str | None = None
    """The user's own files, and below them the names of their columns."""
    dev: str | None = None
    test: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    label_kind: Literal["auto", "classification", "regression"] = "auto"


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """Finetune an encoder on GLUE, SQuAD or a task of your own."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {
        WHAT: "what to train",
        DATA: (
            "where the examples come from (default: the Hub)",
            "With --resume, --data-dir, --hub, --train, --dev and --test give the new location of the run's own "
            "examples, and --model that of its encoder, which only a run without a checkpoint needs.",
        ),
        HOW: "how to run it",
        CHOICE: "selection on the development set, whose scores are then no longer an unbiased test",
        WHERE: _WATCH,
    }

    recipe: str | Mapping[str, Any] | None = _what(
        f"{', '.join(finetune_recipe_names())}, or a YAML file (default: {FINETUNE_RECIPE} for GLUE and SQuAD, "
        f"otherwise {OWN_RECIPE})",
        metavar="NAME|FILE",
        names="settings",
    )
    overrides: list[str] | None = overrides_option(
        "schedule.epochs=5 head.pooling=first", group=WHAT, new_run_only=True, instead="write set"
    )
    seed: int | None = seed_option("of the head, the order of the examples and dropout")
    model: str | None = option(
        "the encoder: a run of bin/pretrain or bin/finetune, a transformers folder, or a name on the Hub",
        metavar="RUN|FOLDER|HUB",
        group=WHAT,
        names="model",
    )
    task: str | None = _what(
        "a task or kind of task listed below, a name that a package registers, or module:Class",
        metavar="TASK",
        parse=task_name,
        names="name",
    )
    random_init: bool | None = _what(
        "use the model's shape and tokenizer with random weights from the seed, as a baseline for pretraining"
    )
    max_train_examples: int | None = _what("train on N examples (default: all)", metavar="N")
    data_dir: Path | None = option(
        "folder with official files: GLUE's folders, or SQuAD's JSON", metavar="DIR", group=DATA, names="folder"
    )
    hub: str | None = option(
        "a dataset on the Hub or a local folder: in the layout of nyu-mll/glue or squad for their tasks, in any "
        "layout, as NAME or NAME#CONFIG, for other kinds of tasks",
        metavar="NAME",
        group=DATA,
    )
    revision: str | None = _data("commit, branch or tag of the dataset on the Hub", metavar="REV")
    train: Path | None = option(
        "your own training examples: .csv, .tsv or .jsonl; .conll and others for tags, .json in SQuAD's layout",
        metavar="FILE",
        group=DATA,
        names="file",
    )
    dev: Path | None = option("your own examples to evaluate on", metavar="FILE", group=DATA, names="file")
    test: Path | None = option(
        "your own examples to predict at the end; labels are optional", metavar="FILE", group=DATA, names="file"
    )
    text: str | None = _data("the text (default: the first of text, sentence, sentence1, …)", metavar="COLUMN")
    pair: str | None = _data("the second text of a pair", metavar="COLUMN")
    label: str | None = _data(
        "the label (default: the first of label, labels, score, …); for .conll files the column's number, from 1; for "
        "multi-label also A,B,C, one column per class",
        metavar="COLUMN",
    )
    label_kind: Literal["classification", "regression"] | None = _data(
        "default: regression if the labels are not classes"
    )
    micro_batch: int | Literal["auto"] | None = micro_batch_option(
        "inputs at a time, instead of the JSON's value; auto: a rank's entire share, or less if memory runs out"
    )
    run_dir: Path | None = run_dir_option("runs/TASK-RECIPE-sSEED-TIME")
    eval_every: int | None = _how(
        "default: an epoch, or a tenth of the recipe's schedule.min_steps if that is larger", metavar="STEPS"
    )
    save_every: int | None = _habit("default: 500", metavar="STEPS")
    keep: int | None = _habit("checkpoints to retain (default: 1)", metavar="N")
    discard_weights: bool | None = _habit("remove the checkpoints when the run is done; keep scores and predictions")
    predict_test: bool | None = _how(
        "predict the test sets too, and write GLUE's files; works with --resume on a finished run as well"
    )
    early_stopping: int | None = option("stop after N evaluations without a better score", metavar="N", group=CHOICE)
    best: bool | None = option("keep and score the best evaluation's weights, not the last", group=CHOICE)

    def recipe_or_default(self) -> str | Mapping[str, Any]:
        """Return the given recipe, or the default one."""
        return self.recipe or (FINETUNE_RECIPE if self.task in TASKS else OWN_RECIPE)

    def source(self) -> TaskSource:
        """Return the source of the examples."""
        places = {"folder": self.data_dir, "train": self.train, "dev": self.dev, "test": self.test}
        paths = {name: None if path is None else str(path.absolute()) for name, path in places.items()}
        return TaskSource(
            hub=self.hub,
            revision=self.revision,
            text=self.text,
            pair=self.pair,
            label=self.label,
            label_kind=self.label_kind or "auto",
            **paths,
        )

    def check_new_run(self) -> None:
        if self.model is None:
            raise ConfigError("Say what to finetune with --model: a run, a transformers folder, or a name on the Hub.")
        is_kind = self.task is not None and self.task not in TASKS  # which takes files, or a data set
        of_task = {name: getattr(self, name) for name in ("data_dir", "hub", "revision")}
        own = {name: getattr(self, name) for name in ("train", "dev", "test", "text", "pair", "label", "label_kind")}
        if (self.task is None or is_kind) and (self.train is None) != (self.dev is None):
            raise ConfigError(f"Your own examples need --{'dev' if self.dev is None else 'train'} FILE too.")
        if self.task is None and self.train is None:
            raise ConfigError("Say what to finetune on: --task TASK, or your own examples with --train and --dev.")
        not_both = of_task if self.task is None or (is_kind and self.train is not None) else {} if is_kind else own
        for name, value in not_both.items():
            if value is not None:
                flag = name.replace("_", "-")
                if is_kind:
                    raise ConfigError(f"--{flag} cannot be combined with --train and --dev. Leave one of them out.")
                whose, others = ("your own examples", "--task") if not_both is own else ("--task", "--train and --dev")
                raise ConfigError(f"--{flag} is for {whose}. Leave out either --{flag} or {others}.")
        if self.data_dir is not None and (self.hub is not None or self.revision is not None):
            raise ConfigError(
                "--hub and --revision are for datasets on the Hub, so they cannot be used with --data-dir."
            )
