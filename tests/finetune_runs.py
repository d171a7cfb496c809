"""Small tasks in their official files, tiny encoders, and `bin/finetune` in this process or in its own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, ElectraConfig, PretrainedConfig, PreTrainedTokenizerFast

from electra_ds.cli import main
from electra_ds.config.run_directory import read_metrics
from electra_ds.finetuning.finetune import FinetuneLoop
from electra_ds.training.checkpoint import CheckpointFolder, open_checkpoint
from electra_ds.training.engine import Engine
from tests import forks
from tests.helpers import REPOSITORY

BAD = ("awful", "dull", "clumsy", "tedious")
GOOD = ("superb", "bright", "graceful", "gripping")
PLAIN = ("the", "a", "film", "play", "book", "with", "and", "of", "its", "is", "was", "scene", "end", "actor", "music")
TELLING = (*BAD, *GOOD)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 64
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAST = ("data.max_length=32", "global_batch_size=8", "optimizer.learning_rate=2e-3")
"""For encoders that know nothing yet."""


# --- tasks


def _sentence(rng: random.Random, telling: str) -> str:
    words = rng.choices(PLAIN, k=rng.randint(2, 12))
    words.insert(rng.randint(0, len(words)), telling)
    return " ".join(words)


def _rows(count: int, seed: int) -> list[tuple[str, str, int]]:
    """(text, second text, 0 or 1): a word of the second text tells it."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.randint(0, 1)
        rows.append((_sentence(rng, "film"), _sentence(rng, rng.choice((BAD, GOOD)[label])), label))
    return rows


