"""Reading what a person wrote as TOML: recipes and sites alike.

Keys are written in kebab-case. An unknown key, a wrong type and an impossible value are all errors
(exit 3) that name the file and the key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from envbuilder.errors import InputError
from envbuilder.toml import tomllib


class Table(BaseModel):
    """A TOML table: frozen, with no room for unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
    )


AnyTable = TypeVar("AnyTable", bound=Table)


def pattern(expression: str, what: str) -> AfterValidator:
    """A check that a text is wholly what `expression` describes; `what` says so in words."""

    def check(text: str) -> str:
        if not re.fullmatch(expression, text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return AfterValidator(check)


EnvName = Annotated[str, pattern(r"[A-Za-z_][A-Za-z0-9_]*", "an environment variable's name")]
AbsolutePath = Annotated[str, pattern(r"/[^\n\r\0]*", "an absolute path")]


def load_table(path: Path, kind: type[AnyTable], *, example: str, manual: str) -> AnyTable:
    """The `kind` in the TOML file `path`; InputError names the key that is wrong.

    For the remedies: `example` is the path of a good file, `manual` the page that lists all keys.
    """
    what = kind.__name__.lower()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"There is no {what} at {path}.",
            remedy=f"Give the path of a {what}, e.g. {example}.",
            context={"file": path},
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The {what} {path} can't be read: {error}.",
            remedy=f"Check that {path} is a readable UTF-8 text file.",
            context={"file": path},
        ) from error
    try:
        return kind.model_validate(tomllib.loads(text), by_name=False, by_alias=True)
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"The {what} {path} is not TOML: {error}.",
            remedy=f"Mend {path} at the place named.",
            context={"file": path},
        ) from error
    except ValidationError as error:
        faults = [(_key(item["loc"]) or what, item["msg"]) for item in error.errors(include_url=False)]
        raise InputError(
            f"The {what} {path} is wrong: {'; '.join(f'{key}: {_in_words(text)}' for key, text in faults)}.",
            remedy=f"Mend the keys named in {path}; {manual} lists all keys.",
            context={"file": path, "keys": ", ".join(sorted({key for key, _ in faults}))},
        ) from error


def _key(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _in_words(message: str) -> str:
    return (
        message.removeprefix("Value error, ")
        .replace("Extra inputs are not permitted", "unknown key")
        .replace("valid tuple", "list")
    )
