"""A real Slurm cluster on one machine, for the tests: munge, MariaDB, slurmdbd, slurmctld and compute nodes.

Each node is a slurmd in a network namespace of its own that reaches the controller and nothing else, so a job
has no internet. Accounting is on: accounts and QoS limits hold, as they do on a real cluster. Needs root and
Debian's slurm-wlm, slurmdbd, munge, mariadb-server and iproute2; no systemd, no standing user, and cgroups
(the first version's, where /sys/fs/cgroup has its memory controller) only with `memory_limits`.

Everything lies in one temporary folder. Whatever was started is ended by its process id, and the namespaces
are removed. `recipes/sites/lab.toml` describes this cluster.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

USER, OTHER_USER = "nobody", "games"
"""Who submits: accounts that every machine has, and not root, whom Slurm's submit limits spare."""
PARTITION, ACCOUNT, QOS, DEBUG_QOS = "lab", "project", "normal", "debug"
PREEMPTABLE_QOS, URGENT_QOS = "preemptable", "urgent"
"""Jobs of the first give way to jobs of the second, with a grace of 10 s, and are queued again."""
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "ip")

_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=login({network}.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser=slurm
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
DefMemPerCPU=1000
ReturnToService=2
SlurmdTimeout=15
KillWait=3
EnforcePartLimits=ALL
PreemptType=preempt/qos
PreemptMode=REQUEUE
MailProg=/bin/true
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos,safe
{nodes}
PartitionName={partition} Nodes=ALL Default=YES MaxTime=24:00:00 DefaultTime=5
PartitionName=short Nodes=ALL MaxTime=5 DefaultTime=1
"""

_SLURMDBD_CONF = """\
DbdHost=localhost
DbdPort={slurmdbd_port}
SlurmUser=slurm
AuthInfo=socket={folder}/munge/socket
PidFile={folder}/state/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
"""


def missing_programs() -> tuple[str, ...]:
    """What this machine lacks for a `SlurmLab`; empty where one can start."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = tuple(program for program in PROGRAMS if shutil.which(program, path=path) is None)
    return missing if os.geteuid() == 0 else (*missing, "root")


class SlurmLab:
    """The cluster, up between `__enter__` and `__exit__`.

    `folder` is its temporary folder; `home`, in it, is a folder that `USER` can write and every node sees,
    `other_home` one that `OTHER_USER` can.
    """

    def __init__(self, nodes: int = 1, *, memory_limits: bool = False) -> None:
        """With `memory_limits`, the kernel kills what uses more memory than its job asked for."""
        self._memory_limits = memory_limits
        self._controller: subprocess.Popen[bytes] | None = None
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self._tag = f"lab{os.getpid() % 100000}"
        self._network = f"10.99.{os.getpid() % 250 + 1}"
        self._cleanup = ExitStack()

    def __enter__(self) -> SlurmLab:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self._cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self._write_files()
            self._make_network()
            self._start_services()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def env(self) -> dict[str, str]:
        """The environment of the submitting user's shell."""
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "USER": USER,
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.conf),
            # This controller is the tests' own: it may be asked every second.
            "ENVBUILDER_SLURM_PACE_S": "1",
        }

    def as_user(
        self, argv: Sequence[str | Path], *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs `argv` as `USER` on the login node; stdout and stderr are kept apart."""
        account = pwd.getpwnam(USER)
        return subprocess.run(
            [str(word) for word in argv],
            env={**self.env, **(env or {})},
            cwd=cwd or self.home,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            umask=0o022,
            capture_output=True,
            text=True,
            check=False,
        )

    def start_as_user(self, argv: Sequence[str | Path], output: TextIO) -> subprocess.Popen[bytes]:
        """Starts `argv` as `as_user` runs it; it speaks into `output`. Whoever calls this ends it."""
        account = pwd.getpwnam(USER)
        return subprocess.Popen(
            [str(word) for word in argv],
            env=self.env,
            cwd=self.home,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            umask=0o022,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # It must heed Ctrl-C, also where the tests run in the background: there a shell has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_job(self, job_id: str) -> str:
        """Waits for the job's end, and returns its state, e.g. "COMPLETED"."""

        def ended() -> bool:
            return self.job_state(job_id) not in {"", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}

        _wait_until(ended, f"job {job_id} has ended")
        return self.job_state(job_id)

    def job_state(self, job_id: str) -> str:
        """The state that the controller knows, e.g. "RUNNING"; empty for a job that it does not."""
        shown = self.as_user(["scontrol", "--oneliner", "show", "job", job_id]).stdout
        return next((w.removeprefix("JobState=") for w in shown.split() if w.startswith("JobState=")), "")

    def cancel_all(self) -> None:
        """Cancels every job and waits until none is left, so that a test finds its limits unused."""
        _run(["scancel", f"--user={USER}"], self._root_env)
        _wait_until(lambda: not _run(["squeue", "--noheader"], self._root_env).strip(), "the queue is empty")

    def cancel_as_operator(self, job_id: str) -> None:
        """Cancels a job as somebody else than who submitted it."""
        _run(["scancel", job_id], self._root_env)

    def kill_node(self, node: str) -> None:
        """Kills all that runs on a node, its slurmd too, as a power failure would."""
        for pid in _run(["ip", "netns", "pids", f"{self._tag}{node}"]).split():
            _works(["kill", "-KILL", pid])

    def drain(self, node: str) -> None:
        """Lets no further job start on a node, until `resume`."""
        _run(["scontrol", "update", f"nodename={node}", "state=drain", "reason=test"], self._root_env)

    def resume(self, node: str) -> None:
        _run(["scontrol", "update", f"nodename={node}", "state=resume"], self._root_env)

    def start_node(self, node: str) -> None:
        """Starts a node that was killed; it takes jobs when this returns."""
        self._start_node(self.nodes.index(node) + 1, node)

        def is_back() -> bool:
            states = _run(["sinfo", "-h", "-n", node, "-p", PARTITION, "-o", "%T"], self._root_env).split()
            return states in (["idle"], ["mixed"], ["allocated"])

        _wait_until(is_back, f"{node} is back")

    def stop_controller(self) -> None:
        """Ends slurmctld: Slurm's commands get no answer, jobs go on."""
        assert self._controller is not None
        _end(self._controller)

    def start_controller(self) -> None:
        """Starts slurmctld, or starts it again."""
        self._controller = self._start(
            "slurmctld", "unshare", "--uts", "sh", "-ec", "hostname login; exec slurmctld -D"
        )

    # ── starting ────────────────────────────────────────────────────────────────────────────────────────────

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        owners = {
            "munge": "munge",
            "database": "mysql",
            # A database's start removes what looks like temporary tables: in /tmp, another lab's too.
            "database_tmp": "mysql",
            "state": "slurm",
            "home": USER,
            "other_home": OTHER_USER,
        }
        for name, owner in owners.items():
            (self.folder / name).mkdir()
            shutil.chown(self.folder / name, owner, pwd.getpwnam(owner).pw_gid)
        for name in ("etc", "spool", "devices", "log"):
            (self.folder / name).mkdir()
        self.home, self.other_home = self.folder / "home", self.folder / "other_home"
        self.conf = self.folder / "etc" / "slurm.conf"
        self._root_env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self._password = secrets.token_hex(16)
        self._database_port, slurmdbd_port, slurmctld_port, slurmd_port = _free_ports(4)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self._network}.{10 + i} CPUs=8 RealMemory=64000 Gres=gpu:4"
            for i, node in enumerate(self.nodes, 1)
        )
        values = {
            "folder": self.folder,
            "network": self._network,
            "nodes": nodes,
            "partition": PARTITION,
            "password": self._password,
            "database_port": self._database_port,
            "slurmdbd_port": slurmdbd_port,
            "slurmctld_port": slurmctld_port,
            "slurmd_port": slurmd_port,
            "task": "cgroup" if self._memory_limits else "none",
        }
        self.conf.write_text(_SLURM_CONF.format_map(values))
        for number in range(4):  # GPUs that Slurm can count and hand out; /dev/null underneath
            os.mknod(self.folder / "devices" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "etc" / "gres.conf").write_text(f"Name=gpu File={self.folder}/devices/nvidia[0-3]\n")
        (self.folder / "etc" / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n" + "ConstrainRAMSpace=yes\n" * self._memory_limits
        )
        slurmdbd_conf = self.folder / "etc" / "slurmdbd.conf"
        slurmdbd_conf.write_text(_SLURMDBD_CONF.format_map(values))
        slurmdbd_conf.chmod(0o600)
        shutil.chown(slurmdbd_conf, "slurm")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        shutil.chown(key, "munge")

    def _make_network(self) -> None:
        """A bridge, and for each node a namespace whose one cable ends there. No route leads further."""
        bridge = f"{self._tag}br"
        _run(["ip", "link", "add", bridge, "type", "bridge"])
        self._cleanup.callback(_run, ["ip", "link", "del", bridge])
        _run(["ip", "addr", "add", f"{self._network}.1/24", "dev", bridge])
        _run(["ip", "link", "set", bridge, "up"])
        hosts = [f"127.0.0.1 localhost\n{self._network}.1 login\n"]
        hosts += [f"{self._network}.{10 + i} {node}\n" for i, node in enumerate(self.nodes, 1)]
        (self.folder / "etc" / "hosts").write_text("".join(hosts))
        (self.folder / "etc" / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        for i, node in enumerate(self.nodes, 1):
            space, cable = f"{self._tag}{node}", f"{self._tag}c{i}"
            _run(["ip", "netns", "add", space])
            self._cleanup.callback(self._remove_namespace, space)
            _run(["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space])
            _run(["ip", "link", "set", cable, "master", bridge, "up"])
            _run(["ip", "-n", space, "link", "set", "lo", "up"])
            _run(["ip", "-n", space, "addr", "add", f"{self._network}.{10 + i}/24", "dev", "eth0"])
            _run(["ip", "-n", space, "link", "set", "eth0", "up"])

    def _start_services(self) -> None:
        database, munge = self.folder / "database", self.folder / "munge"
        apart = f"--tmpdir={self.folder / 'database_tmp'}"
        self._start(
            "munged", "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground",
            f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed", f"--log-file={munge}/log",
        )  # fmt: skip
        _run([
            "mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={database}", apart,
            "--skip-test-db", "--auth-root-authentication-method=socket",
        ])  # fmt: skip
        self._start(
            "mariadbd", "mariadbd", "--no-defaults", "--user=mysql", f"--datadir={database}", apart,
            f"--socket={database}/socket", "--bind-address=127.0.0.1", f"--port={self._database_port}",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-log-file-size=8M",
        )  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={database}/socket", "--execute"]
        self._wait_for(lambda: _works([*client, "SELECT 1"]), "the database answers")
        _run([
            *client,
            f"CREATE USER slurm@'%' IDENTIFIED BY '{self._password}';"
            "GRANT ALL ON slurm_acct_db.* TO slurm@'%'",
        ])  # fmt: skip
        env = self._root_env
        self._start("slurmdbd", "slurmdbd", "-D")
        self._wait_for(lambda: _works(["sacctmgr", "-n", "list", "cluster"], env), "slurmdbd answers")
        _run(["sacctmgr", "-iQ", "add", "cluster", "lab"], env)
        self.start_controller()
        self._cleanup.callback(self._cancel_on_exit)
        for i, node in enumerate(self.nodes, 1):
            if self._memory_limits:
                self._cleanup.callback(_remove_cgroups, Path("/sys/fs/cgroup/memory", f"slurm_{node}"))
            self._start_node(i, node)
        self._wait_for(lambda: _works(["scontrol", "ping"], env), "slurmctld answers")
        # A limit on a resource that slurmctld has not registered yet would be lost without a word.
        self._wait_for(lambda: "gres" in _run(["sacctmgr", "-nP", "show", "tres"], env), "gpus are known")
        self._make_accounts()

        def nodes_are_idle() -> bool:
            states = _run(["sinfo", "-h", "-N", "-p", PARTITION, "-o", "%T"], env).split()
            return states == ["idle"] * len(self.nodes)

        self._wait_for(nodes_are_idle, "the nodes are idle")

    def _start_node(self, number: int, node: str) -> None:
        etc = self.folder / "etc"
        self._start(
            f"slurmd-{node}", "nsenter", f"--net=/run/netns/{self._tag}{node}", "unshare", "--uts", "--mount",
            "sh", "-ec",
            f"hostname {node}; mount --bind {etc}/hosts /etc/hosts;"
            f"mount --bind {etc}/resolv.conf /etc/resolv.conf; exec slurmd -D -N {node}",
        )  # fmt: skip

    def _make_accounts(self) -> None:
        def sacctmgr(*words: str) -> None:
            _run(["sacctmgr", "-iQ", *words], self._root_env)

        sacctmgr("add", "account", ACCOUNT, "cluster=lab")
        sacctmgr("add", "qos", DEBUG_QOS)
        sacctmgr(
            "modify", "qos", DEBUG_QOS, "set",
            "MaxSubmitJobsPerUser=1", "MaxWall=30", "MaxTRESPerUser=gres/gpu=2,node=1", "Flags=DenyOnLimit",
        )  # fmt: skip
        sacctmgr("add", "qos", PREEMPTABLE_QOS)
        sacctmgr("modify", "qos", PREEMPTABLE_QOS, "set", "GraceTime=10", "PreemptMode=requeue")
        sacctmgr("add", "qos", URGENT_QOS)
        sacctmgr("modify", "qos", URGENT_QOS, "set", f"Preempt={PREEMPTABLE_QOS}", "Priority=1000")
        for user in (USER, OTHER_USER):
            sacctmgr(
                "add", "user", user, f"account={ACCOUNT}", f"DefaultAccount={ACCOUNT}",
                f"qos={QOS},{DEBUG_QOS},{PREEMPTABLE_QOS},{URGENT_QOS}", f"DefaultQOS={QOS}",
            )  # fmt: skip

    # ── ending ──────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / name).open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=self._root_env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._cleanup.callback(_end, process)
        self._services[name] = process
        return process

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until it holds; fails with its log where a service has ended meanwhile."""

        def holds() -> bool:
            for name, process in self._services.items():
                log = (self.folder / "log" / name).read_text(errors="replace")
                assert process.poll() is None, f"{name} has ended: {log[-1000:]}"
            return condition()

        _wait_until(holds, what)

    def _cancel_on_exit(self) -> None:
        with suppress(AssertionError):  # Where it fails, the namespaces' processes are killed in any case.
            self.cancel_all()

    def _remove_namespace(self, space: str) -> None:
        for pid in _run(["ip", "netns", "pids", space]).split():
            _works(["kill", "-KILL", pid])
        _run(["ip", "netns", "del", space])


def _remove_cgroups(top: Path) -> None:
    for folder in sorted(top.glob("**/"), reverse=True):
        with suppress(OSError):  # One that still has a process, which the namespace's end kills.
            folder.rmdir()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(argv: Sequence[str], env: dict[str, str] | None = None) -> str:
    completed = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, f"{' '.join(argv)}: {completed.stdout}{completed.stderr}"
    return completed.stdout


def _works(argv: Sequence[str], env: dict[str, str] | None = None) -> bool:
    return subprocess.run(argv, env=env, capture_output=True, check=False).returncode == 0


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"gave up waiting until {what}"
        time.sleep(0.3)  # What is asked of Slurm costs time that the jobs need.


def _free_ports(count: int) -> list[int]:
    """Ports of this process alone, for others start labs too: below those that the kernel gives out."""
    first = 10_000 + os.getpid() % 250 * 40
    return [port for port in range(first, first + 40) if _is_free(port)][:count]


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("", port))
        except OSError:
            return False
        return True
