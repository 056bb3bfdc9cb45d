"""The GPUs of this machine: whether they answer, are sound, run at full clocks, are free and are linked."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections import Counter

from envbuilder.cuda_support import driver_runs, newest_cuda
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.gpu import Gpu, GpuState, read_links, read_peer_access
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.target import version_number

ANOTHER_NODE = (
    "Report it to the administrators, and until then ask for another node: "
    f"#SBATCH --exclude={os.environ.get('SLURMD_NODENAME') or socket.gethostname().partition('.')[0]}"
)
_LIMIT_S = 90
"""nvidia-smi takes seconds where no process keeps the driver loaded, and is given 60 s for each answer."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_BROKEN = ("Unknown Error", "GPU is lost", "N/A", "Not Found")
"""What nvidia-smi writes where a value should be."""
_UNHIDE = f"unset {_VISIBLE}; in a job, ask for a GPU: #SBATCH --gres=gpu:1"
_NONE_THERE = "No CUDA GPUs are available"
"""What torch says where CUDA works, but has no GPU."""


def check_devices(subject: Subject, reporter: Reporter) -> Outcome:
    """Every GPU answers, takes work, and is visible to CUDA."""
    gpus = subject.gpus
    if gpus.problem:
        return failed(
            "nvidia-smi is on this machine but gives no account of its GPUs.",
            gpus.problem,
            remedy=f"On a login node without GPU, run the check in a job. On a GPU node: {ANOTHER_NODE}",
        )
    if not gpus.devices:
        return skipped(gpus.absence)
    evidence = [_described(gpu) for gpu in gpus.devices]
    unusable = [gpu.index for gpu in gpus.devices if gpu.compute_mode == "Prohibited" or _is_broken(gpu)]
    if unusable:
        return failed(
            f"GPU {', '.join(unusable)} takes no work.",
            *evidence,
            remedy=ANOTHER_NODE,
        )
    visible = os.environ.get(_VISIBLE)
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return warning(
            f"{_VISIBLE} hides every GPU from CUDA.",
            f"{_VISIBLE}={visible}",
            *evidence,
            remedy=_UNHIDE,
        )
    return ok(f"{len(gpus.devices)} GPUs answer.", *evidence)


def _described(gpu: Gpu) -> str:
    return (
        f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, "
        f"{gpu.memory_mib} MiB, compute mode {gpu.compute_mode}"
    )


def _is_broken(gpu: Gpu) -> bool:
    return any(
        sign in value for sign in _BROKEN for value in (gpu.name, gpu.compute_capability, gpu.memory_mib)
    )


def sees_no_gpu(consequence: str, problem: str, recipe_file: str) -> Outcome:
    """The verdict where CUDA has none of the GPUs that nvidia-smi shows. `problem`: torch's words, or ""."""
    visible = os.environ.get(_VISIBLE)
    hides = visible is not None and (not problem or _NONE_THERE in problem)
    return failed(
        f"CUDA sees no GPU, {consequence}.",
        f"{_VISIBLE}={'(not set)' if visible is None else visible}",
        *filter(None, (problem,)),
        remedy=(_UNHIDE if hides else remedy_for(problem, recipe_file))
        or f"See why: envbuilder doctor {recipe_file} --only gpu --only libraries",
    )


