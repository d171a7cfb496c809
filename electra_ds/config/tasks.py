"""The names of the published tasks."""

from __future__ import annotations

GLUE_TASKS = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli")
SQUAD_TASKS = ("squad1", "squad2")
TASKS = (*GLUE_TASKS, *SQUAD_TASKS)
"""What can be finetuned on by name. GLUE's diagnostic set, ax, has no training examples: mnli predicts it."""
