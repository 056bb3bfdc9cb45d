"""What the run was started on: the digests of env, model, data and config, as `envbuilder train` gives them.

`ENVBUILDER_STAMP` is a JSON object of strings. It goes word for word into the run's "job" record, every
checkpoint's `state.json` and `outcome.json`. Without it the stamp is empty, and nothing is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from trainer.errors import ConfigError

VARIABLE = "ENVBUILDER_STAMP"
FIXED = ("model", "data", "validation_data")
"""A run goes on with the same model and the same data only; an env may be mended in between."""
KIND = " is of"
"""`model is of` says what `model` is a digest of: digests of different things can't be compared."""

Stamp = dict[str, str | None]


def read_stamp(environ: Mapping[str, str]) -> Stamp:
    """The stamp of this run's part. Raises ConfigError if the variable holds no JSON object of strings."""
    text = environ.get(VARIABLE, "{}")
    try:
        stamp = json.loads(text)
    except ValueError:
        stamp = None
    if not isinstance(stamp, dict) or not all(
        value is None or isinstance(value, str) for value in stamp.values()
    ):
        raise ConfigError(
            f"The variable {VARIABLE} is no JSON object of strings.",
            remedy=f"unset {VARIABLE}",
            context={"value": text[:200]},
        )
    return stamp


def compare_stamps(before: Stamp, now: Stamp) -> tuple[dict[str, str], list[str]]:
    """Name → "was …, is …" for each changed digest that forbids going on, and notes on the other changes."""
    changed = {
        name: f"was {before[name]}, is {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    }
    forbidden = {
        name: text
        for name, text in changed.items()
        if name in FIXED and before.get(name + KIND) == now.get(name + KIND)
    }
    notes = [
        f"{name} changed since the checkpoint: {text}"
        for name, text in changed.items()
        if name not in forbidden
    ]
    return forbidden, notes
