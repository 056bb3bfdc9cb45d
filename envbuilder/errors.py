"""Every failure a user can meet: one class for each exit code, always with the remedy.

An error is one sentence of what happened, the context (file, expected, got), and what to type next.
"""

from __future__ import annotations

from collections.abc import Mapping


class EnvbuilderError(Exception):
    """A failure with a remedy; `cli` prints it and exits with `exit_code`.

    Raised as such it is the tool's own fault (exit 1); stages raise a subclass.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str, context: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        """One sentence of what happened."""
        self.remedy = remedy
        """What to do, as a command to type where there is one."""
        self.context = {key: str(value) for key, value in (context or {}).items()}
        """The facts: file, expected, got, …"""
        self.result: dict[str, object] = {}
        """What the command brought all the same, as it would have printed it: for `--json`."""

    def to_json(self) -> dict[str, object]:
        """The form that `--json` prints."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "message": self.message,
            "context": self.context,
            "remedy": self.remedy,
            **self.result,
        }


class UsageError(EnvbuilderError):
    """The command line asks for something that can't be."""

    exit_code = 2


class InputError(EnvbuilderError):
    """A recipe, lock, site, config or data file is wrong."""

    exit_code = 3


class NetworkError(EnvbuilderError):
    """An index or hub can't be reached, or doesn't have what was asked for."""

    exit_code = 4


class IntegrityError(EnvbuilderError):
    """Bytes are not the bytes that the lock names."""

    exit_code = 5


class BuildError(EnvbuilderError):
    """A source build failed, or built something other than what the recipe names."""

    exit_code = 6


class MismatchError(EnvbuilderError):
    """The environment does not match the lock, or the machine does not match the recipe."""

    exit_code = 7


class DoctorError(EnvbuilderError):
    """`doctor` found a failure."""

    exit_code = 8


class SlurmError(EnvbuilderError):
    """Slurm refused the job, or the job failed."""

    exit_code = 9


class TrainingError(EnvbuilderError):
    """Training failed."""

    exit_code = 10


class StoppedError(EnvbuilderError):
    """Stopped in good order: the same command goes on from where it stopped."""

    exit_code = 75
