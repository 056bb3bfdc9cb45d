"""The HTTP client, set up as the machine's pip is: certificates, proxy, timeout, credentials, trusted hosts.

Credentials come from the URL, else from the netrc file for a host that it names. They go to the host that was
asked, and httpx forwards none where it is redirected to another origin.
"""

from __future__ import annotations

import netrc
import os
import ssl
from collections.abc import Generator, Mapping
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import httpx

from envbuilder.errors import InputError
from envbuilder.pip_settings import PipSettings, read_pip_settings

_LIMITS = httpx.Limits(max_connections=32, max_keepalive_connections=32)


def open_client() -> httpx.Client:
    """A client with pip's settings and the user's netrc; InputError where one of them can't be used."""
    settings = read_pip_settings()
    credentials = _Credentials(_netrc_hosts())
    try:
        return httpx.Client(
            auth=credentials,
            verify=_tls(settings),
            proxy=settings.proxy,
            mounts=_unverified(settings),
            timeout=settings.timeout_s,
            follow_redirects=True,
            limits=_LIMITS,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"pip's cert, client-cert, proxy, timeout or trusted-host can't be used: {error}.",
            remedy="pip config list",
            context={
                "cert": settings.cert or "",
                "client-cert": settings.client_cert or "",
                "timeout": settings.timeout_s,
                "trusted-host": " ".join(settings.trusted_hosts),
            },
        ) from error


class _Credentials(httpx.Auth):
    """Basic authentication with the URL's credentials, else with those that netrc has for its host; what a
    request brings itself stays.

    netrc knows no ports and no schemes. A host that was spoken to over TLS gets netrc's in no other way, even
    if an https page leads to its http URLs.
    """

    def __init__(self, hosts: Mapping[str, tuple[str, str]]) -> None:
        self._hosts = hosts
        self._over_tls: set[str] = set()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        # httpx undoes the percent-encoding.
        known = (request.url.username, request.url.password)
        host = request.url.host
        if request.url.scheme == "https":
            self._over_tls.add(host)
        if not any(known) and (request.url.scheme == "https" or host not in self._over_tls):
            known = self._hosts.get(host, known)
        needed = any(known) and "Authorization" not in request.headers
        auth = httpx.BasicAuth(*known) if needed else httpx.Auth()
        yield from auth.auth_flow(request)


def _netrc_hosts() -> Mapping[str, tuple[str, str]]:
    """Host → user and password, from $NETRC, else ~/.netrc. Its `default` entry is for no index."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        hosts = netrc.netrc(path).hosts
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError) as error:
        raise InputError(
            f"{path} can't be read: {error}.",
            remedy=f"Mend {path}, or: export NETRC={os.devnull}",
            context={"file": path},
        ) from error
    return {
        host: (login or "", password or "")
        for host, (login, _, password) in hosts.items()
        if host != "default"
    }


def _unverified(settings: PipSettings) -> dict[str, httpx.BaseTransport]:
    """How trusted hosts are reached over https: as all others, their certificates unseen."""
    mounts: dict[str, httpx.BaseTransport] = {}
    for host in settings.trusted_hosts:
        proxy = settings.proxy or (None if proxy_bypass(host) else getproxies().get("https"))
        transport = httpx.HTTPTransport(verify=_tls(settings, verified=False), proxy=proxy, limits=_LIMITS)
        # Of an IPv6 address pip takes both forms, httpx this one.
        mounts[f"https://[{host}]" if host.count(":") > 1 and "[" not in host else f"https://{host}"] = (
            transport
        )
    return mounts


def _tls(settings: PipSettings, *, verified: bool = True) -> ssl.SSLContext:
    if not verified:
        context = httpx.create_ssl_context(verify=False)
    elif settings.cert is None:
        context = httpx.create_ssl_context()
        context.load_default_certs()
    elif Path(settings.cert).is_dir():
        context = ssl.create_default_context(capath=settings.cert)
    else:
        context = ssl.create_default_context(cafile=settings.cert)
    if settings.client_cert:
        context.load_cert_chain(settings.client_cert)
    return context
