"""A CUDA extension that is built without torch's help: nvcc by its name, by its path, and through a shell.

The architectures are an old package's: nvcc 13 refuses compute_53. It links with -lcudart and says not where.
"""

import os
import pathlib
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPTIONS = [
    "-c",
    "-arch=sm_75",
    "-gencode=arch=compute_53,code=sm_53",
    "--generate-code",
    "arch=compute_80,code=[sm_80,compute_80]",
    # With the quotes: so they stand in many a setup.py, and nvcc's own shell takes them away.
    "--compiler-options",
    "'-fPIC'",
]


class BuildByHand(build_ext):
    def build_extension(self, ext):
        module = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in self.compiler.include_dirs]
        subprocess.check_call(["nvcc", *OPTIONS, "by_name.cu"], cwd="csrc")
        path = pathlib.Path(os.environ["CUDA_HOME"], "bin", "nvcc")
        subprocess.check_call([path, *OPTIONS, "by_path.cu", "-o", "by_path.o"], cwd="csrc")
        words = [f'"{word}"' for word in OPTIONS]
        if os.system(" ".join(["cd csrc && nvcc", *words, *includes, "-x cu by_shell.cpp"])) != 0:
            raise SystemExit("nvcc failed")
        objects = ["by_name.o", "by_path.o", "by_shell.o"]
        subprocess.check_call(["g++", "-shared", *objects, "-lcudart", "-o", module], cwd="csrc")


setup(
    name="nvcc-by-hand",
    version="1.0.0",
    ext_modules=[Extension("nvcc_by_hand", [])],
    cmdclass={"build_ext": BuildByHand},
)
