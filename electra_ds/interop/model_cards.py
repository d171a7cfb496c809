"""Write the model cards (README.md) of exported models, pretrained and finetuned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.names import SQUAD_TASKS
from electra_ds.config.recipe import Recipe
from electra_ds.config.run_directory import read_metrics
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.files import is_hub_model
from electra_ds.finetuning.glue import GLUE
from electra_ds.finetuning.tasks.base import FinetuneTask
from electra_ds.pretraining.objectives.base import Export
from electra_ds.training.checkpoint import Checkpoint

_OPENING = """\
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AUTO.from_pretrained("PATH")
"""
_ANSWER = """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForQuestionAnswering.from_pretrained("PATH")


def answer(question, context, longest=LONGEST):
    inputs = tokenizer(
        question, context, truncation="only_second", return_offsets_mapping=True, return_tensors="pt"
    )
    offsets = inputs.pop("offset_mapping")[0].tolist()
    is_context = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
    with torch.no_grad():
        output = model(**inputs)
    starts = output.start_logits[0].masked_fill(~is_context, -torch.inf)
    ends = output.end_logits[0].masked_fill(~is_context, -torch.inf)
    spans = starts[:, None] + ends[None, :]
    is_span = torch.ones_like(spans).triu().tril(longest - 1).bool()
    best = spans.masked_fill(~is_span, -torch.inf)
    first, last = divmod(best.argmax().item(), len(best))
NULL    return context[offsets[first][0] : offsets[last][1]]
"""
_NULL = """\
    if output.start_logits[0, 0] + output.end_logits[0, 0] - best.max() > THRESHOLD:
        return ""  # the context has no answer
"""
_HEAD = """
## The head

The trained head is one matrix W. transformers' head has two with a GELU between them: here `dense` holds W and -W, and
`out_proj` subtracts the GELU of the second from that of the first, which gives W x, since GELU(z) - GELU(-z) = z. In
fp16 and bf16 this is as precise as W x itself.
"""
_GLUE = "nyu-mll/glue"
_TERMS = {
    "cola": "examples from published linguistics literature, for research under fair use (Warstadt et al. 2019)",
    "mrpc": "Microsoft Research Paraphrase Corpus, Microsoft Shared Source licence, non-commercial",
    "sts-b": "scores CC BY-SA, texts of several sources with their own terms (Cer et al. 2017)",
    "squad1": "CC BY-SA 4.0",
    "squad2": "CC BY-SA 4.0",
}
"""The terms of published tasks, as stated at their sources, where they are."""
_HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
"""The Hub's names of our metrics, where they differ."""
_COLUMNS = "| set | rows | metric | value | the same prediction for every row |\n| --- | --- | --- | --- | --- |"


class Facts(NamedTuple):
    """Facts about a model that only the user knows, for the card's front matter."""

    license: str | None = None
    """An identifier of the Hub, such as `apache-2.0`."""
    language: Sequence[str] = ()
    """ISO 639 codes of the text."""
    datasets: Sequence[str] = ()
    """Names on the Hub of the text, each perhaps with its licence: `wikimedia/wikipedia=cc-by-sa-4.0`."""
    repository: str | None = None
    """The name under which it is published, without the part's."""


NO_FACTS = Facts()


def pretrained_card(
    part: str,
    exported: Export,
    recipe: Recipe,
    vocab_size: int,
    checkpoint: Checkpoint,
    sources: list[str],
    facts: Facts = NO_FACTS,
) -> str:
    """Return the card of one network of a pretraining. sources: the weights that the run began with."""
    run, state = checkpoint.path.parent.parent, checkpoint.state
    metrics_file = run / "metrics.jsonl"
    evaluations = [
        line
        for line in (read_metrics(metrics_file) if metrics_file.is_file() else [])
        if line["kind"] == "eval" and line["step"] == state["step"]
    ]
    results = ""
    if evaluations:
        rows = "\n".join(
            f"| {name} | {value:.4f} |" for name, value in evaluations[-1].items() if isinstance(value, float)
        )
        results = f"\n## On held-out text\n\n| metric | value |\n| --- | --- |\n{rows}\n"
    began = f" It began with the weights of {' and '.join(map(published_name, sources))}." if sources else ""
    text = f"""This model {exported.purpose}.

It was pretrained with electra_ds for {state["step"]:,} of {recipe.schedule.total_steps:,} steps on
{state["tokens"]:,} tokens, in sequences of {recipe.data.sequence_length} tokens: later positions were never
trained. Its vocabulary has {vocab_size:,} pieces.{began}"""
    title = f"{recipe.objective.upper()} {part}, recipe {recipe.name}"
    code = _OPENING.replace("AUTO", exported.loaded_by)
    if facts.repository is not None:
        code = code.replace("PATH", f"{facts.repository}-{part}")
    front = ModelCardData(
        **_given(facts),
        library_name="transformers",
        pipeline_tag="fill-mask" if exported.loaded_by.endswith("ForMaskedLM") else None,
        base_model=[source for source in sources if is_hub_model(source)] or None,
        tags=[recipe.objective, "electra_ds"],
    )
    return _card(front, title, text, code, results + _data(facts), recipe)


