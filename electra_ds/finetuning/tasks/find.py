"""Find the class of a task by the value of --task."""

from __future__ import annotations

from electra_ds.config.names import GLUE_TASKS, SQUAD_TASKS
from electra_ds.config.plugins import TASK, find
from electra_ds.finetuning.tasks.base import FinetuneTask
from electra_ds.finetuning.tasks.question_answering import QuestionAnsweringTask
from electra_ds.finetuning.tasks.sequence import SequenceTask


def task_class(name: str | None) -> type[FinetuneTask]:
    """Return the class of a task.

    name: a task of GLUE or SQuAD, a registered kind of task, or None for a classification or regression of the user's
    own. Raises PluginError if a kind cannot be loaded.
    """
    if name is None or name in GLUE_TASKS:
        return SequenceTask
    if name in SQUAD_TASKS:
        return QuestionAnsweringTask
    found: type[FinetuneTask] = find(TASK, name)
    return found
