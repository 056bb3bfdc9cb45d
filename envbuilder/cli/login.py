"""Login nodes: the site's budget for what runs there, and the CPU time that a command took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Optional

import typer

from envbuilder.budget import cpu_seconds_used, within
from envbuilder.site import LoginBudget, load_site

LoginSite = Annotated[
    Optional[str],
    typer.Option(
        "--site",
        envvar="ENVBUILDER_SITE",
        help="The site, by name (recipes/sites/NAME.toml) or file, whose [login] limits are kept here.",
    ),
]


@contextmanager
def on_login_node(site: str | None, *, kept: str) -> Iterator[None]:
    """Keeps the command within `login` of `site`, or without a site within the limits in force.

    StoppedError, saying what is `kept`, when its CPU time is nearly used up.
    """
    with within(load_site(site).login if site else LoginBudget(), kept=kept):
        yield


def cpu_seconds() -> float:
    """What the command has used so far, with all that it started."""
    return round(cpu_seconds_used(), 1)