def _given(facts: Facts) -> dict[str, Any]:
    """Return the facts as arguments of `ModelCardData`."""
    return {
        "license": facts.license,
        "language": [*facts.language] or None,
        "datasets": [name.partition("=")[0] for name in facts.datasets] or None,
    }


def _data(facts: Facts, task: str | None = None) -> str:
    """Return a section on the data and their licences. task: the published task of a finetuning."""
    lines = [
        f"- {name}: {terms or 'see its dataset card'}"
        for name, _, terms in (each.partition("=") for each in facts.datasets)
    ]
    if task in _TERMS:
        lines.append(f"- {task.upper()}: {_TERMS[task]}")
    if not lines:
        return ""
    return (
        "\n## Data\n\nThe licence of this model does not change the terms of its training data:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def published_name(source: str) -> str:
    """Return a source's name for a published card: a Hub name, or a folder's name without its path on this machine."""
    path = Path(source)
    if is_hub_model(source):
        return source
    return f"{path.parent.name}/{path.name}" if path.name in ("generator", "discriminator") else path.name


def _card(
    front: ModelCardData, title: str, text: str, code: str, sections: str, recipe: Recipe | FinetuneRecipe
) -> str:
    return f"""---
{front.to_yaml()}
---

# {title}

{text}

```python
{code}```
{sections}
## Recipe

```json
{json.dumps(recipe.model_dump(), indent=2)}
```
"""


# --- finetuned models


@dataclass(frozen=True)
class Exported:
    """The parts of an exported run that its card describes."""

    recipe: FinetuneRecipe
    record: FinetuneRecord
    state: dict[str, Any]
    """The state of the checkpoint."""
    scores: dict[str, Any]
    """The content of scores.json; empty for a run that has not finished."""
    labels: tuple[str, ...]
    has_segments: bool
    task: type[FinetuneTask] | None
    """None if only the encoder was exported."""

    @property
    def hub_task(self) -> str:
        """The Hub's name for what the model does."""
        return "feature-extraction" if self.task is None else self.task.hub_task

    def usage(self, path: str) -> str:
        """Return a line of Python that opens the model at this path."""
        kind = self.hub_task
        if self.task is not None and self.task.usage:
            return self.task.usage.replace("PATH", path)
        if kind == "text-classification":
            return f"from transformers import pipeline; pipeline({kind!r}, model={path!r})({self.example()})"
        auto = "AutoModelForQuestionAnswering" if kind == "question-answering" else "AutoModel"
        return f"from transformers import {auto}; {auto}.from_pretrained({path!r})   # see also {path}/README.md"

    def example(self) -> str:
        """Return an example argument for the pipeline."""
        task = GLUE.get(self.record.loaded_as or "")
        is_pair = task.is_pair if task is not None else self.record.source.pair is not None
        return '{"text": "…", "text_pair": "…"}' if is_pair else '"…"'


def finetuned_card(what: Exported, model: PreTrainedModel, facts: Facts = NO_FACTS) -> str:
    """Return the card of a finetuned model."""
    record, recipe, kind = what.record, what.recipe, what.hub_task
    base = published_name(record.model)
    began = f"random weights of the shape of {base}" if record.has_random_weights else base
    is_spans = record.loaded_as in (*SQUAD_TASKS, "question-answering")
    examples = "windows of training contexts" if is_spans else "training examples"
    if recipe.data.double_unordered:
        examples += ", pairs in both orders counted twice"
    cut = f"Inputs were cut at {recipe.data.max_length} tokens, which is where `truncation=True` cuts them."
    if is_spans or record.loaded_as == "token-classification":
        cut = f"Longer texts were split into several inputs of at most {recipe.data.max_length} tokens."
    segments = "gives segment ids, as in training" if what.has_segments else "gives no segment ids, as in training"
    code, remark = _code_and_remark(what, kind)
    code = code.replace("PATH", facts.repository or "PATH")
    text = f"""It began with {began} and was finetuned with electra_ds on {record.num_examples:,} {examples},
for {what.state["step"]:,} steps of {recipe.global_batch_size}. {cut} The tokenizer {segments}.

{remark}"""
    is_published = is_hub_model(record.model) and not record.has_random_weights
    is_glue = record.loaded_as in GLUE
    results = _results(what, kind) if is_glue else None
    front = ModelCardData(
        **_given(facts._replace(datasets=[*facts.datasets, *([_GLUE] if is_glue else [])])),
        library_name="transformers" if what.task is None else what.task.library,
        pipeline_tag=kind,
        base_model=record.model if is_published else None,
        tags=[model.config.model_type, "electra_ds"],
        eval_results=results,
        model_name=f"{base}, {record.task}" if results else None,
    )
    return _card(
        front,
        f"{type(model).__name__} on {record.task}, recipe {recipe.name}, seed {recipe.seed}",
        text,
        code,
        _scores(what, kind)
        + _data(facts, record.loaded_as)
        + (_HEAD if kind == "text-classification" and recipe.head.num_layers == 1 else ""),
        recipe,
    )


def _code_and_remark(what: Exported, kind: str) -> tuple[str, str]:
    """Return code that uses the model, and a remark on its outputs."""
    if what.task is not None and what.task.example:
        return what.task.example, what.task.outputs + _classes(what)
    if kind == "feature-extraction":
        remark = "This is the finetuned encoder, without the head that scored the task."
        return _OPENING.replace("AUTO", "AutoModel"), remark
    if kind == "question-answering":
        null = _NULL.replace("THRESHOLD", f"{what.recipe.head.null_threshold:g}")
        code = _ANSWER.replace("NULL", null if what.record.task == "squad2" else "")
        code = code.replace("LONGEST", str(what.recipe.data.max_answer_length))
        return (
            code,
            "This code searches only the beginning of a context that is cut; the run searched windows over all of it.",
        )
    remark = _classes(what).strip() or "Its one output is the score, in the task's own range."
    # In the user's own files, the pair may have been found under a usual name, which is not known here.
    pair = '# for a pair: classifier({"text": "…", "text_pair": "…"}, truncation=True)\n'
    more = pair if what.record.source.train is not None and what.record.source.pair is None else ""
    return (
        f'from transformers import pipeline\n\nclassifier = pipeline("text-classification", model="PATH")\n'
        f"classifier({what.example()}, truncation=True)\n{more}"
    ), remark


def _classes(what: Exported) -> str:
    return f" The classes are {', '.join(f'`{label}`' for label in what.labels)}." if what.labels else ""


def _results(what: Exported, kind: str) -> list[EvalResult] | None:
    """Return the scores on GLUE's development sets as the Hub shows them, if they belong to these weights."""
    scores, task = what.scores, what.record.task
    if scores.get("step") != what.state["step"]:
        return None
    return [
        EvalResult(
            task_type=kind,
            dataset_type=_GLUE,
            dataset_name=f"GLUE {task.upper()}",
            dataset_config=task.replace("-", ""),
            dataset_split=name.replace("dev", "validation"),
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_value=round(value, 6),
        )
        for name, of in scores["sets"].items()
        if name.startswith("dev")
        for metric, value in of["metrics"].items()
    ]


def _scores(what: Exported, kind: str) -> str:
    """Return a section with the scores, if they belong to these weights."""
    scores = what.scores
    if scores.get("step") != what.state["step"]:
        return ""
    rows = "".join(
        f"\n| {name} | {of['rows']:,} | {metric} | {value:.4f} | {_baseline(of, metric)} |"
        for name, of in scores["sets"].items()
        for metric, value in of["metrics"].items()
    )
    chosen = scores["chosen"]
    note = (
        f"\nThe weights are those of the {chosen}, so these scores are not those of an independent test.\n"
        if chosen != "last"
        else ""
    )
    heading = "Scores, with its head" if kind == "feature-extraction" else "Scores"
    return f"\n## {heading}\n\n{_COLUMNS}{rows}\n{note}"


def _baseline(of: dict[str, Any], metric: str) -> str:
    found = of.get("baseline", {})
    return f"{found[metric]:.4f} ({of['baseline_prediction']})" if metric in found else "–"
