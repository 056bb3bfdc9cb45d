from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.doctor import explain_log
from envbuilder.doctor.signatures import Signature, explain_text, signatures
from envbuilder.errors import InputError

SAMPLES = {
    "build-isolated": """\
  Getting requirements to build wheel did not run successfully.
        File "<string>", line 9, in <module>
      ModuleNotFoundError: No module named 'torch'
""",
    "nvcc-missing": """\
UserWarning: mamba_ssm was requested, but nvcc was not found.
NameError: name 'bare_metal_version' is not defined
""",
    "wheel-guess-offline": """\
Guessing wheel URL:  causal_conv1d-1.5.0+cu12torch2.5cxx11abiFALSE-cp312-cp312-linux_x86_64.whl
urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>
""",
    "wheel-guess-hangs": """\
running bdist_wheel
Guessing wheel URL:  mamba_ssm-2.2.4+cu12torch2.5cxx11abiFALSE-cp312-cp312-linux_x86_64.whl
""",
    "wheel-guess-missed": "Precompiled wheel not found. Building from source...\n",
    "cuda-mismatch": """\
RuntimeError:
The detected CUDA version (11.8) mismatches the version that was used to compile
PyTorch (12.1). Please make sure to use the same CUDA versions.
""",
    "host-compiler-too-new": """\
/usr/include/crt/host_config.h:132:2: error: unsupported GNU version! gcc versions later than 12 are not
""",
    "gpu-architecture-unknown": "nvcc fatal   : Unsupported gpu architecture 'compute_53'\n",
    "ptx-version": """\
ptxas /tmp/tmpxft_0001.ptx, line 9; fatal   : Unsupported .version 9.5; current version is '9.0'
""",
    "cuda-headers-missing": """\
ATen/cuda/CUDAContextLight.h:6:10: fatal error: cusparse.h: No such file or directory
""",
    "libcudart-link": "/usr/bin/ld: cannot find -lcudart: No such file or directory\n",
    "libcuda-link": "/usr/bin/ld: cannot find -lcuda: No such file or directory\n",
    "no-architecture-list": """\
    arch_list[-1] += '+PTX'
    ~~~~~~~~~^^^^
IndexError: list index out of range
""",
    "compiler-out-of-memory": "c++: fatal error: Killed signal terminated program cc1plus\n",
    "ninja-missing": """\
UserWarning: Attempted to use ninja as the BuildExtension backend but we could not find ninja..
""",
    "torch-abi": """\
ImportError: selective_scan_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEa
""",
    "torch-swapped": "Downloading torch-2.7.1-cp312-cp312-manylinux_2_28_x86_64.whl (821.2 MB)\n",
    "no-kernel-image": "RuntimeError: CUDA error: no kernel image is available for execution on the device\n",
    "glibc-too-old": "/lib64/libc.so.6: version `GLIBC_2.32' not found (required by flash_attn.so)\n",
    "libstdcxx-too-old": "libstdc++.so.6: version `GLIBCXX_3.4.29' not found (required by x.so)\n",
    "cuda-module-shadows": """\
ImportError: libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12
""",
    "pkg-resources": "ModuleNotFoundError: No module named 'pkg_resources'\n",
    "python-headers-missing": "/tmp/main.c:5:10: fatal error: Python.h: No such file or directory\n",
    "triton-cache": "OSError: [Errno 116] Stale file handle: '/home/u/.triton/cache/AB/kernel.json'\n",
    "noexec-tmp": "ImportError: /tmp/x/_C.so: failed to map segment from shared object\n",
    "disk-full": "Fatal error: can't write 64 bytes to section .text: 'No space left on device'\n",
    "driver-too-old": """\
RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver
""",
    "nccl-interface": "NCCL WARN Bootstrap : no socket interface found\n",
    "rank-out-of-memory": """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : -9 (pid: 4711)
""",
    "hub-offline": "huggingface_hub.errors.OfflineModeIsEnabled: offline mode is enabled.\n",
    "kernel-arguments": """\
TypeError: causal_conv1d_fwd(): incompatible function arguments. The following argument types are supported:
""",
    "torchrun-exit-18": "  exitcode  : 18 (pid: 4711)\n",
}


@pytest.mark.parametrize("signature", signatures(), ids=lambda signature: signature.id)
def test_a_signature_finds_its_failure_in_a_log(signature: Signature, tmp_path: Path) -> None:
    identity = signature.id
    log = tmp_path / "build.log"
    log.write_text(f"all is well\n{SAMPLES[identity]}", encoding="utf-8")
    first = explain_log(log)[0]
    assert first.check == f"log.{identity}"
    assert first.remedy
    assert first.evidence[0].startswith("line ")


def test_the_first_cause_is_named_before_its_consequences() -> None:
    text = "\n".join(
        [
            "[1/4] nvcc -c a.cu",
            SAMPLES["ninja-missing"],
            "/usr/bin/ld: cannot find -lcudart",
            "compiling on",
            SAMPLES["compiler-out-of-memory"],
            "error: command failed with exit code 1",
        ]
    )
    findings = explain_text(text)
    assert [finding.check for finding in findings] == [
        "log.libcudart-link",
        "log.compiler-out-of-memory",
        "log.ninja-missing",  # a build survives it, so it comes last although it is the first line
    ]
    assert findings[0].evidence[0] == "line 4: /usr/bin/ld: cannot find -lcudart"
    assert [finding.verdict for finding in findings] == ["failed", "failed", "warning"]


def test_an_unknown_failure_is_said_to_be_unknown_with_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    log.write_bytes(b"one\n\xff\xfe\n" + b"".join(b"line %d\n" % n for n in range(50)))
    (finding,) = explain_log(log)
    assert finding.check == "log.unknown"
    assert finding.evidence[-1] == "line 49"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Building wheels for collected packages: causal-conv1d\nSuccessfully built causal-conv1d\n",
        "step 8 loss 5.12\nOverkilled and killed nothing\nsaved adapter\n",
        "  exitcode  : -15 (pid: 9)\n  exitcode  : 180\n",
    ],
)
def test_a_clean_log_raises_no_alarm(text: str) -> None:
    assert explain_text(text) == ()


def test_a_log_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        explain_log(tmp_path / "none.log")
    assert "none.log" in caught.value.message
