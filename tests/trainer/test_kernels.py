"""Finding the kernels, in a fresh interpreter: what is imported there stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def broken_packages(tmp_path: Path) -> Path:
    for package in ("causal_conv1d", "mamba_ssm"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise ImportError('no symbol in {package}')\n")
    return tmp_path


def python(code: str, *search: Path) -> str:
    path = ":".join(map(str, (REPOSITORY, *search)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_swallowed_import_error_of_each_package_is_kept(broken_packages: Path) -> None:
    code = """
from trainer.kernels import find_mamba_kernels
found = find_mamba_kernels('cuda')
print(found.fused_scan, found.missing)
"""
    assert python(code, broken_packages) == (
        "None {'causal_conv1d': 'ImportError: no symbol in causal_conv1d', "
        "'mamba_ssm': 'ImportError: no symbol in mamba_ssm'}"
    )


def test_the_fused_scan_is_found_where_the_packages_are(tmp_path: Path) -> None:
    (tmp_path / "mamba_ssm/ops/triton").mkdir(parents=True)
    (tmp_path / "causal_conv1d.py").touch()
    (tmp_path / "mamba_ssm/ops/triton/ssd_combined.py").write_text("mamba_split_conv1d_scan_combined = len\n")
    code = "from trainer.kernels import *; print(find_mamba_kernels('cuda'))"
    assert python(code, tmp_path) == "MambaKernels(fused_scan=<built-in function len>, missing={})"


def test_on_a_cpu_installed_gpu_kernels_are_out_of_reach(tmp_path: Path) -> None:
    """transformers calls causal_conv1d wherever it can be imported, on CPU tensors too."""
    (tmp_path / "causal_conv1d.py").write_text(
        "def causal_conv1d_fn(*a, **k): raise RuntimeError('on a CPU')\n"
    )
    code = """
from trainer.kernels import find_mamba_kernels
print(find_mamba_kernels('cpu').missing)
try:
    import causal_conv1d
except ImportError:
    print('hidden')
"""
    assert python(code, tmp_path) == "{}\nhidden"
