"""A CUDA extension that behaves as real ones do: fixed architectures, several threads, a cautious flag."""

import os

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

architectures = [
    flag
    for number in ("75", "80", "90", "100")
    for flag in ("-gencode", f"arch=compute_{number},code=sm_{number}")
]
extension = CUDAExtension(
    name="tiny_cuda_ext",
    sources=["csrc/tiny.cpp", "csrc/tiny_kernel.cu", "csrc/tiny_scale.cu"],
    include_dirs=["csrc"],
    extra_compile_args={"cxx": ["-O1"], "nvcc": ["-O1", "--threads", "4", *architectures]},
)
# "Succeeds" without its extension, as mamba-ssm's setup.py does under its own variable.
skip = os.environ.get("TINY_CUDA_SKIP_BUILD") == "TRUE"

setup(
    name="tiny-cuda",
    version="1.0.0",
    py_modules=["tiny_cuda"],
    ext_modules=[] if skip else [extension],
    cmdclass={"build_ext": BuildExtension},
    install_requires=["torch"],
)
