"""The GPUs of this machine, as nvidia-smi tells, and the compute capabilities that are compiled for.

The one place where nvidia-smi is asked, always with a time limit.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from envbuilder.errors import MismatchError
from envbuilder.process import run
from envbuilder.recipe import CudaSpec

_FIELDS = ("index", "name", "compute_cap", "driver_version", "memory.total", "compute_mode")
_TIMEOUT_S = 60.0
"""A lost GPU makes nvidia-smi hang; where the driver is not loaded yet, an answer takes some seconds."""
_NONE_VISIBLE = "No devices were found"


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: str
    name: str
    compute_capability: str
    """E.g. "9.0"."""
    driver: str
    """E.g. "580.65.06"."""
    memory_mib: str
    compute_mode: str
    """"Default", "Exclusive_Process" or "Prohibited"."""


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi says of them all."""

    devices: tuple[Gpu, ...]
    cuda: str | None
    """The newest CUDA version that the driver serves, e.g. "13.0"; of `read_gpus` alone."""
    problem: str | None
    """Why nvidia-smi, which is here, could not tell."""

    @property
    def absence(self) -> str:
        """Why there is no device here; of use where `devices` is empty."""
        return self.problem or "This machine has no GPU."


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: str
    name: str
    memory_mib: int | None
    """None where nvidia-smi may not tell (in a container, of another user's process)."""


@dataclass(frozen=True)
class GpuState:
    """How one GPU is at this moment; None for what this kind of GPU, or this driver, doesn't tell."""

    index: str
    """As `Gpu.index`: its place in the PCI order."""
    name: str
    uncorrected: int | None
    """Uncorrectable ECC errors since the driver was loaded."""
    uncorrected_ever: int | None
    remap_pending: bool | None
    """Rows of its memory (before Ampere: pages) wait for a reset to be replaced."""
    remap_failed: bool | None
    recovery: str | None
    """What the driver asks for: "Reset", "Reboot", "Drain P2P" or "Drain and Reset"; None for nothing."""
    fabric: str | None
    """Where it hangs on NVSwitches, how far it has joined them: "Completed" is what works."""
    slowed: tuple[str, ...]
    """Why its clocks are held down now: "hw_slowdown", "hw_thermal_slowdown", "sw_power_cap", …"""
    power_limit_w: float | None
    power_default_w: float | None
    mig: bool | None
    persistence: bool | None
    compute_mode: str | None
    memory_free_mib: int | None
    memory_used_mib: int | None
    processes: tuple[GpuProcess, ...]


def read_gpu_states() -> tuple[GpuState, ...]:
    """The state of every GPU, by one call of nvidia-smi; MismatchError where it can't tell."""
    answer = run(["nvidia-smi", "-q", "-x"], timeout_s=_TIMEOUT_S)
    # A warning about an infoROM may stand before or after the document.
    document = re.search(r"<nvidia_smi_log>.*</nvidia_smi_log>", answer.output, re.DOTALL)
    try:
        log = ElementTree.fromstring(document[0] if document else "")
    except ElementTree.ParseError as error:
        how = "gave no answer" if answer.timed_out else "gave no readable answer"
        raise MismatchError(
            f"nvidia-smi -q -x {how}.",
            remedy="Run it by hand; where it fails too, report it to the administrators and ask for another "
            "node: #SBATCH --exclude=NODE",
            context={"output": answer.output[-500:]},
        ) from error
    return tuple(_state(str(index), element) for index, element in enumerate(log.iterfind("gpu")))


def _state(index: str, gpu: ElementTree.Element) -> GpuState:
    reasons = [
        reason
        for block in ("clocks_event_reasons", "clocks_throttle_reasons")  # the second before driver 535
        for reason in gpu.iterfind(f"{block}/*")
        if _text(reason) == "Active"
    ]
    return GpuState(
        index=index,
        name=_text(gpu.find("product_name")) or "unknown",
        uncorrected=_uncorrected(gpu.find("ecc_errors/volatile")),
        uncorrected_ever=_uncorrected(gpu.find("ecc_errors/aggregate")),
        remap_pending=_any_yes(gpu, "remapped_rows/remapped_row_pending", "retired_pages/pending_retirement"),
        remap_failed=_any_yes(gpu, "remapped_rows/remapped_row_failure"),
        recovery=_recovery(gpu),
        fabric=_text(gpu.find("fabric/state")),
        slowed=tuple(re.sub(r"clocks_(event|throttle)_reason_", "", reason.tag) for reason in reasons),
        power_limit_w=_number(gpu, "gpu_power_readings/current_power_limit", "power_readings/power_limit"),
        power_default_w=_number(
            gpu, "gpu_power_readings/default_power_limit", "power_readings/default_power_limit"
        ),
        mig=_is(gpu, "mig_mode/current_mig", "Enabled"),
        persistence=_is(gpu, "persistence_mode", "Enabled"),
        compute_mode=_text(gpu.find("compute_mode")),
        memory_free_mib=_whole(gpu.find("fb_memory_usage/free")),
        memory_used_mib=_whole(gpu.find("fb_memory_usage/used")),
        processes=tuple(
            GpuProcess(
                _text(process.find("pid")) or "unknown",
                _text(process.find("process_name")) or "unknown",
                _whole(process.find("used_memory")),
            )
            for process in gpu.iterfind("processes/process_info")
            if _text(process.find("type")) != "G"  # a screen's
        ),
    )


