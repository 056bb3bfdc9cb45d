"""Licences as packages state them, read without bringing the packages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from envbuilder.index import Index, license_of
from envbuilder.licenses import stated_license
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_wheel

LONG = " AND ".join(["Apache-2.0", "BSD-3-Clause", "MIT", "Zlib"] * 6)
MIT = "Classifier: License :: OSI Approved :: MIT License"


@pytest.mark.parametrize(
    ("lines", "license_"),
    [
        (["License-Expression: mit OR apache-2.0", "License: BSD"], "MIT OR Apache-2.0"),
        (["License-Expression: LicenseRef-Proprietary"], "LicenseRef-Proprietary"),
        (["License-Expression: " + LONG], LONG),
        (["License: bsd-3-clause", MIT], "BSD-3-Clause"),
        (["License: Apache 2.0 License"], "Apache 2.0 License"),
        (["License: UNKNOWN", MIT], "MIT"),
        (["License: " + "x" * 101, MIT], "MIT"),
        (["License: Permission is granted\n        to any person", MIT], "MIT"),
        (["License: " + "x" * 101], None),
        (["Classifier: License :: OSI Approved", MIT], "MIT"),
        (["Classifier: License :: OSI Approved :: BSD License"], "BSD License"),
        (["Classifier: License :: Other/Proprietary License"], "Other/Proprietary License"),
        (
            [MIT, "Classifier: License :: OSI Approved :: Apache Software License", MIT],
            "MIT, Apache-2.0",
        ),
        (["Classifier: Programming Language :: Python"], None),
        ([], None),
    ],
)
def test_the_licence_is_the_expression_else_the_short_field_else_the_classifiers(
    lines: list[str], license_: str | None
) -> None:
    metadata = "\n".join(["Metadata-Version: 2.4", "Name: thing", "Version: 1.0", *lines, "", "License: MIT"])

    assert stated_license(metadata.encode()) == license_


@pytest.mark.parametrize("html_only", [False, True])
@pytest.mark.parametrize("core_metadata", [True, False])
def test_the_licence_of_a_wheel_is_read_without_bringing_it(
    server: IndexServer, html_only: bool, core_metadata: bool
) -> None:
    server.html_only, server.core_metadata = html_only, core_metadata
    wheel = make_wheel(server.folder, "thing", "1.0", stated=["License-Expression: MIT"])
    # Bytes before an archive are allowed: it is a large wheel now.
    wheel.write_bytes(b"\x00" * (2 << 20) + wheel.read_bytes())
    with loopback_client() as client:
        index = Index("default", server.url, client)
        file_ = replace(index.files("thing")[0], size=wheel.stat().st_size)

        assert license_of(index, file_) == "MIT"

    ranges = [headers["range"] for path, headers in server.requests if path.endswith(".whl")]
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges]
    assert sum(end - start + 1 for start, end in asked) < 1 << 20
    assert bool(asked) is not core_metadata


def test_a_wheel_whose_metadata_can_not_be_read_has_no_licence(server: IndexServer) -> None:
    server.core_metadata = False
    name = "thing-1.0-py3-none-any.whl"
    (server.folder / name).write_bytes(b"no archive")
    server.requires_python[name] = ""
    with loopback_client() as client:
        index = Index("default", server.url, client)

        assert license_of(index, index.files("thing")[0]) is None
