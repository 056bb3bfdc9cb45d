"""A build backend of its own that compiles several C++ files at once, as ninja does, each for a while."""

import os
import pathlib
import subprocess
import zipfile

COUNT = 6
LIMITS = ["-fconstexpr-ops-limit=1000000000", "-fconstexpr-loop-limit=100000000"]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    running = []
    for number in range(COUNT):
        source = pathlib.Path(f"unit{number}.cpp")
        source.write_text(
            f'#include "work.h"\nconstexpr int made = work({number});\nint unit{number} = made;\n'
        )
        command = [os.environ["CXX"], *LIMITS, "-c", source, "-o", f"unit{number}.o"]
        running.append(subprocess.Popen(command))
    if sum(process.wait() for process in running):
        raise SystemExit("a unit was not compiled")
    info = "several_units-1.0.dist-info"
    files = {
        "several_units.bin": b"".join(pathlib.Path(f"unit{n}.o").read_bytes() for n in range(COUNT)),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: several-units\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    name = "several_units-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name
