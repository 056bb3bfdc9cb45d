"""Every failure that a training run can end with: one class for each exit code, always with the remedy."""

from __future__ import annotations

from collections.abc import Mapping


class TrainerError(Exception):
    """A failure with a remedy; `__main__` writes it into `outcome.json` and exits with `exit_code`."""

    exit_code = 10

    def __init__(self, message: str, *, remedy: str, context: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        """One sentence of what happened."""
        self.remedy = remedy
        """What to do, as a command to type where there is one."""
        self.context = {key: str(value) for key, value in (context or {}).items()}
        """The facts: file, line, expected, got, …"""

    def told(self) -> str:
        """For a person: the message, the facts and the remedy, a line each."""
        facts = "".join(f"\n  {key}: {value}" for key, value in self.context.items())
        return f"{self.message}{facts}\n  remedy: {self.remedy}"

    def described(self) -> dict[str, object]:
        """As JSON takes it."""
        return {"message": self.message, "remedy": self.remedy, "context": self.context}


class ConfigError(TrainerError):
    """The training config is wrong."""

    exit_code = 3


class DataError(TrainerError):
    """A data file is wrong."""

    exit_code = 3


class VersionMismatch(TrainerError):
    """The env holds versions of packages that this trainer can't be right with."""

    exit_code = 3


class EnvironmentMismatch(TrainerError):
    """The machine or the environment lacks what the config asks for."""

    exit_code = 7


class TrainingFailed(TrainerError):
    """Training itself went wrong: a loss that is no number, an adapter without a gradient, no memory left."""

    exit_code = 10


class Stopped(TrainerError):
    """Stopped in good order at a step boundary: the same command goes on from the checkpoint."""

    exit_code = 75