def check_driver(subject: Subject, reporter: Reporter) -> Outcome:
    """The driver's CUDA against torch's."""
    served, driver = subject.gpus.cuda, subject.gpus.devices[0].driver
    torch = read_torch(subject.import_path)
    if torch is None:
        return skipped("There is no torch to hold the driver against.")
    evidence = (f"driver {driver}: CUDA {served or 'unknown'}", f"torch {torch.version}: CUDA {torch.cuda}")
    lock = f"envbuilder lock {subject.recipe_file}"
    if torch.cuda is None:
        return failed(
            "The torch of the env is a CPU build, and this machine has a GPU.",
            *evidence,
            remedy=f"Name the index with CUDA builds in [index] of {subject.recipe_file}, then: {lock}",
        )
    runs = driver_runs(torch.cuda, driver=driver, served=served)
    if runs is None:
        return skipped(f"nvidia-smi doesn't say which CUDA driver {driver} serves.")
    does = f"The driver serves CUDA {served}" if served else f"The driver is {driver}"
    if not runs:
        newest = newest_cuda(driver=driver, served=served)
        older = f" with CUDA {newest}" if newest else " with an older CUDA"
        return failed(
            f"{does}, which is too old for torch, built with CUDA {torch.cuda}.",
            *evidence,
            remedy=f"Ask for a node with a newer driver, or for a torch built{older} in "
            f"{subject.recipe_file}, then: {lock}",
        )
    if served and version_number(served) < version_number(torch.cuda):
        return warning(
            f"{does}; torch's CUDA {torch.cuda} works on it, but for PTX.",
            *evidence,
            remedy="Ask for a node with a newer driver where a kernel reports an unsupported PTX version.",
        )
    return ok(f"{does}, and torch is built with CUDA {torch.cuda}.", *evidence)


HARDWARE_XIDS = {
    48: "uncorrectable memory error",
    62: "its micro-controller halted",
    64: "a bad row could not be replaced",
    74: "NVLink error",
    79: "it fell off the bus",
    92: "many corrected memory errors",
    95: "memory error that was not contained",
    119: "its system processor gave no answer",
    120: "its system processor failed",
    140: "memory error that was not recovered from",
}
"""NVIDIA's "Xid errors" that tell of the GPU itself; the others (13, 31, 43, 45, 94, …) tell of programs."""
_XID = re.compile(r"NVRM: Xid \((?P<gpu>[^)]*)\): (?P<number>\d+)")


def check_health(subject: Subject, reporter: Reporter) -> Outcome:
    """Memory errors, what the driver asks for, and the kernel's log of the GPUs' errors."""
    states = subject.gpu_states
    xids = _read_xids()
    evidence = (*map(_health, states), *_xid_lines(xids))
    broken = [state for state in states if state.remap_failed or state.remap_pending or state.recovery]
    if broken:
        return failed(
            f"GPU {_indexes(broken)} can't be relied on before it is reset or replaced.",
            *evidence,
            remedy=f"{ANOTHER_NODE}. As root, with nothing running on it: nvidia-smi --gpu-reset "
            f"-i {broken[0].index}",
        )
    if detached := [state for state in states if state.fabric not in (None, "Completed")]:
        return failed(
            f"GPU {_indexes(detached)} has not joined the NVSwitch fabric: CUDA fails with error 802, "
            '"system not yet initialized".',
            *evidence,
            remedy=f"As root: systemctl restart nvidia-fabricmanager. {ANOTHER_NODE}",
        )
    if erring := [state for state in states if state.uncorrected]:
        return warning(
            f"GPU {_indexes(erring)} has had uncorrectable memory errors since its driver was loaded.",
            *evidence,
            remedy=ANOTHER_NODE,
        )
    if any(number in HARDWARE_XIDS for _, number in xids or ()):
        return warning("The kernel's log has errors of the GPUs themselves.", *evidence, remedy=ANOTHER_NODE)
    return ok("The GPUs report no fault.", *evidence)


def _health(state: GpuState) -> str:
    remapped = {True: "failed", False: "pending" if state.remap_pending else "none pending", None: "not told"}
    return (
        f"GPU {state.index}: uncorrectable errors {_told(state.uncorrected)} "
        f"(ever: {_told(state.uncorrected_ever)}), replaced memory rows: {remapped[state.remap_failed]}, "
        f"fabric {_told(state.fabric)}, driver asks for {state.recovery or 'nothing'}"
    )


def _told(value: object) -> object:
    return "not told" if value is None else value


def _indexes(states: list[GpuState]) -> str:
    return ", ".join(state.index for state in states)


def _read_xids() -> Counter[tuple[str, int]] | None:
    """(place of the GPU, number) → how many such errors the kernel's log has; None where it can't be read."""
    log = run(["dmesg"], timeout_s=10) if shutil.which("dmesg") else None
    if log is None or log.returncode != 0:
        return None
    return Counter((match["gpu"], int(match["number"])) for match in _XID.finditer(log.output))


