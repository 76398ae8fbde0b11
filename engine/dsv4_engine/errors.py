"""Every error that wrong input can cause, in one family.

All of them are ValueErrors that carry a next step in `hint`; the command line prints message and hint and exits
with code 2.  This module imports nothing, so that anything may import it.  Bugs of our own are asserts, never these.
"""

from __future__ import annotations


class InputError(ValueError):
    """Something the caller gave cannot be used.

    message: one sentence that names the thing and the value; hint: what to do next, or "".
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        # Exceptions pickle by args alone, which would lose the hint on its way out of a worker process.
        return type(self), (self.message, self.hint)


class ConfigError(InputError):
    """A config.json that cannot be read, or that describes a model this package does not run."""


class CheckpointError(InputError):
    """Checkpoint files that are missing, damaged, or do not belong to the configuration."""


class TokenizerError(InputError):
    """A tokenizer that is missing, unreadable, or of another vocabulary than the model's."""


class PromptError(InputError):
    """Text, messages or token ids that the model cannot be given."""


class DeviceError(InputError):
    """A device or backend that was asked for and is not there."""


class MemoryPlanError(InputError):
    """The model and its cache do not fit; the message holds the needed and the available size."""


class DownloadError(InputError):
    """A transfer that failed though nothing given is wrong: exit code 1, and trying again may help."""
