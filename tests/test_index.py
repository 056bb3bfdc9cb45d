"""Indexes on loopback in both of their languages, and where their URLs come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import envbuilder.index
from envbuilder.errors import InputError, NetworkError
from envbuilder.index import Index, index_url, open_client, open_indexes
from envbuilder.pip_settings import PUBLIC_INDEX, network_environment
from tests.lab.index_server import Fault, IndexServer
from tests.lab.packages import make_wheel


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IndexServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    with IndexServer(folder) as server:
        yield server


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(follow_redirects=True) as client:
        yield client


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without settings, and none of the machine's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for variable in ("PIP_INDEX_URL", "PIP_CERT", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.mark.parametrize("html_only", [False, True])
def test_files_have_url_hash_requires_python_and_yanked_in_both_languages(
    server: IndexServer, client: httpx.Client, html_only: bool
) -> None:
    server.html_only = html_only
    old = make_wheel(server.folder, "Some.Thing", "1.0")
    new = make_wheel(server.folder, "Some.Thing", "2.0")
    server.requires_python[new.name] = ">=3.12"
    server.yanked.add(old.name)

    files = {file.filename: file for file in Index("default", server.url, client).files("some_thing")}

    assert set(files) == {old.name, new.name}
    assert files[new.name].url == server.file_url(new.name)
    assert files[new.name].sha256 == hashlib.sha256(new.read_bytes()).hexdigest()
    assert files[new.name].size == (None if html_only else new.stat().st_size)
    assert (files[new.name].requires_python, files[old.name].requires_python) == (">=3.12", None)
    assert (files[new.name].yanked, files[old.name].yanked) == (False, True)


def test_a_size_that_the_listing_lacks_is_asked_of_the_server(
    server: IndexServer, client: httpx.Client
) -> None:
    server.html_only = True
    wheel = make_wheel(server.folder, "thing", "1.0")
    index = Index("default", server.url, client)

    assert index.complete(index.files("thing")[0]).size == wheel.stat().st_size


def test_a_file_without_a_hash_is_refused(server: IndexServer, client: httpx.Client) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    server.announced_sha256[wheel.name] = None
    index = Index("default", server.url, client)

    with pytest.raises(NetworkError, match="no sha256"):
        index.complete(index.files("thing")[0])


def test_each_package_is_asked_for_once(server: IndexServer, client: httpx.Client) -> None:
    make_wheel(server.folder, "thing", "1.0")
    index = Index("default", server.url, client)

    assert index.files("thing") == index.files("Thing")
    assert [path for path, _ in server.requests] == ["/simple/thing/"]


def test_a_busy_index_is_asked_again(
    server: IndexServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envbuilder.index, "_PAUSES", (0.0, 0.0))
    make_wheel(server.folder, "thing", "1.0")
    server.faults["thing"] = [Fault(status=503), Fault(status=429)]

    assert len(Index("default", server.url, client).files("thing")) == 1


def test_an_unknown_package_is_asked_for_once_and_named(server: IndexServer, client: httpx.Client) -> None:
    with pytest.raises(NetworkError, match="nothing-here: status 404") as caught:
        Index("default", server.url, client).files("nothing-here")

    assert "ENVBUILDER_INDEX_DEFAULT_URL" in caught.value.remedy
    assert len(server.requests) == 1


def test_an_answer_that_is_no_indexs_is_a_network_error(server: IndexServer, client: httpx.Client) -> None:
    server.faults["thing"] = [
        Fault(headers={"Content-Type": "application/vnd.pypi.simple.v1+json"}, body=b'{"meta": 1')
    ]

    with pytest.raises(NetworkError, match="no package index's"):
        Index("default", server.url, client).files("thing")


def test_credentials_go_to_the_indexs_own_host_and_not_where_it_redirects(
    server: IndexServer, client: httpx.Client, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    make_wheel(folder, "thing", "1.0")
    with IndexServer(folder) as elsewhere:
        server.faults["thing"] = [Fault(status=302, headers={"Location": f"{elsewhere.url}/thing/"})]
        url = server.url.replace("http://", "http://user:secret@")

        (file,) = Index("default", url, client).files("thing")

        assert "authorization" in server.requests[0][1]
        assert "authorization" not in elsewhere.requests[0][1]
        assert "secret" not in file.url


def test_files_on_the_indexs_own_host_carry_its_credentials(
    server: IndexServer, client: httpx.Client
) -> None:
    make_wheel(server.folder, "thing", "1.0")

    (file,) = Index("default", server.url.replace("http://", "http://user:secret@"), client).files("thing")

    assert file.url.startswith("http://user:secret@127.0.0.1")


def test_an_error_never_shows_credentials(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envbuilder.index, "_PAUSES", ())
    with pytest.raises(NetworkError) as caught:
        Index("default", "http://user:secret@127.0.0.1:9/simple", client).files("thing")

    assert "secret" not in str(caught.value.to_json())


def test_an_indexs_url_is_its_variable_then_the_users_file_then_pips_then_the_public_one(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index_url("default") == PUBLIC_INDEX
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/pip")
    assert index_url("default") == "http://127.0.0.1:1/pip"
    config = own_settings / ".config/envbuilder/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[index]\ndefault = "http://127.0.0.1:1/file"\nsite-a = "http://127.0.0.1:1/site"\n')
    assert index_url("default") == "http://127.0.0.1:1/file"
    assert index_url("site-a") == "http://127.0.0.1:1/site"
    monkeypatch.setenv("ENVBUILDER_INDEX_SITE_A_URL", "http://127.0.0.1:1/variable")
    assert index_url("site-a") == "http://127.0.0.1:1/variable"


def test_an_index_that_is_configured_nowhere_is_named_with_its_variable(own_settings: Path) -> None:
    with httpx.Client() as client, pytest.raises(InputError) as caught:
        open_indexes(["site-a"], client)

    assert caught.value.remedy == "export ENVBUILDER_INDEX_SITE_A_URL=URL"


@pytest.mark.parametrize("text", ["[index", 'index = "x"', "[index]\nsite = 1"])
def test_a_broken_config_file_is_named(own_settings: Path, text: str) -> None:
    config = own_settings / ".config/envbuilder/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(text)

    with pytest.raises(InputError, match=r"config\.toml"):
        index_url("default")


def test_an_index_on_disk_is_refused(own_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", "file:///opt/simple")

    with pytest.raises(InputError, match="http or https"):
        index_url("default")


def test_the_client_has_pips_timeout(own_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "77")
    with open_client() as client:
        assert client.timeout == httpx.Timeout(77.0)


def test_a_certificate_file_that_is_not_there_is_the_inputs_fault(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CERT", "/nonexistent/ca.pem")

    with pytest.raises(InputError, match="cert") as caught:
        open_client()

    assert caught.value.context["cert"] == "/nonexistent/ca.pem"


def test_a_resolver_gets_pips_certificates_and_nothing_else_of_pips_or_uvs(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CERT", "/etc/ca.pem")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("UV_INDEX", "/wheels")

    environment = network_environment()

    assert environment["SSL_CERT_FILE"] == environment["PIP_CERT"] == "/etc/ca.pem"
    assert not {"PIP_FIND_LINKS", "UV_INDEX"} & set(environment)
