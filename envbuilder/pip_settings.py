"""What the machine's pip is configured with: how it reaches an index, and where else files may lie.

Extra indexes and find-links never choose anything: what is locked must not depend on the machine that locks.
They may only serve bytes that a lock names already.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pip._internal.configuration import Configuration
from pip._internal.exceptions import ConfigurationError
from pip._internal.models.index import PyPI

from envbuilder.errors import InputError

PUBLIC_INDEX = PyPI.simple_url
"""The index that pip uses where nothing is configured."""


@dataclass(frozen=True)
class PipSettings:
    """pip's options of the same names; None or empty where they are not configured."""

    index_url: str | None
    extra_index_urls: tuple[str, ...]
    find_links: tuple[str, ...]
    """Folders, files and URLs of pages."""
    cert: str | None
    client_cert: str | None
    proxy: str | None
    """A URL, also where pip was given none but a host and a port."""
    timeout_s: float
    retries: int
    trusted_hosts: tuple[str, ...]
    """Hosts, each with or without a port, whose certificates are not looked at."""


def read_pip_settings() -> PipSettings:
    """pip's settings, from its configuration files and PIP_* variables, the strongest winning.

    InputError where pip can't read them, or a number is none.
    """
    options = _options()

    def text(option: str) -> str | None:
        return options.get(option) or None

    def several(option: str) -> tuple[str, ...]:
        return tuple(options.get(option, "").split())

    proxy = text("proxy")
    try:
        # pip's own defaults.
        timeout_s, retries = float(text("timeout") or 15), int(text("retries") or 5)
    except ValueError as error:
        raise InputError(
            f"pip's timeout or retries is not a number: {error}.",
            remedy="pip config list",
            context={option: options[option] for option in ("timeout", "retries") if option in options},
        ) from error
    return PipSettings(
        index_url=text("index-url"),
        extra_index_urls=several("extra-index-url"),
        find_links=several("find-links"),
        cert=text("cert"),
        client_cert=text("client-cert"),
        proxy=proxy if proxy is None or "://" in proxy else f"http://{proxy}",
        timeout_s=timeout_s,
        retries=max(retries, 0),
        trusted_hosts=several("trusted-host"),
    )


def network_environment() -> dict[str, str]:
    """Environment for a resolver: this process's, without what sways pip or uv; certificates, proxy,
    timeout, retries and trusted hosts as pip has them."""
    settings = read_pip_settings()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    trusted = " ".join(settings.trusted_hosts) or None
    bypass = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if bypass != "*":
        # Where several indexes are combined, they are served on loopback.
        bypass = ",".join(filter(None, [bypass, "127.0.0.1"]))
    is_folder = settings.cert is not None and Path(settings.cert).is_dir()
    wanted = {
        "NO_PROXY": bypass,
        "no_proxy": bypass,
        "SSL_CERT_DIR" if is_folder else "SSL_CERT_FILE": settings.cert,
        "PIP_CERT": settings.cert,
        "SSL_CLIENT_CERT": settings.client_cert,
        "PIP_CLIENT_CERT": settings.client_cert,
        "UV_HTTP_TIMEOUT": str(max(round(settings.timeout_s), 1)),
        "PIP_TIMEOUT": str(settings.timeout_s),
        "UV_HTTP_RETRIES": str(settings.retries),
        "PIP_RETRIES": str(settings.retries),
        "UV_INSECURE_HOST": trusted,
        "PIP_TRUSTED_HOST": trusted,
        # An empty file: pip reads no other.
        "PIP_CONFIG_FILE": os.devnull,
        # uv builds nothing here, so it needs no interpreter of the target's version.
        "UV_PYTHON_DOWNLOADS": "never",
    }
    if settings.cert is None and "SSL_CERT_FILE" not in os.environ:
        wanted["UV_SYSTEM_CERTS"] = "true"
    if settings.proxy is not None:
        # As variables, which both obey. Not PIP_PROXY, with which pip would heed no NO_PROXY; in both cases,
        # for some programs read the lower one first.
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            wanted |= {name: settings.proxy, name.lower(): settings.proxy}
    return environment | {key: value for key, value in wanted.items() if value is not None}


def _options() -> dict[str, str]:
    """pip's options by name."""
    configuration = Configuration(isolated=False)
    try:
        configuration.load()
    except ConfigurationError as error:
        raise InputError(f"pip's configuration can't be read: {error}.", remedy="pip config debug") from error
    sections: dict[str, dict[str, str]] = {}
    for _, values in configuration.items():
        for key, value in values.items():
            section, _, option = key.partition(".")
            # PIP_DEFAULT_TIMEOUT is another name of PIP_TIMEOUT.
            sections.setdefault(section, {})[option.removeprefix("default-")] = str(value)
    return {**sections.get("global", {}), **sections.get("download", {}), **sections.get(":env:", {})}