def _xid_lines(xids: Counter[tuple[str, int]] | None) -> list[str]:
    if xids is None:
        return ["kernel log: dmesg may not read it here, so Xid errors are not seen"]
    return [
        f"Xid {number} at {gpu}, {count} times: {HARDWARE_XIDS.get(number, 'a fault of a program')}"
        for (gpu, number), count in sorted(xids.items())
    ]


_HARDWARE_BRAKES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_LOW_POWER = 0.8


def check_clocks(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether heat, the power supply or a lowered power limit holds a GPU's clocks down now."""
    states = subject.gpu_states
    evidence = [_clocks(state) for state in states]
    if braked := [state for state in states if set(state.slowed) & set(_HARDWARE_BRAKES)]:
        return warning(
            f"GPU {_indexes(braked)} is slowed down by heat or its power supply.",
            *evidence,
            remedy=f"See whether it lasts: nvidia-smi -q -d PERFORMANCE,TEMPERATURE. {ANOTHER_NODE}",
        )
    if capped := [state for state in states if _is_capped(state)]:
        return warning(
            f"The power limit of GPU {_indexes(capped)} is set far below what it was made for.",
            *evidence,
            remedy="Ask the administrators whether that is meant. As root: nvidia-smi "
            f"-i {capped[0].index} -pl {capped[0].power_default_w:.0f}",
        )
    return ok("Nothing but load holds the clocks down.", *evidence)


def _is_capped(state: GpuState) -> bool:
    limit, default = state.power_limit_w, state.power_default_w
    return limit is not None and default is not None and limit < _LOW_POWER * default


def _clocks(state: GpuState) -> str:
    return (
        f"GPU {state.index}: held down by {', '.join(state.slowed) or 'nothing'}; power limit "
        f"{_told(state.power_limit_w)} W of {_told(state.power_default_w)} W"
    )


def check_modes(subject: Subject, reporter: Reporter) -> Outcome:
    """Settings that change who can use a GPU, and how much of it."""
    states = subject.gpu_states
    evidence = [
        f"GPU {state.index}: MIG {_switch(state.mig)}, compute mode {_told(state.compute_mode)}, "
        f"persistence {_switch(state.persistence)}"
        for state in states
    ]
    if split := [state for state in states if state.mig]:
        return warning(
            f"GPU {_indexes(split)} is split by MIG: a process sees one part of it, and the parts of one GPU "
            "can't be joined by NCCL.",
            *evidence,
            remedy="Train on one part with one process, or ask for whole GPUs: #SBATCH --gres=gpu:1 with "
            "the type that `sinfo -o %G` lists without mig",
        )
    return ok("The GPUs are whole, and open to work.", *evidence)


def _switch(state: bool | None) -> str:
    return {True: "on", False: "off", None: "not told"}[state]


_NOTICED_MIB = 100
"""Below it a process holds no more than an idle context or a service of the driver's own."""
_UNEXPLAINED_MIB = 2048
"""More in use than any driver takes for itself."""


def check_processes(subject: Subject, reporter: Reporter) -> Outcome:
    """Other processes on the GPUs, and the memory that they leave."""
    busy, evidence = [], []
    for state in subject.gpu_states:
        others = [p for p in state.processes if p.memory_mib is None or p.memory_mib >= _NOTICED_MIB]
        evidence.append(f"GPU {state.index}: {_told(state.memory_free_mib)} MiB free")
        evidence += [
            f"GPU {state.index}: process {other.pid} ({other.name}) holds {_told(other.memory_mib)} MiB"
            for other in others
        ]
        if others or (state.memory_used_mib or 0) > _UNEXPLAINED_MIB:
            busy.append(state)
    if not busy:
        return ok("No other process is on the GPUs.", *evidence)
    pids = ",".join(process.pid for state in busy for process in state.processes if process.pid.isdigit())
    return warning(
        f"GPU {_indexes(busy)} is in use already: memory and time are shared.",
        *evidence,
        remedy=f"See whose they are: ps -o user,pid,etime,cmd -p {pids}; end your own with kill PID, or ask "
        "for a GPU of your own: #SBATCH --gres=gpu:1"
        if pids
        else "Its processes are not visible from here (of a container, or of other users): ask for a GPU of "
        "your own: #SBATCH --gres=gpu:1",
    )


def check_links(subject: Subject, reporter: Reporter) -> Outcome:
    """NVLink, and whether the GPUs may read each other's memory."""
    links, peers = read_links(), read_peer_access()
    names = {gpu.index: gpu.name for gpu in subject.gpus.devices}
    evidence = [
        f"GPU {index}: {sum(rate > 0 for rate in rates)} of {len(rates)} NVLinks active, "
        f"{sum(rates):.0f} GB/s each way"
        for index, rates in links.items()
    ]
    lone = sorted({index for pair, state in peers.items() if state not in ("OK", "U") for index in pair})
    evidence += [f"GPU {a} to GPU {b}: {state}" for (a, b), state in sorted(peers.items()) if state != "OK"]
    if weak := _fewer_links(links, names):
        return failed(
            f"GPU {', '.join(weak)} has fewer active NVLinks than its siblings.",
            *evidence,
            remedy=ANOTHER_NODE,
        )
    if links and lone:
        return warning(
            f"NVLink is there, but GPU {', '.join(lone)} can't read another GPU's memory.",
            *evidence,
            remedy="See nvidia-smi topo -p2p r. Some sites cut it off for jobs that share a node: ask for "
            f"all GPUs of a node (#SBATCH --exclusive). Otherwise: {ANOTHER_NODE}",
        )
    if not links:
        reach = "read each other's memory" if peers and not lone else "copy through the host's memory"
        return ok(f"The GPUs are not joined by NVLink: they talk over PCIe and {reach}.", *evidence)
    return ok(f"{len(links)} GPUs are joined by NVLink.", *evidence)


def _fewer_links(links: dict[str, tuple[float, ...]], names: dict[str, str]) -> list[str]:
    """GPUs with fewer links than the best of the same name; a board may have links that lead nowhere."""
    active = {index: sum(rate > 0 for rate in links.get(index, ())) for index in names}
    most = {name: max(active[i] for i in names if names[i] == name) for name in names.values()}
    return [index for index, name in names.items() if active[index] < most[name]]


CHECKS = (
    Check(
        "gpu.devices",
        "the GPUs",
        "whether every GPU answers and takes work (nvidia-smi), and whether CUDA_VISIBLE_DEVICES hides them",
        check_devices,
    ),
    Check(
        "gpu.driver",
        "the driver",
        "the CUDA version that the driver serves against the one that torch is built with",
        check_driver,
        needs=("gpu",),
    ),
    Check(
        "gpu.health",
        "the GPUs' health",
        "uncorrectable memory errors, resets that are due, the NVSwitch fabric (nvidia-smi), and Xid errors "
        "(dmesg, where it may be read)",
        check_health,
        needs=("gpu",),
        limit_s=_LIMIT_S,
    ),
    Check(
        "gpu.clocks",
        "the GPUs' clocks",
        "whether heat, the power supply or a lowered power limit slows a GPU down",
        check_clocks,
        needs=("gpu",),
        limit_s=_LIMIT_S,
    ),
    Check(
        "gpu.modes",
        "the GPUs' modes",
        "MIG, compute mode and persistence mode",
        check_modes,
        needs=("gpu",),
        limit_s=_LIMIT_S,
    ),
    Check(
        "gpu.processes",
        "who is on the GPUs",
        "other processes on the GPUs, what they hold, and how much memory is free",
        check_processes,
        needs=("gpu",),
        limit_s=_LIMIT_S,
    ),
    Check(
        "gpu.links",
        "the links between the GPUs",
        "active NVLinks of each GPU, and which GPUs may read each other's memory (nvidia-smi)",
        check_links,
        needs=("gpus",),
        limit_s=_LIMIT_S,
    ),
)
