"""The options of `pretrain` and `finetune`, each declared once; those of the other commands are in `commands.py`.

A command has one frozen dataclass. Command lines, the functions of the Python API, the keys of a sweep's stages and
docs/reference/options.md all follow from it (`config/option.py` says how). An option that `RunSettings` or
`FinetuneSettings` has too is recorded with the run, and a resumed run keeps its value until another one is given.
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
    described,
    duration_s,
    option,
    positive_or_auto,
    seed,
)
from electra_ds.core.errors import ConfigError, did_you_mean

SettingsT = TypeVar("SettingsT")
WandbMode = Literal["off", "online", "offline"]
Compile = Literal["auto", "on", "off"]
WHAT, HOW, WHERE, DATA, CHOICE = "what", "how", "where", "data", "choice"
_RECIPES, _JSONS = ", ".join(recipe_names()), ", ".join(ds_config_names())
_WATCH = "where to watch it (metrics.jsonl is always written)"


_what = partial(option, group=WHAT, new_run_only=True)
_data = partial(option, group=DATA, new_run_only=True)
_how = partial(option, group=HOW)
_habit = partial(option, group=HOW, is_how=True)
_watch = partial(option, group=WHERE, is_how=True)


def task_name(text: str) -> str:
    """Return a task's name; the names of the Hub, such as `stsb` and `sst2`, are understood too."""
    plain = {task.replace("-", ""): task for task in TASKS}
    task = plain.get(text.lower().replace("-", "").replace("_", ""))
    if task is None:
        raise argparse.ArgumentTypeError(
            f"there is no task {text!r}{did_you_mean(text.lower(), TASKS) or '.'} They are {', '.join(TASKS)}"
        )
    return task


def overrides_option(example: str, **more: Any) -> Any:
    return option(f"override the recipe, e.g. --set {example}", flag="--set", nargs="+", metavar="KEY=VALUE", **more)


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """Return the overrides of a recipe with its seed. Raises ConfigError if they give another one."""
    others = [value for key, _, value in (each.partition("=") for each in overrides or ()) if key == "seed"]
    if seed is not None and any(value.strip() != str(seed) for value in others):
        raise ConfigError(f"--seed {seed} and --set seed={others[-1]} differ. Give one of them.")
    return [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]


def seed_option(of_what: str) -> Any:
    return option(
        f"{of_what}; the same as --set seed=S (default: 0)",
        metavar="S", parse=seed, group=WHAT, new_run_only=True, instead="write seeds: [0, 1]",
    )  # fmt: skip


def ds_config_option(**more: Any) -> Any:
    return option(
        f"{_JSONS}, or a DeepSpeed JSON ({DS_CONFIG_NOTE})", metavar="NAME|FILE", names="settings", is_how=True, **more
    )


def micro_batch_option(help: str, group: str = HOW) -> Any:
    return option(help, metavar="N|auto", parse=positive_or_auto, group=group, is_how=True)


def corpus_option(note: str, **more: Any) -> Any:
    return _what(
        f"text files and folders, or hub:NAME#CONFIG@SPLIT; once for each source ({note})",
        metavar="SOURCE", names="corpus", **more,
    )  # fmt: skip


