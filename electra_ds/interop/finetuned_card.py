"""What is said of an exported finetuned model: its card, and how to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from electra_ds.config.finetune_recipe import FinetuneRecipe
from electra_ds.config.run_record import FinetuneRecord
from electra_ds.core.files import is_hub_model
from electra_ds.finetuning.glue import GLUE
from electra_ds.interop.export_folder import published_name

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
_COLUMNS = "| set | rows | metric | value | the same prediction for every row |"


@dataclass(frozen=True)
class Exported:
    """What is known of the run."""

    recipe: FinetuneRecipe
    record: FinetuneRecord
    state: dict[str, Any]
    """Of its checkpoint."""
    scores: dict[str, Any]
    """scores.json, or empty."""
    labels: tuple[str, ...]
    uses_segments: bool

    def described(self, model: PreTrainedModel) -> str:
        """In a few words."""
        kind = type(model).__name__
        return f"{kind}, {self.record.task}, seed {self.recipe.seed}, step {self.state['step']:,}"

    def usage(self, model: PreTrainedModel, path: str) -> str:
        """A line of Python, or two."""
        kind = _pipeline(model)
        if kind == "text-classification":
            return f"from transformers import pipeline; pipeline({kind!r}, model={path!r})({self.example()})"
        auto = "AutoModelForQuestionAnswering" if kind == "question-answering" else "AutoModel"
        shown = f"   # {path}/README.md shows how to get answers" * (kind == "question-answering")
        return f"from transformers import {auto}; {auto}.from_pretrained({path!r}){shown}"

    def example(self) -> str:
        """What the pipeline is called with."""
        return '{"text": "…", "text_pair": "…"}' if self._is_pair() else '"…"'

    def _is_pair(self) -> bool:
        task = GLUE.get(self.record.task) if self.record.source.train is None else None
        return task.is_pair if task is not None else self.record.source.pair is not None


def _pipeline(model: PreTrainedModel) -> str:
    """The Hub's name of what the model does."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "text-classification"
    return "question-answering" if type(model).__name__.endswith("ForQuestionAnswering") else "feature-extraction"


def finetuned_card(what: Exported, model: PreTrainedModel) -> str:
    """README.md of the folder."""
    record, recipe, kind = what.record, what.recipe, _pipeline(model)
    base = published_name(record.model)
    began = f"random weights of the shape of {base}" if record.has_random_weights else base
    base_model = f"base_model: {record.model}\n" if is_hub_model(record.model) and not record.has_random_weights else ""
    of_own = record.source.train is not None
    examples = "training examples" if of_own or record.task in GLUE else "windows of training contexts"
    if recipe.data.double_unordered:
        examples += ", pairs in both orders counted twice"
    ids = "The tokenizer tells a second text from a first by segment ids" if what.uses_segments else (
        "It was trained without segment ids, and the tokenizer gives none"
    )  # fmt: skip
    return f"""---
library_name: transformers
pipeline_tag: {kind}
{base_model}tags:
- {model.config.model_type}
---

# {type(model).__name__} on {record.task}, recipe {recipe.name}, seed {recipe.seed}

It began with {began} and was finetuned with electra_ds on {record.num_examples:,} {examples},
for {what.state["step"]:,} steps of {recipe.global_batch_size}. Inputs were cut at {recipe.data.max_length} tokens,
which is where `truncation=True` cuts them. {ids}.
{_of_labels(what, kind)}
```python
{_code(what, model, kind)}```
{_scores(what, kind)}{_of_head(what, model, kind)}
## Recipe

```json
{json.dumps(recipe.model_dump(), indent=2)}
```
"""


def _of_labels(what: Exported, kind: str) -> str:
    if kind == "feature-extraction":
        return "\nThis is the finetuned encoder alone, without the head that scored the task.\n"
    if kind == "question-answering":
        return "\nOf a context that is cut, only the beginning is searched here; the run took windows of it.\n"
    if not what.labels:
        return "\nIts one output is the score, in the task's own range.\n"
    return "\nIts classes: " + ", ".join(f"`{label}`" for label in what.labels) + ".\n"


def _code(what: Exported, model: PreTrainedModel, kind: str) -> str:
    if kind == "question-answering":
        null = _NULL.replace("THRESHOLD", f"{what.recipe.head.null_threshold:g}")
        code = _ANSWER.replace("NULL", null if what.record.task == "squad2" else "")
        return code.replace("LONGEST", str(what.recipe.data.max_answer_length))
    if kind == "text-classification":
        # of users' own files it is not known here whether the pair was found by its usual name
        pair = '# for a pair: classifier({"text": "…", "text_pair": "…"}, truncation=True)\n'
        more = pair if what.record.source.train is not None and what.record.source.pair is None else ""
        return (
            f'from transformers import pipeline\n\nclassifier = pipeline("text-classification", model="PATH")\n'
            f"classifier({what.example()}, truncation=True)\n{more}"
        )
    return (
        'from transformers import AutoModel, AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        'model = AutoModel.from_pretrained("PATH")\n'
    )


def _scores(what: Exported, kind: str) -> str:
    """Those of these very weights."""
    scores = what.scores
    if scores.get("step") != what.state["step"]:
        return ""
    rows = [
        f"| {name} | {of['rows']:,} | {metric} | {value:.4f} | {_baseline(of, metric)} |"
        for name, of in scores["sets"].items()
        for metric, value in of["metrics"].items()
    ]
    chosen = scores["chosen"]
    note = f"\nThe weights are those of the {chosen}, so that its scores are no test.\n" if chosen != "last" else ""
    heading = "Scores, with its head" if kind == "feature-extraction" else "Scores"
    table = "\n".join([_COLUMNS, "| --- | --- | --- | --- | --- |", *rows])
    return f"\n## {heading}\n\n{table}\n{note}"


def _baseline(of: dict[str, Any], metric: str) -> str:
    found = of.get("baseline", {})
    return f"{found[metric]:.4f} ({of['baseline_prediction']})" if metric in found else "–"


def _of_head(what: Exported, model: PreTrainedModel, kind: str) -> str:
    if kind != "text-classification" or what.recipe.head.num_layers == 2:
        return ""
    told = (
        "The head that was trained is one matrix W. transformers' has two with a GELU between them: here `dense` holds "
        "W and -W,\nand `out_proj` subtracts the one's GELU from the other's, which is W x, since "
        "GELU(z) - GELU(-z) = z. fp16 and bf16 lose\nno more by it than by W x itself."
    )
    if 2 * max(1, len(what.labels)) > int(model.config.hidden_size):
        told = (
            "The head that was trained is one matrix W. transformers' has two with a GELU between them: here `dense` "
            "adds so much\nto its input that GELU passes it on as it is, and `out_proj` holds W and takes that back. "
            "Use it in fp32: the scores\nare off by up to 1e-5 of the largest there, by 1e-2 in fp16 and by 9e-2 in "
            "bf16."
        )
    return f"\n## The head\n\n{told}\n"
