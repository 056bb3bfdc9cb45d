"""Resolvers behind one protocol: uv (the default) and pip-tools."""

from __future__ import annotations

from collections.abc import Callable

from envbuilder.errors import UsageError
from envbuilder.resolve.pip_tools import PipToolsResolver
from envbuilder.resolve.protocol import Request, Resolver, Versions
from envbuilder.resolve.uv import UvResolver
from envbuilder.stubs import KnownPackage

__all__ = [
    "RESOLVERS",
    "KnownPackage",
    "PipToolsResolver",
    "Request",
    "Resolver",
    "UvResolver",
    "Versions",
    "resolver_named",
]

RESOLVERS: dict[str, Callable[[], Resolver]] = {
    resolver.name: resolver for resolver in (UvResolver, PipToolsResolver)
}


def resolver_named(name: str) -> Resolver:
    """The resolver called `name`; UsageError where there is none."""
    if name not in RESOLVERS:
        raise UsageError(
            f"There is no resolver called {name}.",
            remedy=f"Run the command with --resolver and one of {', '.join(RESOLVERS)}.",
        )
    return RESOLVERS[name]()
