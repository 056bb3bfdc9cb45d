"""Promises 11 and 12 on a disk that is full, or mounted read-only. As root only: both take a mount."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.commands import Workplace
from tests.promises.conftest import SOURCE, TARGET, publish_plain, publish_tools

pytestmark = pytest.mark.lab

DISK = 1 << 20
"""Bytes of the small disk."""


def mounted(place: Workplace, mounts: str, *commands: str) -> list[str]:
    """What a shell prints that runs `commands` in a mount namespace of its own, after `mounts`.

    $ROOT is the workplace's, $RECIPE its recipe; `envbuilder` is the command with --json.
    """
    program = f'envbuilder() {{ "{sys.executable}" -m envbuilder --json "$@"; }}\n'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", "\n".join(["set -e", mounts, "set +e", program, *commands])],
        cwd=place.folder,
        env={
            **place.environment,
            "PYTHONPATH": str(REPOSITORY),
            "ROOT": str(place.root.path),
            "RECIPE": str(place.recipe("source")),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.fixture
def place(tmp_path: Path, server: IndexServer) -> Workplace:
    publish_tools(server.folder)
    place = Workplace(tmp_path / "place", {"PIP_INDEX_URL": server.url})
    for folder in ("home", "tmp", ".envbuilder"):
        (place.folder / folder).mkdir(parents=True)
    return place


@pytest.mark.parametrize("size", [DISK + 1, DISK * 4 // 5], ids=["at once", "on the way"])
def test_promise_11_a_small_disk_is_told_with_path_and_bytes_and_leaves_no_partial(
    place: Workplace, server: IndexServer, size: int
) -> None:
    """Disk full → typed error with the path and the bytes needed, no partial left (1 MiB tmpfs)."""
    make_wheel(server.folder, "big", "1.0", files={"big.bin": random.Random(1).randbytes(size)})
    place.add("source", f'name = "source"\nrequirements = ["big"]\n{TARGET}')
    place.succeed("lock", place.recipe("source"))
    server.requests.clear()
    *told, code, left = mounted(
        place,
        f'mount -t tmpfs -o size={DISK},mode=750 tmpfs "$ROOT"',
        'envbuilder fetch "$RECIPE"',
        "echo $?",
        r'find "$ROOT" \( -name "*.part" -o -name "*.new" -o -name bundle.json \) | wc -l',
    )
    assert (code, left) == ("7", "0")
    error = json.loads("\n".join(told))
    assert int(error["context"]["bytes needed"]) > 0
    assert Path(error["context"]["file"]).is_relative_to(place.root.path)
    assert bool(server.file_requests()) == (size < DISK)


def test_promise_12_a_bundle_on_a_read_only_disk_serves(
    place: Workplace, server: IndexServer, tmp_path: Path
) -> None:
    """Read-only bundle → hits work with no write at all."""
    publish_plain(server.folder)
    make_wheel(server.folder, "one", "1.0")
    place.add("source", SOURCE)
    for command in ("lock", "fetch"):
        place.succeed(command, place.recipe("source"))
    server.requests.clear()
    # Not even what the last fetch noted is there, and it can't be noted again.
    (place.root.cache / "fetch" / "source.json").unlink()
    codes = mounted(
        place,
        'mount --bind "$ROOT" "$ROOT" && mount -o remount,bind,ro "$ROOT" && ! touch "$ROOT/x" 2>&-',
        *(
            f"envbuilder {words} >&2; echo $?"
            for words in ('fetch "$RECIPE"', "bundle verify source", f'bundle pack source -o "{tmp_path}"')
        ),
    )
    assert codes == ["0", "0", "0"]
    codes = mounted(
        place,
        'for part in bundles store; do mount --bind "$ROOT/$part" "$ROOT/$part"; '
        'mount -o remount,bind,ro "$ROOT/$part"; done; ! touch "$ROOT/bundles/x" 2>&-',
        'envbuilder compile "$RECIPE" >&2; echo $?',
    )
    assert codes == ["0"]
    assert place.root.env("source").exists()
    assert server.requests == []