def _text(element: ElementTree.Element | None) -> str | None:
    """What an element says; None for "N/A", "[N/A]", "[Not Supported]" and their like, and without one."""
    text = (element.text or "").strip() if element is not None else ""
    unknown = not text or re.fullmatch(r"\[?(N/A|Not Supported|Unknown Error|ERR!|Requested .*)\]?", text)
    return None if unknown else text


def _whole(element: ElementTree.Element | None) -> int | None:
    digits = re.match(r"\d+", _text(element) or "")
    return int(digits[0]) if digits else None


def _number(gpu: ElementTree.Element, *paths: str) -> float | None:
    found = (re.match(r"\d+(\.\d+)?", _text(gpu.find(path)) or "") for path in paths)
    return next((float(match[0]) for match in found if match), None)


def _is(gpu: ElementTree.Element, path: str, value: str) -> bool | None:
    text = _text(gpu.find(path))
    return None if text is None else text == value


def _any_yes(gpu: ElementTree.Element, *paths: str) -> bool | None:
    told = [answer for path in paths if (answer := _is(gpu, path, "Yes")) is not None]
    return any(told) if told else None


def _recovery(gpu: ElementTree.Element) -> str | None:
    action = _text(gpu.find("gpu_recovery_action"))
    if action is None and _is(gpu, "gpu_reset_status/reset_required", "Yes"):  # before driver 570
        action = "Reset"
    return None if action == "None" else action


def _uncorrected(errors: ElementTree.Element | None) -> int | None:
    """The sum of the kinds of uncorrectable errors; their names differ from generation to generation."""
    if errors is None:
        return None
    counted = [_whole(kind) for kind in errors if "uncorrectable" in kind.tag]
    counted.append(_whole(errors.find("double_bit/total")))
    told = [count for count in counted if count is not None]
    return sum(told) if told else None


def read_links() -> dict[str, tuple[float, ...]]:
    """GPU's index → the rate of each NVLink in GB/s one way, 0 for an inactive one; empty without NVLink."""
    links: dict[str, list[float]] = {}
    here: list[float] = []
    for line in run(["nvidia-smi", "nvlink", "--status"], timeout_s=_TIMEOUT_S).output.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            here = links.setdefault(gpu[1], [])
        elif link := re.match(r"\s*Link \d+: (?:([\d.]+) GB/s|<inactive>)", line):
            here.append(float(link[1] or 0))
    return {index: tuple(rates) for index, rates in links.items() if any(rates)}


def read_peer_access() -> dict[tuple[str, str], str]:
    """(GPU, other GPU) → whether one may read the other's memory: "OK", "NS", "CNS", "TNS", …"""
    lines = run(["nvidia-smi", "topo", "-p2p", "r"], timeout_s=_TIMEOUT_S).output.splitlines()
    rows = [match for line in lines if (match := re.match(r"\s*GPU(\d+)((?:\s+(?!GPU)\w+)+)\s*$", line))]
    return {
        (row[1], str(column)): state
        for row in rows
        for column, state in enumerate(row[2].split())
        if str(column) != row[1]
    }


def read_gpus() -> Gpus:
    """The GPUs, and the CUDA version that their driver serves; without nvidia-smi, there are none."""
    gpus = list_gpus()
    if not gpus.devices:
        return gpus
    overview = run(["nvidia-smi"], timeout_s=_TIMEOUT_S)
    cuda = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", overview.output)
    return replace(gpus, cuda=cuda[1] if cuda else None)


def list_gpus() -> Gpus:
    """The GPUs alone: half the time of `read_gpus`."""
    if shutil.which("nvidia-smi") is None:
        return Gpus((), None, None)
    query = run(
        ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
        timeout_s=_TIMEOUT_S,
    )
    if query.timed_out:
        return Gpus((), None, f"nvidia-smi gave no answer in {_TIMEOUT_S:.0f} s.")
    if _NONE_VISIBLE in query.output:
        return Gpus((), None, None)
    rows = [[cell.strip() for cell in line.split(",")] for line in query.output.splitlines()]
    devices = tuple(Gpu(*row) for row in rows if len(row) == len(_FIELDS))
    if query.returncode != 0 or not devices:
        return Gpus((), None, f"nvidia-smi fails: {' '.join(query.output.split())}")
    return Gpus(devices, None, None)


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, e.g. ("9.0",); empty where there is none."""
    found = {gpu.compute_capability for gpu in list_gpus().devices}
    return tuple(sorted(text for text in found if re.fullmatch(r"\d+\.\d", text)))


def wanted_capabilities(cuda: CudaSpec | None) -> tuple[str, ...]:
    """The compute capabilities to compile for on this machine, sorted; none for a recipe without CUDA."""
    if cuda is None:
        return ()
    detected = present_capabilities() if cuda.detect else ()
    return detected or tuple(sorted(cuda.compute_capabilities))


def architecture(capability: str) -> str:
    """nvcc's number for a compute capability: "90" for "9.0", "100a" for "10.0a"."""
    return capability.replace(".", "")