def run_dir_option(default: str) -> Any:
    return option(
        f"where the run lives (default: {default})",
        metavar="DIR", group=HOW, new_run_only=True, instead="every trial has its own",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingOptions(Options):
    """The places that a run's numbers go to besides metrics.jsonl."""

    wandb: WandbMode | None = _watch(
        "Weights & Biases; offline needs no account and is uploaded later by `wandb sync` (default: off)", on="offline"
    )
    wandb_project: str | None = _watch("default: electra_ds", metavar="NAME")
    wandb_entity: str | None = _watch("the user or team (default: that of the account)", metavar="NAME")
    wandb_group: str | None = _watch("shows runs together", metavar="NAME")
    tensorboard: bool | None = _watch("write RUN/tensorboard (default: no)", off="--no-tensorboard")


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrackingOptions):
    """The options of any training."""

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
        "save and leave at this step of the schedule", metavar="STEP", instead="write stop_at_share"
    )
    time_limit: float | None = _how(
        "save and leave after this time, e.g. 90m, 3.5h or 23:55:00, and leave the file `requeue` in the run",
        metavar="TIME",
        parse=duration_s,
        instead="give the sweep itself --time-limit",
    )
    dry_run: bool | None = _how(
        "check everything that can be checked without training, show what would run, and write nothing",
        instead="give the sweep itself --dry-run",
    )
    yes: bool | None = _habit("start even a run that is predicted to take a year or more")
    threads: int | None = _how("CPU threads (default: torch's choice)", metavar="N", instead="write resources.cpus")
    log_every: int | None = _habit("default: 10", metavar="STEPS")
    eval_every: int | None = None
    save_every: int | None = None
    keep: int | None = None

    def settings(self, defaults: SettingsT) -> SettingsT:
        """Return the settings to record: those that are given, else the defaults or those recorded before."""
        before: Any = defaults
        values = {each.name: getattr(self, each.name) for each in fields(before)}
        settings: SettingsT = replace(before, **{name: value for name, value in values.items() if value is not None})
        return settings

    def recipe_overrides(self) -> list[str]:
        """Return the recipe's overrides, --seed among them. Raises ConfigError if they contradict each other."""
        return with_seed(self.overrides, self.seed)

    def check(self) -> None:
        if self.resume is None:
            self.recipe_overrides()
            self.check_new_run()
            return
        known = described(type(self))
        if flags := [str(known[name].flag) for name in self.given() if known[name].new_run_only]:
            raise ConfigError(
                f"--resume takes recipe and data from the run, so {', '.join(flags)} cannot be given with it."
            )

    def check_new_run(self) -> None:
        """Raise ConfigError if options of a new run cannot go together."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """The options that name a source of text and its tokenizer."""

    corpus: list[list[str]] | None = corpus_option("default: the built-in corpus")
    document_boundary: Literal["file", "blank-line"] | None = _what(
        "where a document ends in a text file (default: file)"
    )
    text_key: str | None = _what("field of JSON lines, column of Parquet and datasets (default: text)", metavar="KEY")
    streaming: bool | None = _what("read Hub datasets without downloading them completely")
    revision: str | None = _what("commit, branch or tag of the Hub dataset", metavar="REV")
    tokenizer: str | None = _what(
        "use this tokenizer.json or vocab.txt, a folder with one, or that of a model on the Hub, such as "
        "FacebookAI/xlm-roberta-base, instead of training one",
        metavar="PATH|NAME",
        names="model",
    )
    cased: bool | None = _what(
        "the vocab.txt was made from cased text",
        off="--uncased",
        off_help="the vocab.txt was made from lower-cased text (assumed if nothing says so)",
    )
    strip_accents: bool | None = _what(
        "whether the vocab.txt was made from text without accents (default: yes if it is uncased)",
        off="--no-strip-accents",
    )
    allow_unknown: bool | None = _what("build a store even if the tokenizer turns nearly all of a source into [UNK]")

    def gives_corpus(self) -> bool:
        """Return whether any of these options is given."""
        return any(getattr(self, name) is not None for name in described(CorpusOptions))

    def check_store(self, data: Path | None) -> None:
        """Raise ConfigError if a token store is given and a corpus too."""
        if data is not None and self.gives_corpus():
            raise ConfigError("--data is a finished token store; give either it or --corpus and what belongs to that.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(CorpusOptions, RunOptions):
    """Pretrain generator and discriminator."""

    GROUPS: ClassVar[dict[str, str | tuple[str, str]]] = {WHAT: "what to train", HOW: "how to run it", WHERE: _WATCH}

    recipe: str | Mapping[str, Any] | None = _what(
        f"{_RECIPES}, or a YAML file ({RECIPE_NOTE})", metavar="NAME|FILE", names="settings"
    )
    overrides: list[str] | None = overrides_option(
        "schedule.total_steps=5000 model.hidden_size=256", group=WHAT, new_run_only=True, instead="write set"
    )
    seed: int | None = seed_option("of weights, data order, masks, samples and dropout")
    init_from: list[str] | None = _what(
        "begin with the weights of transformers' ELECTRA: a generator and a discriminator, each a folder or a name on "
        "the Hub, a folder that bin/export made, or a discriminator alone",
        metavar="SOURCE",
        names="model",
    )
    data: Path | None = option(
        "a token store that bin/build-data made; with --resume: where the run's own store is now",
        metavar="STORE", group=WHAT, names="folder",
    )  # fmt: skip
    micro_batch: int | Literal["auto"] | None = micro_batch_option(
        "sequences at a time, in place of the JSON's; auto: the largest that fits, found by trying on a GPU"
    )
    run_dir: Path | None = run_dir_option("runs/RECIPE-TIME")
    compile: Compile | None = _habit(
        "torch.compile, and CUDA graphs without accumulation; auto: on GPUs of compute capability 7.0 and above",
        on="on",
    )
    eval_every: int | None = _how("default: a tenth of it, at most 5000", metavar="STEPS")
    save_every: int | None = _habit("default: a tenth of it, at most 2000", metavar="STEPS")
    keep: int | None = _habit("checkpoints to retain (default: 3)", metavar="N")
    keep_at: list[int] | None = _how(
        "steps whose checkpoints stay, whatever --keep says", metavar="STEP", instead="write checkpoints"
    )
    stop_on_collapse: bool | None = _how(
        "end the run where the discriminator stays at chance while the generator gets better",
        instead="write it next to seeds, the same for all trials",
    )
    eval_windows: int | None = _how("held-out sequences (default: 512)", metavar="N")

    def check_new_run(self) -> None:
        if self.init_from is not None and len(self.init_from) > 2:
            raise ConfigError(
                f"--init-from takes a generator and a discriminator, and {len(self.init_from)} models are given."
            )
        self.check_store(self.data)


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """The place that a task's examples come from: a folder, the Hub or the user's own files."""

    folder: str | None = None
    """The folder of official files."""
    hub: str | None = None
    """The name of a dataset on the Hub."""
    revision: str | None = None
    """The commit, branch or tag of that dataset."""
    train: str | None = None
    """The user's own files, and below how their columns are called."""
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
            "With --resume, --data-dir, --train, --dev and --test say where the run's own examples are now; --model "
            "says where its encoder is, which only a run without a checkpoint needs.",
        ),
        HOW: "how to run it",
        CHOICE: "choices by the development set, whose scores are then no test any more",
        WHERE: _WATCH,
    }

    recipe: str | Mapping[str, Any] | None = _what(
        f"{', '.join(finetune_recipe_names())}, or a YAML file (default: {FINETUNE_RECIPE} with --task, {OWN_RECIPE} "
        f"with --train)",
        metavar="NAME|FILE",
        names="settings",
    )
    overrides: list[str] | None = overrides_option(
        "schedule.epochs=5 head.pooling=first", group=WHAT, new_run_only=True, instead="write set"
    )
    seed: int | None = seed_option("of the head, the order of the examples and dropout")
    model: str | None = option(
        "the encoder: a run of bin/pretrain or bin/finetune, a transformers folder, or a name on the Hub",
        metavar="RUN|FOLDER|HUB", group=WHAT, names="model",
    )  # fmt: skip
    task: str | None = _what("one of those below", metavar="TASK", parse=task_name, names="name")
    random_init: bool | None = _what(
        "the model's shape and tokenizer, but random weights by the seed: what pretraining is compared with"
    )
    max_train_examples: int | None = _what("train on N examples (default: all)", metavar="N")
    data_dir: Path | None = option(
        "official files: GLUE's folders, or SQuAD's JSON", metavar="DIR", group=DATA, names="folder"
    )
    hub: str | None = _data("a data set on the Hub, laid out as nyu-mll/glue or squad", metavar="NAME")
    revision: str | None = _data("commit, branch or tag of the data set on the Hub", metavar="REV")
    train: Path | None = option(
        "your own training examples: .csv, .tsv or .jsonl", metavar="FILE", group=DATA, names="file"
    )
    dev: Path | None = option("your own examples to score by", metavar="FILE", group=DATA, names="file")
    test: Path | None = option(
        "your own examples to predict at the end; labels are optional", metavar="FILE", group=DATA, names="file"
    )
    text: str | None = _data("the text (default: the first of text, sentence, sentence1, …)", metavar="COLUMN")
    pair: str | None = _data("the second text, where there is one", metavar="COLUMN")
    label: str | None = _data("the label (default: the first of label, labels, score, …)", metavar="COLUMN")
    label_kind: Literal["classification", "regression"] | None = _data(
        "default: regression where labels are no classes"
    )
    micro_batch: int | Literal["auto"] | None = micro_batch_option(
        "inputs at a time, in place of the JSON's; auto: a rank's whole share, or less where memory runs out"
    )
    run_dir: Path | None = run_dir_option("runs/TASK-RECIPE-sSEED-TIME")
    eval_every: int | None = _how(
        "default: an epoch, or a tenth of the recipe's schedule.min_steps if that is more", metavar="STEPS"
    )
    save_every: int | None = _habit("default: 500", metavar="STEPS")
    keep: int | None = _habit("checkpoints to retain (default: 1)", metavar="N")
    discard_weights: bool | None = _habit("remove the checkpoints once the run is done; scores and predictions stay")
    predict_test: bool | None = _how(
        "predict the test sets too, and write GLUE's files; with --resume for a finished run as well"
    )
    early_stopping: int | None = option("end after N evaluations without a better score", metavar="N", group=CHOICE)
    best: bool | None = option("keep and score the best evaluation's weights, not the last", group=CHOICE)

    def recipe_or_default(self) -> str | Mapping[str, Any]:
        """Return the recipe that is given, or the default one."""
        return self.recipe or (OWN_RECIPE if self.task is None else FINETUNE_RECIPE)

    def source(self) -> TaskSource:
        """Return where the examples come from."""
        places = {"folder": self.data_dir, "train": self.train, "dev": self.dev, "test": self.test}
        paths = {name: None if path is None else str(path.absolute()) for name, path in places.items()}
        return TaskSource(
            hub=self.hub, revision=self.revision, text=self.text, pair=self.pair, label=self.label,
            label_kind=self.label_kind or "auto", **paths,
        )  # fmt: skip

    def check_new_run(self) -> None:
        if self.model is None:
            raise ConfigError("Say what to finetune with --model: a run, a transformers folder, or a name on the Hub.")
        of_task = {name: getattr(self, name) for name in ("data_dir", "hub", "revision")}
        own = {name: getattr(self, name) for name in ("train", "dev", "test", "text", "pair", "label", "label_kind")}
        if self.task is None and (self.train is None) != (self.dev is None):
            raise ConfigError(f"Your own examples need --{'dev' if self.dev is None else 'train'} FILE too.")
        if self.task is None and self.train is None:
            raise ConfigError("Say what to finetune on: --task TASK, or your own examples with --train and --dev.")
        for name, value in (of_task if self.task is None else own).items():
            if value is not None:
                flag, whose = name.replace("_", "-"), "a --task" if self.task is None else "examples of your own"
                raise ConfigError(f"--{flag} is for {whose}. Leave out --{flag}, or what belongs to the other.")
        if self.data_dir is not None and (self.hub is not None or self.revision is not None):
            raise ConfigError("--hub and --revision are for data sets of the Hub, and --data-dir is given.")
