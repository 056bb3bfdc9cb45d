"""One researcher's day on a cluster, from clone to adapter, and a second one's of the same group.

python -m benchmarks.cluster_day [--recipe quickstart]     as root, with what `make test-lab` needs

On the suite's Slurm, whose nodes have no internet. Every command is typed by an unprivileged user, with umask
077, into a shell that gives a process 300 CPU seconds and 2 GiB of address space, and measured: seconds, CPU
seconds of the login node, files and bytes that are on the disk after it. Prints Markdown; docs/cluster-day.md
has one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.slurm import ACCOUNT, OTHER_USER, USER, SlurmLab, missing_programs

REPOSITORY = Path(__file__).parent.parent
GROUP = 100
"""`users`, which every machine has: the project's group."""
LIMITS = "ulimit -t 300; ulimit -v 2097152; umask 077"
SITE = """\
name = "lab"
allow-chain = true
shared-folder = "{shared}"

[login]
cpu-seconds = 300
threads = 2
memory = "2G"

[build]
partition = "lab"
account = "{account}"
walltime = "01:00:00"
cpus = 2
memory = "16G"

[train]
partition = "lab"
account = "{account}"
walltime = "00:10:00"
cpus = 2
memory = "4G"
gpus = 2
gpu-request = "gres"
"""
MIB = 1 << 20


@dataclass(frozen=True)
class Typed:
    """One command, as it was typed, and what it cost."""

    text: str
    seconds: float
    cpu_seconds: float
    files: int
    bytes: int


