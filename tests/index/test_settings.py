"""Where indexes are, and what of pip's settings and of netrc holds for reaching them."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from envbuilder.errors import InputError, NetworkError
from envbuilder.index import Index, index_url, open_client, open_indexes
from envbuilder.pip_settings import PUBLIC_INDEX, network_environment, read_pip_settings
from tests.lab.index_server import Fault, IndexServer
from tests.lab.packages import make_wheel


def user_of(server: IndexServer, request: int = -1) -> str | None:
    """The "user:password" that came with a request."""
    header = server.requests[request][1].get("authorization")
    return base64.b64decode(header.removeprefix("Basic ")).decode() if header else None


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[IndexServer]:
    """A second index. Reached as `localhost`, where the first one is 127.0.0.1, it is another host."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    make_wheel(folder, "thing", "1.0")
    with IndexServer(folder) as server:
        yield server


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


@pytest.mark.parametrize(
    "url", ["file:///opt/simple", "http://user:secret@host:port/simple", "http://u:sec/secret@host/simple"]
)
def test_an_index_that_is_not_on_http_is_refused_and_its_credentials_are_not_shown(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", url)

    with pytest.raises(InputError, match="http or https") as caught:
        index_url("default")

    assert "secret" not in str(caught.value.to_json())


def test_pips_files_are_read_and_its_variables_win(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_settings / "pip.conf"
    config.write_text(
        "[global]\nindex-url = http://127.0.0.1:1/file\ntimeout = 5\nproxy = 127.0.0.1:3128\n"
        "extra-index-url =\n    http://127.0.0.1:2/a\n    http://127.0.0.1:2/b\n"
        "[download]\nretries = 7\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "77")

    settings = read_pip_settings()

    assert settings.index_url == "http://127.0.0.1:1/file"
    assert settings.extra_index_urls == ("http://127.0.0.1:2/a", "http://127.0.0.1:2/b")
    assert (settings.timeout_s, settings.retries) == (77.0, 7)
    assert settings.proxy == "http://127.0.0.1:3128"
    with open_client() as client:
        assert client.timeout == httpx.Timeout(77.0)


@pytest.mark.parametrize("option", ["TIMEOUT", "RETRIES"])
def test_a_number_of_pips_that_is_none_is_the_inputs_fault(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv(f"PIP_{option}", "soon")

    with pytest.raises(InputError, match="not a number") as caught:
        read_pip_settings()

    assert caught.value.context[option.lower()] == "soon"


def test_the_indexes_have_pips_retries(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, server: IndexServer
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("PIP_RETRIES", "1")
    server.faults["thing"] = [Fault(status=503)] * 9

    with open_client() as client, pytest.raises(NetworkError):
        open_indexes([], client)["default"].files("thing")

    assert len(server.requests) == 2


@pytest.mark.parametrize("variable", ["PIP_CERT", "PIP_CLIENT_CERT"])
def test_a_certificate_file_that_is_not_there_is_the_inputs_fault(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/nonexistent/ca.pem")

    with pytest.raises(InputError, match="cert") as caught:
        open_client()

    assert "/nonexistent/ca.pem" in caught.value.context.values()


def test_requests_go_through_pips_proxy(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, server: IndexServer
) -> None:
    monkeypatch.setenv("PIP_PROXY", server.origin)

    with open_client() as client, pytest.raises(NetworkError, match="status 404"):
        Index("default", "http://packages.example.org/simple", client).files("thing")

    # A proxy is asked for the whole URL; this server only looks at its path.
    assert server.requests[0][1]["host"] == "packages.example.org"


def test_credentials_in_a_url_are_sent_decoded_to_its_own_host_and_not_where_it_redirects(
    own_settings: Path, server: IndexServer, elsewhere: IndexServer
) -> None:
    server.faults["thing"] = [Fault(status=302, headers={"Location": f"{elsewhere.url}/thing/"})]
    url = server.url.replace("http://", "http://user%40site:s%2Fe%3Acret@")

    with open_client() as client:
        (file,) = Index("default", url, client).files("thing")

    assert user_of(server) == "user@site:s/e:cret"
    assert user_of(elsewhere) is None
    assert "cret" not in file.url


@pytest.mark.parametrize("where", ["home", "variable"])
def test_netrc_serves_the_hosts_that_it_names_and_no_others(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, server: IndexServer, where: str
) -> None:
    path = own_settings / (".netrc" if where == "home" else "elsewhere.netrc")
    path.write_text("machine 127.0.0.1 login user password secret\ndefault login anyone password other\n")
    path.chmod(0o600)
    if where == "variable":
        monkeypatch.setenv("NETRC", str(path))
    make_wheel(server.folder, "thing", "1.0")

    with open_client() as client:
        Index("default", server.url, client).files("thing")
        Index("default", server.url.replace("127.0.0.1", "localhost"), client).files("thing")
        Index("default", server.url.replace("//", "//own:mine@"), client).files("thing")

    assert [user_of(server, request) for request in range(3)] == ["user:secret", None, "own:mine"]


def test_netrc_does_not_replace_what_a_request_brings_itself(own_settings: Path, server: IndexServer) -> None:
    netrc = own_settings / ".netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    netrc.chmod(0o600)

    with open_client() as client:
        client.get(server.url, headers={"Authorization": "Bearer token"})

    assert server.requests[0][1]["authorization"] == "Bearer token"


def test_a_netrc_that_can_not_be_read_is_named(own_settings: Path) -> None:
    (own_settings / ".netrc").write_text("machine 127.0.0.1 nonsense\n")

    with pytest.raises(InputError, match=r"\.netrc can't be read"):
        open_client()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, and its key."""
    path = tmp_path_factory.mktemp("tls") / "loopback.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", path.with_suffix(".key"), "-out", path),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".key").read_bytes())
    return path


def test_certificates_are_verified_but_for_pips_trusted_hosts(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path
) -> None:
    folder = tmp_path / "secure"
    folder.mkdir()
    make_wheel(folder, "thing", "1.0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with IndexServer(folder, certificate=certificate) as secure:

        def failure() -> str:
            with open_client() as client:
                try:
                    Index("default", secure.url, client, retries=0).files("thing")
                except NetworkError as error:
                    return error.message.lower()
                return ""

        assert "certificate" in failure()
        for trusted in ("other.example.org", "127.0.0.1:1", "localhost"):
            monkeypatch.setenv("PIP_TRUSTED_HOST", trusted)
            assert "certificate" in failure()
        for trusted in ("127.0.0.1", f"other.example.org {secure.origin.removeprefix('https://')}"):
            monkeypatch.setenv("PIP_TRUSTED_HOST", trusted)
            assert not failure()
        monkeypatch.delenv("PIP_TRUSTED_HOST")
        monkeypatch.setenv("PIP_CERT", str(certificate))
        assert not failure()


def test_a_resolver_gets_what_reaches_an_index_and_nothing_else_of_pips_or_uvs(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        "PIP_CERT": "/etc/ca.pem",
        "PIP_PROXY": "127.0.0.1:3128",
        "PIP_TRUSTED_HOST": "a.example.org b.example.org",
        "PIP_RETRIES": "9",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "http://127.0.0.1:1",
        "UV_INDEX": "/wheels",
    }.items():
        monkeypatch.setenv(variable, value)

    environment = network_environment()

    assert environment["SSL_CERT_FILE"] == environment["PIP_CERT"] == "/etc/ca.pem"
    assert environment["HTTPS_PROXY"] == environment["https_proxy"] == "http://127.0.0.1:3128"
    assert environment["UV_INSECURE_HOST"] == environment["PIP_TRUSTED_HOST"] == "a.example.org b.example.org"
    assert environment["UV_HTTP_RETRIES"] == environment["PIP_RETRIES"] == "9"
    assert "PIP_PROXY" not in environment
    assert environment["NO_PROXY"] == environment["no_proxy"] == "127.0.0.1"
    assert not {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_INDEX"} & set(environment)
