"""What the machine's pip is configured with: how it reaches an index. Only that is taken from pip.

find-links and extra indexes are left alone: what is locked must not depend on the machine that locks.
"""

from __future__ import annotations

import os

from pip._internal.configuration import Configuration
from pip._internal.exceptions import ConfigurationError
from pip._internal.models.index import PyPI

from envbuilder.errors import InputError

PUBLIC_INDEX = PyPI.simple_url
"""The index that pip uses where nothing is configured."""


def _settings() -> dict[str, str]:
    """pip's options by name, from its configuration files and PIP_* variables, the strongest winning."""
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


def pip_setting(option: str) -> str | None:
    """pip's `option` ("cert", "index-url", …) where it is configured."""
    return _settings().get(option) or None


def network_environment() -> dict[str, str]:
    """Environment for a resolver: this process's, without what sways pip or uv; certificates, proxy,
    timeout and retries as pip has them."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    wanted = {
        "SSL_CERT_FILE": pip_setting("cert"),
        "PIP_CERT": pip_setting("cert"),
        "SSL_CLIENT_CERT": pip_setting("client-cert"),
        "PIP_CLIENT_CERT": pip_setting("client-cert"),
        "HTTP_PROXY": pip_setting("proxy"),
        "HTTPS_PROXY": pip_setting("proxy"),
        "PIP_PROXY": pip_setting("proxy"),
        "UV_HTTP_TIMEOUT": pip_setting("timeout"),
        "PIP_TIMEOUT": pip_setting("timeout"),
        "UV_HTTP_RETRIES": pip_setting("retries"),
        "PIP_RETRIES": pip_setting("retries"),
        # An empty file: pip reads no other.
        "PIP_CONFIG_FILE": os.devnull,
        # uv builds nothing here, so it needs no interpreter of the target's version.
        "UV_PYTHON_DOWNLOADS": "never",
    }
    if pip_setting("cert") is None and "SSL_CERT_FILE" not in os.environ:
        wanted["UV_SYSTEM_CERTS"] = "true"
    return environment | {key: value for key, value in wanted.items() if value is not None}