@dataclass
class Researcher:
    """A user of the cluster, with a folder on its shared disk."""

    name: str
    user: str
    home: Path
    folder: Path
    lab: SlurmLab
    watched: tuple[Path, ...]
    """Folders whose files are counted."""
    day: list[Typed] = field(default_factory=list)

    def types(self, text: str) -> None:
        """Runs one command line in the user's shell; ends the script where it fails."""
        account = pwd.getpwnam(self.user)
        environment = {
            **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))},
            **self.lab.env,
            "USER": self.user,
            "HOME": str(self.home),
            "PATH": f"{self.folder}/tool/bin:/usr/local/bin:/usr/bin:/bin",
            "ENVBUILDER_ROOT": str(self.folder / "root"),
        }
        environment.pop("PIP_FIND_LINKS", None)
        print(f"{self.name}$ {text}", file=sys.stderr, flush=True)
        before, began = _cpu_seconds(), time.monotonic()
        completed = subprocess.run(
            ["bash", "-c", f"{LIMITS}; {text}"],
            env=environment,
            cwd=self.folder / "envbuilder" if (self.folder / "envbuilder").exists() else self.folder,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[GROUP],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            check=False,
        )
        seconds, cpu_seconds = time.monotonic() - began, _cpu_seconds() - before
        if completed.returncode != 0:
            sys.exit(f"{text}: exit {completed.returncode}")
        self.day.append(Typed(text, seconds, cpu_seconds, *on_disk(self.watched)))
        print(self.day[-1], file=sys.stderr, flush=True)

    def shown(self, text: str) -> str:
        """A command line without the places of this machine."""
        return text.replace(REPOSITORY.as_uri(), "REPOSITORY").replace(str(self.lab.folder), "")

    def jobs(self) -> tuple[int, float]:
        """How many jobs the user had, and the seconds that they waited in the queue."""
        words = ["sacct", "-X", "-n", "-P", "-u", self.user, "-S", "now-1days", "-o", "Submit,Start"]
        rows = [line.split("|") for line in self.lab.as_user(words).stdout.splitlines()]
        return len(rows), sum(max(0.0, _stamp(start) - _stamp(submit)) for submit, start in rows)

    def first_step(self, run: str) -> float:
        """When the run's first step was done, in seconds since the epoch."""
        lines = (self.folder / "root" / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return next(float(r["time"]) for r in map(json.loads, lines) if r["kind"] == "step")


def _stamp(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def _cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def on_disk(folders: tuple[Path, ...]) -> tuple[int, int]:
    """Files below `folders`, a file with several names counted once, and the bytes that they take."""
    found = {(status.st_dev, status.st_ino): status.st_blocks * 512 for status in _statuses(folders)}
    return len(found), sum(found.values())


def _statuses(folders: tuple[Path, ...]) -> Iterator[os.stat_result]:
    for folder in folders:
        for above, _, names in os.walk(folder):
            yield from (os.lstat(os.path.join(above, name)) for name in names)  # noqa: PTH118


def table(researcher: Researcher) -> str:
    """The day as Markdown: a row for each command, then the sums."""
    rows = [
        f"| `{researcher.shown(typed.text)}` | {typed.seconds:.0f} | {typed.cpu_seconds:.0f} "
        f"| {typed.files:,} | {typed.bytes / MIB:,.0f} |"
        for typed in researcher.day
    ]
    jobs, waited = researcher.jobs()
    day = researcher.day
    return "\n".join(
        [
            "| typed | seconds | login CPU seconds | files then | MiB then |",
            "|---|---:|---:|---:|---:|",
            *rows,
            f"| **{len(day)} commands, {jobs} job{'s' if jobs != 1 else ''} ({waited:.0f} s in the queue)** "
            f"| **{sum(typed.seconds for typed in day):.0f}** "
            f"| **{sum(typed.cpu_seconds for typed in day):.0f}** "
            f"| **{day[-1].files:,}** | **{day[-1].bytes / MIB:,.0f}** |",
        ]
    )


def days(lab: SlurmLab, recipe: str) -> None:
    """Both days, one after the other, and what they cost, as Markdown."""
    project = lab.folder / "project"
    project.mkdir(mode=0o755)
    shared = project / "shared"
    site = project / "lab.toml"
    site.write_text(SITE.format(shared=shared, account=ACCOUNT))
    folders = {}
    # ann leads the project: the shared folder's owner is believed, as are the group's members.
    for name, user in (("shared", USER), ("ann", USER), ("ben", OTHER_USER)):
        folders[name] = project / name
        folders[name].mkdir()
        os.chown(folders[name], pwd.getpwnam(user).pw_uid, GROUP)
        folders[name].chmod(0o2770)
    site.chmod(0o644)
    ann = Researcher("ann", USER, lab.home, folders["ann"], lab, (folders["ann"], shared))
    ben = Researcher("ben", OTHER_USER, lab.other_home, folders["ben"], lab, (folders["ben"],))
    for home in (lab.home, lab.other_home):
        (home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")  # the clone's source is another user's
    clone = f"git clone -q {REPOSITORY.as_uri()} envbuilder"
    tool = f"python3 -m venv {{}}/tool && {{}}/tool/bin/pip install -q . # in {clone.split()[-1]}/"
    train = f"envbuilder train recipes/train/quickstart.yaml --recipe {recipe} --sbatch --site {site}"
    for text in (
        clone,
        tool.format(ann.folder, ann.folder),
        f"envbuilder fetch recipes/{recipe}.toml --site {site}",
        f"envbuilder compile recipes/{recipe}.toml --sbatch --site {site}",
        f"envbuilder doctor recipes/{recipe}.toml --site {site}",
        train,
        f"envbuilder publish {recipe} --site {site}",
    ):
        ann.types(text)
    login = time.time()
    for text in (
        clone,
        tool.format(ben.folder, ben.folder),
        f"envbuilder use {recipe} --site {site}",
        train,
    ):
        ben.types(text)
    _, waited = ben.jobs()
    print(f"Machine: {platform.machine()}, {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}.\n")
    for researcher in (ann, ben):
        print(f"## {researcher.name}\n\n{table(researcher)}\n")
    print(
        f"ben's first training step was done {ben.first_step('quickstart') - login - waited:.0f} s after"
        " login, the queue aside."
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--recipe", default="quickstart")
    recipe = options.parse_args().recipe
    if missing := missing_programs():
        sys.exit(f"needs: {', '.join(missing)}")
    with SlurmLab(2) as lab:
        days(lab, recipe)


if __name__ == "__main__":
    main()
