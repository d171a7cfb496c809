"""The errors that a user can cause or run into. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElectraError(Exception):
    """Base of every error that is shown as a message, without a traceback."""

    rank: int | None = None
    """The rank that hit the error, if other ranks may not have hit it."""


class ConfigError(ElectraError):
    """A recipe, an override, a DeepSpeed JSON or a command line that cannot be run."""


class PluginError(ConfigError):
    """A part that comes by name, such as an objective, and is not installed or cannot be loaded."""


class DataError(ElectraError):
    """A corpus, tokenizer, token store or published model that is missing, broken or does not fit."""


class CheckpointError(ElectraError):
    """A run directory or checkpoint that cannot be used, or could not be written."""


class TrainingError(ElectraError):
    """A run that cannot continue: the losses or gradients are no longer finite."""


class FailedElsewhereError(ElectraError):
    """Another rank failed and prints the reason; this rank exits without a message."""


class LostRankError(ElectraError):
    """The connection to another rank broke. That rank died, and its own message says why."""


class InterruptedBySignalError(ElectraError):
    """A signal asked a long job to stop; what was finished is kept.

    `signum` is the signal's number: the process exits with 128 + signum, as shells expect.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion of a similar known name, to append to a message, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
