from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.paths import Root
from tests.doctor.conftest import TinyEnv, nvidia_smi, run_one, torch_version

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]


@pytest.mark.parametrize("check", ["gpu.devices", "gpu.driver"])
@pytest.mark.parametrize("smi", [{}, {"nvidia_smi": "echo No devices were found; exit 6"}])
def test_without_a_gpu_the_checks_are_skipped(
    root: Root, programs: Programs, smi: dict[str, str], check: str
) -> None:
    programs(**smi)
    finding = run_one(check, root=root)
    assert finding.verdict == "skipped"
    assert finding.summary == "This machine has no GPU."


def test_gpus_are_listed_with_what_they_can(root: Root, programs: Programs) -> None:
    programs(nvidia_smi=nvidia_smi())
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "ok"
    assert "NVIDIA H200, compute capability 9.0, 143771 MiB" in finding.evidence[0]


def test_a_driver_that_does_not_answer_fails(root: Root, programs: Programs) -> None:
    programs(
        nvidia_smi='echo "NVIDIA-SMI has failed because it could not communicate with the driver."; exit 9'
    )
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "failed"
    assert "could not communicate" in finding.evidence[0]


@pytest.mark.parametrize(
    "smi", [nvidia_smi(mode="Prohibited"), nvidia_smi("[Unknown Error], [Unknown Error]")]
)
def test_a_gpu_that_takes_no_work_fails(root: Root, programs: Programs, smi: str) -> None:
    programs(nvidia_smi=smi)
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "failed"
    assert "GPU 0" in finding.summary


