"""A build backend of its own, standard library only: it needs no package to build with.

It behaves as $PLAIN_BEHAVIOUR says, and the wheel holds what the build could see: the canary of the tests.
"""

import base64
import hashlib
import json
import os
import pathlib
import socket
import sys
import zipfile


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    behaviour = os.environ.get("PLAIN_BEHAVIOUR", "")
    if behaviour == "fails":
        print("plain.c:1:1: error: unknown type name 'nonsense'")
        # What other compilers, which ran beside it, had to say.
        print("\n".join(f"[{number}/20] compiled" for number in range(1, 21)), flush=True)
        sys.exit(1)
    version = "2.0" if behaviour == "other-version" else "1.0"
    info = f"plain-{version}.dist-info"
    files = {
        "plain.py": f"__version__ = {version!r}\n",
        "plain_seen.json": json.dumps(_seen()),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: plain\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: plain\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    name = f"plain-{version}-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name


def _digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()


def _seen():
    """Whether the port in port.txt answers, the variables, and the files in the home folder."""
    port = pathlib.Path("port.txt")
    reached = None
    if port.exists():
        try:
            socket.create_connection(("127.0.0.1", int(port.read_text())), timeout=1).close()
            reached = True
        except OSError:
            reached = False
    home = sorted(path.name for path in pathlib.Path.home().iterdir())
    return {"reached": reached, "environment": dict(os.environ), "home": home}