def _write(path: Path, header: Sequence[str] | None, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", "utf8")


def write_glue(folder: Path, train: int = 64, dev: int = 24, test: int = 10, seed: int = 0) -> Path:
    """The folders of SST-2, CoLA, MRPC, STS-B, RTE and MNLI, each learnable."""
    sizes = {"train": train, "dev": dev, "test": test}
    for offset, (name, size) in enumerate(sizes.items()):
        rows, is_test = _rows(size, 10 * seed + offset), name == "test"
        sentences = [(second, label) for _, second, label in rows]
        if is_test:
            _write(folder / "SST-2/test.tsv", ("index", "sentence"), [(i, s) for i, (s, _) in enumerate(sentences)])
            _write(folder / "CoLA/test.tsv", ("index", "sentence"), [(i, s) for i, (s, _) in enumerate(sentences)])
        else:
            _write(folder / f"SST-2/{name}.tsv", ("sentence", "label"), sentences)
            _write(folder / f"CoLA/{name}.tsv", None, [("gj04", label, "", s) for s, label in sentences])
        first_column = "index" if is_test else "Quality"
        _write(
            folder / f"MRPC/{name}.tsv", (first_column, "#1 ID", "#2 ID", "#1 String", "#2 String"),
            [(i if is_test else label, i, i, first, second) for i, (first, second, label) in enumerate(rows)],
        )  # fmt: skip
        scored = [(i, first, second, [1.25, 4.5][label]) for i, (first, second, label) in enumerate(rows)]
        _write(
            folder / f"STS-B/{name}.tsv", ("index", "sentence1", "sentence2", "score")[: 3 if is_test else 4],
            [row[: 3 if is_test else 4] for row in scored],
        )  # fmt: skip
        names = ("entailment", "not_entailment")
        _write(
            folder / f"RTE/{name}.tsv", ("index", "sentence1", "sentence2", "label")[: 3 if is_test else 4],
            [(i, first, second, names[label])[: 3 if is_test else 4] for i, (first, second, label) in enumerate(rows)],
        )  # fmt: skip
        nli = ("contradiction", "entailment")
        for part in ("train",) if name == "train" else (f"{name}_matched", f"{name}_mismatched"):
            _write(
                folder / f"MNLI/{part}.tsv", ("index", "sentence1", "sentence2", "gold_label")[: 3 if is_test else 4],
                [
                    (i, first, second, "neutral" if i % 7 == 6 else nli[label])[: 3 if is_test else 4]
                    for i, (first, second, label) in enumerate(rows)
                ],
            )  # fmt: skip
    return folder


def write_squad(folder: Path, version: str = "2.0", train: int = 24, dev: int = 8, seed: int = 0) -> Path:
    """What is bright or dull is asked for; of 2.0 one question in three has no answer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, size in (("train", train), ("dev", dev)):
        paragraphs = []
        for index in range(size):
            context = _sentence(rng, rng.choice(GOOD)) + " " + _sentence(rng, "and")
            answer = next(word for word in context.split() if word in GOOD)
            question: dict[str, Any] = {"id": f"{name}{index}", "question": "what is the film"}
            is_impossible = version == "2.0" and index % 3 == 2
            if is_impossible:
                context = context.replace(answer, "of")
            question["answers"] = [] if is_impossible else [{"text": answer, "answer_start": context.index(answer)}]
            if version == "2.0":
                question["is_impossible"] = is_impossible
            paragraphs.append({"context": context, "qas": [question]})
        document = {"version": f"v{version}", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{name}-v{version}.json").write_text(json.dumps(document))
    return folder


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def reviews(count: int, seed: int, labels: Sequence[object] = ("bad", "good")) -> list[tuple[str, object]]:
    return [(second, labels[label]) for _, second, label in _rows(count, seed)]


# --- encoders


def wordpiece(special: Sequence[str] = SPECIAL, **settings: Any) -> PreTrainedTokenizerFast:
    """Of the words that the tasks are made of, and the letters; a trainer numbers its pieces anew each time."""
    pad, unk, cls, sep, mask = special
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = (*special, *TELLING, *PLAIN, "what", *letters[1:], *(f"##{letter}" for letter in letters))
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        **settings,
    )


def save_encoder(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 7
) -> Path:
    """A transformers folder with random weights, large enough to matter."""
    tokenizer = tokenizer or wordpiece()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name.lower():
                    parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def electra_config(**changes: Any) -> ElectraConfig:
    return ElectraConfig(vocab_size=len(wordpiece()), embedding_size=16, **(SMALL | changes))


def tiny_electra(folder: Path, seed: int = 7, **changes: Any) -> Path:
    return save_encoder(folder, electra_config(**changes), seed=seed)


# --- runs


def finetune(*arguments: object, status: int = 0) -> str:
    """`bin/finetune` in this process; what it printed, standard error included."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        found = 0
        try:
            main(["finetune", *map(str, arguments)])
        except SystemExit as leaving:
            found = int(leaving.code or 0)
        except KeyboardInterrupt:
            found = 128 + signal.SIGINT
    assert found == status, printed.getvalue()
    assert "Traceback" not in printed.getvalue()
    return printed.getvalue()


def arguments_of(model: Path, data: Path | None, task: str, run_dir: Path, *overrides: str, **flags: Any) -> list[str]:
    """Of a short run; flags with underscores, True for one without a value."""
    given: list[str] = []
    for name, value in flags.items():
        given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    where = [] if data is None else ["--task", task, "--data-dir", str(data)]
    return [
        "--model", str(model), *where, "--run-dir", str(run_dir),
        "--ds-config", str(REPOSITORY / "ds_configs/cpu.json"), "--threads", "1", "--log-every", "1", *given,
        "--set", *FAST, *overrides,
    ]  # fmt: skip


def in_own_process(arguments: Sequence[object], ranks: int = 1, status: int = 0) -> str:
    result = forks.run("finetune", *arguments, ranks=ranks)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr or ranks > 1
    return result.stdout + result.stderr


def die_at(step: str) -> None:
    """Make this process kill itself when this step is about to begin, or `end`, before a run writes its scores.

    The saving of checkpoints is then wherever it is.
    """
    train_step = Engine.train_step

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty(self: Engine, batch: Any, number: int, samples: Any = None) -> Any:
        if str(number) == step:
            die()
        return train_step(self, batch, number, samples)

    Engine.train_step = faulty  # type: ignore[method-assign]
    if step == "end":
        FinetuneLoop._write = die  # type: ignore[method-assign]


def losses_of(run_dir: Path) -> list[float]:
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "eval"]


def scores_of(run_dir: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run_dir / "scores.json").read_text("utf8"))
    return scores


def predictions_of(run_dir: Path, name: str = "dev") -> list[dict[str, Any]]:
    lines = (run_dir / "predictions" / f"{name}.jsonl").read_text("utf8").splitlines()
    return [json.loads(line) for line in lines]


def logits_of(run_dir: Path, name: str = "dev") -> list[list[float]]:
    return [line["logits"] for line in predictions_of(run_dir, name)]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    return dict(open_checkpoint(CheckpointFolder(run_dir / "checkpoints", keep=1).paths()[-1]).tensors)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def outcome(run_dir: Path) -> tuple[Any, ...]:
    """Everything that one seed and one plan decide, but the tensors."""
    return losses_of(run_dir), evaluations_without_times(run_dir), scores_of(run_dir), predictions_of(run_dir)


def evaluations_without_times(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in evaluations_of(run_dir)]