def test_hidden_gpus_are_a_warning(root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(nvidia_smi=nvidia_smi())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_one("gpu.devices", root=root).verdict == "warning"


@pytest.mark.parametrize(
    ("driver", "torch", "verdict"),
    [("13.0", "13.0", "ok"), ("13.1", "13.0", "ok"), ("12.4", "12.8", "warning"), ("12.8", "13.0", "failed")],
)
def test_the_driver_must_serve_the_major_version_of_torchs_cuda(
    make_env: MakeEnv, programs: Programs, driver: str, torch: str, verdict: str
) -> None:
    env = make_env(files=torch_version(cuda=torch))
    programs(nvidia_smi=nvidia_smi(cuda=driver))
    finding = env.check("gpu.driver")
    assert finding.verdict == verdict
    assert driver in finding.summary


@pytest.mark.parametrize(("torch", "verdict"), [("13.0", "ok"), ("99.0", "skipped")])
def test_a_driver_that_does_not_say_what_it_serves_is_judged_by_its_version(
    make_env: MakeEnv, programs: Programs, torch: str, verdict: str
) -> None:
    env = make_env(files=torch_version(cuda=torch))
    programs(nvidia_smi=nvidia_smi(cuda="N/A"))
    assert env.check("gpu.driver").verdict == verdict


def test_an_older_driver_that_says_nothing_fails(make_env: MakeEnv, programs: Programs) -> None:
    env = make_env(files=torch_version())
    programs(nvidia_smi=nvidia_smi(cuda="N/A").replace("580.65.06", "535.54.03"))
    finding = env.check("gpu.driver")
    assert (finding.verdict, "535.54.03" in finding.summary) == ("failed", True)
    assert "a torch built with CUDA 12" in (finding.remedy or "")


def test_a_cpu_torch_on_a_gpu_machine_fails(make_env: MakeEnv, programs: Programs) -> None:
    env = make_env(files=torch_version("2.11.0+cpu", None))
    programs(nvidia_smi=nvidia_smi())
    finding = env.check("gpu.driver")
    assert finding.verdict == "failed"
    assert "CPU build" in finding.summary


def test_an_env_without_torch_has_nothing_to_hold_the_driver_against(
    env: TinyEnv, programs: Programs
) -> None:
    programs(nvidia_smi=nvidia_smi())
    assert env.check("gpu.driver").verdict == "skipped"


def log(gpu: str, *, count: int = 1) -> str:
    """What `nvidia-smi -q -x` prints of `count` GPUs, as far as it is read, in a driver's own layout."""
    head = (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>\n'
    )
    body = f'<gpu id="00000000:18:00.0">\n{gpu}</gpu>\n' * count
    return f"{head}<driver_version>580.65.06</driver_version>\n{body}</nvidia_smi_log>"


SOUND = """
<product_name>NVIDIA H200</product_name>
<persistence_mode>Enabled</persistence_mode>
<mig_mode><current_mig>Disabled</current_mig></mig_mode>
<gpu_recovery_action>None</gpu_recovery_action>
<clocks_event_reasons>
  <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
  <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
</clocks_event_reasons>
<fb_memory_usage><used>1 MiB</used><free>143154 MiB</free></fb_memory_usage>
<compute_mode>Default</compute_mode>
<ecc_errors>
  <volatile>
    <sram_correctable>0</sram_correctable>
    <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
    <dram_uncorrectable>0</dram_uncorrectable>
  </volatile>
  <aggregate><dram_uncorrectable>2</dram_uncorrectable></aggregate>
</ecc_errors>
<retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
<remapped_rows>
  <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
</remapped_rows>
<gpu_power_readings>
  <current_power_limit>700.00 W</current_power_limit><default_power_limit>700.00 W</default_power_limit>
</gpu_power_readings>
<fabric><state>Completed</state><status>Success</status></fabric>
<processes></processes>
"""
# A consumer card under an old driver: most is not told, and the names are others.
BARE = """
<product_name>GeForce GTX 1080</product_name>
<persistence_mode>Disabled</persistence_mode>
<mig_mode><current_mig>N/A</current_mig></mig_mode>
<clocks_throttle_reasons>
  <clocks_throttle_reason_sw_power_cap>Active</clocks_throttle_reason_sw_power_cap>
</clocks_throttle_reasons>
<fb_memory_usage><used>984 MiB</used><free>7122 MiB</free></fb_memory_usage>
<compute_mode>Default</compute_mode>
<ecc_errors><volatile><double_bit><total>N/A</total></double_bit></volatile></ecc_errors>
<remapped_rows>[N/A]</remapped_rows>
<power_readings><power_limit>151.00 W</power_limit><default_power_limit>[Not Supported]</default_power_limit>
</power_readings>
<processes>
  <process_info><pid>812</pid><type>G</type><process_name>/usr/lib/xorg/Xorg</process_name>
  <used_memory>900 MiB</used_memory></process_info>
</processes>
"""


def smi(state: str, **answers: str) -> str:
    """nvidia-smi that tells this of its GPUs; `answers` are for `nvlink` and `topo`."""
    others = "".join(f"{word}) cat <<'END'\n{text}\nEND\n;;\n" for word, text in answers.items())
    devices = "\n".join(
        f"{index}, NVIDIA H200, 9.0, 580.65.06, 143771, Default"
        for index in range(max(1, state.count("<gpu ")))
    )
    return (
        f"case \"$1\" in\n-q) cat <<'END'\n{state}\nEND\n;;\n{others}"
        f"--query*) cat <<'END'\n{devices}\nEND\n;;\n"
        '*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |";; esac'
    )


STATE_CHECKS = ("gpu.health", "gpu.clocks", "gpu.modes", "gpu.processes")


@pytest.mark.parametrize("check", STATE_CHECKS)
@pytest.mark.parametrize("gpu", [SOUND, BARE])
def test_a_sound_gpu_passes_whatever_its_driver_can_tell(
    root: Root, programs: Programs, gpu: str, check: str
) -> None:
    programs(nvidia_smi=smi(log(gpu)), dmesg="echo '[1.0] Linux version 6.1'")
    assert run_one(check, root=root).verdict == "ok"


@pytest.mark.parametrize(
    ("check", "told", "instead", "verdict", "words"),
    [
        ("gpu.health", "remapped_row_failure>No", "remapped_row_failure>Yes", "failed", "reset or replaced"),
        ("gpu.health", "remapped_row_pending>No", "remapped_row_pending>Yes", "failed", "reset or replaced"),
        ("gpu.health", "pending_retirement>N/A", "pending_retirement>Yes", "failed", "reset or replaced"),
        ("gpu.health", "recovery_action>None", "recovery_action>Reset", "failed", "reset or replaced"),
        ("gpu.health", "<state>Completed", "<state>In Progress", "failed", "802"),
        ("gpu.health", "<dram_uncorrectable>0", "<dram_uncorrectable>3", "warning", "memory errors"),
        ("gpu.clocks", "slowdown>Not Active", "slowdown>Active", "warning", "heat"),
        ("gpu.clocks", "current_power_limit>700", "current_power_limit>300", "warning", "power limit"),
        ("gpu.modes", "current_mig>Disabled", "current_mig>Enabled", "warning", "MIG"),
        ("gpu.processes", "<used>1 MiB", "<used>90000 MiB", "warning", "in use already"),
    ],
)
def test_a_gpu_that_is_not_as_it_should_be_is_found(
    root: Root, programs: Programs, check: str, told: str, instead: str, verdict: str, words: str
) -> None:
    assert told in SOUND
    programs(nvidia_smi=smi(log(SOUND.replace(told, instead))))
    finding = run_one(check, root=root)
    assert finding.verdict == verdict
    assert words in finding.summary


def test_an_older_driver_asks_for_a_reset_in_its_own_words(root: Root, programs: Programs) -> None:
    asked = "<gpu_reset_status><reset_required>Yes</reset_required></gpu_reset_status>"
    programs(nvidia_smi=smi(log(BARE + asked)))
    finding = run_one("gpu.health", root=root)
    assert finding.verdict == "failed"
    assert "driver asks for Reset" in finding.evidence[0]


def test_another_process_is_named_with_what_it_holds(root: Root, programs: Programs) -> None:
    process = (
        "<process_info><pid>4711</pid><type>C</type><process_name>python</process_name>"
        "<used_memory>81000 MiB</used_memory></process_info>"
    )
    programs(nvidia_smi=smi(log(SOUND.replace("</processes>", process + "</processes>"))))
    finding = run_one("gpu.processes", root=root)
    assert finding.verdict == "warning"
    assert "GPU 0: process 4711 (python) holds 81000 MiB" in finding.evidence
    assert "-p 4711" in (finding.remedy or "")


XID = "[12.3] NVRM: Xid (PCI:0000:18:00): {}, pid=4711, name=python, some words"


@pytest.mark.parametrize(
    ("dmesg", "verdict", "words"),
    [
        (f"echo '{XID.format(79)}'", "warning", "it fell off the bus"),
        (f"echo '{XID.format(31)}'", "ok", "a fault of a program"),
        ("echo 'dmesg: read kernel buffer failed: Operation not permitted'; exit 1", "ok", "may not read it"),
    ],
)
def test_errors_of_the_gpu_itself_in_the_kernels_log_are_found(
    root: Root, programs: Programs, dmesg: str, verdict: str, words: str
) -> None:
    programs(nvidia_smi=smi(log(SOUND)), dmesg=dmesg)
    finding = run_one("gpu.health", root=root)
    assert finding.verdict == verdict
    assert words in finding.evidence[-1]


def test_a_driver_that_gives_no_account_of_the_state_is_a_failure(root: Root, programs: Programs) -> None:
    programs(nvidia_smi=nvidia_smi())
    assert run_one("gpu.health", root=root).verdict == "failed"


def nvlink(*active: int, of: int = 18) -> str:
    """What `nvidia-smi nvlink --status` prints of GPUs with so many active links."""
    lines = []
    for index, count in enumerate(active):
        lines.append(f"GPU {index}: NVIDIA H200 (UUID: GPU-{index})")
        lines += [f"\t Link {link}: {'26.562 GB/s' if link < count else '<inactive>'}" for link in range(of)]
    return "\n".join(lines)


P2P = " \tGPU0\tGPU1\t\n GPU0\tX\t{0}\t\n GPU1\t{0}\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok"


@pytest.mark.parametrize(
    ("links", "peers", "verdict", "words"),
    [
        (nvlink(18, 18), "OK", "ok", "2 GPUs are joined by NVLink"),
        # A board may have links that lead nowhere.
        (nvlink(12, 12), "OK", "ok", "2 GPUs are joined by NVLink"),
        (nvlink(18, 17), "OK", "failed", "GPU 1 has fewer active NVLinks"),
        (nvlink(18, 18), "NS", "warning", "can't read another GPU's memory"),
        ("", "OK", "ok", "over PCIe and read each other's memory"),
        (
            "NVML: Unable to retrieve NVLink information as all links are inActive",
            "CNS",
            "ok",
            "the host's memory",
        ),
    ],
)
def test_links_between_gpus(
    root: Root, programs: Programs, links: str, peers: str, verdict: str, words: str
) -> None:
    programs(nvidia_smi=smi(log(SOUND, count=2), nvlink=links, topo=P2P.format(peers)))
    finding = run_one("gpu.links", root=root)
    assert finding.verdict == verdict
    assert words in finding.summary


def test_one_gpu_has_no_links_to_look_at(root: Root, programs: Programs) -> None:
    programs(nvidia_smi=smi(log(SOUND)))
    assert run_one("gpu.links", root=root).summary == "There is one GPU here."
