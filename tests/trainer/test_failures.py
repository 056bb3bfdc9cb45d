"""Texts that CUDA, NCCL, gloo and the system really write → the sentence for it."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.failures import blames_another, explain

TEXTS = {
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported at "
    "some other API call, so the stacktrace below might be incorrect.": "hardware is at fault",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": "GPU is lost",
    "CUDA error: no CUDA-capable device is detected": "GPU is lost",
    "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the "
    "system to recover this GPU": "GPU is lost",
    "CUDA error: uncorrectable NVLink error detected during the execution": "GPU is lost",
    "CUDA error: an illegal memory access was encountered": "kernel broke off",
    "CUDA error: unspecified launch failure": "kernel broke off",
    "CUDA error: device-side assert triggered": "kernel broke off",
    "CUDA error: no kernel image is available for execution on the device": "not compiled for this GPU",
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.20 GiB is free.": "GPU's memory is full",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "GPU's memory is full",
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, remote process exited or "
    "there was a network error, NCCL version 2.20.5\nncclRemoteError: A call failed possibly due to a "
    "network error or a remote process exiting prematurely.": "Another process",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[127.0.0.1]:21520": "Another process",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for "
    "recv operation to complete": "Another process",
    "[Errno 28] No space left on device: 'x'": "disk, or your quota",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)": "host's memory",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_known_text_has_its_sentence_and_the_text_is_kept(text: str) -> None:
    error = explain(RuntimeError(text))
    assert TEXTS[text] in error.message
    assert text.splitlines()[0] in error.context["error"]
    assert blames_another(error) == ("Another process" in error.message)


def test_the_rest_is_told_as_it_is() -> None:
    error = explain(ValueError("shape '[2, 3]' is invalid\nmore"))
    assert error.message == "Training broke off: ValueError: shape '[2, 3]' is invalid"
    assert explain(ImportError("No module named 'x'")).exit_code == 7
    known = ConfigError("wrong", remedy="mend it")
    assert explain(known) is known
