"""Sweeps as they are noted under ROOT: what `status` and a second submission know of them."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import TypeAdapter

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.errors import InputError, UsageError
from envbuilder.paths import Root
from envbuilder.sweep import Sweep, differences


def read_sweep(root: Root, name: str) -> Sweep | None:
    """The sweep that is noted under that name; None where there is none, or where it can't be read."""
    try:
        return TypeAdapter(Sweep).validate_json(root.sweep(name).read_bytes())
    except (OSError, ValueError):
        return None


def check_same_sweep(root: Root, sweep: Sweep) -> None:
    """Raises where `sweep` can't have its name: InputError where another sweep has it, UsageError where a
    run that is not of this sweep has the name of one of its runs."""
    noted = read_sweep(root, sweep.name)
    if noted is None:
        taken = next((member.run for member in sweep.members if root.run(member.run).exists()), None)
        if taken is not None:
            raise UsageError(
                f"There is a run called {taken} already, and it is not of this sweep.",
                remedy="Give the sweep another name: envbuilder sweep … --name NAME",
                context={"run": root.run(taken)},
            )
        return
    if other := differences(noted, sweep):
        told = "; ".join(f"{key}: {before} there, {now} here" for key, (before, now) in other.items())
        raise InputError(
            f"There is another sweep called {sweep.name}, which differs in {', '.join(other)}.",
            remedy=f"Type that one's own words to go on with it, or give this one another name: "
            f"envbuilder sweep … --name {sweep.name}-2",
            context={"noted in": root.sweep(sweep.name), "differs": told},
        )


def note_sweep(root: Root, sweep: Sweep) -> None:
    """Notes the sweep, before its first job is submitted."""
    path = root.sweep(sweep.name)
    make_folder(path.parent)
    write_atomically(path, json.dumps(asdict(sweep), indent=1) + "\n")
